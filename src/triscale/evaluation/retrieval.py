"""Image-to-text and text-to-image recall, blocked: the matrix of all scores is never held.

Recall@k as CLIP and CLIP_benchmark count it: the fraction of images one of whose captions is among the k best-scoring
texts, and the fraction of texts whose image is among the k best-scoring images. It follows from the number of
candidates that rank before a query's best positive:

1. the scores of the positives are found in the tiles that hold them: a text has one image, the texts of an image stand
   together, so these tiles lie along the diagonal;
2. every tile of scores is computed once and serves both directions: for each image it counts the texts ahead of its
   best caption, for each text the images ahead of its own.

A score is always taken from the same tile, so a positive equals itself. Of equal scores the lower index ranks first.
Rows of tiles are shared out over processes and the counts summed: integers, hence equal for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triscale import distributed
from triscale.errors import RunError
from triscale.evaluation.encoder import Encoder, read_batches
from triscale.evaluation.sets import EvaluationSet

DEPTHS = (1, 5, 10)


def evaluate_retrieval(encoder: Encoder, evaluation_set: EvaluationSet) -> dict[str, str | int | float]:
    """Score a model on a retrieval set; every process calls it and gets the same result.

    Returns:
        "task"; "samples", the images really scored; "captions"; "image_to_text_recall@k" and "text_to_image_recall@k"
        for k of 1, 5 and 10, fractions of 1; where not zero, "bad" samples left out.

    Raises:
        RunError: no sample can be read, or the model's embeddings are not finite.
    """
    images, texts, image_of_text, bad = _embed(encoder, evaluation_set)
    if not len(images):
        raise RunError(f"evaluation set {evaluation_set.name!r}: none of its {bad} samples can be read")
    if not bool(images.isfinite().all() and texts.isfinite().all()):
        raise RunError(f"evaluation set {evaluation_set.name!r}: the model's embeddings are not finite")
    texts_ahead, images_ahead = candidates_ahead(images, texts, image_of_text)
    result: dict[str, str | int | float] = {"task": "retrieval", "samples": len(images), "captions": len(texts)}
    for way, ahead in (("image_to_text", texts_ahead), ("text_to_image", images_ahead)):
        result |= {f"{way}_recall@{depth}": int((ahead < depth).sum()) / len(ahead) for depth in DEPTHS}
    bad += evaluation_set.skipped
    return result | ({"bad": bad} if bad else {})


def _embed(encoder: Encoder, evaluation_set: EvaluationSet) -> tuple[Tensor, Tensor, Tensor, int]:
    """All processes' embeddings: of images (n, d), of texts (m, d), each text's image (m,), and the bad samples."""
    images, texts, captions_of_image, bad = [], [], [], 0
    for batch in read_batches(evaluation_set, encoder):
        bad += sum(batch.bad.values())
        if len(batch):
            images.append(encoder.embed_pixels(batch.pixels))
            texts.append(encoder.embed_texts([text for captions in batch.captions for text in captions]))
            captions_of_image += [len(captions) for captions in batch.captions]
    width = torch.tensor([images[0].shape[1] if images else 0], device=encoder.device)
    distributed.all_reduce_max(width)
    none = torch.zeros(0, int(width), device=encoder.device)
    all_images, all_texts = (_gather(torch.cat([none, *parts])) for parts in (images, texts))
    caption_counts = _gather(torch.tensor(captions_of_image, dtype=torch.int64, device=encoder.device))
    image_of_text = torch.repeat_interleave(torch.arange(len(all_images), device=encoder.device), caption_counts)
    all_bad = distributed.all_reduce_sum(torch.tensor([bad], device=encoder.device))
    return all_images, all_texts, image_of_text, int(all_bad)


def _gather(rows: Tensor) -> Tensor:
    return distributed.all_gather_rows(rows, distributed.row_counts(len(rows), rows.device))
