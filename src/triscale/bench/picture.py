"""The picture of a benchmark: peak memory and time per sample against the batch, one line a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from triscale.bench.measure import MIB
from triscale.bench.table import Report, Row
from triscale.errors import UsageError

WIDTH_INCHES, ROW_INCHES, FOOT_INCHES, DOTS_PER_INCH = 10.5, 3.7, 0.55, 160
PAPER, INK, MUTED, GRID = "#ffffff", "#1f2933", "#6b7785", "#e4e8ec"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d3b")
"""Of Okabe and Ito, apart for colour-blind eyes too."""
MANY = 3e3
"""From this ratio of largest to smallest on, only powers of ten are ticks."""
MARKERS = "osD^vPX"


def draw(path: str, report: Report, titles: dict[str, str]) -> None:
    """Draw a PNG with two panels for each loss or kind of towers.

    Args:
        titles: of a task, by its name; a task without one is titled by its name.

    Raises:
        UsageError: the file cannot be written.
    """
    tasks = list(dict.fromkeys(row.task for row in report.rows))
    styles = {name: place for place, name in enumerate(dict.fromkeys(row.method for row in report.rows))}
    height = ROW_INCHES * len(tasks) + FOOT_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), facecolor=PAPER, dpi=DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    for (memory, time), task in zip(axes, tasks, strict=True):
        rows = [row for row in report.rows if row.task == task]
        with_memory = [row for row in rows if row.peak_bytes is not None]
        title = titles.get(task, task)
        _panel(memory, f"{title}: peak memory", "MiB", with_memory, lambda row: (row.peak_bytes or 0) / MIB, styles)
        _panel(time, f"{title}: time", "ms per sample", rows, lambda row: 1000 * row.seconds.median / row.batch, styles)
        time.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, labelcolor=INK)
    figure.text(0.012, 0.12 / height, report.machine.line(), fontsize=8, color=MUTED, va="bottom")
    figure.tight_layout(rect=(0, 0.32 / height, 1, 1), w_pad=2.5, h_pad=2.0)
    try:
        figure.savefig(path, format="png", facecolor=PAPER)
    except OSError as error:
        raise UsageError(f"--picture {path!r} cannot be written: {error.strerror}") from error


def _panel(
    axes: Axes, title: str, unit: str, rows: Sequence[Row], value: Callable[[Row], float], styles: dict[str, int]
) -> None:
    """One panel, both axes logarithmic; batches are ticks."""
    for method, place in styles.items():
        points = [(row.batch, value(row)) for row in rows if row.method == method and value(row) > 0]
        if points:
            batches, values = zip(*sorted(points), strict=True)
            axes.plot(
                batches,
                values,
                label=method,
                color=COLOURS[place % len(COLOURS)],
                marker=MARKERS[place % len(MARKERS)],
                linestyle="-" if place < len(COLOURS) else "--",
                linewidth=1.8,
                markersize=5.5,
                clip_on=False,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({row.batch for row in rows})
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < MANY * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel("B, samples in the contrastive batch", fontsize=9, color=INK)
    axes.set_ylabel(unit, fontsize=9, color=INK)
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
