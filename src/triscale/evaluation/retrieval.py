"""Image-to-text and text-to-image retrieval: recall and median rank, without the matrix of all scores.

Recall@k as CLIP and CLIP_benchmark count it: the fraction of images one of whose captions is among the k best-scoring
texts, and the fraction of texts whose image is among the k best-scoring images. Median rank: of each image's
best-ranked caption, and of each text's image, from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from triscale import distributed
from triscale.data.samples import REASONS
from triscale.errors import RunError
from triscale.evaluation import metrics
from triscale.evaluation.encoder import Encoder, read_batches
from triscale.evaluation.matches import Matches, find_matches
from triscale.evaluation.ranking import candidates_ahead
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.zeroshot import left_out

DEPTHS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A retrieval set as a model embeds it; all processes hold all."""

    images: Float[Tensor, "n d"]
    texts: Float[Tensor, "m d"]
    image_of_text: Int64[Tensor, " m"]
    """The row of each text's image, ascending; every image has one or more texts, in their order."""
    samples: Int64[Tensor, " n"]
    """The number of each image's sample in its set, ascending."""
    bad: Mapping[str, int]
    """Samples left out, by reason."""


def evaluate_retrieval(encoder: Encoder, evaluation_set: EvaluationSet) -> tuple[dict[str, Any], Matches]:
    """Score a model on a retrieval set; every process calls it and gets the same.

    Returns:
        The result and examples. Of the result: "task"; "samples", the images really scored; "captions"; what `scores`
        gives; where not zero, what `zeroshot.left_out` does.

    Raises:
        RunError: no sample can be read, or the model's embeddings are not finite.
    """
    embedded = embed(encoder, evaluation_set)
    ahead = candidates_ahead(embedded.images, embedded.texts, embedded.image_of_text)
    matches = find_matches(
        evaluation_set, embedded.images, embedded.texts, embedded.image_of_text, embedded.samples, *ahead
    )
    texts_ahead, images_ahead, image_of_text = (each.cpu().numpy() for each in (*ahead, embedded.image_of_text))
    result: dict[str, Any] = {"task": "retrieval", "samples": len(texts_ahead), "captions": len(images_ahead)}
    result |= scores(texts_ahead, images_ahead, image_of_text, evaluation_set.name)
    return result | left_out(evaluation_set, embedded.bad), matches


def scores(
    texts_ahead: Int64[np.ndarray, " n"],
    images_ahead: Int64[np.ndarray, " m"],
    image_of_text: Int64[np.ndarray, " m"],
    name: str,
) -> dict[str, float | list[float]]:
    """Recalls and median ranks from the candidates ahead of positives (see `ranking.candidates_ahead`).

    Args:
        name: of the set; intervals are a pure function of it and the ranks.

    Returns:
        "image_to_text_recall@k" and "text_to_image_recall@k" for k of 1, 5 and 10, fractions of 1; with "_interval"
        behind, their 95 % intervals; "image_to_text_median_rank" and "text_to_image_median_rank".
    """
    intervals = _recall_intervals(texts_ahead, images_ahead, image_of_text, name)
    found: dict[str, float | list[float]] = {}
    for way, ahead in zip(WAYS, (texts_ahead, images_ahead), strict=True):
        for depth in DEPTHS:
            found[f"{way}_recall@{depth}"] = metrics.top_k(ahead, depth)
            found[f"{way}_recall@{depth}_interval"] = intervals[f"{way}_recall@{depth}"]
        found[f"{way}_median_rank"] = metrics.median_rank(ahead)
    return found


def _recall_intervals(
    texts_ahead: Int64[np.ndarray, " n"],
    images_ahead: Int64[np.ndarray, " m"],
    image_of_text: Int64[np.ndarray, " m"],
    name: str,
) -> dict[str, list[float]]:
    """Intervals of all recalls. Images are drawn anew with all of their captions, as those are not independent."""
    within = [(ahead[:, None] < np.array(DEPTHS)).astype(np.int64) for ahead in (texts_ahead, images_ahead)]
    hits = np.zeros((len(texts_ahead), 2 * len(DEPTHS) + 1), dtype=np.int64)
    hits[:, : len(DEPTHS)] = within[0]
    np.add.at(hits[:, len(DEPTHS) : -1], image_of_text, within[1])
    np.add.at(hits[:, -1], image_of_text, 1)
    distinct, kinds = np.unique(hits, axis=0, return_inverse=True)

    def recalls(counts: Int64[np.ndarray, "r c"]) -> Float64[np.ndarray, "r s"]:
        totals = (counts @ distinct).astype(np.float64)
        return totals[:, :-1] / np.where(np.arange(2 * len(DEPTHS)) < len(DEPTHS), len(texts_ahead), totals[:, -1:])

    drawn = metrics.bootstrap(kinds.reshape(-1), recalls, name).tolist()
    names = [f"{way}_recall@{depth}" for way in WAYS for depth in DEPTHS]
    return dict(zip(names, drawn, strict=True))


def embed(encoder: Encoder, evaluation_set: EvaluationSet) -> Embedded:
    """Embed a retrieval set; every process calls it and gets the same.

    Raises:
        RunError: no sample can be read, or the model's embeddings are not finite.
    """
    images: list[Tensor] = []
    texts: list[Tensor] = []
    rows: list[tuple[int, int]] = []  # of each image, its sample and the number of its captions
    bad: Counter[str] = Counter()
    with closing(read_batches(evaluation_set, encoder)) as batches:
        for batch in batches:
            bad.update(batch.bad)
            if len(batch):
                images.append(encoder.embed_pixels(batch.pixels))
                texts.append(encoder.embed_texts([text for captions in batch.captions for text in captions]))
                rows += zip(batch.samples.tolist(), map(len, batch.captions), strict=True)
    width = torch.tensor([images[0].shape[1] if images else 0], device=encoder.device)
    like = torch.zeros(0, int(distributed.all_reduce_max(width)), device=encoder.device)
    integers = torch.tensor(rows, dtype=torch.int64, device=encoder.device).view(-1, 2)
    samples, captions = distributed.all_gather_parts([integers], integers[:0]).unbind(dim=1)
    counts = distributed.all_reduce_sum(torch.tensor([bad[reason] for reason in REASONS], device=encoder.device))
    found = Embedded(
        images=distributed.all_gather_parts(images, like),
        texts=distributed.all_gather_parts(texts, like),
        image_of_text=torch.repeat_interleave(torch.arange(len(captions), device=encoder.device), captions),
        samples=samples,
        bad={reason: count for reason, count in zip(REASONS, counts.tolist(), strict=True) if count},
    )
    if not len(samples):
        raise RunError(f"evaluation set {evaluation_set.name!r}: none of its {len(evaluation_set)} samples can be read")
    if not bool(found.images.isfinite().all() and found.texts.isfinite().all()):
        raise RunError(f"evaluation set {evaluation_set.name!r}: the model's embeddings are not finite")
    return found
