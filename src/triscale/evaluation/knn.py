"""k nearest neighbours by cosine: exact, blocked, with the votes of Wu et al. (arXiv 1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from triscale.errors import UsageError
from triscale.evaluation.probe_rows import LabelledRows, unit

TEMPERATURE = 0.07
"""Of the weights exp(cosine / T), that of Wu et al. and of DINO."""


def neighbours(
    train: LabelledRows, test: LabelledRows, k: int, device: torch.device
) -> tuple[Float[Tensor, "n k"], Int64[Tensor, "n k"]]:
    """Cosines and classes of the k nearest training rows of each test row, nearest first, of equal ones the earlier.

    Of the products only a chunk of test rows against one of training rows is there at a time.

    Raises:
        UsageError: there are fewer training rows.
    """
    if k > len(train):
        raise UsageError(f"--knn {k}: {train.name} has {len(train)} samples")
    cosines, classes = [], []
    for features, _ in test.chunks():
        queries = torch.from_numpy(unit(features)).to(device)
        best = queries.new_empty((len(queries), 0))
        labels = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
        for chunk, its_labels in train.chunks():
            found = queries @ torch.from_numpy(unit(chunk)).to(device).T
            near = torch.from_numpy(its_labels).to(device).expand(len(queries), -1)
            # Stable: of equal cosines the earlier row stays before.
            best, order = torch.cat([best, found], dim=1).sort(dim=1, descending=True, stable=True)
            labels = torch.cat([labels, near], dim=1).gather(1, order[:, :k])
            best = best[:, :k]
        cosines.append(best.cpu())
        classes.append(labels.cpu())
    return torch.cat(cosines), torch.cat(classes)


def votes(
    cosines: Float[Tensor, "n k"], classes: Int64[Tensor, "n k"], count: int, *, weighted: bool
) -> Float[Tensor, "n c"]:
    """The score of each of `count` classes for each row.

    Weighted: the sum of exp(cosine / T) over its neighbours of that class. Otherwise their number, and of equal numbers
    the class with the nearest neighbour is ahead.
    """
    scores = torch.zeros((len(cosines), count), dtype=torch.float64)
    if weighted:
        return scores.scatter_add_(1, classes, (cosines.double() / TEMPERATURE).exp())
    scores.scatter_add_(1, classes, torch.ones_like(classes, dtype=torch.float64))
    k = classes.shape[1]
    nearness = torch.linspace(0.5, 0, k + 1, dtype=torch.float64)[:k].expand(len(classes), -1)  # below half a vote
    return scores + torch.zeros_like(scores).scatter_reduce_(1, classes, nearness, "amax")


def knn_ranks(
    train: LabelledRows, test: LabelledRows, ks: Sequence[int], classes: int, device: torch.device
) -> dict[tuple[int, bool], Int64[np.ndarray, " n"]]:
    """By k and whether votes are weighted: how many classes rank before the right one of each test row.

    A class without a vote ranks behind all.
    """
    cosines, labels = neighbours(train, test, max(ks), device)
    truth = torch.from_numpy(test.labels)
    found: dict[tuple[int, bool], np.ndarray] = {}
    for k in ks:
        for weighted in (True, False):
            pieces = [np.empty(0, dtype=np.int64)]
            for rows in torch.arange(len(truth)).split(1024):
                scores = votes(cosines[rows, :k], labels[rows, :k], classes, weighted=weighted)
                ahead = ranks(scores, truth[rows])
                voted = scores.gather(1, truth[rows].unsqueeze(1)).squeeze(1) > 0
                pieces.append(torch.where(voted, ahead, classes).numpy())
            found[k, weighted] = np.concatenate(pieces)
    return found


def ranks(scores: Float[Tensor, "n c"], truth: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """How many classes rank before the right one: of a higher score, or of the same and a lower number."""
    own = scores.gather(1, truth.unsqueeze(1))
    earlier = torch.arange(scores.shape[1], device=scores.device) < truth.unsqueeze(1)
    return ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
