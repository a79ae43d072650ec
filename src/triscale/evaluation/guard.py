"""What fine-tuning gained and what it lost: scores before and after, of weights in between, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from triscale.errors import UsageError
from triscale.evaluation.suite import Results
from triscale.evaluation.tables import printable

HALF = 0.5
"""The share of trained weights that is taken where no set chooses: WiSE-FT's (arXiv 2109.01903, section 4)."""


class ComparedResults(Results):
    """What `results.json` holds of a run that is compared with what it began with; at the top, after training."""

    before: Results
    """Of the initial weights."""
    after: Results
    """Of the trained weights."""
    guard: list[str]
    """Names of the sets whose scores should not fall; the others are targets."""
    interpolated: dict[str, Results]
    """Share of the trained weights, between 0 and 1, to results."""
    chosen: float | None
    """The share that was taken; None: nothing was interpolated."""
    chosen_on: str
    """The set whose scores chose it, and so say too much; "": none did."""


def score(result: Mapping[str, Any]) -> float:
    """One number of a set's result: top-1, or recall@1 of images."""
    return float(result["top1"] if result["task"] == "classification" else result["text_to_image_recall@1"])


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """That number of every set of results."""
    return {name: score(result) for name, result in results["sets"].items()}


class GuardWatch:
    """Compares scores with those from before training, and says once where one of the guard has fallen.

    Args:
        before: set to score.
        guard: names of the sets that should not fall.
        limit: the largest fall without a word, as a fraction of 1.
    """

    def __init__(self, before: Mapping[str, float], guard: Sequence[str], limit: float) -> None:
        self._before, self._guard, self._limit, self._told = before, guard, limit, False

    def fall(self, now: Mapping[str, float]) -> float:
        """The largest fall of a set of the guard; below 0: all have risen."""
        return max(self._before[name] - now[name] for name in self._guard)

    def add(self, now: Mapping[str, float]) -> str | None:
        """Take in scores; the warning, once, when it has to be given."""
        worst = max(self._guard, key=lambda name: self._before[name] - now[name])
        if self._told or self.fall(now) <= self._limit:
            return None
        self._told = True
        return (
            f"guard set {worst} has fallen from {self._before[worst]:.1%} to {now[worst]:.1%}, by more than"
            f" --train.guard-drop {self._limit:g}: lower --optim.learning-rate or --train.epochs, lock a tower with"
            " --train.frozen, or take interpolated weights (--train.interpolate)"
        )


def check_choice(grid: Sequence[float], choose_on: str, sets: Sequence[str]) -> None:
    """Raise UsageError where weights are to be interpolated and nothing, or not the set that chooses, is evaluated."""
    if grid and choose_on and choose_on not in sets:
        raise UsageError(f"--train.choose-on {choose_on!r} is not among the sets: {', '.join(sets) or 'none'}")
    if grid and not sets:
        raise UsageError("--train.interpolate has no set to compare weights on: add --data.eval, or leave it empty")


def choose(by_share: Mapping[float, Mapping[str, Any]], choose_on: str) -> float:
    """The share of trained weights to take.

    Args:
        by_share: share to results.
        choose_on: the set whose highest score decides, at equal scores for the weights nearer to the initial ones; "":
            the share nearest to a half, of two the smaller one.
    """
    if not choose_on:
        return min(by_share, key=lambda share: (abs(share - HALF), share))
    return max(by_share, key=lambda share: (scores(by_share[share])[choose_on], -share))


def guard_table(results: Mapping[str, Any]) -> Table:
    """Scores before, in between and after, in percent, for the terminal: a row a set; the share that is taken starred.

    Args:
        results: as results.json of a run that compares holds them.
    """
    columns: dict[str, Mapping[str, float]] = {"before": scores(results["before"])}
    chosen = results["chosen"]
    for share, each in sorted(results["interpolated"].items(), key=lambda item: float(item[0])):
        columns[f"a={share}" + "*" * (chosen is not None and float(share) == chosen)] = scores(each)
    columns["after"] = scores(results["after"])
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("set", no_wrap=True, overflow="ellipsis", max_width=40)
    table.add_column("", no_wrap=True)
    for header in columns:
        star = "*" * (chosen is not None and {"before": 0, "after": 1}.get(header) == chosen)
        table.add_column(header + star, justify="right", no_wrap=True)
    for name in results["sets"]:
        # A set's name is the user's: nothing in it is markup or a terminal command.
        kind = "guard" if name in results["guard"] else "target"
        table.add_row(printable(name, 40), kind, *(f"{100 * column[name]:.1f}" for column in columns.values()))
    return table
