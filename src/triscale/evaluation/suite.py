"""Several evaluation sets at once, the drop from the first to the shifted ones, and the form that results take."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from triscale.errors import UsageError
from triscale.evaluation.encoder import Encoder
from triscale.evaluation.predictions import Predictions, predictions_file, write_whole
from triscale.evaluation.retrieval import evaluate_retrieval
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.zeroshot import build_classifier, classification_scores, predict

RESULTS = "results.json"

SetResult = dict[str, Any]
"""Of one set: "task", "samples" and its scores, fractions of 1 (see the functions that make them)."""


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
    predictions: dict[str, Predictions] = {}
    classifiers: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}

    def classifier(each: EvaluationSet) -> Tensor:
        prompts = (each.classnames, each.templates)  # which sets often share
        if prompts not in classifiers:
            classifiers[prompts] = build_classifier(encoder, each)
        return classifiers[prompts]

    for each in sets:
        if each.task == "retrieval":
            scored[each.name] = evaluate_retrieval(encoder, each)
        else:
            predictions[each.name] = predict(encoder, each, classifier)
            scored[each.name] = classification_scores(each, predictions[each.name])
    return Evaluation(results=_with_shifts(scored, shifts), predictions=predictions)


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


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write predictions/NAME.safetensors of every classification set, and results.json when these are complete.

    Raises:
        RunError: they can't be written.
    """
    for name, each in evaluation.predictions.items():
        each.save(predictions_file(folder, name))
    write_results(folder / RESULTS, evaluation.results)
