"""Zero-shot classification with prompt ensembles (CLIP, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from triscale import distributed
from triscale.data.resize import fit_square
from triscale.data.samples import BadSample
from triscale.errors import RunError
from triscale.evaluation.encoder import Encoder, read_batches
from triscale.evaluation.sets import EvaluationSet, Example
from triscale.models.prompts import class_embeddings
from triscale.randomness import generator

LARGEST_SHOWN_SIDE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """One image with the classes that the model finds likeliest, likeliest first."""

    image: UInt8[np.ndarray, "h w 3"]
    truth: str
    names: tuple[str, ...]
    probabilities: tuple[float, ...]


def build_classifier(encoder: Encoder, evaluation_set: EvaluationSet) -> Float[Tensor, "k d"]:
    """The set's k class embeddings, of length 1: per class the mean over the prompt templates."""
    return class_embeddings(encoder.embed_texts, evaluation_set.classnames, evaluation_set.templates)


def evaluate_classification(
    encoder: Encoder, evaluation_set: EvaluationSet, classifier: Float[Tensor, "k d"] | None = None
) -> dict[str, str | int | float]:
    """Score a model on a classification set; every process calls it and gets the same result.

    Args:
        classifier: the set's class embeddings where they are at hand (see `build_classifier`).

    Returns:
        "task"; "samples" really scored; "classes"; the fractions "top1", "top5" and "mean_per_class" (of the classes
        that occur); where not zero, "bad" samples left out and "merged_classes", labels whose name was taken already.

    Raises:
        RunError: no sample can be read, or the model's embeddings are not finite.
    """
    if classifier is None:
        classifier = build_classifier(encoder, evaluation_set)
    classes = len(evaluation_set.classnames)
    counts = torch.zeros(3, classes, dtype=torch.int64, device=classifier.device)  # samples, first, among five
    left_out = torch.zeros(2, dtype=torch.int64, device=classifier.device)  # bad, not finite
    for batch in read_batches(evaluation_set, encoder):
        left_out[0] += sum(batch.bad.values())
        if not len(batch):
            continue
        scores = encoder.embed_pixels(batch.pixels) @ classifier.T
        labels = torch.tensor([labels[0] for labels in batch.labels], device=scores.device)
        ahead = classes_ahead(scores, labels)
        left_out[1] += (~scores.isfinite()).any(dim=1).sum()
        for row, counted in enumerate((ahead < classes, ahead < 1, ahead < 5)):
            counts[row] += torch.bincount(labels[counted], minlength=classes)
    distributed.all_reduce_sum(counts)
    bad, not_finite = distributed.all_reduce_sum(left_out).tolist()
    if not_finite:
        raise RunError(
            f"evaluation set {evaluation_set.name!r}: {not_finite} embeddings or their scores are not finite"
        )
    if not int(counts[0].sum()):
        raise RunError(f"evaluation set {evaluation_set.name!r}: none of its {bad} samples can be read")
    return _result(counts.cpu(), bad + evaluation_set.skipped, evaluation_set.merged_classes)


def classes_ahead(scores: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many classes rank before the true one. Of equal scores the class with the lower index ranks first."""
    truth = labels[:, None]
    true_scores = scores.gather(1, truth)
    index = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > true_scores) | ((scores == true_scores) & (index < truth))).sum(dim=1)


def top_guesses(
    encoder: Encoder,
    evaluation_set: EvaluationSet,
    *,
    count: int,
    top: int = 3,
    classifier: Float[Tensor, "k d"] | None = None,
) -> list[Guess]:
    """The likeliest classes of `count` images drawn from the set, the same in every run; bad ones are passed over.

    Probabilities are softmax(logit scale * cosine) over all classes.
    """
    if classifier is None:
        classifier = build_classifier(encoder, evaluation_set)
    examples: list[Example] = []
    for index in generator("guesses", evaluation_set.name).permutation(len(evaluation_set)).tolist():
        if len(examples) == count:
            break
        with suppress(BadSample):
            examples.append(evaluation_set.read(index))
    if not examples:
        return []
    cosines = encoder.embed_images([example.image for example in examples]) @ classifier.T
    probabilities, order = (encoder.logit_scale() * cosines).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    names = evaluation_set.classnames
    return [
        Guess(
            image=_for_show(example.image),
            truth=names[example.labels[0]],
            names=tuple(names[index] for index in order[row, :top].tolist()),
            probabilities=tuple(probabilities[row, :top].tolist()),
        )
        for row, example in enumerate(examples)
    ]


def _for_show(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    return fit_square(image, LARGEST_SHOWN_SIDE, "pad") if max(image.shape) > LARGEST_SHOWN_SIDE else image


def _result(counts: Int[Tensor, "3 k"], bad: int, merged_classes: int) -> dict[str, str | int | float]:
    samples, first, among_five = counts.sum(dim=1).tolist()
    occurs = counts[0] > 0
    per_class = counts[1, occurs].double() / counts[0, occurs]
    result: dict[str, str | int | float] = {
        "task": "classification",
        "samples": samples,
        "classes": counts.shape[1],
        "top1": first / samples,
        "top5": among_five / samples,
        "mean_per_class": float(per_class.mean()),
    }
    return result | {key: n for key, n in (("bad", bad), ("merged_classes", merged_classes)) if n}
