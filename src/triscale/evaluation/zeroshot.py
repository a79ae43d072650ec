"""Zero-shot classification with prompt ensembles (CLIP, arXiv 2103.00020, section 3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from triscale import distributed
from triscale.data.resize import fit_square
from triscale.data.samples import REASONS, PartlyUsed
from triscale.errors import RunError
from triscale.evaluation import metrics
from triscale.evaluation.encoder import Batch, Encoder, read_batches
from triscale.evaluation.predictions import EMBEDDINGS, GUESSES, Predictions
from triscale.evaluation.sets import EvaluationSet
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


def predict(
    encoder: Encoder,
    evaluation_set: EvaluationSet,
    make_classifier: Callable[[EvaluationSet], Float[Tensor, "k d"]] | None = None,
) -> Predictions:
    """What a model answers on a classification set; every process calls it and gets the same.

    Samples of a multi-label set that have no right class are left out.

    Args:
        make_classifier: gives the set's class embeddings; None: `build_classifier`.

    Raises:
        RunError: no sample is readable and labelled, or the model's embeddings are not finite.
        UsageError: a sample's label is wrong.
    """
    batches = read_batches(evaluation_set, encoder)  # whose workers read while class embeddings are made
    with closing(batches):
        make = make_classifier or partial(build_classifier, encoder)
        answers = _Answers(evaluation_set, make(evaluation_set), encoder.logit_scale())
        for batch in batches:
            answers.add(batch, encoder)
    return answers.gathered()


class _Answers:
    """The answers to this process's batches, on the encoder's device until they are gathered."""

    def __init__(self, evaluation_set: EvaluationSet, classifier: Float[Tensor, "k d"], logit_scale: float) -> None:
        self._set, self._logit_scale = evaluation_set, logit_scale
        self._device = classifier.device
        allowed = range(len(classifier)) if evaluation_set.allowed is None else evaluation_set.allowed
        self._allowed = self._tensor(list(allowed))
        self._classifier = classifier if evaluation_set.allowed is None else classifier[self._allowed]
        self._column = torch.full((len(classifier),), -1, device=self._device)
        self._column[self._allowed] = torch.arange(len(allowed), device=self._device)
        self._groups = self._tensor(list(evaluation_set.levels.values())).reshape(-1, len(classifier))
        self._depth = min(GUESSES, len(allowed))
        width = 4 + self._depth + len(evaluation_set.slices) + len(evaluation_set.levels)
        # Starting with none, so that a process without a batch has their shapes.
        self._integers = [torch.zeros(0, width, dtype=torch.int64, device=self._device)]
        self._probabilities = [torch.zeros(0, self._depth, device=self._device)]
        self._embeddings = [torch.zeros(0, classifier.shape[1], device=self._device)]
        self._bad: Counter[str] = Counter()
        self._not_finite = torch.zeros((), dtype=torch.int64, device=self._device)

    def _tensor(self, values: Any) -> Int[Tensor, ...]:
        return torch.as_tensor(values, dtype=torch.int64, device=self._device)

    def add(self, batch: Batch, encoder: Encoder) -> None:
        """Embed a batch and keep the answers; what is computed need not be there yet when this returns."""
        self._bad.update(batch.bad)
        rows = [row for row, labels in enumerate(batch.labels) if labels]
        if not rows:
            return
        pixels = batch.pixels if len(rows) == len(batch) else batch.pixels[rows]
        embeddings = encoder.embed_pixels(pixels)
        scores = embeddings @ self._classifier.T
        self._not_finite += (~scores.isfinite()).any(dim=1).sum()
        guesses = likeliest(scores, self._depth)
        labels, ahead, at_levels = self._truth(scores, guesses[:, 0], [batch.labels[row] for row in rows])
        in_slices = [[batch.keys[row] in each for each in self._set.slices.values()] for row in rows]
        samples, total = batch.samples[rows], len(self._set)
        is_kept = samples * EMBEDDINGS // total < (samples + 1) * EMBEDDINGS // total
        known = np.concatenate([samples[:, None], is_kept[:, None], np.array(in_slices, np.int64)], axis=1)
        columns = (self._tensor(known), labels[:, None], ahead[:, None], self._allowed[guesses], at_levels)
        self._integers.append(torch.cat(columns, dim=1))
        chances = (self._logit_scale * scores).softmax(dim=1)
        self._probabilities.append(chances.gather(1, guesses).float())
        self._embeddings.append(embeddings[self._tensor(np.flatnonzero(is_kept))])

    def _truth(
        self, scores: Float[Tensor, "n a"], guess: Int[Tensor, " n"], labels: list[tuple[int, ...]]
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, "n l"]]:
        """Of each sample its best-ranked right class, the classes before that, and whether it is right at each level.

        A class that may not be guessed ranks behind all others.
        """
        row = self._tensor([row for row, right in enumerate(labels) for _ in right])
        label = self._tensor([each for right in labels for each in right])
        column = self._column[label]
        ahead = classes_ahead(scores[row], column.clamp(min=0))
        ahead = torch.where(column < 0, scores.shape[1], ahead)
        # The least (ahead, place in the list) of each row, as one number.
        pair = ahead * len(row) + torch.arange(len(row), device=self._device)
        best = torch.full_like(guess, torch.iinfo(torch.int64).max).scatter_reduce(0, row, pair, "amin") % len(row)
        same = self._groups[:, self._allowed[guess]][:, row] == self._groups[:, label]
        at_levels = torch.zeros(len(self._groups), len(guess), dtype=torch.int64, device=self._device)
        at_levels.index_add_(1, row, same.long())
        return label[best], ahead[best], at_levels.clamp(max=1).T

    def gathered(self) -> Predictions:
        """All processes' answers. A collective."""
        counts = torch.cat([self._tensor([self._bad[reason] for reason in REASONS]), self._not_finite[None]])
        *bad, not_finite = distributed.all_reduce_sum(counts).tolist()
        named = {reason: count for reason, count in zip(REASONS, bad, strict=True) if count}
        parts = (self._integers, self._probabilities, self._embeddings)
        integers, probabilities, embeddings = (_gather(torch.cat(part)).cpu().numpy() for part in parts)
        where = f"evaluation set {self._set.name!r}"
        if not_finite:
            raise RunError(f"{where}: {not_finite} embeddings or their scores are not finite")
        if not len(integers):
            fault = "can be read" if named or not self._set.multi_label else "has a right class"
            raise RunError(f"{where}: none of its {len(self._set)} samples {fault}")
        widths = (1, 1, len(self._set.slices), 1, 1, self._depth, len(self._set.levels))
        samples, is_kept, in_slices, labels, ahead, guesses, at_levels = np.split(
            integers, np.cumsum(widths)[:-1], axis=1
        )
        return Predictions(
            samples=samples[:, 0],
            labels=labels[:, 0],
            ahead=ahead[:, 0],
            guesses=guesses,
            probabilities=probabilities,
            in_slices=in_slices > 0,
            at_levels=at_levels > 0,
            embedded=np.flatnonzero(is_kept),
            embeddings=embeddings,
            bad=named,
        )


def _gather(rows: Tensor) -> Tensor:
    return distributed.all_gather_rows(rows, distributed.row_counts(len(rows), rows.device))


def classes_ahead(scores: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many classes rank before the true one. Of equal scores the class with the lower index ranks first."""
    truth = labels[:, None]
    true_scores = scores.gather(1, truth)
    index = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > true_scores) | ((scores == true_scores) & (index < truth))).sum(dim=1)


def likeliest(scores: Float[Tensor, "n k"], most: int) -> Int[Tensor, "n t"]:
    """The `most` (at most k) classes with the highest scores, of equal scores the class with the lower index first."""
    left, found = scores.clone(), []
    for _ in range(most):
        found.append(left.argmax(dim=1))  # the first of equal ones, unlike topk
        left.scatter_(1, found[-1][:, None], -torch.inf)
    return torch.stack(found, dim=1)


def classification_scores(evaluation_set: EvaluationSet, predictions: Predictions) -> dict[str, Any]:
    """The scores of a classification set.

    Returns:
        "task"; "samples" that they rest on; "classes"; the fractions "top1", "top5" and "mean_per_class" (of the
        classes that occur), each with its 95 % "..._interval" [low, high]; "ece", the expected calibration error. Where
        there are any: "allowed_classes", their number; "levels", top-1 by name; "slices", "samples" and "top1" by name;
        "unlabelled" samples, left out; "bad" samples, left out too, and "bad_reasons", their numbers by reason;
        "merged_classes", labels whose name was taken already.
    """
    labels, ahead, name = predictions.labels, predictions.ahead, evaluation_set.name
    right = ahead < 1
    table = metrics.class_table(labels, ahead, predictions.guesses[:, 0], len(evaluation_set.classnames))
    intervals = metrics.top_k_intervals(ahead, (1, 5), name)
    return {
        "task": "classification",
        "samples": len(predictions),
        "classes": len(evaluation_set.classnames),
        "top1": metrics.top_k(ahead, 1),
        "top5": metrics.top_k(ahead, 5),
        "mean_per_class": table.mean_per_class,
        "top1_interval": intervals[1],
        "top5_interval": intervals[5],
        "mean_per_class_interval": metrics.mean_per_class_interval(labels, ahead, name),
        "ece": metrics.reliability(predictions.probabilities[:, 0], right).expected_error,
        **({} if evaluation_set.allowed is None else {"allowed_classes": len(evaluation_set.allowed)}),
        **_parts(evaluation_set, predictions, right),
        **left_out(evaluation_set, predictions.bad),
        **_unless_zero("unlabelled", len(evaluation_set) - len(predictions) - sum(predictions.bad.values())),
        **_unless_zero("merged_classes", evaluation_set.merged_classes),
    }


def _parts(
    evaluation_set: EvaluationSet, predictions: Predictions, right: Bool[np.ndarray, " n"]
) -> dict[str, dict[str, Any]]:
    """Top-1 at levels and in slices; None in a slice without a sample."""
    levels = {
        name: float(column.mean()) for name, column in zip(evaluation_set.levels, predictions.at_levels.T, strict=True)
    }
    slices = {
        name: {"samples": int(column.sum()), "top1": float(right[column].mean()) if column.any() else None}
        for name, column in zip(evaluation_set.slices, predictions.in_slices.T, strict=True)
    }
    return {key: values for key, values in (("levels", levels), ("slices", slices)) if values}


def left_out(evaluation_set: EvaluationSet, bad: Mapping[str, int]) -> dict[str, Any]:
    """Of results, the samples that scores leave out: "bad", and "bad_reasons" by reason; nothing where there are none.

    Args:
        bad: samples that were read, by reason; what the source itself leaves out is added.
    """
    reasons = Counter(bad)
    if isinstance(evaluation_set.source, PartlyUsed):
        reasons.update(reason for _, reason in evaluation_set.source.skipped)
    total = sum(bad.values()) + evaluation_set.skipped
    return {"bad": total, "bad_reasons": dict(sorted(reasons.items()))} if total else {}


def _unless_zero(key: str, count: int) -> dict[str, int]:
    return {key: count} if count else {}


def top_guesses(evaluation_set: EvaluationSet, predictions: Predictions, *, count: int, most: int = 3) -> list[Guess]:
    """The likeliest classes of `count` images drawn from the set's predictions, the same in every run.

    Reads the images; `most` classes of each.
    """
    row_of = {sample: row for row, sample in enumerate(predictions.samples.tolist())}
    drawn = generator("guesses", evaluation_set.name).permutation(len(evaluation_set)).tolist()
    names = evaluation_set.classnames
    return [
        Guess(
            image=_for_show(evaluation_set.read(sample, min_side=LARGEST_SHOWN_SIDE).image),
            truth=names[predictions.labels[row_of[sample]]],
            names=tuple(names[index] for index in predictions.guesses[row_of[sample], :most]),
            probabilities=tuple(predictions.probabilities[row_of[sample], :most].tolist()),
        )
        for sample in [sample for sample in drawn if sample in row_of][:count]
    ]


def _for_show(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    return fit_square(image, LARGEST_SHOWN_SIDE, "pad") if max(image.shape) > LARGEST_SHOWN_SIDE else image
