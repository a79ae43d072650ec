"""CSV and TSV files: a row a sample, read by byte offset.

A file is gone through once at opening, and the place of every 32nd row kept, a quarter of a byte a row. Quotes are read
as the csv module does: one opens a field only at its beginning. A quote that is never closed costs its own row alone.
"""

from __future__ import annotations

import csv
import io
import os
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import numpy as np

from triscale.data.files import OPEN_FILES, Recent, open_unchanged
from triscale.data.samples import BadSample, Sample
from triscale.data.tables import Columns, choose_columns, make_sample
from triscale.data.tar import ReadOnlyFile
from triscale.errors import UsageError

MAX_ROW_BYTES = 64 * 2**10
MAX_LINE_BYTES = 2**20
_SEPARATORS = (",", "\t", ";", "|")
_GROUP_ROWS = 32


class _Table(NamedTuple):
    """A file whose rows are known. `groups` holds the offset of every 32nd row, and of the end."""

    path: str
    stamp: tuple[int, int]
    separator: str
    header: tuple[str, ...]
    columns: Columns
    groups: np.ndarray
    rows: int


class CsvSource:
    """The rows of CSV files, in the order of the files and of the rows within. A row's key is "FILE#ROW", from 0.

    Args:
        name: what reports call this source.
        paths: the files; UTF-8, each with a header.
        folder: what image paths are relative to and must not leave.
        columns: see `tables.choose_columns`.
        keyed_by_path: whether a row's key is its image's path.

    Raises:
        UsageError: a file is missing, no table or empty, or has not the columns.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        folder: str,
        columns: Sequence[str] = (),
        *,
        keyed_by_path: bool = False,
    ) -> None:
        self.name = name
        self.folder = os.path.realpath(folder)
        self._keyed_by_path = keyed_by_path
        self._tables = [_open_table(path, columns) for path in paths]
        self._ends = np.cumsum([table.rows for table in self._tables])
        stamps = [table.stamp for table in self._tables]
        self._files = Recent(partial(open_unchanged, list(paths), stamps), OPEN_FILES)
        if not len(self):
            raise UsageError(f"{name} holds no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def file(self, index: int) -> str:
        """Path of the table that sample `index` is a row of."""
        return self._tables[self._table(index)].path

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` no image file is opened.

        Raises:
            BadSample: row-too-long, row-not-utf8, row-malformed (it has not as many fields as the header), or as
                `tables.make_sample`.
            OSError: reading failed.
            RunError: the file is not the one that was opened.
        """
        number = self._table(index)
        table = self._tables[number]
        row = index - (int(self._ends[number - 1]) if number else 0)
        key = f"{os.path.basename(table.path)}#{row}"
        fields = _fields(self._record(number, row), table, key)
        columns = table.columns
        return make_sample(
            fields[columns.image] if self._keyed_by_path else key,
            fields[columns.image] if image else b"",
            [fields[caption] for caption in columns.captions],
            fields[columns.label] if columns.label else None,
            self.folder,
        )

    def _table(self, index: int) -> int:
        """Number of the table that sample `index` is a row of."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def _record(self, number: int, row: int) -> bytes:
        table = self._tables[number]
        group, place = divmod(row, _GROUP_ROWS)
        start, end = table.groups[group : group + 2].tolist()
        records = _records(io.BytesIO(self._files[number].read(start, end - start)), table.separator.encode())
        return next(record for at, (_, record) in enumerate(records) if at == place)


def _open_table(path: str, wanted: Sequence[str]) -> _Table:
    """Read a file's header and find its rows."""
    try:
        stamp = ReadOnlyFile(path).stamp
        with open(path, "rb") as file:
            header = file.readline(MAX_LINE_BYTES)
            separator, names, columns = _read_header(header.removeprefix(b"\xef\xbb\xbf"), path, wanted)
            groups, rows, offset = array("Q"), 0, len(header)
            for start, record in _records(file, separator.encode()):
                if rows % _GROUP_ROWS == 0:
                    groups.append(len(header) + start)
                rows += 1
                offset = len(header) + start + len(record)
            groups.append(offset)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except _LongLine as error:
        raise UsageError(f"{path} is no CSV file: it has a line longer than {MAX_LINE_BYTES >> 20} MiB") from error
    return _Table(path, stamp, separator, names, columns, np.frombuffer(groups, np.uint64), rows)


def _read_header(line: bytes, path: str, wanted: Sequence[str]) -> tuple[str, tuple[str, ...], Columns]:
    """The separator under which the header has the columns, the first that does; its names, and the columns."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text") from error
    if not text.strip():
        raise UsageError(f"{path} is {'empty' if not line else 'without a header'}: its first line names the columns")
    separators = ("\t",) if path.lower().endswith(".tsv") else sorted(_SEPARATORS, key=lambda s: -text.count(s))
    failure: UsageError | None = None
    for separator in separators:
        try:
            names = tuple(name.strip() for name in next(csv.reader([text.rstrip("\r\n")], delimiter=separator)))
        except csv.Error as error:
            raise UsageError(f"{path} is no CSV file: its first line cannot be read ({error})") from error
        try:
            return separator, names, choose_columns(names, wanted, path)
        except UsageError as error:
            failure = failure or error  # what the most frequent separator gives says most
    assert failure is not None
    raise failure


class _LongLine(Exception):
    pass


def _records(file: BinaryIO | io.BytesIO, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset from where `file` stands, bytes) of every row; empty lines are none.

    A row ends with its line, or with the line in which its last open quote closes. One that stays open for 64 KiB was
    never meant to: then the row is the one line.
    """
    again: deque[bytes] = deque()
    offset = 0
    while line := again.popleft() if again else file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise _LongLine
        held, size = [line], len(line)
        inside = b'"' in line and _ends_quoted(line, separator, False)
        while inside and size <= MAX_ROW_BYTES:
            line = again.popleft() if again else file.readline(MAX_LINE_BYTES + 1)
            if not line:
                break
            held.append(line)
            size += len(line)
            inside = _ends_quoted(line, separator, True)
        if inside:
            again.extendleft(reversed(held[1:]))
            held, size = held[:1], len(held[0])
        if size > 2 or held[0].strip():
            yield offset, b"".join(held)
        offset += size


def _ends_quoted(line: bytes, separator: bytes, inside: bool) -> bool:
    """Whether a quoted field is open at the end of `line`; `inside`: whether one is at its beginning."""
    place = 0
    while True:
        if inside:
            place = line.find(b'"', place)
            while place >= 0 and line[place + 1 : place + 2] == b'"':  # a doubled quote stands for one
                place = line.find(b'"', place + 2)
            if place < 0:
                return True
        elif line[place : place + 1] == b'"':
            inside, place = True, place + 1
            continue
        place = line.find(separator, place)
        if place < 0:
            return False
        inside, place = False, place + 1


def _fields(record: bytes, table: _Table, key: str) -> dict[str, str]:
    """A row's fields by column."""
    if len(record) > MAX_ROW_BYTES:
        raise BadSample("row-too-long", key)
    try:
        text = record.decode()
    except UnicodeDecodeError:
        raise BadSample("row-not-utf8", key) from None
    try:
        values = next(csv.reader([text.rstrip("\r\n")], delimiter=table.separator))
        return dict(zip(table.header, values, strict=True))
    except (csv.Error, ValueError):
        raise BadSample("row-malformed", key) from None
