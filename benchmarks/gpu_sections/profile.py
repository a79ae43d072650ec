"""Where the time of one step goes, by kind of kernel: from a trace of torch's profiler, whatever the kernels' order.

A kernel belongs to the loss or to the optimizer if it was launched while that was at work; otherwise its name decides.
Idle is the time of the step in which the device ran nothing. On the CPU, operators that call no other stand for
kernels.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from gpu_sections.cases import Bench, Case, Failure, Found, Section, attempt, leave_out
from gpu_sections.step import Ours
from gpu_sections.workload import Sizes, own_towers, sizes_of
from triscale.bench import measure
from triscale.losses import InfoNCE, launch

STEP, LOSS, ALL = "step", "loss", "all"
PRODUCTS, ELSE, COPIES, IDLE = "matrix products", "elementwise, norms, reductions", "copies", "idle"
OPTIMIZER = "Optimizer.step"
"""torch itself names the range of an optimizer's step so."""
KINDS = (
    ("attention", re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE)),
    (
        PRODUCTS,
        re.compile(r"gemm|nvjet|cutlass|xmma|cublas|split_?k|conv|::(add)?mm\b|::bmm\b", re.IGNORECASE),
    ),
)
"""Of a tower's kernels, by their names; the first that matches. What matches none is elementwise or a reduction."""
COPY_CATEGORIES = ("gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
LONGEST_NAME = 90
LISTED_KERNELS = 8


class Kernel(NamedTuple):
    """A piece of work on the device, in microseconds."""

    name: str
    kind: str
    start: float
    stop: float


@dataclass(frozen=True, kw_only=True)
class ProfileRow:
    """Time of one kind of kernels, or of one kernel."""

    task: str
    kind: str
    seconds: float
    share: float
    """Of the whole, idle time included."""
    count: int
    floor_share: float | None = None
    """Time of the least arithmetic at the rate of a large product, as a share of this one's."""


def _ranges(events: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Start and end of every range on the host whose name begins so."""
    chosen = (e for e in events if e.get("cat") == "user_annotation" and str(e["name"]).startswith(name))
    return [(e["ts"], e["ts"] + e["dur"]) for e in chosen]


def _launches(events: list[dict[str, Any]], ranges: list[tuple[float, float]]) -> set[int]:
    """Numbers of what was launched within a range."""
    return {
        e["args"]["correlation"]
        for e in events
        if e.get("cat") in LAUNCH_CATEGORIES and any(start <= e["ts"] <= stop for start, stop in ranges)
    }


def kernels(events: list[dict[str, Any]]) -> list[Kernel]:
    """All work on the device with its kind, by its start."""
    special = {LOSS: _launches(events, _ranges(events, LOSS))}
    special["optimizer"] = _launches(events, _ranges(events, OPTIMIZER))
    found = []
    for e in events:
        if e.get("cat") not in ("kernel", *COPY_CATEGORIES):
            continue
        number = e.get("args", {}).get("correlation")
        owner = next((kind for kind, numbers in special.items() if number in numbers), None)
        kind = COPIES if e["cat"] in COPY_CATEGORIES else owner or _kind_of(e["name"])
        found.append(Kernel(e["name"], kind, e["ts"], e["ts"] + e["dur"]))
    return sorted(found or _leaf_operators(events), key=lambda kernel: kernel.start)


def _kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), ELSE)


def _leaf_operators(events: list[dict[str, Any]]) -> Iterable[Kernel]:
    """The host's operators that call no other."""
    owners = {kind: _ranges(events, name) for kind, name in ((LOSS, LOSS), ("optimizer", OPTIMIZER))}
    by_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for e in events:
        if e.get("cat") == "cpu_op":
            by_thread[e["tid"]].append(e)
    for operators in by_thread.values():
        operators.sort(key=lambda e: (e["ts"], -e["dur"]))
        for e, following in zip(operators, [*operators[1:], None], strict=True):
            stop = e["ts"] + e["dur"]
            if following is None or following["ts"] >= stop:
                owner = next((k for k, rs in owners.items() if any(a <= e["ts"] <= b for a, b in rs)), None)
                yield Kernel(e["name"], owner or _kind_of(e["name"]), e["ts"], stop)


def busy_microseconds(work: Iterable[Kernel]) -> float:
    """Time in which at least one was at work; given by their start."""
    total, end = 0.0, float("-inf")
    for kernel in work:
        total += max(0.0, kernel.stop - max(kernel.start, end))
        end = max(end, kernel.stop)
    return total


def summary(events: list[dict[str, Any]], task: str, floors: dict[str, float]) -> list[ProfileRow]:
    """Rows by kind, largest first, and idle time last.

    Args:
        floors: seconds of the least arithmetic of a kind.
    """
    work = kernels(events)
    (start, stop), *_ = _ranges(events, STEP)
    whole = max([stop, *(kernel.stop for kernel in work)]) - start
    by_kind: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for kernel in work:
        by_kind[kernel.kind] += kernel.stop - kernel.start  # type: ignore[assignment]
        counts[kernel.kind] += 1
    rows = [_row(task, kind, us, whole, counts[kind], floors.get(kind)) for kind, us in by_kind.most_common()]
    idle = whole - busy_microseconds(work)
    return [
        *rows,
        _row(task, IDLE, idle, whole, 0, None),
        _row(task, ALL, whole, whole, len(work), floors.get(ALL)),
    ]


def _row(task: str, kind: str, microseconds: float, whole: float, count: int, floor: float | None) -> ProfileRow:
    seconds = microseconds / 1e6
    return ProfileRow(
        task=task,
        kind=kind,
        seconds=seconds,
        share=microseconds / whole,
        count=count,
        floor_share=None if floor is None or not seconds else floor / seconds,
    )


def longest(events: list[dict[str, Any]], task: str) -> list[ProfileRow]:
    """The kernels that took longest in all, by name."""
    work = kernels(events)
    whole = busy_microseconds(work)
    by_name: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for kernel in work:
        by_name[kernel.name] += kernel.stop - kernel.start  # type: ignore[assignment]
        counts[kernel.name] += 1
    return [
        _row(task, name[:LONGEST_NAME], us, whole, counts[name], None)
        for name, us in by_name.most_common(LISTED_KERNELS)
    ]


def trace(run: Callable[[], Any], device: torch.device) -> list[dict[str, Any]]:
    """Events of one call, as torch's profiler exports them."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled, record_function(STEP):
        run()
        measure.synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _annotated(loss: nn.Module) -> None:
    """Make the loss's forward pass, which makes its gradients, too, a range of the trace."""
    open_range = ExitStack()
    loss.register_forward_pre_hook(lambda *_: open_range.enter_context(record_function(LOSS)) and None)
    loss.register_forward_hook(lambda *_: open_range.close())


def _profiled_step(bench: Bench, sizes: Sizes) -> Found:
    """One step with keep=0, AdamW included."""
    of = own_towers(bench, sizes)
    ours = Ours(of, sizes.profiled, sizes.micro_batch, keep=0, bench=bench)
    _annotated(ours.loss)
    optimizer = torch.optim.AdamW(ours.parameters, lr=0.0, fused=bench.cuda)

    def run() -> None:
        ours.run()
        optimizer.step()

    ours.clear()
    run()  # loads what is loaded lazily
    ours.clear()
    events = attempt(lambda: trace(run, bench.device))
    found, task = Found(), f"step, B={sizes.profiled:,}"
    if isinstance(events, Failure):
        leave_out(found, task, "profile", sizes.profiled, events)
        return found
    floor = of.flops(4, sizes.profiled) * _seconds_per_flop(bench)
    found.rows += summary(events, task, {PRODUCTS: floor, ALL: floor})
    found.rows += longest(events, f"{task}: longest")
    return found


def _seconds_per_flop(bench: Bench) -> float:
    return measure.seconds_of(bench.product, bench.device) / bench.product_flops


def _profiled_loss(bench: Bench, sizes: Sizes) -> Found:
    """InfoNCE alone at the largest batch, by both forms."""
    found = Found()
    for form in launch.FORMS:
        task = f"InfoNCE, B={sizes.batch:,}, {form}"
        events = attempt(lambda form=form: _trace_of_loss(form, bench, sizes))
        if isinstance(events, Failure):
            leave_out(found, task, "profile", sizes.batch, events)
        else:
            found.rows += longest(events, task)
    return found


def _trace_of_loss(form: launch.Form, bench: Bench, sizes: Sizes) -> list[dict[str, Any]]:
    loss = InfoNCE(products="bf16").to(bench.device)
    rows = [torch.randn(sizes.batch, sizes.loss_width, device=bench.device).requires_grad_() for _ in range(2)]

    def run() -> None:
        with launch.using(form):
            loss(*rows).backward()

    run()
    return trace(run, bench.device)


def cases(bench: Bench) -> list[Case]:
    """A step, and the loss at the largest batch."""
    sizes = sizes_of(bench)
    return [
        Case(
            name=f"profile of a step, B={sizes.profiled:,}",
            importance=1,
            estimate_seconds=35,
            run=partial(_profiled_step, bench, sizes),
        ),
        Case(
            name=f"profile of InfoNCE, B={sizes.batch:,}",
            importance=2,
            estimate_seconds=15,
            run=partial(_profiled_loss, bench, sizes),
        ),
    ]


def table(rows: list[ProfileRow]) -> Table:
    """Milliseconds and shares."""
    made = Table(box=box.SIMPLE_HEAD)
    for heading in ("profile of", "kernels"):
        made.add_column(heading, no_wrap=True)
    for heading in ("ms", "share", "count", "of floor"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        floor = "-" if row.floor_share is None else f"{row.floor_share:.0%}"
        cells = [row.task, row.kind, f"{1000 * row.seconds:,.2f}", f"{row.share:.1%}", f"{row.count:,}", floor]
        made.add_row(*map(Text, cells))
    return made


PROFILE = Section(cases=cases, table=table)
