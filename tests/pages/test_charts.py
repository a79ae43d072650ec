"""Scales, ticks and charts: were these to fail, a curve would lie."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.pages.axes import Scale, extent, fitted, linear_ticks, log_ticks, spread, text_width, tick_texts, widened
from triscale.pages.charts import Series, histogram, line_chart, runs
from triscale.pages.html import Element
from triscale.pages.plots import Group, Row, dot_chart, legend, point_map, reliability_chart, shape, strip

NAN = math.nan
VALUES = st.floats(-1e9, 1e9)


def parsed(chart: Element) -> ElementTree.Element:
    """The chart read as XML; its numbers are all finite."""
    text = str(chart)
    assert "nan" not in re.sub(r">[^<]*<|aria-label=\"[^\"]*\"", "", text) and "inf" not in re.sub(
        r">[^<]*<|aria-label=\"[^\"]*\"", "", text
    )
    return ElementTree.fromstring(text)


def texts(chart: Element) -> list[str]:
    return [each.text or "" for each in parsed(chart).iter("text")]


@given(VALUES, st.floats(1e-3, 1e6), st.floats(0, 1))
def test_a_scale_keeps_proportions_and_stays_inside(low: float, width: float, share: float) -> None:
    scale = Scale(low=low, high=low + width, start=100, end=20)
    assert scale(low) == pytest.approx(100) and scale(low + width) == pytest.approx(20)
    assert scale(low - width) == 100 and scale(low + 2 * width) == 20
    assert scale(low + share * width) == pytest.approx(100 - 80 * share, abs=1e-3 + 80 * 1e-6 * abs(low) / width)


def test_a_logarithmic_scale_keeps_ratios_and_a_gap_stays_one() -> None:
    scale = Scale(low=0.01, high=100, start=0, end=4, log=True)
    assert [scale(10.0**power) for power in (-2, -1, 0, 1, 2)] == pytest.approx([0, 1, 2, 3, 4])
    assert scale(0) == 0 and math.isnan(scale(NAN))


@given(st.lists(st.one_of(VALUES, st.just(NAN), st.just(math.inf))), st.booleans())
def test_an_extent_holds_all_that_is_finite_and_is_never_empty(values: list[float], log: bool) -> None:
    low, high = extent(values, log=log)
    assert math.isfinite(low) and math.isfinite(high) and low < high
    assert all(low <= v <= high for v in values if math.isfinite(v) and (v > 0 or not log))
    assert low > 0 or not log


def test_nothing_one_value_and_zero_have_an_extent() -> None:
    assert extent([]) == (0, 1) and extent([NAN], log=True) == (1, 10)
    assert extent([3.0]) == pytest.approx((2.85, 3.15)) and extent([0.0]) == (-0.5, 0.5)
    assert extent([2.0, 4.0], zero=True) == (0, 4)


@given(VALUES, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_round_inside_and_of_the_number_asked_for(low: float, width: float, count: int) -> None:
    low, high = extent([low, low + width])
    ticks = linear_ticks(low, high, count)
    step_room = 1e-6 * max(abs(low), abs(high), 1)
    assert all(low - step_room <= tick <= high + step_room for tick in ticks) and len(ticks) <= count + 1
    wide = widened(low, high, count)
    assert wide[0] <= low + step_room and wide[1] >= high - step_room


def test_ticks_are_those_one_would_write() -> None:
    assert linear_ticks(0, 1) == pytest.approx([0, 0.5, 1]) and linear_ticks(0, 1, 6) == pytest.approx(
        [0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    assert tick_texts([0, 0.5, 1]) == ["0.0", "0.5", "1.0"]
    assert tick_texts([0, 0.25, 0.5], percent=True) == ["0 %", "25 %", "50 %"]
    assert tick_texts([0, 500, 1000, 1500]) == ["0", "500", "1,000", "1,500"]
    assert tick_texts([0, 50_000, 100_000]) == ["0", "50k", "100k"]
    assert tick_texts([0, 5e5, 1e6]) == ["0.0", "0.5M", "1.0M"]
    assert tick_texts([0, 5e-4, 1e-3]) == ["0", "5e-4", "1e-3"] and tick_texts([]) == []


def test_logarithmic_ticks_are_powers_of_ten_or_finer_where_these_are_few() -> None:
    assert log_ticks(0.01, 100) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert log_ticks(2, 30) == pytest.approx([2, 5, 10, 20])
    assert 3 <= len(log_ticks(1e-12, 1e12)) <= 8


@given(st.lists(st.floats(0, 100), max_size=12))
def test_labels_are_moved_apart_and_stay_in_their_order_and_room(places: list[float]) -> None:
    moved = spread(places, 12, 0, 100)
    order = sorted(range(len(places)), key=places.__getitem__)
    gap = min(12, 100 / max(len(places) - 1, 1))
    for before, after in zip(order, order[1:], strict=False):
        assert moved[after] - moved[before] >= gap - 1e-6
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in moved)


def test_labels_with_room_stay_and_wide_letters_are_wide() -> None:
    assert spread([10, 50, 90], 12, 0, 100) == [10, 50, 90]
    assert text_width("表表", 10) > 1.5 * text_width("ab", 10)
    assert fitted("abc", 10, 100) == "abc"
    for text in ("x" * 10_000, "W" * 10_000, "表" * 10_000):
        assert text_width(fitted(text, 10, 100), 10) <= 100 < text_width(fitted(text, 10, 100) + text[0], 10) + 10


def test_runs_are_the_stretches_between_gaps() -> None:
    assert runs([1, 2, NAN, 3, NAN, NAN, 4, 5]) == [range(0, 2), range(3, 4), range(6, 8)]
    assert runs([]) == [] == runs([NAN])


def test_a_line_breaks_at_gaps_and_a_point_alone_is_a_dot() -> None:
    chart = parsed(line_chart([Series(name="a", x=range(6), y=[1, 2, NAN, 3, NAN, math.inf])], title="t"))
    assert len(chart.findall(".//path[@class='line']")) == 1 and len(chart.findall(".//circle")) == 1


def test_a_line_goes_through_its_points() -> None:
    chart = parsed(line_chart([Series(name="a", x=[0, 10], y=[0, 1])], title="t", width=400, height=215))
    [drawn] = chart.findall(".//path[@class='line']")
    (x0, y0), (x1, y1) = (map(float, pair.split()) for pair in drawn.attrib["d"].removeprefix("M").split("L"))
    axis = chart.find("line[@class='axis']")
    assert axis is not None and y0 == float(axis.attrib["y1"]) and y1 == 9
    assert (x0, x1) == (
        pytest.approx(float(axis.attrib["x1"]), abs=0.1),
        pytest.approx(float(axis.attrib["x2"]), abs=0.1),
    )


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("y", [[], [NAN, NAN], [0.0], [5.0], [-1.0, 0.0], [1e-30, 1e30], [1.0, 1.0]])
def test_any_series_makes_a_chart(y: list[float], log: bool) -> None:
    series = [Series(name=n, x=range(len(y)), y=y, low=y, high=y) for n in "ab"]
    assert parsed(line_chart(series, title="t", log_y=log)).find("desc") is not None
    assert parsed(line_chart(series[:1], title="t", log_y=log, reference=(1.0, "one"))) is not None


def test_several_lines_are_labelled_at_their_ends_with_names_as_text() -> None:
    series = [Series(name=n, x=[0, 1], y=[0, 1]) for n in ("<b>", "x" * 10_000)]
    shown = texts(line_chart(series, title="t"))
    assert "<b>" in shown and any(re.fullmatch("x{10,30}…", text) for text in shown)
    heights = [float(e.attrib["y"]) for e in parsed(line_chart(series, title="t")).findall(".//text[@class='label']")]
    assert abs(heights[0] - heights[1]) >= 12


def test_a_histogram_has_bars_in_proportion_and_says_what_they_are() -> None:
    chart = parsed(histogram([0, 1, 2, 3], [1, 0, 2], title="t", x_label="x"))
    heights = [float(bar.attrib["height"]) for bar in chart.findall(".//rect")]
    assert heights[0] == pytest.approx(heights[2] / 2, abs=0.02) and heights[1] == 0
    assert [tip.text for tip in chart.findall(".//rect/title")] == ["0 to 1: 1", "1 to 2: 0", "2 to 3: 2"]
    assert parsed(histogram([0, 1], [0], title="t", x_label="x", mark=0.5)) is not None


def test_a_strip_is_as_long_as_its_fraction_even_beyond_its_ends() -> None:
    for value, width in ((0.25, 25), (0.0, 0), (1.0, 100), (1.7, 100), (-1, 0)):
        bar = parsed(strip(value, interval=(value - 0.1, value + 0.1))).find("rect[@class='bar']")
        assert bar is not None and float(bar.attrib["width"]) == width


def test_dots_stand_where_their_values_are() -> None:
    chart = parsed(dot_chart([Row(name="a", value=0.2), Row(name="<i>", value=0.4, interval=(0.3, 0.5))], title="t"))
    first, second = (float(dot.attrib["cx"]) - 6 for dot in chart.findall(".//circle"))
    assert second == pytest.approx(2 * first, abs=0.02)
    assert "<i>" in [each.text for each in chart.iter("text")]


def test_a_calibrated_bin_has_no_gap_and_empty_bins_no_bar() -> None:
    chart = parsed(reliability_chart([0.1, 0.0, 0.9], [0.1, 0.0, 0.5], [10, 0, 5], title="t"))
    gaps = [float(gap.attrib["height"]) for gap in chart.findall(".//rect[@class='gap']")]
    assert len(gaps) == 2 and gaps[0] == 0 and gaps[1] > 50
    assert parsed(reliability_chart([], [], [], title="t")) is not None


def test_a_map_marks_every_point_and_shapes_differ() -> None:
    groups = [Group(name=n, x=[0, 1], y=[0, 1]) for n in ("a", "<b>", "c", "d", "e")]
    chart = point_map(groups, Group(name="rest", x=[0.5], y=[0.5]), title="t")
    assert len(parsed(chart).findall(".//path")) == 10 and len(parsed(chart).findall(".//circle")) == 1
    assert len({shape(place, 0, 0) for place in range(4)}) == 4 and shape(4, 0, 0) == shape(0, 0, 0)
    assert "&lt;b&gt;" in str(legend(groups)) and "<b>" in texts(chart)
    assert parsed(point_map([], Group(name="rest", x=[], y=[]), title="t")) is not None
