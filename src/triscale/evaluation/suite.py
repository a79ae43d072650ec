"""Several evaluation sets at once, the drop from the first to the shifted ones, and the form that results take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from triscale.errors import UsageError
from triscale.evaluation.encoder import Encoder
from triscale.evaluation.predictions import Predictions, write_whole
from triscale.evaluation.retrieval import DEPTHS, evaluate_retrieval
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.zeroshot import build_classifier, evaluate_classification

LONGEST_NAME = 40
SHOWN_LABELS = 5

SetResult = dict[str, str | int | float]
"""Of one set: "task", "samples" and its scores, fractions of 1 (see the functions that make them)."""


COLUMNS = {
    "classification": {"top1": "top-1", "top5": "top-5", "mean_per_class": "per class"},
    "retrieval": {
        f"{way}_recall@{depth}": f"{found if depth == 1 else ''}@{depth}"
        for way, found in (("image_to_text", "text"), ("text_to_image", "image"))
        for depth in DEPTHS
    },
}
"""By task, the scores that the table shows, and what it calls them."""


class Results(TypedDict):
    """What `results.json` holds."""

    sets: dict[str, SetResult]
    shift_mean: float | None
    """Mean top-1 over the shifted sets; None where none is named."""
    drop: float | None
    """Top-1 of the first classification set less `shift_mean`."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model does on evaluation sets; the same on every process."""

    results: Results
    """The scores, as `results.json` holds them."""
    predictions: Mapping[str, Predictions]
    """By name of a classification set, what the model answered image by image."""


def check_shifts(sets: Iterable[EvaluationSet], shifts: Sequence[str]) -> None:
    """Raise UsageError if a name in `shifts` is not that of a classification set."""
    names = [each.name for each in sets if each.task == "classification"]
    for shift in shifts:
        if shift not in names:
            raise UsageError(
                f"shifted set {shift!r} is not among the classification sets: {', '.join(names) or 'none'}"
            )


def evaluate(encoder: Encoder, sets: Sequence[EvaluationSet], shifts: Sequence[str] = ()) -> Evaluation:
    """Score a model on every set; all processes call it and get the same results.

    Args:
        sets: with distinct names; the first classification set is the one that the drop is measured from.
        shifts: names of the classification sets whose distribution is shifted.

    Raises:
        UsageError: a shifted set is not there.
        RunError: a set can't be read, or the model's embeddings are not finite.
    """
    check_shifts(sets, shifts)
    scored: dict[str, SetResult] = {}
    classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}  # sets often share names and templates
    for each in sets:
        if each.task == "retrieval":
            scored[each.name] = evaluate_retrieval(encoder, each)
            continue
        prompts = (each.classnames, each.templates)
        if prompts not in classifiers:
            classifiers[prompts] = build_classifier(encoder, each)
        scored[each.name] = evaluate_classification(encoder, each, classifiers[prompts])
    return Evaluation(results=_with_shifts(scored, shifts), predictions={})


def _with_shifts(scored: dict[str, SetResult], shifts: Sequence[str]) -> Results:
    if not shifts:
        return Results(sets=scored, shift_mean=None, drop=None)
    shift_mean = sum(float(scored[name]["top1"]) for name in shifts) / len(shifts)
    first = next(result for result in scored.values() if result["task"] == "classification")
    return Results(sets=scored, shift_mean=shift_mean, drop=float(first["top1"]) - shift_mean)


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write results as JSON, in place of what is there only once they are complete on the disk.

    Raises:
        RunError: they can't be written.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    write_whole(Path(path), text.encode(), "results")


def results_table(results: Results) -> Group:
    """Results for the terminal, a table for each task: a row a set, scores in percent, and what guessing reaches."""
    tables: list[Table | Text] = []
    for task, columns in COLUMNS.items():
        rows = {name: result for name, result in results["sets"].items() if result["task"] == task}
        if rows:
            tables.append(_table(rows, columns))
    if results["shift_mean"] is not None and results["drop"] is not None:
        mean, drop = _percent(results["shift_mean"]), _percent(results["drop"])
        tables.append(Text(f" mean top-1 over shifted sets {mean} %, drop {drop} points"))
    return Group(*tables)


def _table(rows: Mapping[str, SetResult], columns: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("set", no_wrap=True, overflow="ellipsis", max_width=LONGEST_NAME)
    has_bad = any("bad" in result for result in rows.values())
    for header in ("samples", *(("bad",) if has_bad else ()), *columns.values()):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True, style="dim")
    for name, result in rows.items():
        bad = (f"{int(result.get('bad', 0)):,}",) if has_bad else ()
        scores = (_percent(float(result[key])) for key in columns)
        samples = f"{int(result['samples']):,}"
        table.add_row(printable(name, LONGEST_NAME), samples, *bad, *scores, _percent(_chance(result)))
    return table


def printable(name: str, longest: int) -> Text:
    """A user's name as plain text for the terminal: no markup, no control characters, at most `longest` long."""
    kept = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[: longest + 1])
    return Text(kept if len(kept) <= longest else kept[: longest - 1] + "…")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _chance(result: SetResult) -> float:
    """Expected top-1, or recall@1 of texts, of a model that guesses."""
    return 1 / int(result["classes"] if result["task"] == "classification" else result["samples"])


def guesses_table(images: Sequence[str], labels: Sequence[str], probabilities: Sequence[Sequence[float]]) -> Table:
    """The likeliest labels of each image, for the terminal."""
    table = Table("image", "label", "probability")
    for path, row in zip(images, probabilities, strict=True):
        best = sorted(range(len(labels)), key=row.__getitem__, reverse=True)[:SHOWN_LABELS]
        for place, index in enumerate(best):
            name = printable(path, 80) if place == 0 else ""
            table.add_row(name, printable(labels[index], 60), f"{row[index]:.1%}")
    return table
