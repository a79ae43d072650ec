"""What a source of data gives, and how it says that a sample is bad."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An image with what stands beside it, as raw as the source holds it; nothing is decoded or checked yet."""

    key: str
    """The sample's name within its source; for reports, not necessarily unique over shards."""
    image: bytes | np.ndarray
    """An encoded image file, or uint8 pixels (h, w, 3) in RGB."""
    text: bytes | None = None
    """Content of the `.txt` sidecar."""
    metadata: bytes | None = None
    """Content of the `.json` sidecar."""
    label: bytes | None = None
    """Content of the `.cls` sidecar."""


class BadSample(Exception):
    """A sample's bytes are wrong and reading them again won't help.

    Args:
        reason: a short kebab-case code that counts are kept by, such as "image-truncated" or "caption-empty".
        key: the sample's name, where it was `Source.read` that found the fault and so gave no Sample; else None.
    """

    def __init__(self, reason: str, key: str | None = None) -> None:
        super().__init__(reason, key)
        self.reason = reason
        self.key = key

    def __str__(self) -> str:
        return self.reason


@runtime_checkable
class PartlyUsed(Protocol):
    """A source that holds more than it gives."""

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of everything in it that is not used, such as links and second samples of a key."""
        ...


@runtime_checkable
class Source(Protocol):
    """A finite, indexed collection of samples. May be pickled to worker processes and read from several at once."""

    @property
    def name(self) -> str:
        """What reports and the quarantine call this source."""
        ...

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` all of it but that, whose bytes are empty then.

        Raises BadSample for bad bytes, OSError where reading failed.
        """
        ...


@runtime_checkable
class FetchesAhead(Protocol):
    """A source whose shards are fetched before they are read."""

    def expect(self, shards: Iterator[int]) -> None:
        """Be told which shards will be read, in order of need and without end. Returns at once."""
        ...


@runtime_checkable
class ShardedSource(Source, Protocol):
    """A source whose samples lie in shards, one shard after another."""

    @property
    def shard_counts(self) -> Int64[np.ndarray, " s"]:
        """The number of samples in each shard."""
        ...
