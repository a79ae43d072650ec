"""How the benchmarks measure: calls timed in turns, peak memory in fresh processes, the machine's own product rate.

Time: all methods take turns within one process, each round beginning with another one, so that a slow minute of the
machine meets them all; median, smallest and largest are kept, and ratios are medians over the rounds' own ratios.
Memory: each method runs once in a process of its own, after a small call that loads what is loaded lazily; what counts
is the peak during the call above the size just before it. So inputs are left out, gradients are not.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from triscale.errors import RunError, UsageError
from triscale.training.host_memory import reuse_large_buffers

MIB = 2**20
PRODUCT_SIDE = {"cpu": 2048}
PRODUCT_SIDE_ELSEWHERE = 8192
"""Side of the square matrices whose product gives the machine's rate; larger ones are no faster."""
DEVICES = ("cpu", "cuda", "mps")
STATUS = Path("/proc/self/status")


class MethodFailed(RunError):
    """A method could not be measured: why, in one line."""


@dataclass(frozen=True)
class Spread:
    """Seconds of the same call in several rounds."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarise one or more durations."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Call:
    """Something to measure: `run` is timed; `before`, which clears what the last call left, and `after` are not."""

    run: Callable[[], Any]
    before: Callable[[], Any] = _nothing
    after: Callable[[], Any] = _nothing


def set_up(threads: int, reuse_buffers: bool) -> None:
    """Make this process like every process of a benchmark, before anything is measured, ours or peers'.

    Args:
        threads: on the CPU; 0: as many as torch takes by itself.
        reuse_buffers: whether the C library keeps freed memory, as in training.
    """
    if threads > 0:
        torch.set_num_threads(threads)
    if reuse_buffers:
        reuse_large_buffers()


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(call: Call, device: torch.device) -> float:
    """Duration of one call, until the device has finished it; on CUDA by the device's own events."""
    call.before()
    gc.collect()
    synchronise(device)
    seconds = _cuda_seconds(call.run, device) if device.type == "cuda" else _host_seconds(call.run, device)
    call.after()
    return seconds


def _host_seconds(run: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def _cuda_seconds(run: Callable[[], Any], device: torch.device) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    run()
    ended.record()
    torch.cuda.synchronize(device)
    return began.elapsed_time(ended) / 1000


def time_in_turns(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call, once a round; round r begins with call r, so that none is always the first."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(r + i) % len(names)]
            seconds[name].append(seconds_of(calls[name], device))
    return seconds


def product(dtype: torch.dtype, device: torch.device, side: int = 0) -> tuple[Call, float]:
    """A large square matrix product to be timed beside the methods, and its FLOPs; side 0: what fits the device."""
    side = side or PRODUCT_SIDE.get(device.type, PRODUCT_SIDE_ELSEWHERE)
    generator = torch.Generator(device).manual_seed(0)  # not constant: devices save power on equal numbers
    a, b = (torch.randn(side, side, dtype=dtype, device=device, generator=generator) for _ in range(2))
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, b, out=out)

    run()  # once untimed
    return Call(run=run), 2.0 * side**3


def status_bytes(field: str) -> int:
    """A size of this process as Linux counts it: VmRSS, resident now; VmHWM, its largest since the last reset."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Largest memory during one call above that just before it; None where the system does not tell.

    On CUDA what tensors occupy; on the CPU, on Linux, what the process has resident. What it has freed so far is given
    back first, so that the call does not find it.
    """
    call.before()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call.run()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not STATUS.exists():
        return None
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:  # not allowed in some containers
        return None
    before = status_bytes("VmRSS")
    call.run()
    return status_bytes("VmHWM") - before


def in_fresh_process(job: Mapping[str, Any]) -> int | None:
    """Peak memory in bytes of the call that a job describes, measured by `triscale.bench.once`.

    Raises:
        MethodFailed: the process failed, or was killed.
    """
    command = [sys.executable, "-m", "triscale.bench.once", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0:
        raise MethodFailed(f"its process was killed by signal {-done.returncode} (9: out of memory)")
    if done.returncode > 0:
        raise MethodFailed((done.stderr.strip().splitlines() or ["its process failed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def usable_device(name: str) -> torch.device:
    """The device of that name; UsageError where it cannot be used here."""
    try:
        device = torch.device(name)
        if device.type not in DEVICES:
            raise RuntimeError(f"there are {', '.join(DEVICES)}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--device {name!r} cannot be used here: {reason}") from error
    return device


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and when figures were measured; no names of hosts or users."""

    processor: str
    accelerator: str | None
    threads: int
    system: str
    python: str
    torch: str
    date: str

    def line(self) -> str:
        """All of it as one line."""
        where = self.accelerator or f"{self.processor}, {self.threads} thread{'s' * (self.threads != 1)}"
        return f"{where}; {self.system}, Python {self.python}, PyTorch {self.torch}; {self.date}"


def this_machine(device: torch.device) -> Machine:
    """The machine that runs this process."""
    return Machine(
        processor=_processor(),
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        date=date.today().isoformat(),
    )


def _processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
