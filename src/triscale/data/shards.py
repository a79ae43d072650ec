"""WebDataset tar shards, read by byte offset.

At opening the headers of every shard are read once (never the bodies) and the places of its samples kept in compact
arrays, 72 bytes and a key a sample. A sample is then read with `os.pread`, without any position to keep: any order,
thread or process serves. Shards are untrusted: nothing is ever unpacked, and every size is checked before its bytes
are read.
"""

from __future__ import annotations

import glob
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triscale.data.samples import BadSample, Sample
from triscale.data.tar import ReadOnlyFile, tar_entries
from triscale.errors import RunError, UsageError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_SIDECAR_BYTES = 64 * 2**10

_FIELDS = {extension: 0 for extension in IMAGE_EXTENSIONS} | {"txt": 1, "json": 2, "cls": 3}
_TOO_LARGE = ("image-too-large", "caption-too-long", "metadata-too-large", "label-too-large")
_LIMITS = (MAX_IMAGE_BYTES, MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES)
_ABSENT = -1

_OPEN_SHARDS = 64
_REFUSED_TYPES = {b"1": "entry-is-link", b"2": "entry-is-link"} | dict.fromkeys((b"3", b"4", b"6"), "entry-is-device")


class _Shard(NamedTuple):
    """An indexed shard. `places` is (n, 4, 2): offset and size of image, txt, json and cls; size -1 where absent."""

    path: str
    stamp: tuple[int, int]
    keys: list[str]
    places: np.ndarray
    skipped: list[tuple[str, str]]


class ShardSource:
    """The samples of some tar shards, in the order of the shards' paths and of the entries within. See `open_shards`.

    Attributes:
        name: what reports call this source.
        skipped: (key, reason) of everything in the shards that is not used: entries outside the shard, links, devices,
            second samples of a key, samples without an image.
    """

    def __init__(self, name: str, shards: Sequence[_Shard]) -> None:
        self.name = name
        self.skipped = [entry for shard in shards for entry in shard.skipped]
        self._paths = [shard.path for shard in shards]
        self._stamps = [shard.stamp for shard in shards]
        self._ends = np.cumsum([len(shard.keys) for shard in shards])
        self._places = np.concatenate([shard.places for shard in shards])
        keys = [key.encode() for shard in shards for key in shard.keys]
        self._key_bytes = b"".join(keys)
        self._key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
        self._open: OrderedDict[int, ReadOnlyFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, object]:
        """Open files and the lock stay behind: every process opens its own."""
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._open = OrderedDict()
        self._lock = threading.Lock()

    def key(self, index: int) -> str:
        """Name of sample `index`: its path in the shard up to the first dot of the file name."""
        start = int(self._key_ends[index - 1]) if index else 0
        return self._key_bytes[start : int(self._key_ends[index])].decode()

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` only its sidecars are read.

        Raises:
            BadSample: the image is empty or too large, or a sidecar too large; nothing of it was read.
            OSError: reading failed.
            RunError: the shard is not the file that was opened.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        key = self.key(index)
        places = self._places[index].tolist()
        for (_, size), limit, reason in zip(places, _LIMITS, _TOO_LARGE, strict=True):
            if size > limit:
                raise BadSample(reason, key)
        if places[0][1] == 0:
            raise BadSample("image-empty", key)
        shard = self._file(int(np.searchsorted(self._ends, index, side="right")))
        if not image:
            places[0] = (0, _ABSENT)
        parts = [None if size == _ABSENT else shard.read(offset, size) for offset, size in places]
        return Sample(key=key, image=parts[0] or b"", text=parts[1], metadata=parts[2], label=parts[3])

    def _file(self, number: int) -> ReadOnlyFile:
        """The open file of shard `number`; a file pushed out closes when its last reader lets go of it."""
        with self._lock:
            file = self._open.pop(number, None) or ReadOnlyFile(self._paths[number])
            self._open[number] = file
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        if file.stamp != self._stamps[number]:
            raise RunError(f"{self._paths[number]} has changed since it was opened: start again")
        return file


def open_shards(
    patterns: str | Path | Sequence[str | Path], *, root: str | Path = "", name: str | None = None
) -> ShardSource:
    """Index tar shards and return them as one source.

    Args:
        patterns: paths or globs (`*`, `?`, `[...]`, `**`) of shards; a shard that several name counts once.
        root: folder that patterns are relative to.
        name: what reports call the source; default: the patterns.

    Raises:
        UsageError: a pattern matches nothing, a shard is cut off or no plain tar, or there is no sample in any.
    """
    listed = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    name = name or " ".join(str(pattern) for pattern in listed)
    paths = sorted({path for pattern in listed for path in _matching(str(pattern), str(root))})
    source_shards = [_index_shard(path) for path in paths]
    if not any(shard.keys for shard in source_shards):
        raise UsageError(f"{name} holds no samples: its shards have no entry named KEY.jpg, .jpeg, .png or .webp")
    return ShardSource(name, source_shards)


def sample_name(entry: str) -> tuple[str, str]:
    """Split an entry's name into (key, extension) as webdataset does: at the first dot of the file name.

    The extension is in lower case; both are empty where the entry is no part of a sample ("README", ".DS_Store").
    """
    while entry.startswith("./"):
        entry = entry[2:]
    folder, slash, file = entry.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def leaves_its_folder(entry: str) -> bool:
    """Whether an entry's name points outside the folder that it would be unpacked in."""
    return entry.startswith("/") or ".." in entry.split("/")


def _matching(pattern: str, root: str) -> list[str]:
    """Paths of the files that `pattern` names. Raises UsageError where there are none."""
    path = os.path.join(root, pattern)
    if os.path.isfile(path):
        return [path]
    found = [os.path.join(root, match) for match in glob.glob(pattern, root_dir=root or None, recursive=True)]
    files = [match for match in found if os.path.isfile(match)]
    if files:
        return files
    if os.path.isdir(path):
        raise UsageError(f"{path} is a folder: name its shards, such as {os.path.join(path, '*.tar')}")
    raise UsageError(f"no file matches {path}: {_what_is_there(path)}")


def _what_is_there(path: str) -> str:
    """Say what stands in the nearest folder that exists on the way to `path`."""
    folder = os.path.dirname(path) or "."
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "."
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return f"{folder} holds {shown or 'nothing'}"


def _index_shard(path: str) -> _Shard:
    """Read the headers of a shard and gather its entries to samples by key."""
    try:
        file = ReadOnlyFile(path)
    except OSError as fault:
        raise UsageError(f"cannot read {path}: {fault.strerror}") from fault
    samples: dict[str, list[tuple[int, int]]] = {}
    repeated: dict[str, None] = {}
    skipped: list[tuple[str, str]] = []
    for entry in tar_entries(file):
        if leaves_its_folder(entry.name):
            skipped.append((entry.name, "entry-outside-shard"))
        elif entry.kind in _REFUSED_TYPES:
            skipped.append((entry.name, _REFUSED_TYPES[entry.kind]))
        elif entry.kind in (b"0", b"\0", b"7") and not entry.name.endswith("/"):
            key, extension = sample_name(entry.name)
            field = _FIELDS.get(extension)
            if field is None or key in repeated:
                continue
            places = samples.setdefault(key, [(0, _ABSENT)] * 4)
            if places[field][1] == _ABSENT:
                places[field] = (entry.offset, entry.size)
            else:
                repeated[key] = None  # and what follows under this key belongs to the second sample
    skipped += [(key, "key-duplicate") for key in repeated]
    skipped += [(key, "image-missing") for key, places in samples.items() if places[0][1] == _ABSENT]
    whole = {key: places for key, places in samples.items() if places[0][1] != _ABSENT}
    table = np.array(list(whole.values()), dtype=np.int64).reshape(len(whole), 4, 2)
    return _Shard(path, file.stamp, list(whole), table, skipped)
