"""Examples of retrieval for a report: what a model finds for some images and for some captions."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from triscale.data.samples import BadSample
from triscale.errors import RunError, first_line
from triscale.evaluation.array_file import Kind, load_arrays, save_arrays
from triscale.evaluation.ranking import best_candidates
from triscale.evaluation.sets import EvaluationSet

QUERIES = 24
"""Images, and captions, that are asked with."""
BEST = 5
"""Candidates that are shown of each."""


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The t best-scoring captions for q images and the u best-scoring images for p captions, best first.

    q and p are at most 24, evenly spread over the set, t and u at most 5. Images stand as the numbers of their samples
    in the set, captions as indices into `captions`. Scores are cosines; of equal ones the first in the set comes first.
    """

    images: Int64[np.ndarray, " q"]
    """Images that are asked with."""
    text_ranks: Int64[np.ndarray, " q"]
    """Rank of each image's best caption among all, from 1."""
    own_texts: Int64[np.ndarray, " q"]
    """That caption."""
    best_texts: Int64[np.ndarray, "q t"]
    text_scores: Float32[np.ndarray, "q t"]
    text_is_own: Bool[np.ndarray, "q t"]
    """Whether it is a caption of the image."""
    texts: Int64[np.ndarray, " p"]
    """Captions that are asked with."""
    image_ranks: Int64[np.ndarray, " p"]
    """Rank of each caption's image among all, from 1."""
    own_images: Int64[np.ndarray, " p"]
    """That image."""
    best_images: Int64[np.ndarray, "p u"]
    image_scores: Float32[np.ndarray, "p u"]
    captions: tuple[str, ...]
    """Texts of all captions that occur."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in place of what is there only once it is complete on the disk.

        Raises:
            RunError: it can't be written.
        """
        save_arrays(Path(path), {name: getattr(self, name) for name in _KINDS}, list(self.captions), "matches")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Matches:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is not there, too large, damaged or not of this kind.
        """
        arrays, captions = load_arrays(Path(path), _KINDS, "matches", _check)
        return cls(**arrays, captions=tuple(captions))


_KINDS = {
    "images": Kind("i8", "q"),
    "text_ranks": Kind("i8", "q"),
    "own_texts": Kind("i8", "q"),
    "best_texts": Kind("i8", "qt"),
    "text_scores": Kind("f4", "qt"),
    "text_is_own": Kind("b1", "qt"),
    "texts": Kind("i8", "p"),
    "image_ranks": Kind("i8", "p"),
    "own_images": Kind("i8", "p"),
    "best_images": Kind("i8", "pu"),
    "image_scores": Kind("f4", "pu"),
}
assert {*_KINDS, "captions"} == {each.name for each in fields(Matches)}


def _check(arrays: dict[str, np.ndarray], captions: object) -> None:
    """Raise ValueError unless captions are texts, and all of those that are pointed at are there."""
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise ValueError("its captions are no list of texts")
    if any(arrays[name].size and arrays[name].max() >= len(captions) for name in ("own_texts", "best_texts", "texts")):
        raise ValueError("it points at a caption that is not there")


def find_matches(
    evaluation_set: EvaluationSet,
    images: Float[Tensor, "n d"],
    texts: Float[Tensor, "m d"],
    image_of_text: Int[Tensor, " m"],
    samples: Int64[Tensor, " n"],
    texts_ahead: Int[Tensor, " n"],
    images_ahead: Int[Tensor, " m"],
) -> Matches:
    """Ask with some images and some captions of a set, and read the captions that occur from it again.

    Args:
        images, texts, image_of_text, samples: as `retrieval.Embedded` has them.
        texts_ahead, images_ahead: as `ranking.candidates_ahead` gives them.

    Raises:
        RunError: a sample can't be read again.
    """
    asked_images, asked_texts = (_evenly(len(rows)).to(rows.device) for rows in (images, texts))
    best_texts, text_scores = best_candidates(images[asked_images], texts, BEST)
    best_images, image_scores = best_candidates(texts[asked_texts], images, BEST)
    first_text = torch.searchsorted(image_of_text, torch.arange(len(images) + 1, device=image_of_text.device))
    own_texts = torch.stack(
        [
            first_text[image] + (texts[first_text[image] : first_text[image + 1]] @ images[image]).argmax()
            for image in asked_images
        ]
    )
    occurring, indices = torch.cat([own_texts, best_texts.flatten(), asked_texts]).unique(return_inverse=True)
    of_own, of_best, of_asked = indices.split([len(own_texts), best_texts.numel(), len(asked_texts)])
    image = image_of_text[occurring]
    places = torch.stack([samples[image], occurring - first_text[image]], dim=1).tolist()
    numbers = {
        "images": samples[asked_images],
        "text_ranks": texts_ahead[asked_images] + 1,
        "own_texts": of_own,
        "best_texts": of_best.view_as(best_texts),
        "text_scores": text_scores.float(),
        "text_is_own": image_of_text[best_texts] == asked_images[:, None],
        "texts": of_asked,
        "image_ranks": images_ahead[asked_texts] + 1,
        "own_images": samples[image_of_text[asked_texts]],
        "best_images": samples[best_images],
        "image_scores": image_scores.float(),
    }
    return Matches(
        **{name: value.cpu().numpy() for name, value in numbers.items()},
        captions=_read_captions(evaluation_set, places),
    )


def _evenly(total: int) -> Int64[Tensor, " q"]:
    """Rows to ask with: at most 24 of `total`, evenly spread."""
    asked = min(QUERIES, total)
    return torch.arange(asked) * total // asked


def _read_captions(evaluation_set: EvaluationSet, places: list[list[int]]) -> tuple[str, ...]:
    """The texts of captions, each given by its sample and its number among that sample's."""
    try:
        return tuple(evaluation_set.captions(sample)[number] for sample, number in places)
    except (OSError, BadSample, IndexError) as error:
        raise RunError(
            f"evaluation set {evaluation_set.name!r} could not be read again: {first_line(error)}"
        ) from error
