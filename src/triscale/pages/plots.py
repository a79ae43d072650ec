"""Charts of what a model answers: scores with their intervals, calibration, a map of points in two axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triscale.pages.axes import Scale, extent, fitted, spread, text_width
from triscale.pages.charts import LONGEST_LABEL, TEXT, WIDEST_LABEL, colour, frame, label, path, svg
from triscale.pages.html import Element, element, name, plain

_SHAPES = 4


def strip(value: float, *, interval: Sequence[float] = (), class_: str = "c1") -> Element:
    """A fraction of 1 as a bar in a cell of a table, beside which it is written.

    Args:
        interval: its lower and upper end, drawn as a line over the bar's end; none: no line.
    """

    def at(fraction: float) -> float:
        return 100 * min(max(fraction, 0.0), 1.0)

    parts = [
        element("rect", class_="track", x=0, y=2, width=100, height=6),
        element("rect", class_="bar", x=0, y=2, width=at(value), height=6),
    ]
    if interval:
        low, high = at(interval[0]), at(interval[1])
        parts.append(element("rect", class_="reach", x=low, y=4.4, width=max(high - low, 0.3), height=1.2))
    return element(
        "svg", *parts, class_=f"strip {class_}", viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true"
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A value with its interval in a chart of dots."""

    name: str
    value: float
    interval: Sequence[float] = ()
    strong: bool = False
    """Whether the name stands out."""


def dot_chart(rows: Sequence[Row], *, title: str, width: float = 380) -> Element:
    """Fractions of 1, each a dot with its interval on a line of its own, below its name, from zero on."""
    step, right = 36, 50
    height = step * len(rows) + 6
    high = extent([v for row in rows for v in (row.value, *row.interval)], zero=True)[1]
    across = Scale(low=0, high=min(1.0, high * 1.03), start=6, end=width - right)
    parts: list[Element] = []
    for place, row in enumerate(rows):
        y = step * place + 26
        parts.append(element("rect", class_="track", x=6, y=y - 2.5, width=across.end - 6, height=5, rx=2.5))
        if row.interval:
            left, end = across(row.interval[0]), across(row.interval[1])
            parts.append(element("rect", class_="bar pale", x=left, y=y - 4, width=end - left, height=8, rx=4))
        tip = f"{100 * row.value:.1f} %" + (
            f" ({100 * row.interval[0]:.1f} to {100 * row.interval[1]:.1f})" if row.interval else ""
        )
        parts.append(element("circle", element("title", tip), class_="ring", cx=across(row.value), cy=y, r=5.5))
        parts.append(
            label(6, y - 10, fitted(plain(row.name), TEXT, across.end - 6), class_="strong" if row.strong else None)
        )
        parts.append(label(width, y + 4, f"{100 * row.value:.1f} %", anchor="end", class_="strong"))
    text = "; ".join(f"{plain(row.name, LONGEST_LABEL)} {100 * row.value:.1f} %" for row in rows)
    return svg(width, height, title, text, element("g", *parts, class_="c1"))


def reliability_chart(
    confidence: Sequence[float], accuracy: Sequence[float], samples: Sequence[int], *, title: str, size: float = 300
) -> Element:
    """How often guesses of each confidence are right, one bar a bin, beside the diagonal of a calibrated model.

    Below, how many samples each bin has. The gap between the bar and the diagonal is drawn pale.

    Args:
        confidence: the mean of each bin; bins are of equal width.
        accuracy: fraction of right guesses in each.
        samples: in each.
    """
    axes = frame((0, 1), (0, 1), width=size, height=size - 40, percent_x=True, percent_y=True)
    floor = axes.y.start
    most, bins = max([*samples, 1]), len(samples)
    below = size - 4
    bars: list[Element] = []
    for place, count in enumerate(samples):
        if not count:
            continue
        left, right = axes.x(place / bins) + 0.7, axes.x((place + 1) / bins) - 0.7
        tip = f"confidence {confidence[place]:.1%}, right {accuracy[place]:.1%}, {count:,} samples"
        gap = "gap" if confidence[place] >= accuracy[place] else "gap under"  # over the bar it must be stronger
        ends = sorted((axes.y(accuracy[place]), axes.y(confidence[place])))
        bars.append(
            element(
                "rect",
                element("title", tip),
                class_="bar",
                x=left,
                y=axes.y(accuracy[place]),
                width=right - left,
                height=floor - axes.y(accuracy[place]),
            )
        )
        bars.append(element("rect", class_=gap, x=left, y=ends[0], width=right - left, height=ends[1] - ends[0]))
        tall = max(26 * count / most, 0.8)
        bars.append(element("rect", class_="bar pale", x=left, y=below - tall, width=right - left, height=tall))
    diagonal = path([(axes.x(0), axes.y(0)), (axes.x(1), axes.y(1))])
    return svg(
        size,
        size,
        title,
        f"{sum(samples):,} samples in {bins} bins of confidence; bars on the diagonal mean a calibrated model",
        *axes.parts,
        element("g", *bars, class_="c1"),
        element("path", class_="rule", d=diagonal, fill="none"),
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points of one kind in a map."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    class_: str = ""
    """The style sheet's class; "": that of its place among the groups."""


def point_map(
    groups: Sequence[Group], rest: Group, *, title: str, width: float = 420, height: float = 330, labelled: bool = True
) -> Element:
    """Points in two axes without units; each group has a colour and a shape.

    Args:
        rest: points of no group, behind the others.
        labelled: whether each group has its name near its middle, as where groups lie apart.
    """
    xs = extent([value for each in (*groups, rest) for value in each.x])
    ys = extent([value for each in (*groups, rest) for value in each.y])
    across = Scale(low=xs[0], high=xs[1], start=8, end=width - 8)
    up = Scale(low=ys[0], high=ys[1], start=height - 8, end=8)

    def places(group: Group) -> list[tuple[float, float]]:
        return [(across(x), up(y)) for x, y in zip(group.x, group.y, strict=True)]

    behind = [element("circle", class_="dot pale", cx=x, cy=y, r=1.8) for x, y in places(rest)]
    marks, middles = [element("g", *behind, class_="faint")], []
    for place, group in enumerate(groups):
        points = places(group)
        shapes = [element("path", class_="ring", d=shape(place, x, y)) for x, y in points]
        marks.append(element("g", *shapes, class_=group.class_ or colour(place)))
        if points and labelled:
            middles.append((place, sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)))
    heights = spread([y for _, _, y in middles], TEXT + 3, 16, height - 10)
    for (place, x, _), y in zip(middles, heights, strict=True):
        text = fitted(plain(groups[place].name), TEXT, WIDEST_LABEL)
        half = text_width(text, TEXT) / 2
        at = min(max(x, half + 4), width - half - 4)
        class_ = groups[place].class_ or colour(place)
        marks.append(element("g", label(at, y + 3.8, text, anchor="middle", class_="label"), class_=class_))
    text = f"{sum(len(each.x) for each in (*groups, rest)):,} points; groups: " + (
        ", ".join(plain(each.name, LONGEST_LABEL) for each in groups) or "none"
    )
    return svg(width, height, title, text, element("rect", class_="plate", width=width, height=height, rx=10), *marks)


def legend(groups: Sequence[Group]) -> Element:
    """The groups of a map with their shapes and whole names."""
    items = [
        element(
            "li",
            element(
                "svg",
                element("path", class_="ring", d=shape(place, 6, 6, 4.5)),
                class_=f"swatch {group.class_ or colour(place)}",
                viewBox="0 0 12 12",
                aria_hidden="true",
            ),
            name(group.name, 60),
            f" ({len(group.x):,})",
        )
        for place, group in enumerate(groups)
    ]
    return element("ul", *items, class_="legend")


def shape(place: int, x: float, y: float, radius: float = 3.4) -> str:
    """The outline of a mark: circle, square, triangle and diamond in turn, so that colour is not needed."""
    r = radius
    kind = place % _SHAPES
    if kind == 0:
        return f"M{x - r:.1f} {y:.1f}a{r:.1f} {r:.1f} 0 1 0 {2 * r:.1f} 0a{r:.1f} {r:.1f} 0 1 0 {-2 * r:.1f} 0Z"
    corners = {
        1: [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        2: [(0, -1.2), (1.1, 0.8), (-1.1, 0.8)],
        3: [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
    }[kind]
    return path([(x + r * dx, y + r * dy) for dx, dy in corners], closed=True)
