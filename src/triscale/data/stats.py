"""What a source holds: counts, lengths of captions, sizes of images, duplicates, bad samples by reason."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from triscale.data.captions import all_captions
from triscale.data.decode import decode_image
from triscale.data.processes import note
from triscale.data.samples import BadSample, PartlyUsed, Sample, Source
from triscale.data.tokenizer import Tokenizer
from triscale.data.workers import Watch, run
from triscale.errors import RunError

SHOWN_BAD = 50
"""Bad samples whose keys are kept."""
_PIECE_SAMPLES = 64
_PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)


@dataclass(kw_only=True)
class Measured:
    """What was found in some samples. Arrays are in the samples' order; captions of one sample stand together."""

    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    listed: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of the first bad samples."""
    labelled: int = 0
    captions: array[int] = field(default_factory=partial(array, "q"))
    """Of each good sample."""
    characters: array[int] = field(default_factory=partial(array, "q"))
    """Of each caption."""
    tokens: array[int] = field(default_factory=partial(array, "q"))
    """Of each caption, with the end token; empty without a tokenizer."""
    sizes: array[int] = field(default_factory=partial(array, "q"))
    """Width and height of each good image, in pixels."""
    file_bytes: array[int] = field(default_factory=partial(array, "q"))
    image_hashes: array[int] = field(default_factory=partial(array, "Q"))
    caption_hashes: array[int] = field(default_factory=partial(array, "Q"))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What `measure` found in a source."""

    name: str
    length: int
    """Samples of the source; `samples` of them were read, evenly spread."""
    unused: dict[str, int]
    """Entries that the source never gives, by reason."""
    token_length: int
    """Length of the token rows that truncation is told for; 0 without a tokenizer."""
    samples: int
    bad: dict[str, int]
    """Samples by what is wrong with them."""
    listed: tuple[tuple[str, str], ...]
    """(key, reason) of the first bad samples."""
    labelled: int
    captions: np.ndarray
    characters: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray
    """(n, 2): width and height."""
    file_bytes: np.ndarray
    duplicate_images: int
    """Images whose file, or pixels where there is none, an earlier sample has."""
    duplicate_captions: int
    """Captions that an earlier one equals but for case and spacing."""

    @property
    def truncated(self) -> int:
        """Captions that do not fit their token row."""
        return int((self.tokens > self.token_length).sum())

    def values(self) -> dict[str, Any]:
        """All figures as JSON values; fractions are of 1."""
        images, captions = len(self.sizes), len(self.characters)
        sides = self.sizes.reshape(-1, 2)
        return {
            "source": self.name,
            "samples": self.length,
            "samples_read": self.samples,
            "unused": self.unused,
            "bad": self.bad,
            "bad_fraction": _share(sum(self.bad.values()), self.samples),
            "labelled": self.labelled,
            "captions": captions,
            "captions_per_sample": _percentiles(self.captions),
            "caption_characters": _percentiles(self.characters),
            "caption_tokens": _percentiles(self.tokens),
            "token_length": self.token_length or None,
            "truncated_fraction": _share(self.truncated, captions) if self.token_length else None,
            "duplicate_caption_fraction": _share(self.duplicate_captions, captions),
            "images": images,
            "image_width": _percentiles(sides[:, 0]),
            "image_height": _percentiles(sides[:, 1]),
            "image_bytes": _percentiles(self.file_bytes),
            "duplicate_image_fraction": _share(self.duplicate_images, images),
        }


def measure(
    source: Source,
    *,
    fields: Sequence[str] = ("txt",),
    tokenizer: Tokenizer | None = None,
    samples: int | None = None,
    workers: int = 0,
) -> Statistics:
    """Read and decode samples of a source and tell what they are.

    A sample that is bad counts under the first reason in the order of training: its own files, captions, image.

    Args:
        fields: where captions come from, see `captions.all_captions`.
        tokenizer: counts tokens; its length says what is cut.
        samples: read so many, evenly spread; None: all. Duplicates are among those read.
        workers: processes that read; 0: this one does. The result is the same.

    Raises:
        RunError: reading failed.
    """
    count = len(source) if samples is None else min(samples, len(source))
    pieces = (range(first, min(first + _PIECE_SAMPLES, count)) for first in range(0, count, _PIECE_SAMPLES))
    total = Measured()
    meter = _Meter(source, tuple(fields), tokenizer, count)
    watch = Watch(describe=lambda index: f"was reading sample {index}, in {source.file(index)}")
    with closing(run(meter, pieces, workers=workers, ahead=4 * workers, watch=watch)) as parts:
        for part in parts:
            _add(total, part)
    skipped = source.skipped if isinstance(source, PartlyUsed) else []
    return Statistics(
        name=source.name,
        length=len(source),
        unused=dict(Counter(reason for _, reason in skipped).most_common()),
        token_length=0 if tokenizer is None else tokenizer.length,
        samples=total.samples,
        bad=dict(total.bad.most_common()),
        listed=tuple(total.listed),
        labelled=total.labelled,
        captions=np.frombuffer(total.captions, np.int64),
        characters=np.frombuffer(total.characters, np.int64),
        tokens=np.frombuffer(total.tokens, np.int64),
        sizes=np.frombuffer(total.sizes, np.int64).reshape(-1, 2),
        file_bytes=np.frombuffer(total.file_bytes, np.int64),
        duplicate_images=_duplicates(total.image_hashes),
        duplicate_captions=_duplicates(total.caption_hashes),
    )


class _Meter:
    """Measures the samples that a range numbers among `count`. Goes to worker processes."""

    def __init__(self, source: Source, fields: tuple[str, ...], tokenizer: Tokenizer | None, count: int) -> None:
        self.source, self.fields, self.tokenizer, self.count = source, fields, tokenizer, count

    def __call__(self, numbers: range) -> Measured:
        found = Measured()
        for number in numbers:
            index = len(self.source) * number // self.count
            key = f"#{index}"
            found.samples += 1
            note(index)
            try:
                sample = self.source.read(index)
                key = sample.key
                self._measure(sample, found)
            except BadSample as fault:
                found.bad[fault.reason] += 1
                found.listed.append((fault.key or key, fault.reason))
            except OSError as error:
                raise RunError(f"{self.source.name}: sample {key} cannot be read: {error.strerror or error}") from error
        return found

    def _measure(self, sample: Sample, found: Measured) -> None:
        captions = all_captions(sample, self.fields)
        image = sample.image
        pixels = decode_image(image) if isinstance(image, bytes) else image
        found.sizes.extend((pixels.shape[1], pixels.shape[0]))
        found.image_hashes.append(_hash(image if isinstance(image, bytes) else pixels.tobytes()))
        if isinstance(image, bytes):
            found.file_bytes.append(len(image))
        found.labelled += sample.label is not None
        found.captions.append(len(captions))
        found.characters.extend(len(caption) for caption in captions)
        found.caption_hashes.extend(_hash(" ".join(caption.casefold().split()).encode()) for caption in captions)
        if self.tokenizer is not None:
            found.tokens.extend(self.tokenizer.count(captions))


def _add(total: Measured, part: Measured) -> None:
    total.samples += part.samples
    total.labelled += part.labelled
    total.bad += part.bad
    total.listed = (total.listed + part.listed)[:SHOWN_BAD]
    total.captions += part.captions
    total.characters += part.characters
    total.tokens += part.tokens
    total.sizes += part.sizes
    total.file_bytes += part.file_bytes
    total.image_hashes += part.image_hashes
    total.caption_hashes += part.caption_hashes


def _hash(content: bytes) -> int:
    """64 bits: among 10 million different contents, two are equal with a probability of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _duplicates(hashes: array[int]) -> int:
    return len(hashes) - len(np.unique(np.frombuffer(hashes, np.uint64)))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    """Percentiles and mean; None of no values."""
    if not len(values):
        return None
    return {f"p{p}": float(v) for p, v in zip(_PERCENTILES, np.percentile(values, _PERCENTILES), strict=True)} | {
        "mean": float(values.mean())
    }
