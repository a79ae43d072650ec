"""What a benchmark found, as JSON values and as a table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from triscale.bench.measure import MIB, Machine, Spread


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one batch."""

    task: str
    """The loss, or the towers."""
    method: str
    batch: int
    seconds: Spread
    samples_per_second: float
    time_over_ours: float | None
    """Median over the rounds of this method's time over that of ours in the same round."""
    peak_bytes: int | None
    floor_flops: float
    """The method's least arithmetic."""
    floor_share: float
    """Time of that arithmetic at the machine's product rate, as a fraction of the measured time."""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What was not measured, and why."""

    task: str
    method: str
    batch: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that a benchmark found."""

    command: str
    machine: Machine
    reuse_buffers: bool
    """Whether the C library was told to keep freed memory, in every process."""
    product_flops: float
    """FLOPs of the large matrix product whose rate is the machine's."""
    product_seconds: Spread
    """Its duration, over all rounds."""
    peers: dict[str, str]
    """Version of every peer that took part."""
    rows: list[Row]
    left_out: list[LeftOut]

    def values(self) -> dict[str, Any]:
        """As JSON values; seconds and bytes."""
        return asdict(self)


def make_row(
    task: str,
    method: str,
    batch: int,
    seconds: Mapping[str, Sequence[float]],
    *,
    ours: str,
    product: tuple[Sequence[float], float],
    floor_flops: float,
    peak_bytes: int | None,
    details: dict[str, Any],
) -> Row:
    """The row of one method.

    Args:
        seconds: by method, the seconds of every round.
        ours: name of the method that others are compared with, if it is among them.
        product: the matrix product's seconds in the same rounds, and its FLOPs.
    """
    mine = seconds[method]
    spread = Spread.of(mine)
    ratios = [a / b for a, b in zip(mine, seconds[ours], strict=True)] if ours in seconds else []
    flops_per_second = product[1] / statistics.median(product[0])
    return Row(
        task=task,
        method=method,
        batch=batch,
        seconds=spread,
        samples_per_second=batch / spread.median,
        time_over_ours=statistics.median(ratios) if ratios else None,
        peak_bytes=peak_bytes,
        floor_flops=floor_flops,
        floor_share=floor_flops / flops_per_second / spread.median,
        details=details,
    )


def _duration(seconds: Spread) -> str:
    """Milliseconds with three digits: median, and smallest to largest."""
    values = [1000 * s for s in (seconds.median, seconds.smallest, seconds.largest)]
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2
    median, smallest, largest = (f"{value:,.{digits}f}" for value in values)
    return f"{median} ({smallest} to {largest})"


def make_table(rows: Sequence[Row], *, task: str, ours: str, details: Mapping[str, str]) -> Table:
    """The table of a report's rows.

    Args:
        task: heading of the column of losses or towers.
        ours: the method that others are compared with.
        details: entries of `Row.details` to show, with their headings; numbers are shown as errors, None as a dash.
    """
    tasks = {row.task for row in rows}
    title = None if len(tasks) > 1 else Text(f"{task}: {', '.join(tasks)}")
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in (*([task] * (title is None)), "method"):
        table.add_column(heading, no_wrap=True)
    for heading in ("B", "ms (min to max)", "samples/s", f"time / {ours}", "peak MiB", "of floor", *details.values()):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and (row.task, row.batch) != previous:
            table.add_section()
        previous = (row.task, row.batch)
        cells = [
            *([row.task] * (title is None)),
            row.method,
            f"{row.batch:,}",
            _duration(row.seconds),
            f"{row.samples_per_second:,.0f}",
            "-" if row.time_over_ours is None else f"{row.time_over_ours:.2f}",
            "-" if row.peak_bytes is None else f"{row.peak_bytes / MIB:,.1f}",
            f"{row.floor_share:.0%}",
            *(_detail(row.details.get(name)) for name in details),
        ]
        table.add_row(*map(Text, cells))
    return table


def _detail(value: object) -> str:
    return "-" if value is None else f"{value:.1e}" if isinstance(value, float) else str(value)


def notes(report: Report) -> list[str]:
    """What stands below the table: machine, product rate, versions of peers, what was left out."""
    seconds = report.product_seconds
    rate, slowest, fastest = (
        report.product_flops / s / 1e9 for s in (seconds.median, seconds.largest, seconds.smallest)
    )
    lines = [
        report.machine.line(),
        f"freed memory is {'kept for reuse' if report.reuse_buffers else 'given back as the C library does'}, "
        "for all methods alike",
        f"large matrix product in the same rounds: {rate:,.0f} GFLOP/s ({slowest:,.0f} to {fastest:,.0f})",
    ]
    if report.peers:
        lines.append("peers: " + ", ".join(f"{name} {version}" for name, version in report.peers.items()))
    lines += [f"left out: {out.task}, {out.method}, B={out.batch:,}: {out.reason}" for out in report.left_out]
    return lines
