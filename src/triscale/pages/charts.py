"""Charts as SVG that fills the width it is given: lines and histograms, with their marks labelled directly.

All draw in units that are pixels of a chart `width` wide; colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from triscale.pages.axes import (
    Scale,
    extent,
    fitted,
    linear_ticks,
    log_ticks,
    spread,
    text_width,
    tick_texts,
    widened,
)
from triscale.pages.html import Element, Node, element, number, plain
from triscale.pages.style import SERIES

TEXT = 11
"""Size of letters, as in the style sheet."""
LONGEST_LABEL = 22
"""Characters of a name in a description."""
WIDEST_LABEL = 110
"""Pixels of a name at the end of a line."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line: as many y as x; y that is not finite is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    """With `high`, a band around the line, as long as it; none: no band."""
    high: Sequence[float] = ()
    dots: bool = False
    """Whether each point is marked, as where they are few."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The place where marks go, between axes."""

    x: Scale
    y: Scale
    parts: tuple[Element, ...]
    """The axes, their ticks and grid lines."""


def frame(
    x: tuple[float, float],
    y: tuple[float, float],
    *,
    width: float,
    height: float,
    x_label: str = "",
    right: float = 8,
    log_y: bool = False,
    percent_x: bool = False,
    percent_y: bool = False,
) -> Frame:
    """Axes with ticks over given ranges.

    Args:
        right: room that labels at the lines' ends take.
    """
    y_ticks = log_ticks(*y) if log_y else linear_ticks(*y, count=5)
    y_texts = tick_texts(y_ticks, percent=percent_y)
    left = max((text_width(text, TEXT) for text in y_texts), default=0) + 8
    bottom = height - (34 if x_label else 20)
    across = Scale(low=x[0], high=x[1], start=left, end=width - right)
    up = Scale(low=y[0], high=y[1], start=bottom, end=9, log=log_y)
    x_ticks = linear_ticks(*x, count=max(2, int((width - left - right) / 62)))
    parts: list[Element] = []
    for tick, text in zip(y_ticks, y_texts, strict=True):
        parts.append(element("line", class_="grid", x1=left, x2=width - right, y1=up(tick), y2=up(tick)))
        parts.append(label(left - 6, up(tick) + 3.8, text, anchor="end"))
    parts.append(element("line", class_="axis", x1=left, x2=width - right, y1=bottom, y2=bottom))
    for tick, text in zip(x_ticks, tick_texts(x_ticks, percent=percent_x), strict=True):
        parts.append(label(across(tick), bottom + 15, text, anchor="middle"))
    if x_label:
        parts.append(label((left + width - right) / 2, height - 4, x_label, anchor="middle"))
    return Frame(x=across, y=up, parts=tuple(parts))


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "step",
    log_y: bool = False,
    percent: bool = False,
    zero: bool = False,
    reference: tuple[float, str] | None = None,
    width: float = 400,
    height: float = 215,
) -> Element:
    """Lines over a common axis; with more than one, each has its name at its end.

    Args:
        title: what the chart shows, for those who do not see it.
        log_y: a logarithmic axis; values up to zero are gaps.
        percent: y are fractions of 1.
        zero: the axis begins at zero.
        reference: a value of y with its name, drawn as a dashed line.
    """
    shown = [_drawable(each, log_y) for each in series]
    values = [v for each in shown for v in (*each.y, *each.low, *each.high)]
    marked = [reference[0]] if reference else []
    y = extent([*values, *marked], log=log_y, zero=zero)
    y = y if log_y else widened(*y)
    names = len(shown) > 1
    right = 8 + max((text_width(_end_name(s), TEXT) for s in shown), default=0) if names else 10
    x = extent((value for each in shown for value in each.x), zero=True)
    axes = frame(x, y, width=width, height=height, x_label=x_label, right=right, log_y=log_y, percent_y=percent)
    marks: list[Element] = []
    if reference:
        at = axes.y(reference[0])
        marks.append(element("line", class_="rule", x1=axes.x.start, x2=axes.x.end, y1=at, y2=at))
        marks.append(label(axes.x.end, at - 4, reference[1], anchor="end"))
    for place, each in enumerate(shown):
        marks.append(element("g", *_line(each, axes), class_=colour(place)))
    if names:
        marks += _end_labels(shown, axes)
    return svg(width, height, title, _describe(series), *axes.parts, *marks)


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    x_label: str,
    mark: float | None = None,
    width: float = 400,
    height: float = 180,
) -> Element:
    """Counts of values between neighbouring edges.

    Args:
        edges: ascending, one more than counts.
        mark: a value that is marked by a dashed line.
    """
    top = widened(0, max([*counts, 1]))
    axes = frame((edges[0], edges[-1]), top, width=width, height=height, x_label=x_label)
    bars = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        left, right, up = axes.x(low), axes.x(high), axes.y(count)
        gap = min(1.0, (right - left) * 0.15)
        tip = element("title", f"{low:,.4g} to {high:,.4g}: {count:,}")
        bars.append(
            element("rect", tip, class_="bar", x=left, y=up, width=right - left - gap, height=axes.y.start - up)
        )
    lines = []
    if mark is not None:
        lines.append(element("line", class_="rule", x1=axes.x(mark), x2=axes.x(mark), y1=9, y2=axes.y.start))
    text = f"{sum(counts):,} values from {edges[0]:,.4g} to {edges[-1]:,.4g}"
    return svg(width, height, title, text, *axes.parts, element("g", *bars, class_="c1"), *lines)


def figure(title: str, chart: Element, *more: Node, note: str = "") -> Element:
    """A chart with its title above it, and what explains it."""
    return element("figure", element("figcaption", element("strong", title), note), chart, *more)


def svg(width: float, height: float, title: str, description: str, *parts: Node) -> Element:
    """A picture that fills its place, read out as its title and description."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *parts,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        aria_label=plain(f"{title}: {description}", 300),
    )


def label(x: float, y: float, text: str, *, anchor: str = "start", class_: str | None = None) -> Element:
    """A line of text, from data or not; it takes the room that it takes (see `axes.fitted`)."""
    return element("text", plain(text), x=x, y=y, text_anchor=anchor, class_=class_)


def colour(place: int) -> str:
    """The class of the series at a place, from 0."""
    return f"c{place % SERIES + 1}"


def path(points: Iterable[tuple[float, float]], *, closed: bool = False) -> str:
    """Straight lines through points, a tenth of a pixel exact."""
    text = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f"M{text}{'Z' if closed else ''}" if text else ""


def runs(values: Sequence[float]) -> list[range]:
    """The stretches of neighbouring finite values."""
    found: list[range] = []
    for place, value in enumerate(values):
        if math.isfinite(value):
            joins = found and found[-1].stop == place
            found[-1:] = [range(found[-1].start, place + 1)] if joins else [*found[-1:], range(place, place + 1)]
    return found


def _drawable(series: Series, log_y: bool) -> Series:
    """The series with gaps where a logarithm has no value."""
    if not log_y:
        return series
    y, low, high = (
        tuple(value if value > 0 else math.nan for value in each) for each in (series.y, series.low, series.high)
    )
    return Series(name=series.name, x=series.x, y=y, low=low, high=high, dots=series.dots)


def _line(series: Series, axes: Frame) -> list[Element]:
    """A path for each stretch without a gap, a dot for a point that stands alone, the band behind them."""
    xs, ys = [axes.x(value) for value in series.x], [axes.y(value) for value in series.y]
    marks = []
    if series.low:
        for stretch in runs([low + high for low, high in zip(series.low, series.high, strict=True)]):
            outline = [(xs[i], axes.y(series.high[i])) for i in stretch]
            outline += [(xs[i], axes.y(series.low[i])) for i in reversed(stretch)]
            marks.append(element("path", class_="band", d=path(outline, closed=True)))
    for stretch in runs(ys):
        if len(stretch) > 1:
            marks.append(element("path", class_="line", d=path((xs[i], ys[i]) for i in stretch)))
        if len(stretch) == 1 or series.dots:
            marks += [element("circle", class_="dot", cx=xs[i], cy=ys[i], r=2.6) for i in stretch]
    return marks


def _end_labels(series: Sequence[Series], axes: Frame) -> list[Element]:
    """Each line's name beside its last point, moved apart where lines end close together."""
    ends = [(place, runs(each.y)[-1][-1]) for place, each in enumerate(series) if runs(each.y)]
    heights = spread([axes.y(series[place].y[end]) for place, end in ends], TEXT + 2, axes.y.end, axes.y.start)
    return [
        element(
            "g",
            label(axes.x.end + 6, height + 3.8, _end_name(series[place]), class_="label"),
            class_=colour(place),
        )
        for (place, _), height in zip(ends, heights, strict=True)
    ]


def _end_name(series: Series) -> str:
    return fitted(plain(series.name), TEXT, WIDEST_LABEL)


def _describe(series: Sequence[Series]) -> str:
    parts = []
    for each in series:
        finite = [value for value in each.y if math.isfinite(value)]
        what = f"from {finite[0]:.4g} to {finite[-1]:.4g}" if finite else "no values"
        parts.append(f"{plain(each.name, LONGEST_LABEL)} {what}")
    return "; ".join(parts) or "nothing to show"
