"""What a section is made of: cases with an estimate of their time, and contestants that are timed in turns.

A case that fails, or a contestant that runs out of memory, is a line in the result and never the end of the program.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.table import Table

from triscale.bench import measure
from triscale.bench.measure import Call
from triscale.bench.table import LeftOut, Row, make_row
from triscale.training.memory import is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all sections share."""

    device: torch.device
    toy: bool
    """Whether everything runs at sizes that a CPU does in seconds."""
    peers: Mapping[str, str]
    """Version of every peer that can be imported here."""
    product: Call
    """A large product in bfloat16, whose rate is the device's."""
    product_flops: float

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA card."""
        return self.device.type == "cuda"


@dataclass
class Found:
    """What a case gave."""

    rows: list[Any] = field(default_factory=list)
    """Dataclasses of the section's own kind."""
    left_out: list[LeftOut] = field(default_factory=list)
    product_seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Tracebacks of what failed otherwise than for want of memory."""

    def add(self, other: Found) -> None:
        """Append what another case gave."""
        self.rows += other.rows
        self.left_out += other.left_out
        self.product_seconds += other.product_seconds
        self.errors += other.errors


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure, with its own place in the order and in the time."""

    name: str
    importance: int
    """1: a figure that must be there; 2: what it is compared with; 3: the rest."""
    estimate_seconds: float
    """On an H100, kernels compiled anew."""
    run: Callable[[], Found]


def no_lines(rows: Sequence[Any]) -> list[str]:
    """Of a section whose table says all."""
    return []


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cases of one kind, and how their rows are shown."""

    cases: Callable[[Bench], list[Case]]
    table: Callable[[list[Any]], Table]
    lines: Callable[[list[Any]], list[str]] = no_lines
    """What all rows say together, for the end."""


@dataclass(frozen=True)
class Failure:
    """Why something could not be had."""

    reason: str
    error: str
    """The traceback; "" where memory ran out, which is a result."""


def attempt(do: Callable[[], T]) -> T | Failure:
    """The result of `do`, or why there is none; what the failed call held is freed."""
    try:
        return do()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if is_out_of_memory(error):
            failure = Failure(f"out of memory: {lines[0][:120]}", "")
        else:
            failure = Failure(f"failed: {type(error).__name__}: {lines[0][:160]}", traceback.format_exc())
        traceback.clear_frames(error.__traceback__)
    free_memory()
    return failure


def free_memory() -> None:
    """Give back what nothing holds any more, the allocator's cache included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to do the work of a heat."""

    name: str
    prepare: Callable[[], Call]
    floor_flops: Callable[[], float]
    """Its least arithmetic, once it has run."""
    details: Callable[[], dict[str, Any]] = dict
    """What else belongs into its row, once it has run."""


@dataclass(frozen=True)
class Peak:
    """Memory of one call in bytes."""

    allocated: int | None
    """By tensors, above what was there before."""
    reserved: int | None
    """Taken from the card by this process in all; None elsewhere than on CUDA."""


def peak_of(call: Call, bench: Bench) -> Peak:
    """Memory of one call, the allocator's cache emptied before."""
    free_memory()
    allocated = measure.peak_bytes(call, bench.device)
    reserved = torch.cuda.max_memory_reserved(bench.device) if bench.cuda else None
    call.after()
    return Peak(allocated, reserved)


def _prepared(contestant: Contestant, bench: Bench, warm_up: bool) -> tuple[Call, Peak]:
    call = contestant.prepare()
    if warm_up:
        measure.seconds_of(call, bench.device)
    return call, peak_of(call, bench)


def heat(
    bench: Bench,
    task: str,
    batch: int,
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    ours: str = "",
    warm_up: bool = True,
) -> Found:
    """Every contestant's memory, then their times in turns beside the large product.

    The calls before the timed ones are at full size, so that what does not fit is known by then.

    Args:
        ours: the contestant that others are compared with; none is if it fails.
        warm_up: whether a call precedes that in which memory is measured; needed where something is compiled.
    """
    found = Found()
    calls: dict[str, Call] = {}
    peaks: dict[str, Peak] = {}
    for contestant in contestants:
        outcome = attempt(lambda contestant=contestant: _prepared(contestant, bench, warm_up))
        if isinstance(outcome, Failure):
            leave_out(found, task, contestant.name, batch, outcome)
        else:
            calls[contestant.name], peaks[contestant.name] = outcome
    seconds = attempt(lambda: measure.time_in_turns({**calls, "product": bench.product}, rounds, bench.device))
    if isinstance(seconds, Failure):
        leave_out(found, task, " and ".join(calls), batch, seconds)
        return found
    _add_rows(found, bench, task, batch, contestants, peaks, seconds, ours)
    return found


def once(bench: Bench, task: str, batch: int, contestant: Contestant) -> Found:
    """Memory and time of a single call, for what takes too long to be repeated; to be warmed up at a smaller size."""
    found = Found()
    seconds: list[float] = []

    def timed() -> Peak:
        call = contestant.prepare()
        inner = Call(run=lambda: seconds.append(measure.seconds_of(call, bench.device)))
        return peak_of(inner, bench)

    peak = attempt(timed)
    if isinstance(peak, Failure):
        leave_out(found, task, contestant.name, batch, peak)
        return found
    measure.seconds_of(bench.product, bench.device)
    both = {contestant.name: seconds, "product": [measure.seconds_of(bench.product, bench.device)]}
    _add_rows(found, bench, task, batch, [contestant], {contestant.name: peak}, both, contestant.name)
    return found


def leave_out(found: Found, task: str, method: str, batch: int, failure: Failure) -> None:
    """Write down what could not be had."""
    found.left_out.append(LeftOut(task=task, method=method, batch=batch, reason=failure.reason))
    if failure.error:
        found.errors.append(failure.error)


def _add_rows(
    found: Found,
    bench: Bench,
    task: str,
    batch: int,
    contestants: Sequence[Contestant],
    peaks: Mapping[str, Peak],
    seconds: Mapping[str, Sequence[float]],
    ours: str,
) -> None:
    """A row of every contestant that was timed."""
    found.product_seconds += seconds["product"]
    for contestant in contestants:
        if contestant.name not in seconds:
            continue
        peak = peaks[contestant.name]
        row: Row = make_row(
            task,
            contestant.name,
            batch,
            seconds,
            ours=ours,
            product=(seconds["product"], bench.product_flops),
            floor_flops=contestant.floor_flops(),
            peak_bytes=peak.allocated,
            details={
                "seconds": list(seconds[contestant.name]),
                "reserved_bytes": peak.reserved,
                "card_bytes": torch.cuda.mem_get_info(bench.device)[1] if bench.cuda else None,
                **contestant.details(),
            },
        )
        found.rows.append(row)
