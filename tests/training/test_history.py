"""Curves of a run read back: were these to fail, a long run's page would lie or be endless."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.training.history import MOST_POINTS, Curve, read_history


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(None), st.just(math.nan)), min_size=1, max_size=2000))
def test_a_curve_is_the_means_of_equal_stretches_and_never_long(values: list[float | None]) -> None:
    curve = Curve()
    for step, value in enumerate(values, start=1):
        curve.add(step, value)
    width = curve.stretch_steps
    assert len(curve.steps) == -(-len(values) // width) <= MOST_POINTS
    assert width == 1 or len(values) > MOST_POINTS * width // 2
    for place in range(len(curve.steps)):
        kept = [v for v in values[place * width : (place + 1) * width] if v is not None and math.isfinite(v)]
        assert curve.steps[place] == place * width + (width + 1) / 2
        found = (curve.mean[place], curve.low[place], curve.high[place])
        if kept:
            assert found == (pytest.approx(float(np.mean(kept)), abs=1e-9), min(kept), max(kept))
        else:
            assert all(map(math.isnan, found))


def test_the_last_value_is_the_last_that_is_there() -> None:
    curve = Curve()
    assert math.isnan(curve.last)
    for step, value in enumerate((1.0, 2.0, None), start=1):
        curve.add(step, value)
    assert curve.last == 2.0


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in records))
    return path


def test_a_log_is_read_with_its_evaluations_notices_and_the_time_of_all_processes(tmp_path: Path) -> None:
    found = read_history(
        write(
            tmp_path / "metrics.jsonl",
            {"step": 1, "seconds": 5, "loss": 3.0, "skipped": False},
            {"step": 2, "seconds": 9, "loss": None, "skipped": True},
            {"step": 2, "seconds": 9.5, "evaluation": {"val": 0.5, "shift_mean": None}},
            {"step": 2, "seconds": 9.75, "notice": "slow"},
            {"step": 3, "seconds": 2, "loss": 1.0, "accuracy": 1, "skipped": False},
        )
    )
    assert (found.steps, found.skipped, found.seconds) == (3, 1, 11.75)
    assert found.evaluations == [(2, {"val": 0.5})] and found.notices == [(2, "slow")]
    assert found.curves["loss"].mean == [3.0, pytest.approx(math.nan, nan_ok=True), 1.0]
    assert found.curves["accuracy"].steps == [3.0] and set(found.curves) == {"loss", "accuracy"}


def test_what_is_no_log_line_is_passed_over_and_no_file_is_an_empty_history(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m",
        "no json\n",
        [1],
        {"step": "1"},
        {"step": 1, "loss": "x"},
        {"step": 2, "loss": 1},
        '{"step": 3, "lo',
    )
    found = read_history(path)
    assert found.steps == 2 and found.curves["loss"].mean == [1.0]
    assert read_history(tmp_path / "none").steps == 0
