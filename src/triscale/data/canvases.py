"""From a sample's image to the squares that augmentation starts from: fitted, or one for every drawn crop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from triscale.data.crop import Crop
from triscale.data.decode import EncodedImage, decode_image
from triscale.data.resize import crop_square, fit_square
from triscale.data.samples import Sample
from triscale.data.settings import DataSettings, Fit

CACHE_BYTES = 256 * 2**20
"""Fitted squares are kept in a process's memory where those of all samples fit into so much."""


class Canvases:
    """Makes the squares that augmentation starts from. May be pickled to worker processes.

    Fitted squares are the same in every epoch, so they are kept where all can be: of a larger data set, what is kept
    would seldom be drawn again before it has to go. Crops are new at each draw, so nothing is kept where there are any.

    Args:
        settings: their size and fit.
        samples: of all sources.
    """

    def __init__(self, settings: DataSettings, samples: int) -> None:
        self.size = settings.canvas or settings.image_size
        self.fit: Fit = settings.fit
        cropped = settings.augment.crop_area != (1.0, 1.0)
        self._keeps = not cropped and samples * 3 * self.size**2 <= CACHE_BYTES
        self._kept: dict[tuple[int, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        """To worker processes go no images; each keeps those that it has decoded itself."""
        return {**vars(self), "_kept": {}}

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether the square of that (source, sample) is kept, so that its image need not be read."""
        return place in self._kept

    def squares(
        self, sample: Sample, place: tuple[int, int], crops: Sequence[Crop | None]
    ) -> list[UInt8[np.ndarray, "c c 3"]]:
        """One square for each view of an image, which is decoded once.

        Args:
            sample: with its image, unless `place` is kept.
            place: its (source, sample).
            crops: what each view sees, or None for the fitted image; all are drawn, or none is.

        Raises:
            BadSample: the image is wrong.
        """
        drawn = [crop for crop in crops if crop is not None]
        if not drawn:
            return [self._fitted(sample, place)] * len(crops)
        image = sample.image
        if isinstance(image, bytes):
            encoded = EncodedImage(image)
            return encoded.crops([crop.box(*encoded.size) for crop in drawn], self.size)
        height, width = image.shape[:2]
        return [crop_square(image, crop.box(width, height), self.size) for crop in drawn]

    def _fitted(self, sample: Sample, place: tuple[int, int]) -> np.ndarray:
        square = self._kept.get(place)
        if square is None:
            image = sample.image
            if isinstance(image, bytes):
                # A photograph is decoded at a fraction of its size, the rest of the reduction is antialiased.
                image = decode_image(image, min_side=self.size)
            square = fit_square(image, self.size, self.fit)
            if self._keeps:
                self._kept[place] = square
        return square
