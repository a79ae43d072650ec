"""Write and check the indexes of tar shards: what `triscale data index` does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Literal, NamedTuple

from triscale.data.processes import note
from triscale.data.shard_index import (
    COUNTS_FILE,
    Count,
    ShardIndex,
    Stamp,
    build_index,
    index_folders,
    load_index,
    read_counts,
    write_counts,
    write_index,
)
from triscale.data.tar import ReadOnlyFile
from triscale.data.workers import Watch, run
from triscale.errors import RunError, UsageError


class Indexed(NamedTuple):
    """What became of one shard's index."""

    path: str
    outcome: Literal["kept", "written", "damaged"]
    stamp: Stamp
    holds: Count
    skipped: dict[str, int]
    """Entries that are not used, by reason."""
    fault: str
    """Why the shard is damaged."""


def index_shards(paths: Sequence[str], *, check: bool = False, workers: int = 0) -> list[Indexed]:
    """Make sure that every shard of `paths` has a valid index; those that cannot be read are told, not raised.

    Args:
        check: read the headers of shards whose index is valid, too, and compare.
        workers: processes that read; 0: this one does.

    Raises:
        RunError: neither the shards' folder nor the cache can be written.
    """
    folders = {folder: _writable_folder(folder) for folder in {os.path.dirname(path) for path in paths}}
    made: list[Indexed] = []
    each = (range(number, number + 1) for number in range(len(paths)))
    indexer = _Indexer(list(paths), folders, check)
    watch = Watch(describe=lambda number: f"was reading {paths[number]}")
    with closing(run(indexer, each, workers=workers, ahead=4 * workers, watch=watch)) as results:
        made.extend(results)
    for folder, target in folders.items():
        counts = {
            name: known for name, known in read_counts(folder).items() if os.path.exists(os.path.join(folder, name))
        }
        for shard in made:
            if os.path.dirname(shard.path) == folder:
                counts.pop(os.path.basename(shard.path), None)
                if shard.outcome != "damaged":
                    counts[os.path.basename(shard.path)] = (shard.stamp, shard.holds)
        try:
            write_counts(target, counts)
        except OSError as error:
            raise RunError(f"cannot write {os.path.join(target, COUNTS_FILE)}: {error.strerror}") from error
    return made


class _Indexer:
    """Indexes the one shard whose number a range holds. Goes to worker processes."""

    def __init__(self, paths: list[str], folders: dict[str, str], check: bool) -> None:
        self.paths, self.folders, self.check = paths, folders, check

    def __call__(self, numbers: range) -> Indexed:
        path = self.paths[numbers.start]
        note(numbers.start)
        try:
            stamp = ReadOnlyFile(path).stamp
            index = load_index(path, stamp)
            if index is not None and not self.check:
                return _indexed(path, "kept", index)
            built = build_index(path)
        except (UsageError, OSError) as error:
            return Indexed(path, "damaged", (0, 0), Count(0, 0), {}, str(error))
        if index is not None and bytes(built.data) == bytes(index.data):
            return _indexed(path, "kept", index)
        try:
            write_index(built, path, self.folders[os.path.dirname(path)])
        except OSError as error:
            raise RunError(f"cannot write the index of {path}: {error.strerror}") from error
        return _indexed(path, "written", built)


def _indexed(path: str, outcome: Literal["kept", "written"], index: ShardIndex) -> Indexed:
    reasons = Counter(reason for _, reason in index.skipped)
    return Indexed(path, outcome, index.stamp, index.count, dict(reasons), "")


def _writable_folder(shard_folder: str) -> str:
    """The index folder of the shards in a folder: beside them where that can be made and written, else the cache's."""
    beside, cache = index_folders(shard_folder)
    for folder in (beside, cache):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError:  # read-only, or not ours: the cache is there for that
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise RunError(f"neither {beside} nor {cache} can be written: set XDG_CACHE_HOME to a folder of yours")
