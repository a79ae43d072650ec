"""Drops, their intervals, and effective robustness against literal formulas; what is wrong in a file of references."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from triscale.errors import UsageError
from triscale.evaluation.robustness import Unit, fit_reference, robustness

MODELS = {
    "small": (0.55, 0.42, 0.02),
    "medium": (0.67, 0.55, 0.05),
    "large": (0.761, 0.633, 0.0),
    "huge": (0.80, 0.70, 0.19),
    "elsewhere": (0.79, None, 0.17),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def table(unit: Unit = "fraction") -> str:
    whole = 100 if unit == "percent" else 1
    rows = [
        ",".join([name, "x", *("" if value is None else f"{value * whole:.17g}" for value in values)])
        for name, values in MODELS.items()
    ]
    return "\n".join(["model,of another set,val,v2,adversarial", *rows]) + "\n"


@pytest.mark.parametrize("unit", ["fraction", "percent"])
def test_effective_robustness_is_that_of_the_formula_whatever_the_unit(tmp_path: Path, unit: Unit) -> None:
    lines = fit_reference(write(tmp_path / "models.csv", table(unit)), unit, "val", ("v2", "adversarial"))
    top1, samples = {"val": 0.7, "v2": 0.625, "adversarial": 0.24}, dict.fromkeys(("val", "v2", "adversarial"), 1000)
    found = robustness("val", top1, samples, ("v2", "adversarial"), lines)
    expected = {
        name: reference.effective_robustness(
            [(row[0], row[at]) for row in MODELS.values() if row[at]], top1["val"], top1[name]
        )
        for at, name in ((1, "v2"), (2, "adversarial"))
    }
    for name, shift in found["shifts"].items():
        assert shift["effective_robustness"] == pytest.approx(expected[name], abs=1e-12)
        assert shift["predicted_top1"] == pytest.approx(top1[name] - expected[name], abs=1e-12)
        assert shift["line"]["models"] == 4 and shift["line"]["left_out"] == 1
    assert found["effective_robustness"] == pytest.approx(sum(expected.values()) / 2, abs=1e-12)


def test_the_residual_spread_is_that_of_the_reference_models_own_effective_robustness(tmp_path: Path) -> None:
    line = fit_reference(write(tmp_path / "models.csv", table()), "fraction", "val", ("v2",))["v2"]
    points = [(row[0], row[1]) for row in MODELS.values() if row[1]]
    own = [reference.effective_robustness(points, *point) for point in points]
    assert line.residual_spread == pytest.approx(math.sqrt(sum(each**2 for each in own) / (len(points) - 2)), abs=1e-12)


@given(st.floats(-3, 3), st.floats(0.1, 2), st.floats(0.01, 0.99))
def test_a_model_on_the_line_has_no_effective_robustness(intercept: float, slope: float, base: float) -> None:
    def on_line(p: float) -> float:
        return 1 / (1 + math.exp(-(slope * math.log(p / (1 - p)) + intercept)))

    text = "model,val,v2\n" + "".join(f"{p},{p},{on_line(p):.17g}\n" for p in (0.3, 0.5, 0.6, 0.9))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        lines = fit_reference(write(Path(folder, "models.csv"), text), "fraction", "val", ("v2",))
    found = robustness("val", {"val": base, "v2": on_line(base)}, {"val": 9, "v2": 9}, ("v2",), lines)
    assert found.get("effective_robustness") == pytest.approx(0, abs=1e-9)
    assert lines["v2"].residual_spread < 1e-9


@pytest.mark.parametrize("base", [0.0, 1.0])
def test_a_base_accuracy_without_a_logit_is_no_trouble(tmp_path: Path, base: float) -> None:
    lines = fit_reference(write(tmp_path / "models.csv", table()), "fraction", "val", ("v2",))
    found = robustness("val", {"val": base, "v2": 0.5}, {"val": 10, "v2": 10}, ("v2",), lines)
    assert found["shifts"]["v2"].get("predicted_top1") == pytest.approx(base, abs=1e-9)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, samples = np.random.default_rng(0), {"val": 400, "v2": 300, "sketch": 200}
    truth = {"val": 0.8, "v2": 0.6, "sketch": 0.4}
    covered = []
    for _ in range(200):
        top1 = {name: rng.binomial(samples[name], truth[name]) / samples[name] for name in truth}
        found = robustness("val", top1, samples, ("v2", "sketch"), {})
        for (low, high), true in (
            (found["shift_mean_interval"], 0.5),
            (found["drop_interval"], 0.3),
            (found["shifts"]["sketch"]["drop_interval"], 0.4),
        ):
            assert low < high
            covered.append(low <= true <= high)
    assert 0.92 <= sum(covered) / len(covered) <= 0.98


def test_intervals_are_the_same_in_every_run_and_need_no_reference() -> None:
    found = [robustness("val", {"val": 0.8, "v2": 0.6}, {"val": 50, "v2": 40}, ("v2",), {}) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["shifts"]["v2"]["drop"] == pytest.approx(0.2)
    assert "effective_robustness" not in found[0] and "line" not in found[0]["shifts"]["v2"]


HEAD = "model,val,v2\n"


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("", "fraction", "it is empty"),
        ("name,val,v2\na,.5,.4\n", "fraction", "there is no column 'model'"),
        ("model,val\na,.5\n", "fraction", "there is no column 'v2'"),
        ("model,val,v2,v2\na,.5,.4,.4\n", "fraction", "several columns 'v2'"),
        (HEAD + "a,.5\n", "fraction", "row 2: 2 fields, where the header has 3"),
        (HEAD + "a,.5,.4\n,.6,.5\n", "fraction", "row 3: the model has no name"),
        (HEAD + "a,.5,.4\na,.6,.5\n", "fraction", "model 'a' is there twice"),
        (HEAD + "a,.5,good\n", "fraction", "model 'a', set 'v2': 'good' is no number"),
        (HEAD + "a,.5,nan\n", "fraction", "'nan' is not from 0 to 1"),
        (HEAD + "a,50,40\n", "fraction", "'50' is not from 0 to 1; if numbers are in percent, say --reference-unit"),
        (HEAD + "a,-5,40\n", "percent", "'-5' is not from 0 to 100"),
        (HEAD + "a,101,40\n", "percent", "'101' is not from 0 to 100"),
        (HEAD + "a,.5,.4\nb,.6,.5\nc,.7,.6\n", "percent", "no percent: --reference-unit fraction"),
        (HEAD + "a,.5,.4\nb,.6,.5\nc,.7,\nd,.8,0\n", "fraction", "a line needs 3 models with a top-1 .* not 2"),
        (HEAD + "a,.5,.4\nb,.5,.5\nc,.5,.6\n", "fraction", "the same top-1 on 'val'"),
        (HEAD + '"a,.5,.4\n', "fraction", "unexpected end of data"),
        (HEAD + '"a,.5,' + "x" * 200_000 + '"\n', "fraction", "larger than field limit"),
    ],
)
def test_a_mistake_in_the_file_of_references_is_one_line(tmp_path: Path, text: str, unit: Unit, message: str) -> None:
    path = write(tmp_path / "models.csv", text)
    with pytest.raises(UsageError, match=message) as caught:
        fit_reference(path, unit, "val", ("v2",))
    assert "\n" not in str(caught.value) and "models.csv" in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        fit_reference(tmp_path / "none.csv", "fraction", "val", ("v2",))
    (tmp_path / "models.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        fit_reference(tmp_path / "models.csv", "fraction", "val", ("v2",))
