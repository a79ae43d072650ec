"""Scores as plain functions of arrays: accuracy, calibration, confidence intervals, and what goes wrong where.

The rank of a sample's right answer is given as the number of candidates ahead of it: 0 means that it comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from triscale.randomness import generator

BINS = 15
RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
_LARGEST_BLOCK = 2**22


def top_k(ahead: Int64[np.ndarray, " n"], k: int) -> float:
    """The fraction of samples (n >= 1) whose right answer is among the k first."""
    return int((ahead < k).sum()) / len(ahead)


def median_rank(ahead: Int64[np.ndarray, " n"]) -> float:
    """The median of the right answers' ranks, which count from 1; of an even number the mean of the middle two."""
    return float(np.median(ahead)) + 1


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """What became of every class's samples."""

    samples: Int64[np.ndarray, " k"]
    """Of which it is the right class."""
    right: Int64[np.ndarray, " k"]
    """Of these, those with the right guess."""
    among_five: Int64[np.ndarray, " k"]
    """Of these, those with the right class among the five likeliest."""
    guessed: Int64[np.ndarray, " k"]
    """For which it is the likeliest guess, right or wrong."""

    @property
    def mean_per_class(self) -> float:
        """The mean over the classes that occur of the fraction of right guesses."""
        occurs = self.samples > 0
        return float((self.right[occurs] / self.samples[occurs]).mean())


def class_table(
    labels: Int64[np.ndarray, " n"], ahead: Int64[np.ndarray, " n"], guesses: Int64[np.ndarray, " n"], classes: int
) -> ClassTable:
    """Count by class.

    Args:
        labels: each sample's right class.
        ahead: classes ranking before it.
        guesses: each sample's likeliest class.
        classes: k, their number.
    """

    def count(chosen: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " k"]:
        return np.bincount(chosen, minlength=classes).astype(np.int64)

    return ClassTable(
        samples=count(labels),
        right=count(labels[ahead < 1]),
        among_five=count(labels[ahead < 5]),
        guessed=count(guesses),
    )


def confusion_pairs(
    labels: Int64[np.ndarray, " n"], ahead: Int64[np.ndarray, " n"], guesses: Int64[np.ndarray, " n"], most: int
) -> list[tuple[int, int, int]]:
    """The pairs of classes that are taken for each other most often: (right class, guess, samples), `most` of them.

    The most frequent come first, of equal ones the lower classes. Arguments as of `class_table`.
    """
    wrong = ahead > 0
    pairs, counts = np.unique(np.stack([labels[wrong], guesses[wrong]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[row, 0]), int(pairs[row, 1]), int(counts[row])) for row in order]


def confident_mistakes(
    ahead: Int64[np.ndarray, " n"], confidence: Float32[np.ndarray, " n"], most: int
) -> Int64[np.ndarray, " m"]:
    """The rows of wrong guesses with the highest probability, `most` of them, highest first, of equal ones the first.

    Args:
        ahead: classes ranking before the right one.
        confidence: probability of the likeliest class.
    """
    wrong = np.flatnonzero(ahead > 0)
    return wrong[np.argsort(-confidence[wrong], kind="stable")[:most]]


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Confidence and accuracy in bins of equal width; bin i is of confidences above i / b, up to (i + 1) / b."""

    samples: Int64[np.ndarray, " b"]
    confidence: Float64[np.ndarray, " b"]
    """Mean over the samples of the bin; 0 without any."""
    accuracy: Float64[np.ndarray, " b"]
    """Fraction of right guesses in the bin; 0 without any."""

    @property
    def expected_error(self) -> float:
        """ECE, the mean over samples of |accuracy - confidence| of their bin (Guo et al., arXiv 1706.04599, eq. 3)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.samples * gaps).sum() / self.samples.sum())


def reliability(confidence: Float32[np.ndarray, " n"], right: Bool[np.ndarray, " n"], bins: int = BINS) -> Reliability:
    """How often guesses of each confidence are right (Guo et al., section 2). n >= 1.

    Args:
        confidence: probability of each sample's likeliest class.
        right: whether that is right.
    """
    edges = np.arange(1, bins) / bins
    places = np.searchsorted(edges, confidence.astype(np.float64), side="left")
    samples = np.bincount(places, minlength=bins)
    sums = [np.bincount(places, weights=values, minlength=bins) for values in (confidence, right)]
    confidences, accuracies = (total / np.maximum(samples, 1) for total in sums)
    return Reliability(samples=samples.astype(np.int64), confidence=confidences, accuracy=accuracies)


def bootstrap(
    kinds: Int64[np.ndarray, " n"],
    scores: Callable[[Int64[np.ndarray, "r c"]], Float64[np.ndarray, "r s"]],
    name: str,
) -> Float64[np.ndarray, "s 2"]:
    """95 % intervals of scores by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13); 1,000 resamples.

    A resample draws n samples with replacement. Samples of one kind count alike, so that it is drawn as the numbers of
    its kinds, which are multinomial: the cost depends on the kinds and not on n.

    Args:
        kinds: what each sample is; n >= 1.
        scores: from resamples, each as the numbers of the c distinct kinds in ascending order, to s scores of each.
        name: what the samples are; draws are a pure function of it and the kinds.
    """
    counts = np.unique(kinds, return_counts=True)[1]
    rng = generator("bootstrap", name)
    block = max(1, min(RESAMPLES, _LARGEST_BLOCK // len(counts)))
    sizes = [min(block, RESAMPLES - done) for done in range(0, RESAMPLES, block)]
    shares = counts / len(kinds)
    found = [scores(rng.multinomial(len(kinds), shares, size=size).astype(np.int64)) for size in sizes]
    return np.percentile(np.concatenate(found), PERCENTILES, axis=0).T


def top_k_intervals(ahead: Int64[np.ndarray, " n"], depths: Sequence[int], name: str) -> dict[int, list[float]]:
    """Intervals [low, high] of `top_k` by depth.

    Args:
        ahead: candidates ahead of each sample's right answer.
        depths: values of k, ascending.
        name: as of `bootstrap`.
    """
    kinds = np.searchsorted(np.array(depths), ahead, side="right").astype(np.int64)  # the depths it is too deep for
    within = np.unique(kinds)[:, None] <= np.arange(len(depths))
    intervals = bootstrap(kinds, lambda counts: counts @ within.astype(np.float64) / len(kinds), name)
    return dict(zip(depths, intervals.tolist(), strict=True))


def mean_per_class_interval(labels: Int64[np.ndarray, " n"], ahead: Int64[np.ndarray, " n"], name: str) -> list[float]:
    """Interval [low, high] of the mean per class; arguments as of `class_table` and `bootstrap`.

    A class that a resample has no sample of is left out of its mean.
    """
    kinds = 2 * labels + (ahead < 1)
    distinct = np.unique(kinds)
    starts = np.flatnonzero(np.diff(distinct // 2, prepend=-1))  # where the kinds of each class begin
    is_right = distinct % 2

    def scores(counts: Int64[np.ndarray, "r c"]) -> Float64[np.ndarray, "r 1"]:
        samples = np.add.reduceat(counts, starts, axis=1)
        right = np.add.reduceat(counts * is_right, starts, axis=1)
        fractions = (right / np.maximum(samples, 1)).sum(axis=1) / (samples > 0).sum(axis=1)
        return fractions[:, None]

    return bootstrap(kinds, scores, name)[0].tolist()
