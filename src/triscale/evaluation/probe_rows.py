"""Rows of features with a class each, of which only chunks are in memory, and what is done to them before a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int64

from triscale.data.features import FeatureParts
from triscale.errors import RunError

CHUNK_ROWS = 1024
"""Most rows that are read at once."""
HELD_BYTES = 2**28
"""Rows that take no more than this are held in memory, as they are read many times."""
Scale = Literal["raw", "unit", "standard"]
Stream = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Features and classes of samples, in an order that never changes."""

    name: str
    """Of the source, for messages."""
    labels: Int64[np.ndarray, " n"]
    """Class numbers."""
    width: int
    """f."""
    stream: Stream
    """Gives the rows from the first on, float32 (m, f), at most `CHUNK_ROWS` at once."""

    def __len__(self) -> int:
        """n."""
        return len(self.labels)

    def chunks(self) -> Iterator[tuple[Float32[np.ndarray, "m f"], Int64[np.ndarray, " m"]]]:
        """Features and classes, chunk by chunk.

        Raises:
            RunError: a feature is not finite, or the features cannot be read.
        """
        first = 0
        for features in self.stream():
            if not np.isfinite(features).all():
                row = first + int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
                raise RunError(
                    f"{self.name}: the features of row {row} are not finite: the model's weights are damaged"
                )
            yield features, self.labels[first : first + len(features)]
            first += len(features)

    def select(self, places: Int64[np.ndarray, " m"]) -> LabelledRows:
        """The rows at `places`, ascending."""
        chosen = np.zeros(len(self), dtype=bool)
        chosen[places] = True
        return LabelledRows(
            name=self.name, labels=self.labels[chosen], width=self.width, stream=partial(_chosen, self.stream, chosen)
        )

    def joined(self, other: LabelledRows) -> LabelledRows:
        """These rows and then others."""
        return LabelledRows(
            name=f"{self.name} and {other.name}",
            labels=np.concatenate([self.labels, other.labels]),
            width=self.width,
            stream=partial(_one_by_one, self.stream, other.stream),
        )

    def held(self) -> LabelledRows:
        """The same rows in memory where they take little of it, else as they are."""
        if 4 * len(self) * self.width > HELD_BYTES:
            return self
        rows = np.concatenate([np.empty((0, self.width), dtype=np.float32), *self.stream()])
        return rows_in_memory(self.name, rows, self.labels)


def rows_in_memory(name: str, features: Float32[np.ndarray, "n f"], labels: Int64[np.ndarray, " n"]) -> LabelledRows:
    """Rows of an array."""
    return LabelledRows(name=name, labels=labels, width=features.shape[1], stream=partial(_sliced, features))


def stored_rows(
    name: str, parts: FeatureParts, samples: Int64[np.ndarray, " n"], labels: Int64[np.ndarray, " n"]
) -> LabelledRows:
    """The rows of `samples`, ascending, of parts of one source, read from the disk each time."""
    return LabelledRows(name=name, labels=labels, width=parts.width, stream=partial(_stored, parts, samples))


def good_samples(parts: FeatureParts) -> Int64[np.ndarray, " n"]:
    """The samples of parts of one source that have features."""
    good = [parts.open(part).good for part in range(len(parts))]
    return np.flatnonzero(np.concatenate([np.empty(0, dtype=bool), *good]))


def _sliced(features: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(features), CHUNK_ROWS):
        yield features[first : first + CHUNK_ROWS]


def _chosen(stream: Stream, chosen: np.ndarray) -> Iterator[np.ndarray]:
    first = 0
    for features in stream():
        mask = chosen[first : first + len(features)]
        first += len(features)
        if mask.any():
            yield features if mask.all() else features[mask]


def _one_by_one(*streams: Stream) -> Iterator[np.ndarray]:
    for stream in streams:
        yield from stream()


def _stored(parts: FeatureParts, samples: np.ndarray) -> Iterator[np.ndarray]:
    for part in range(len(parts)):
        _, inside = parts.samples(part)
        first, last = np.searchsorted(samples, [inside.start, inside.stop]).tolist()
        if first == last:
            continue
        opened = parts.open(part)
        for at in range(first, last, CHUNK_ROWS):
            rows = samples[at : min(at + CHUNK_ROWS, last)] - inside.start
            low, high = int(rows[0]), int(rows[-1]) + 1
            # Rows between those wanted are few, but where a class or two are chosen.
            for start in range(low, high, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, high)
                wanted = rows[(rows >= start) & (rows < stop)]
                if len(wanted):
                    yield opened[start:stop][wanted - start]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What becomes of features before a linear probe: (x - mean) * factor, or rows of length 1."""

    scale: Scale
    mean: Float32[np.ndarray, " f"]
    factor: Float32[np.ndarray, " f"]

    def __call__(self, features: Float32[np.ndarray, "m f"]) -> Float32[np.ndarray, "m f"]:
        """Scaled copies of rows; the same rows where nothing is to be done."""
        if self.scale == "raw":
            return features
        if self.scale == "unit":
            return unit(features)
        return (features - self.mean) * self.factor


def unit(features: Float32[np.ndarray, "m f"]) -> Float32[np.ndarray, "m f"]:
    """Rows of length 1; zeros stay."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float32).tiny)


def fit_scaling(rows: LabelledRows, scale: Scale) -> Scaling:
    """The scaling that `scale` names; for "standard" with the mean and deviation of `rows`, a constant feature kept."""
    zeros, ones = np.zeros(rows.width, dtype=np.float32), np.ones(rows.width, dtype=np.float32)
    if scale != "standard":
        return Scaling(scale=scale, mean=zeros, factor=ones)
    mean = np.zeros(rows.width)
    for features, _ in rows.chunks():
        mean += features.sum(axis=0, dtype=np.float64) / len(rows)
    variance = np.zeros(rows.width)
    for features, _ in rows.chunks():
        variance += ((features - mean) ** 2).sum(axis=0) / len(rows)
    deviation = np.sqrt(variance)
    deviation[deviation <= 1e-7 * np.abs(mean)] = 1.0
    deviation[deviation == 0] = 1.0
    return Scaling(scale=scale, mean=mean.astype(np.float32), factor=(1 / deviation).astype(np.float32))
