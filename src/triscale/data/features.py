"""Features of a frozen image tower, computed once for every sample and read in place of its image.

    FOLDER/00000012.npy    part 12: up to `PART_SAMPLES` samples of one source, f float32 values each, and whether the
                           image could be decoded

A part is written whole or not at all, so what is there is complete, however the writing ended, and processes share the
work part by part. The folder's name is a digest of all that features depend on: others' are never taken for them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from triscale.data.files import OPEN_FILES, Recent
from triscale.data.images import ImageRow, Pixels
from triscale.data.samples import Sample
from triscale.errors import RunError

PART_SAMPLES = 4096
"""Samples of a part: what is computed again after a kill, 16 MiB at 1,024 features."""
_NO_NUMBERS = np.empty(0, dtype=np.float32)


class FeatureParts:
    """The parts of a folder. May be pickled to worker processes.

    Args:
        folder: may not be there yet.
        counts: samples of each source.
        width: f.
    """

    def __init__(self, folder: Path, counts: Sequence[int], width: int) -> None:
        self.folder, self.counts, self._size = folder, tuple(counts), PART_SAMPLES
        self.dtype = np.dtype([("features", "<f4", (width,)), ("good", "?")])
        # Of each source the number of its first part; after the last one that of all parts.
        self._firsts = np.cumsum([0, *(-(-count // self._size) for count in counts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def samples(self, part: int) -> tuple[int, range]:
        """The source of a part, and its samples there."""
        source = int(np.searchsorted(self._firsts, part, side="right")) - 1
        first = (part - int(self._firsts[source])) * self._size
        return source, range(first, min(first + self._size, self.counts[source]))

    def find(self, place: tuple[int, int]) -> tuple[int, int]:
        """The part of a (source, sample), and its row there."""
        part, row = divmod(place[1], self._size)
        return int(self._firsts[place[0]]) + part, row

    def is_there(self, part: int) -> bool:
        """Whether a part is written."""
        try:
            self.open(part)
        except RunError:
            return False
        return True

    def open(self, part: int) -> np.ndarray:
        """A part's records, mapped. Raises RunError where it is not there or is another's."""
        path = self.path(part)
        try:
            records = np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise RunError(f"features {path} cannot be read: the same command computes them again") from error
        if records.dtype != self.dtype or records.shape != (len(self.samples(part)[1]),):
            raise RunError(f"features {path} are of another shape: remove them, and the same command goes on")
        return records

    def write(self, part: int, features: Float[np.ndarray, "n f"], good: Bool[np.ndarray, " n"]) -> None:
        """Write a part: whole, or not at all. Raises RunError where that fails."""
        records = np.empty(len(good), dtype=self.dtype)
        records["features"], records["good"] = features, good
        path = self.path(part)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.save(file, records, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with suppress(OSError):  # why it could not be made
                temporary.unlink()
            raise RunError(
                f"features {path} could not be written: {error.strerror}; --data.cache-features off does without"
            ) from error

    def remove_torn(self) -> None:
        """Remove what processes that were killed had not written to its end."""
        for path in self.folder.glob(".*.npy.*"):
            path.unlink(missing_ok=True)

    def path(self, part: int) -> Path:
        """The file of a part."""
        return self.folder / f"{part:08d}.npy"


class StoredFeatures:
    """The image lane's rows from features. Satisfies `ImageRows`.

    A sample whose image could not be decoded is read and decoded as ever, so that it is found bad for its own reason
    and the same one stands in its place.

    Args:
        parts: all of them are there.
        pixels: how images are decoded.
    """

    def __init__(self, parts: FeatureParts, pixels: Pixels) -> None:
        self.parts, self.pixels = parts, pixels
        self.row_bytes = parts.dtype["features"].itemsize
        self._open = Recent(partial(FeatureParts.open, parts), OPEN_FILES)

    def __contains__(self, place: tuple[int, int]) -> bool:
        part, row = self.parts.find(place)
        return bool(self._open[part]["good"][row])

    def draw(self, sample: Sample, place: tuple[int, int], rng: np.random.Generator) -> ImageRow:
        """The features at `place`; nothing is drawn."""
        if place not in self:
            self.pixels.draw(sample, place, rng)
            raise RunError(f"{sample.key} can be decoded, but could not be when features were computed: remove them")
        part, row = self.parts.find(place)
        return ImageRow(np.array(self._open[part]["features"][row]), _NO_NUMBERS)

    def stack(self, rows: Sequence[ImageRow]) -> Float32[Tensor, "m f"]:
        """The features of the rows."""
        return torch.from_numpy(np.stack([row.values for row in rows]))
