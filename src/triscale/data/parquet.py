"""Parquet files: a row a sample, read by row group. Needs pyarrow: pip install 'triscale[parquet]'.

At opening the files' footers are read, and of these only the numbers of rows kept: 24 bytes a row group. A read takes
in the row group that the sample lies in, and the last ones are kept, up to a budget; so row groups should be small
(some hundred images, or some thousand paths and captions) where samples are drawn in random order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from triscale.data.files import Recent
from triscale.data.samples import BadSample, Sample
from triscale.data.tables import Columns, choose_columns, make_sample, require_package
from triscale.errors import RunError, UsageError

CACHE_BYTES = 256 * 2**20
"""Row groups are kept in a process's memory up to this much."""
MAX_GROUP_BYTES = 2 * 2**30
"""Largest row group, uncompressed, of the columns that are read."""
_OPEN_FILES = 16


class _Files(NamedTuple):
    """The files of a source and where their row groups lie; what a reader in any process needs."""

    paths: list[str]
    stamps: list[tuple[int, int]]
    file_of_group: np.ndarray
    number_in_file: np.ndarray


class ParquetSource:
    """The rows of Parquet files, in the order of the files and of the rows within. A row's key is "FILE#ROW", from 0.

    Args:
        name: what reports call this source.
        paths: the files, all with the same columns.
        folder: what image paths are relative to and must not leave.
        columns: see `tables.choose_columns`.

    Attributes:
        classnames: of labels 0, 1, ..., where a Hugging Face data set has written them into the first file.

    Raises:
        UsageError: pyarrow is not installed; a file is damaged, has not the columns or too large row groups; no rows.
    """

    def __init__(self, name: str, paths: Sequence[str], folder: str, columns: Sequence[str] = ()) -> None:
        self.name = name
        self.folder = os.path.realpath(folder)
        rows, file_of_group, number_in_file = list[int](), list[int](), list[int]()
        stamps: list[tuple[int, int]] = []
        self._columns: Columns | None = None
        self.classnames: tuple[str, ...] = ()
        for number, path in enumerate(paths):
            stamps.append(_stamp(path))
            file = _open(path)
            if self._columns is None:
                self._columns = choose_columns(file.schema_arrow.names, columns, path)
                self.classnames = _classnames(file.schema_arrow.metadata or {}, self._columns.label)
            needed = [self._columns.image, *self._columns.beside_image]
            absent = [column for column in needed if column not in file.schema_arrow.names]
            if absent:
                raise UsageError(f"{path} has no column {absent[0]!r}, which {paths[0]} has")
            sizes = _group_rows(file.metadata, path, needed)
            rows += sizes
            file_of_group += [number] * len(sizes)
            number_in_file += range(len(sizes))
        self._ends = np.cumsum(rows, dtype=np.int64)
        if not len(self):
            raise UsageError(f"{name} holds no rows")
        files = _Files(list(paths), stamps, np.array(file_of_group), np.array(number_in_file))
        self._files = files
        self._file_starts = np.searchsorted(files.file_of_group, np.arange(len(paths)))
        assert self._columns is not None
        opened = Recent(partial(_reopen, files), _OPEN_FILES)
        captions = self._columns.beside_image
        self._beside = Recent(partial(_read_group, files, opened, captions), CACHE_BYTES, _bytes)
        self._whole = Recent(partial(_read_group, files, opened, [self._columns.image, *captions]), CACHE_BYTES, _bytes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def file(self, index: int) -> str:
        """Path of the file that sample `index` is a row of."""
        return self._files.paths[int(self._files.file_of_group[self._group(index)])]

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` the image's column is not read.

        Raises:
            BadSample: row-group-damaged, row-not-utf8, row-malformed, or as `tables.make_sample`.
            OSError: reading failed.
            RunError: the file is not the one that was opened.
        """
        group = self._group(index)
        row = index - self._start(group)
        file = int(self._files.file_of_group[group])
        key = f"{os.path.basename(self._files.paths[file])}#{index - self._start(int(self._file_starts[file]))}"
        columns = self._columns
        assert columns is not None
        if not image and not columns.beside_image:
            return Sample(key=key, image=b"")
        table = (self._whole if image else self._beside)[group]
        if table is None:
            raise BadSample("row-group-damaged", key)
        value = _row(table, row, key)
        return make_sample(
            key,
            value[columns.image] if image else b"",
            [value[caption] for caption in columns.captions],
            value[columns.label] if columns.label else None,
            self.folder,
        )

    def _group(self, index: int) -> int:
        """Number of the row group that sample `index` lies in."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def _start(self, group: int) -> int:
        return int(self._ends[group - 1]) if group else 0


def _open(path: str) -> Any:
    """The file with its footer read; UsageError where it is no Parquet file."""
    arrow, parquet = _packages()
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise UsageError(
            f"{path} is no Parquet file, or it is damaged: {' '.join(str(error).split())[:200]}"
        ) from error


def _classnames(metadata: Mapping[bytes, bytes], label: str | None) -> tuple[str, ...]:
    """The names that a Hugging Face data set's features give to labels; none where they are not there or not names."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _group_rows(metadata: Any, path: str, columns: Sequence[str]) -> list[int]:
    """Rows of every row group, after their sizes were found to fit."""
    rows = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        if size > MAX_GROUP_BYTES:
            raise UsageError(
                f"{path}: row group {number} takes {size / 2**30:.1f} GiB, more than {MAX_GROUP_BYTES >> 30}: write it "
                "again with smaller row groups, or as tar shards (triscale data pack)"
            )
        rows.append(group.num_rows)
    return rows


def _reopen(files: _Files, number: int) -> Any:
    path = files.paths[number]
    if _stamp(path) != files.stamps[number]:
        raise RunError(f"{path} has changed since it was opened: start again")
    return _open(path)


def _read_group(files: _Files, opened: Recent[Any], columns: Sequence[str], group: int) -> Any:
    """The table of a row group; None where its bytes are damaged."""
    arrow, _ = _packages()
    file = opened[int(files.file_of_group[group])]
    try:
        return file.read_row_group(int(files.number_in_file[group]), columns=list(columns), use_threads=False)
    except arrow.ArrowInvalid:
        return None
    except OSError as error:
        if error.errno is None:  # what could be read is damaged, says the decompressor
            return None
        raise


def _row(table: Any, row: int, key: str) -> dict[str, Any]:
    """A row's values by column. What files say to be text is not checked before."""
    try:
        return {name: table.column(name)[row].as_py() for name in table.column_names}
    except UnicodeDecodeError:
        raise BadSample("row-not-utf8", key) from None
    except (ValueError, OverflowError):  # such as a date beyond those that Python has
        raise BadSample("row-malformed", key) from None


def _packages() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet."""
    names = ("pyarrow", "pyarrow.parquet")
    arrow, parquet = (require_package(name, "parquet", "reading Parquet files") for name in names)
    return arrow, parquet


def _bytes(table: Any) -> int:
    return 0 if table is None else table.nbytes


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns
