"""Files at places that others have written down: opened below one folder or not at all, and held open in turns."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from triscale.data.samples import BadSample
from triscale.data.tar import ReadOnlyFile
from triscale.errors import RunError

OPEN_FILES = 64
"""Files that a source holds open at once."""
Kept = TypeVar("Kept")

_NO_SUCH_PATH = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def read_below(
    folder: str, path: str, limit: int, *, key: str, field: str, too_large: str, listed: bool = False
) -> bytes:
    """The content of the file `path`, which comes from a table or a directory that is not to be trusted.

    Args:
        folder: as os.path.realpath gives it: what `path` is relative to and must not leave, by `..`, as an absolute
            path or by a link.
        path: relative, or absolute and below `folder`.
        limit: most bytes that are read.
        key: of the sample, for the error.
        field: what it is, for reasons: "image", "caption", ...
        too_large: the reason where it is larger.
        listed: it was there at opening: that it is gone is a failed read, which may succeed later.

    Raises:
        BadSample: FIELD-path-outside, FIELD-missing, FIELD-not-a-file (a folder, pipe, device) or `too_large`.
        OSError: reading failed.
    """
    try:
        whole = os.path.realpath(os.path.join(folder, path))
        if os.path.commonpath([folder, whole]) != folder:
            raise BadSample(f"{field}-path-outside", key)
        # Links are resolved by now. A pipe would block at opening.
        descriptor = os.open(whole, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except ValueError:  # NUL in the path
        raise BadSample(f"{field}-missing", key) from None
    except OSError as error:
        if listed or error.errno not in _NO_SUCH_PATH:
            raise
        raise BadSample(f"{field}-missing", key) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample(f"{field}-not-a-file", key)
        if status.st_size > limit:
            raise BadSample(too_large, key)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def open_unchanged(paths: Sequence[str], stamps: Sequence[tuple[int, int]], number: int) -> ReadOnlyFile:
    """Open file `number` of `paths`. Raises RunError where it is not the file of that size and time any more."""
    file = ReadOnlyFile(paths[number])
    if file.stamp != stamps[number]:
        raise RunError(f"{paths[number]} has changed since it was opened: start again")
    return file


class PackedStrings(Sequence[str]):
    """Many strings in two blocks of memory: 8 bytes each beside their own.

    Args:
        ends: where each ends in `data`, uint64 (n,).
        data: their UTF-8 bytes one after another; lone surrogates stand for bytes that are none.
    """

    def __init__(self, ends: np.ndarray, data: bytes | memoryview) -> None:
        self.ends = ends
        self.data = data

    @staticmethod
    def of(strings: Iterable[str]) -> PackedStrings:
        """Pack `strings`."""
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        return PackedStrings(np.cumsum([len(data) for data in encoded], dtype=np.uint64), b"".join(encoded))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        start = int(self.ends[index - 1]) if index else 0
        return bytes(self.data[start : int(self.ends[index])]).decode("utf-8", "surrogateescape")


class Recent(Generic[Kept]):
    """The things that were asked for last, made when they are asked for and not there. Threads may ask at once.

    Args:
        make: from a number to the thing; not a method of what holds this.
        most: largest sum of sizes that is kept, but the last thing always; one pushed out lives on while it is held.
        size: of a thing; by default 1, so that `most` is a number of things.
    """

    def __init__(self, make: Callable[[int], Kept], most: int, size: Callable[[Kept], int] | None = None) -> None:
        self._make, self._most, self._size = make, most, size
        self._forget()

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, object]:
        """To another process goes how things are made; it makes its own."""
        return {"_make": self._make, "_most": self._most, "_size": self._size}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    def __getitem__(self, number: int) -> Kept:
        """The thing of that number."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number][0]
            thing = self._make(number)
            size = 1 if self._size is None else self._size(thing)
            self._kept[number] = thing, size
            self._total += size
            while self._total > self._most and len(self._kept) > 1:
                self._total -= self._kept.popitem(last=False)[1][1]
            return thing

    def _forget(self) -> None:
        self._kept: OrderedDict[int, tuple[Kept, int]] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
