"""Scores before and after: a fall of the guard is told once, the weights to take follow a stated rule."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from triscale.errors import UsageError
from triscale.evaluation.guard import GuardWatch, check_choice, choose, guard_table


def results(**top1: float) -> dict[str, Any]:
    sets: dict[str, Any] = {name: {"task": "classification", "top1": value} for name, value in top1.items()}
    sets["pairs"] = {"task": "retrieval", "text_to_image_recall@1": 0.25}
    return {"sets": sets, "shift_mean": None, "drop": None}


def test_the_guard_warns_once_where_a_set_of_it_falls_by_more_than_the_limit() -> None:
    watch = GuardWatch({"target": 0.9, "a": 0.5, "b": 0.5}, ["a", "b"], 0.02)
    assert watch.add({"target": 0.1, "a": 0.481, "b": 0.6}) is None
    line = watch.add({"target": 0.9, "a": 0.5, "b": 0.45})
    assert line and "guard set b has fallen from 50.0% to 45.0%" in line and "--train.guard-drop 0.02" in line
    assert watch.fall({"a": 0.5, "b": 0.45}) == pytest.approx(0.05)
    assert watch.fall({"a": 0.6, "b": 0.7}) == pytest.approx(-0.1)
    assert watch.add({"target": 0.9, "a": 0.0, "b": 0.0}) is None


def test_half_is_taken_unless_a_set_chooses() -> None:
    by_share = {0.0: results(val=0.5), 0.25: results(val=0.7), 0.75: results(val=0.7), 1.0: results(val=0.6)}
    assert choose(by_share, "") == 0.25, "of two as near to a half, the one nearer to the initial weights"
    assert choose({**by_share, 0.5: results(val=0.1)}, "") == 0.5
    assert choose(by_share, "val") == 0.25, "at equal scores the one nearer to the initial weights"
    assert choose(by_share, "pairs") == 0.0


def test_a_choice_without_a_set_is_refused() -> None:
    with pytest.raises(UsageError, match="--train.choose-on 'vla' is not among the sets: val"):
        check_choice([0.5], "vla", ["val"])
    with pytest.raises(UsageError, match="no set to compare weights on"):
        check_choice([0.5], "", [])
    check_choice([], "", [])


def test_the_table_has_a_row_a_set_and_stars_what_is_taken() -> None:
    compared = {
        **results(val=0.75, old=0.5),
        "before": results(val=0.25, old=0.625),
        "after": results(val=0.75, old=0.5),
        "guard": ["old"],
        "interpolated": {"0.5": results(val=0.5, old=0.6)},
        "chosen": 0.5,
        "chosen_on": "",
    }
    console = Console(width=100)
    with console.capture() as shown:
        console.print(guard_table(compared))
    lines = [line.split() for line in shown.get().splitlines()]
    assert ["set", "before", "a=0.5*", "after"] in lines
    assert ["val", "target", "25.0", "50.0", "75.0"] in lines
    assert ["old", "guard", "62.5", "60.0", "50.0"] in lines
    assert ["pairs", "target", "25.0", "25.0", "25.0"] in lines
