"""WebDataset tar shards, read by byte offset.

Where `triscale data index` has been, opening reads nothing but the counts, and a shard's index is mapped when a sample
of it is first asked for. Otherwise the headers of every shard are read once at opening (never the bodies) and the
places of its samples kept, 72 bytes and a key a sample; or, where img2dataset's `_stats.json` tells how many there are,
when a sample is first asked for. A sample is then read with `os.pread`, without any position to keep: any order, thread
or process serves. Shards are untrusted: nothing is ever unpacked, and every size is checked before its bytes are read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from triscale.data.entries import LIMITS, TOO_LARGE
from triscale.data.files import OPEN_FILES, Recent, open_unchanged
from triscale.data.paths import matching_files
from triscale.data.samples import BadSample, Sample
from triscale.data.shard_index import (
    ABSENT,
    Count,
    ShardIndex,
    Stamp,
    build_index,
    img2dataset_count,
    index_folders,
    load_index,
    read_counts,
    write_index,
)
from triscale.errors import RunError, UsageError

_MAPPED_INDEXES = OPEN_FILES
"""A map holds a file descriptor, too, until Python 3.13; making one again takes some tens of microseconds."""


class ShardSource:
    """The samples of some tar shards, in the order of the shards' paths and of the entries within. See `open_shards`.

    Args:
        name: what reports call this source.
        paths: the shards.
        stamps: their sizes and times.
        counts: what they hold.
        built: the indexes that were made at opening, by the shard's number; others are mapped when they are needed.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        stamps: Sequence[Stamp],
        counts: Sequence[Count],
        built: dict[int, ShardIndex],
    ) -> None:
        self.name = name
        self._paths = list(paths)
        self._ends = np.cumsum([count.samples for count in counts], dtype=np.int64)
        self._with_skipped = [number for number, count in enumerate(counts) if count.skipped]
        self._open = Recent(partial(open_unchanged, self._paths, list(stamps)), OPEN_FILES)
        self._indexes = Recent(_Indexes(self._paths, list(stamps), built), _MAPPED_INDEXES)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of everything in the shards that is not used: entries outside the shard, links, devices, second
        samples of a key, samples without an image. Shards known by img2dataset's counts alone are left out.
        """
        return [entry for number in self._with_skipped for entry in self._indexes[number].skipped]

    @property
    def shard_counts(self) -> Int64[np.ndarray, " s"]:
        """The number of samples in each shard."""
        return np.diff(self._ends, prepend=0)

    def file(self, index: int) -> str:
        """Path of the shard that sample `index` lies in."""
        return self._paths[self._shard(index)]

    def key(self, index: int) -> str:
        """Name of sample `index`: its path in the shard up to the first dot of the file name."""
        return self._find(index)[2]

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` only its sidecars are read.

        Raises:
            BadSample: the image is empty or too large, or a sidecar too large; nothing of it was read. Or
                "sample-missing": the shard holds fewer samples than img2dataset's `_stats.json` says.
            OSError: reading failed.
            RunError: the shard is not the file that was opened, or it is damaged where only its count was known.
        """
        number, row, key = self._find(index)
        places = self._indexes[number].places[row].tolist()
        for (_, size), limit, reason in zip(places, LIMITS, TOO_LARGE, strict=True):
            if size > limit:
                raise BadSample(reason, key)
        if places[0][1] == 0:
            raise BadSample("image-empty", key)
        shard = self._open[number]
        if not image:
            places[0] = (0, ABSENT)
        parts = [None if size == ABSENT else shard.read(offset, size) for offset, size in places]
        return Sample(key=key, image=parts[0] or b"", text=parts[1], metadata=parts[2], label=parts[3])

    def _find(self, index: int) -> tuple[int, int, str]:
        """Number of the shard, row in it, and key of a sample."""
        number = self._shard(index)
        row = index - (int(self._ends[number - 1]) if number else 0)
        shard = self._indexes[number]
        if row >= len(shard):
            raise BadSample("sample-missing", f"{os.path.basename(self._paths[number])}#{row}")
        # What another program has written in an index may be no UTF-8.
        return number, row, shard.keys[row].encode("utf-8", "backslashreplace").decode()

    def _shard(self, index: int) -> int:
        """Number of the shard that sample `index` lies in."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        return int(np.searchsorted(self._ends, index, side="right"))


class _Indexes:
    """From a shard's number to its index: made at opening, mapped, or read from the shard's headers and written to the
    cache. Goes to worker processes.
    """

    def __init__(self, paths: Sequence[str], stamps: Sequence[Stamp], built: dict[int, ShardIndex]) -> None:
        self._paths, self._stamps = paths, stamps
        self._built = built
        self._checked: set[int] = set()

    def __call__(self, number: int) -> ShardIndex:
        path, stamp = self._paths[number], self._stamps[number]
        index = self._built.get(number)
        if index is None:
            index = load_index(path, stamp, check=number not in self._checked)
        if index is None:
            try:
                index = build_index(path)
            except UsageError as error:
                raise RunError(str(error)) from error
            if index.stamp != stamp:
                raise RunError(f"{path} has changed since it was opened: start again")
            try:
                write_index(index, path, index_folders(os.path.dirname(path))[1])
            except OSError:  # without a place for it, it stays in memory
                self._built[number] = index
        self._checked.add(number)
        return index


def open_shards(
    patterns: str | Path | Sequence[str | Path], *, root: str | Path = "", name: str | None = None
) -> ShardSource:
    """Open tar shards as one source.

    Args:
        patterns: paths or globs (`*`, `?`, `[...]`, `**`), with braces (`{00..12}`, `{a,b}`) or without; a shard that
            several name counts once.
        root: folder that patterns are relative to.
        name: what reports call the source; default: the patterns.

    Raises:
        UsageError: a pattern matches nothing, a shard is cut off or no plain tar, or there is no sample in any.
    """
    listed = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    name = name or " ".join(str(pattern) for pattern in listed)
    paths = matching_files([str(pattern) for pattern in listed], str(root))
    known = {folder: read_counts(folder) for folder in {os.path.dirname(path) for path in paths}}
    stamps: list[Stamp] = []
    counts: list[Count] = []
    built: dict[int, ShardIndex] = {}
    for number, path in enumerate(paths):
        stamp = _stamp(path)
        indexed = known[os.path.dirname(path)].get(os.path.basename(path))
        count = indexed[1] if indexed is not None and indexed[0] == stamp else img2dataset_count(path)
        if count is None:
            built[number] = build_index(path)
            stamp, count = built[number].stamp, built[number].count
        stamps.append(stamp)
        counts.append(count)
    if not any(count.samples for count in counts):
        raise UsageError(f"{name} holds no samples: its shards have no entry named KEY.jpg, .jpeg, .png or .webp")
    return ShardSource(name, paths, stamps, counts, built)


def _stamp(path: str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as fault:
        raise UsageError(f"cannot read {path}: {fault.strerror}") from fault
    return status.st_size, status.st_mtime_ns
