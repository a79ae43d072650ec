"""Where the samples of a tar shard lie: read from its headers, and kept in a small file so that it is read once.

An index file holds, little-endian: magic and version, size and time of the shard, numbers of samples and bytes, a
BLAKE2 digest of what follows; then of every sample offset and size of image, txt, json and cls (size -1 where absent),
the ends of the keys, the keys, and as JSON what the shard holds beside samples. It is mapped into memory, not read.

Index files stand in `.triscale` beside the shards, or in the user's cache where that folder cannot be written, and with
them `counts.json`, which is all that is read of many shards at opening. Neither is trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import stat
import struct
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from triscale.data.entries import gather, leaves_its_folder
from triscale.data.files import PackedStrings
from triscale.data.tar import ReadOnlyFile, tar_entries
from triscale.errors import UsageError

FOLDER = ".triscale"
COUNTS_FILE = "counts.json"
ABSENT = -1

_MAGIC = b"TRISHD\x00\x01"
_HEADER = struct.Struct("<8sqqQQQ16s")
_SAMPLE_BYTES = 8 * 8 + 8  # four offsets and sizes, the end of the key
MAX_COUNTS_BYTES = 256 * 2**20
_MAX_STATS_BYTES = 2**20
_REFUSED_TYPES = {b"1": "entry-is-link", b"2": "entry-is-link"} | dict.fromkeys((b"3", b"4", b"6"), "entry-is-device")
_REFUSED_TYPES[b"S"] = "entry-is-sparse"

Stamp = tuple[int, int]
"""Size in bytes and time of change in nanoseconds."""


class Count(NamedTuple):
    """What is known of a shard before its index is mapped."""

    samples: int
    skipped: int
    """Entries that are not used."""


class ShardIndex:
    """The index of one shard, over the bytes of an index file or a map of them.

    Raises:
        ValueError: the bytes are no index, or not that of a shard with `stamp`; or, with `check`, damaged.
    """

    def __init__(self, data: bytes | mmap.mmap, stamp: Stamp | None = None, *, check: bool = True) -> None:
        if len(data) < _HEADER.size:
            raise ValueError("too short for an index")
        magic, size, time_ns, samples, key_bytes, skipped_bytes, digest = _HEADER.unpack(data[: _HEADER.size])
        body = memoryview(data)[_HEADER.size :]
        if magic != _MAGIC or len(body) != samples * _SAMPLE_BYTES + key_bytes + skipped_bytes:
            raise ValueError("no index of this version, or cut off")
        if stamp is not None and stamp != (size, time_ns):
            raise ValueError("of a shard that has changed")
        if check and digest != hashlib.blake2b(body, digest_size=16).digest():
            raise ValueError("damaged")
        self.data = data
        self.stamp: Stamp = (size, time_ns)
        self.places = np.frombuffer(body, "<i8", samples * 8).reshape(samples, 4, 2)
        """(n, 4, 2): offset and size of image, txt, json and cls; size -1 where absent."""
        names = body[samples * 64 :]
        ends = np.frombuffer(names, "<u8", samples)
        self.keys = PackedStrings(ends, names[samples * 8 : samples * 8 + key_bytes])
        self._skipped = names[samples * 8 + key_bytes :]
        if check and not self._fits(size, key_bytes):
            raise ValueError("points outside of the shard")

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple[Callable[[bytes], ShardIndex], tuple[bytes]]:
        return _trusted, (bytes(self.data),)

    def _fits(self, size: int, key_bytes: int) -> bool:
        """Whether places lie within `size` bytes, and keys, one behind another, within `key_bytes`."""
        ends = self.keys.ends.astype(np.int64)
        return (
            int(self.places.min(initial=0)) >= ABSENT
            and int(self.places.max(initial=0)) <= size
            and not np.any(np.diff(ends, prepend=0, append=key_bytes) < 0)
        )

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(key, reason) of what is not used."""
        return [(str(key), str(reason)) for key, reason in json.loads(bytes(self._skipped))]

    @property
    def count(self) -> Count:
        """The numbers that are kept of it."""
        return Count(len(self), len(self.skipped))


def _trusted(data: bytes) -> ShardIndex:
    """An index that another process of this run has made."""
    return ShardIndex(data, check=False)


def build_index(path: str) -> ShardIndex:
    """Read the headers of a shard, never the bodies, and gather its entries to samples.

    Raises:
        UsageError: it cannot be read, is cut off, damaged or no plain tar.
    """
    try:
        file = ReadOnlyFile(path)
    except OSError as fault:
        raise UsageError(f"cannot read {path}: {fault.strerror}") from fault
    refused: list[tuple[str, str]] = []
    entries: list[tuple[str, tuple[int, int]]] = []
    for entry in tar_entries(file):
        if leaves_its_folder(entry.name):
            refused.append((entry.name, "entry-outside-shard"))
        elif entry.kind in _REFUSED_TYPES:
            refused.append((entry.name, _REFUSED_TYPES[entry.kind]))
        elif entry.kind in (b"0", b"\0", b"7") and not entry.name.endswith("/"):
            entries.append((entry.name, (entry.offset, entry.size)))
    samples, skipped = gather(entries)
    places = [[place or (0, ABSENT) for place in four] for four in samples.values()]
    table = np.array(places, dtype="<i8").reshape(len(samples), 4, 2)
    keys = PackedStrings.of(samples)
    listed = json.dumps(refused + skipped).encode()
    body = b"".join((table.tobytes(), keys.ends.astype("<u8").tobytes(), bytes(keys.data), listed))
    digest = hashlib.blake2b(body, digest_size=16).digest()
    header = _HEADER.pack(_MAGIC, *file.stamp, len(samples), len(keys.data), len(listed), digest)
    return ShardIndex(header + body, check=False)


def load_index(path: str, stamp: Stamp, *, check: bool = True) -> ShardIndex | None:
    """Map the index of the shard `path`, from beside it or from the cache; None where neither has one that is valid.

    Args:
        stamp: the shard's; an index of another one is stale.
        check: compare the digest, which reads the whole file.
    """
    for folder in index_folders(os.path.dirname(path)):
        try:
            return ShardIndex(_map(os.path.join(folder, f"{os.path.basename(path)}.index")), stamp, check=check)
        except (OSError, ValueError):  # absent, or of no use: it is made again from the shard
            continue
    return None


def write_index(index: ShardIndex, path: str, folder: str) -> None:
    """Write the index of the shard `path` to the index folder `folder`. Raises OSError."""
    _replace(os.path.join(folder, f"{os.path.basename(path)}.index"), bytes(index.data))


def index_folders(shard_folder: str) -> tuple[str, str]:
    """Where the index of the shards in a folder may stand: beside them, or in the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    spelled = os.fsencode(os.path.realpath(shard_folder or "."))
    name = hashlib.blake2b(spelled, digest_size=12).hexdigest()
    return os.path.join(shard_folder, FOLDER), os.path.join(base, "triscale", "shards", name)


def read_counts(shard_folder: str) -> dict[str, tuple[Stamp, Count]]:
    """File name to stamp and count of the shards in a folder that have an index; the folder's own word goes first."""
    counts: dict[str, tuple[Stamp, Count]] = {}
    for folder in reversed(index_folders(shard_folder)):
        with contextlib.suppress(OSError):  # not there
            counts.update(parse_counts(_read_small(os.path.join(folder, COUNTS_FILE), MAX_COUNTS_BYTES)))
    return counts


def parse_counts(content: bytes) -> dict[str, tuple[Stamp, Count]]:
    """File name to stamp and count, from what a `counts.json` holds; what is damaged is left out."""
    try:
        listed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    shards = listed.get("shards") if isinstance(listed, dict) and listed.get("version") == 1 else None
    entries = {str(name): _entry(values) for name, values in shards.items()} if isinstance(shards, dict) else {}
    return {name: entry for name, entry in entries.items() if entry is not None}


def write_counts(folder: str, counts: Mapping[str, tuple[Stamp, Count]]) -> None:
    """Write `counts.json` to the index folder `folder`. Raises OSError."""
    shards = {name: [*stamp, *count] for name, (stamp, count) in sorted(counts.items())}
    _replace(os.path.join(folder, COUNTS_FILE), json.dumps({"version": 1, "shards": shards}).encode())


def img2dataset_count(path: str) -> Count | None:
    """The number of samples that img2dataset's `00000_stats.json` tells of the shard `00000.tar`; None without one."""
    try:
        return parse_img2dataset(_read_small(stats_file(path), _MAX_STATS_BYTES))
    except OSError:  # there is none that can be read, so the headers are
        return None


def stats_file(shard: str) -> str:
    """Where img2dataset writes what it knows of `shard`, a path or URL."""
    return os.path.splitext(shard)[0] + "_stats.json"


def parse_img2dataset(content: bytes) -> Count | None:
    """The number of samples of a shard, from its `_stats.json`; None where that does not tell it."""
    try:
        stats = json.loads(content)
    except (ValueError, RecursionError):
        return None
    successes = stats.get("successes") if isinstance(stats, dict) else None
    return Count(successes, 0) if type(successes) is int and 0 <= successes < 2**40 else None


def _entry(values: object) -> tuple[Stamp, Count] | None:
    if not isinstance(values, list) or len(values) != 4 or not all(type(value) is int for value in values):
        return None
    size, time_ns, samples, skipped = values
    if not (0 <= samples < 2**40 and 0 <= skipped < 2**40):
        return None
    return (size, time_ns), Count(samples, skipped)


def _map(path: str) -> mmap.mmap:
    descriptor = _open_regular(path)
    try:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _read_small(path: str, limit: int) -> bytes:
    with os.fdopen(_open_regular(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise OSError(f"{path} is too large")
        return file.read(limit)


def _open_regular(path: str) -> int:
    """Open a regular file; a pipe would block at opening, or a device at reading."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def _replace(path: str, data: bytes) -> None:
    """Write a file at once: a reader sees the whole of the old or of the new one."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.{os.getpid()}.{threading.get_ident()}.partial"
    try:
        with open(partial, "wb") as file:
            file.write(data)
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise
