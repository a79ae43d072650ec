"""How accuracy holds on shifted sets: the mean, the drop, and what is beyond what other models lead one to expect.

The mean over shifted sets and the drop from the base set are what BASIC (arXiv 2111.10050) reports. A better model is
better on shifted sets too, so Taori et al. (Measuring Robustness to Natural Distribution Shifts in Image
Classification, arXiv 2007.00644, section 2) fit a line to reference models,

    logit(shift top-1) = slope * logit(base top-1) + intercept,        logit(p) = ln(p / (1 - p)),

by least squares, and call a model's top-1 on the shifted set less what the line predicts from its top-1 on the base set
its effective robustness. Reference models with a top-1 of 0 or 1, whose logit is infinite, are left out of the fit.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import numpy as np
from jaxtyping import Float64

from triscale.data.lists import quote, read_lines
from triscale.errors import UsageError
from triscale.randomness import generator

MODEL_COLUMN = "model"
FEWEST_MODELS = 3
RESAMPLES = 1000
Unit = Literal["fraction", "percent"]
Interval = list[float]
"""Lower and upper end of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What reference models' top-1 on a base set says of that on a shifted set."""

    slope: float
    intercept: float
    """Of logit(shift top-1) over logit(base top-1)."""
    models: int
    """Reference models that the fit rests on."""
    left_out: int
    """Others: not measured on one of both sets, or with a top-1 of 0 or 1 there."""
    residual_spread: float
    """Standard deviation of these models' own effective robustness, with models - 2 degrees of freedom."""

    def predict(self, base: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """Expected top-1 on the shifted set; at 0 and 1 as of the nearest number that has a logit."""
        inside = np.clip(base, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
        return _inverse_logit(self.slope * _logit(inside) + self.intercept)


class ShiftResult(TypedDict):
    """Of one shifted set; fractions of 1."""

    drop: float
    """Top-1 of the base set less this set's."""
    drop_interval: Interval
    predicted_top1: NotRequired[float]
    """Where there are reference models: what their line expects."""
    effective_robustness: NotRequired[float]
    effective_robustness_interval: NotRequired[Interval]
    line: NotRequired[dict[str, float | int]]
    """The fields of `Line`."""


class RobustnessResult(TypedDict):
    """What `results.json` holds of shifted sets beside their mean and the drop; fractions of 1.

    Intervals tell what other images of the same kinds would give. They take the reference models' line as it is: see
    its residual spread.
    """

    base: str
    """The set that drops are measured from."""
    shift_mean_interval: Interval
    drop_interval: Interval
    effective_robustness: NotRequired[float]
    """Mean over the shifted sets, where there are reference models."""
    effective_robustness_interval: NotRequired[Interval]
    shifts: dict[str, ShiftResult]


def fit_reference(path: Path, unit: Unit, base: str, shifts: Sequence[str]) -> dict[str, Line]:
    """Fit a line for each shifted set to the models of a CSV file; by name of the set.

    Args:
        path: of a UTF-8 file with a header: "model" and the names of sets; a row a model, its top-1 on each set. An
            empty field: not measured. Columns of other sets are passed over.
        unit: of its numbers.
        base, shifts: names of sets.

    Raises:
        UsageError: the file can't be read, a column is missing or there twice, a model is there twice or has no name, a
            number is none or not of this unit, or there are too few models for a line.
    """
    rows = _read_rows(path)
    models = _column(path, rows, MODEL_COLUMN)
    for line, model in enumerate(models, start=2):
        if not model:
            raise UsageError(f"{_named(path)}, row {line}: the model has no name")
        if models.index(model) != line - 2:
            raise UsageError(f"{_named(path)}: model {quote(model)} is there twice")
    top1 = {name: _numbers(path, models, name, _column(path, rows, name), unit) for name in (base, *shifts)}
    if unit == "percent" and all(bool((each[~np.isnan(each)] <= 0.01).all()) for each in top1.values()):
        raise UsageError(f"{_named(path)}: no number exceeds 1, so they are no percent: --reference-unit fraction")
    return {name: _fit(path, base, name, top1[base], top1[name]) for name in shifts}


def _named(path: Path) -> str:
    return f"reference models {quote(str(path))}"


def _read_rows(path: Path) -> list[list[str]]:
    """The header and the rows, all of as many fields without white space around them."""
    try:
        rows = [[field.strip() for field in row] for row in csv.reader(read_lines(path), strict=True)]
    except csv.Error as error:
        raise UsageError(f"{_named(path)}: {error}") from error
    if not rows:
        raise UsageError(f"{_named(path)}: it is empty")
    for line, row in enumerate(rows, start=1):
        if len(row) != len(rows[0]):
            raise UsageError(f"{_named(path)}, row {line}: {len(row)} fields, where the header has {len(rows[0])}")
    return rows


def _column(path: Path, rows: Sequence[Sequence[str]], name: str) -> list[str]:
    header = rows[0]
    if header.count(name) != 1:
        how = "there is no column" if name not in header else "there are several columns"
        raise UsageError(f"{_named(path)}: {how} {quote(name)}; the header is {quote(','.join(header))}")
    return [row[header.index(name)] for row in rows[1:]]


def _numbers(
    path: Path, models: Sequence[str], name: str, fields: Sequence[str], unit: Unit
) -> Float64[np.ndarray, " n"]:
    """A column as fractions of 1; NaN where a field is empty."""
    whole = 100.0 if unit == "percent" else 1.0
    numbers = np.full(len(fields), np.nan)
    for row, text in enumerate(fields):
        if not text:
            continue
        where = f"{_named(path)}: model {quote(models[row])}, set {quote(name)}: {quote(text)}"
        try:
            number = float(text)
        except ValueError:
            raise UsageError(f"{where} is no number") from None
        if not 0 <= number <= whole:
            percent = unit == "fraction" and 1 < number <= 100
            hint = "; if numbers are in percent, say --reference-unit percent" if percent else ""
            raise UsageError(f"{where} is not from 0 to {whole:.0f}{hint}")
        numbers[row] = number / whole
    return numbers


def _fit(
    path: Path, base: str, shift: str, of_base: Float64[np.ndarray, " n"], of_shift: Float64[np.ndarray, " n"]
) -> Line:
    usable = (of_base > 0) & (of_base < 1) & (of_shift > 0) & (of_shift < 1)  # NaN: no
    x, y = _logit(of_base[usable]), _logit(of_shift[usable])
    where = f"{_named(path)}: {quote(base)} and {quote(shift)}"
    if len(x) < FEWEST_MODELS:
        raise UsageError(f"{where}: a line needs {FEWEST_MODELS} models with a top-1 between 0 and 1, not {len(x)}")
    away = x - x.mean()
    if not np.ptp(x):
        raise UsageError(f"{where}: all models have the same top-1 on {quote(base)}, which makes no line")
    slope = float(away @ y / (away @ away))
    intercept = float(y.mean() - slope * x.mean())
    residuals = of_shift[usable] - _inverse_logit(slope * x + intercept)
    return Line(
        slope=slope,
        intercept=intercept,
        models=len(x),
        left_out=len(of_base) - len(x),
        residual_spread=math.sqrt(float(residuals @ residuals) / (len(x) - 2)),
    )


def _logit(p: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    return np.log(p) - np.log1p(-p)


def _inverse_logit(x: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    return 0.5 + 0.5 * np.tanh(0.5 * x)  # 1 / (1 + exp(-x)), which overflows


def robustness(
    base: str, top1: Mapping[str, float], samples: Mapping[str, int], shifts: Sequence[str], lines: Mapping[str, Line]
) -> RobustnessResult:
    """What the top-1 on shifted sets says beside that on the base set.

    Args:
        base: name of the set that drops are measured from.
        top1, samples: of every set, by name.
        shifts: names of one or more sets.
        lines: of all of these, by name; empty: no effective robustness is given.
    """
    drawn = {name: _resampled(name, top1[name], samples[name]) for name in (base, *shifts)}
    shift_mean = np.mean([drawn[name] for name in shifts], axis=0)
    result = RobustnessResult(
        base=base,
        shift_mean_interval=_interval(shift_mean),
        drop_interval=_interval(drawn[base] - shift_mean),
        shifts={
            name: ShiftResult(drop=top1[base] - top1[name], drop_interval=_interval(drawn[base] - drawn[name]))
            for name in shifts
        },
    )
    if not lines:
        return result
    beyond = []
    for name in shifts:
        of_set, line = result["shifts"][name], lines[name]
        of_set["predicted_top1"] = float(line.predict(np.array([top1[base]]))[0])
        of_set["effective_robustness"] = top1[name] - of_set["predicted_top1"]
        beyond.append(drawn[name] - line.predict(drawn[base]))
        of_set["effective_robustness_interval"] = _interval(beyond[-1])
        of_set["line"] = asdict(line)
    mean = sum(result["shifts"][name].get("effective_robustness", 0.0) for name in shifts) / len(shifts)
    result["effective_robustness"] = mean
    result["effective_robustness_interval"] = _interval(np.mean(beyond, axis=0))
    return result


def _resampled(name: str, top1: float, samples: int) -> Float64[np.ndarray, " r"]:
    """Top-1 of as many images drawn anew from a set's, each time: how many are right is binomial."""
    return generator("robustness", name).binomial(samples, top1, RESAMPLES) / samples


def _interval(drawn: Float64[np.ndarray, " r"]) -> Interval:
    return np.percentile(drawn, [2.5, 97.5]).tolist()
