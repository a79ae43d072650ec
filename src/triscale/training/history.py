"""What a run's metrics.jsonl says: its numbers as curves of bounded length, evaluations and notices."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_POINTS = 240
MOST_EVALUATIONS = 2000
MOST_NOTICES = 50
LONGEST_LINE = 2**20
"""Longer lines, which no run writes, are passed over, as are those that are no JSON."""


@dataclass(kw_only=True)
class Curve:
    """A number over steps: means of equal stretches of steps, with the smallest and largest value of each.

    A stretch becomes twice as long when there would be more than `MOST_POINTS`, so that any run's curve is short.
    """

    stretch_steps: int = 1
    steps: list[float] = field(default_factory=list)
    """The middle of each stretch."""
    mean: list[float] = field(default_factory=list)
    """NaN where no value of the stretch is finite."""
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    _numbers: list[int] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)

    def add(self, step: int, value: float | None) -> None:
        """Take up the value of a step later than those before; None or not finite: there is none."""
        self._reach((step - 1) // self.stretch_steps)
        if value is not None and math.isfinite(value):
            self._merge(value, 1, value, value)
        if len(self.steps) > MOST_POINTS:
            self._halve()

    @property
    def last(self) -> float:
        """The mean of the last stretch that has a value; NaN without any."""
        return next((value for value in reversed(self.mean) if math.isfinite(value)), math.nan)

    def _reach(self, stretch: int) -> None:
        """Make the stretch of this number the last one."""
        if self._numbers and self._numbers[-1] == stretch:
            return
        self._numbers.append(stretch)
        self._counts.append(0)
        self.steps.append(stretch * self.stretch_steps + (self.stretch_steps + 1) / 2)
        for values in (self.mean, self.low, self.high):
            values.append(math.nan)

    def _merge(self, mean: float, count: int, low: float, high: float) -> None:
        """Add `count` values to the last stretch."""
        if not self._counts[-1]:
            self.mean[-1], self.low[-1], self.high[-1] = mean, low, high
        else:
            self.mean[-1] += (mean - self.mean[-1]) * count / (self._counts[-1] + count)
            self.low[-1], self.high[-1] = min(self.low[-1], low), max(self.high[-1], high)
        self._counts[-1] += count

    def _halve(self) -> None:
        """Make stretches twice as long, and hence half as many."""
        old = list(zip(self._numbers, self.mean, self._counts, self.low, self.high, strict=True))
        self.stretch_steps *= 2
        for values in (self._numbers, self._counts, self.steps, self.mean, self.low, self.high):
            values.clear()
        for stretch, mean, count, low, high in old:
            self._reach(stretch // 2)
            if count:
                self._merge(mean, count, low, high)


@dataclass(kw_only=True)
class History:
    """What a run logged."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """By name of a metric."""
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """(step, scores) of the evaluations during training."""
    notices: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0
    """The last step."""
    skipped: int = 0
    """Steps whose loss or gradient was not finite."""
    seconds: float = 0.0
    """Wall time of all the processes that wrote it in turn."""


def read_history(path: Path) -> History:
    """Read metrics.jsonl; one that is not there is that of a run without steps."""
    history = History()
    before, earlier_seconds = 0.0, 0.0
    for record in _records(path):
        seconds = _number(record.get("seconds"))
        if seconds is not None and math.isfinite(seconds):
            if seconds < before:  # a process that went on counts from its own beginning
                earlier_seconds += before
            before = seconds
        _take(history, record)
    history.seconds = earlier_seconds + before
    return history


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        while line := file.readline(LONGEST_LINE):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _take(history: History, record: Mapping[str, Any]) -> None:
    step = int(record["step"])
    if "notice" in record:
        if len(history.notices) < MOST_NOTICES:
            history.notices.append((step, str(record["notice"])))
        return
    if isinstance(record.get("evaluation"), dict):
        scores = {str(name): _number(value) for name, value in record["evaluation"].items()}
        if len(history.evaluations) < MOST_EVALUATIONS:
            history.evaluations.append((step, {name: v for name, v in scores.items() if v is not None}))
        return
    if step <= history.steps:
        return
    history.steps = step
    history.skipped += record.get("skipped") is True
    for name, value in record.items():
        if name not in ("step", "seconds", "skipped") and (value is None or _number(value) is not None):
            history.curves.setdefault(name, Curve()).add(step, _number(value))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
