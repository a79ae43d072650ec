"""Small pictures of samples for a page, embedded in it; so many and no more."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from triscale.data.samples import BadSample
from triscale.errors import RunError, UsageError
from triscale.evaluation.sets import EvaluationSet
from triscale.pages.html import Element, element, plain

SIDE = 112
"""Longest side in pixels."""
MOST = 320
"""Pictures on a page: about 4 KiB each."""


class Thumbnails:
    """Pictures by set and sample, each read once.

    Args:
        sets: by name; a set that could not be opened is not there, and its samples have no picture.
    """

    def __init__(self, sets: Mapping[str, EvaluationSet]) -> None:
        self._sets = sets
        self._made: dict[tuple[str, int], str | None] = {}

    def has(self, set_name: str) -> bool:
        """Whether the set is there to be read."""
        return set_name in self._sets

    def of(self, set_name: str, sample: int, text: str) -> Element | None:
        """The picture of a sample; None where it cannot be read or the page has its share.

        Args:
            text: what is said in its place.
        """
        key = (set_name, sample)
        if key not in self._made:
            if len(self._made) >= MOST or set_name not in self._sets:
                return None
            self._made[key] = _read(self._sets[set_name], sample)
        source = self._made[key]
        return element("img", src=source, alt=plain(text, 80)) if source else None


def _read(evaluation_set: EvaluationSet, sample: int) -> str | None:
    if not 0 <= sample < len(evaluation_set):
        return None  # the set has changed since
    try:
        return data_address(evaluation_set.read(sample, min_side=SIDE).image)
    except (BadSample, OSError, RunError, UsageError):  # gone, or changed since: the page goes without
        return None


def data_address(image: UInt8[np.ndarray, "h w 3"]) -> str:
    """An image as a data address: WebP, its longer side at most `SIDE` pixels, its shape kept."""
    picture = Image.fromarray(image)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=82)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
