"""Where the members of a tar lie: its headers, read without its bodies and without trusting either."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from triscale.errors import UsageError

_BLOCK_BYTES = 512
_MAX_NAME_BYTES = 2**20
_RECORD_BYTES = 20 * _BLOCK_BYTES
"""What the end of an archive is filled up to."""
_WITHOUT_BODY = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes."""
_PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


class TarEntry(NamedTuple):
    """A member of a tar: its name, its type flag, and where its body lies."""

    name: str
    kind: bytes
    offset: int
    size: int


class ReadOnlyFile:
    """A file descriptor that closes with its last reference and is read at offsets, from any thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        self.stamp = (status.st_size, status.st_mtime_ns)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`. Raises OSError where the file ends before."""
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # one call may give less than was asked for, on network file systems above all
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self.path} ends at byte {offset + len(data)}, before {offset + size}")
            data += more
        return data


def tar_entries(file: ReadOnlyFile) -> Iterator[TarEntry]:
    """The members of a plain tar (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU), reading nothing but headers.

    Own code because the standard library's reader takes damage in the middle for the end, and reads names of any size.

    Raises:
        UsageError: the file is empty, cut off, damaged, compressed or no tar.
    """
    offset = 0
    long_name, long_size = None, None
    while header := _read_header(file, offset):
        kind, size = header[156:157], _number(header[124:136], file.path)
        body = offset + _BLOCK_BYTES
        if kind not in b"xL" and long_size is not None:
            size = long_size
        if kind in _WITHOUT_BODY:  # whatever size they tell: old programs tell that of a link's target
            size = 0
        elif kind == b"S":
            body = _behind_sparse_map(file, header, body)
        offset = body + -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
        if offset > file.size:
            raise UsageError(f"{file.path} is cut off in the middle of an entry: fetch it again")
        if kind in b"xL" and size > _MAX_NAME_BYTES:
            raise UsageError(f"{file.path} is damaged: an entry's name is {size} bytes long")
        if kind == b"L":  # GNU: the next entry's name
            long_name = _text(file.read(body, size))
        elif kind == b"x":  # pax: the next entry's attributes
            attributes = _pax_attributes(file.read(body, size), file.path)
            long_name = _text(attributes[b"path"]) if b"path" in attributes else long_name
            long_size = _decimal(attributes[b"size"], file.path) if b"size" in attributes else None
        elif kind not in b"gK":  # pax global attributes and GNU link targets: of no use here
            yield TarEntry(_header_name(header) if long_name is None else long_name, kind, body, size)
            long_name, long_size = None, None
    _require_no_second(file, offset)


def _require_no_second(file: ReadOnlyFile, end: int) -> None:
    """Raise UsageError where a further archive follows the end, whose samples would be lost; other bytes may."""
    rest = file.read(end, min(_RECORD_BYTES + _BLOCK_BYTES, file.size - end))
    blocks = (rest[at : at + _BLOCK_BYTES] for at in range(0, len(rest), _BLOCK_BYTES))
    following = next((block for block in blocks if block.strip(b"\0")), b"")
    if len(following) == _BLOCK_BYTES and _has_checksum(following):
        raise UsageError(f"{file.path} is several archives in one file, read as its first alone: write it as one")


def _behind_sparse_map(file: ReadOnlyFile, header: bytes, offset: int) -> int:
    """Where the body of GNU's sparse kind begins: behind the blocks that its map takes beside the header."""
    goes_on = header[482]
    while goes_on and offset + _BLOCK_BYTES <= file.size:
        goes_on = file.read(offset, _BLOCK_BYTES)[504]
        offset += _BLOCK_BYTES
    return offset


def _read_header(file: ReadOnlyFile, offset: int) -> bytes:
    """The header block at `offset`, checked; empty at the end of the archive."""
    if file.size < _BLOCK_BYTES:
        raise UsageError(f"{file.path} is {'not a tar shard' if file.size else 'empty'}: fetch it again")
    if offset + _BLOCK_BYTES > file.size:
        raise UsageError(f"{file.path} is cut off: it has no end-of-archive block; fetch it again")
    header = file.read(offset, _BLOCK_BYTES)
    if not header.strip(b"\0"):
        return b""
    if not _has_checksum(header):
        if offset:
            raise UsageError(f"{file.path} is damaged at byte {offset}: fetch it again")
        packed = header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
        raise UsageError(f"{file.path} is {'compressed: unpack it to a plain tar' if packed else 'not a tar shard'}")
    return header


def _has_checksum(header: bytes) -> bool:
    """Whether a block holds the octal sum of its bytes, as every header does."""
    digits = header[148:156].strip(b" \0")
    is_octal = bool(digits) and not digits.strip(b"01234567")
    return is_octal and int(digits, 8) == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _header_name(header: bytes) -> str:
    """The name in a header block: of up to 100 bytes, after a prefix in ustar archives."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(name: bytes) -> str:
    """A name as text; bytes that are not UTF-8 are spelled out."""
    return name.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _number(field: bytes, path: str) -> int:
    """A header's size: octal digits, or big-endian after a first byte of 0x80 (GNU, from 8 GiB)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if digits.strip(b"01234567"):
        raise UsageError(f"{path} is damaged: an entry has no readable size")
    return int(digits, 8)


def _decimal(digits: bytes, path: str) -> int:
    """A pax size."""
    if not digits.isdigit() or len(digits) > 18:
        raise UsageError(f"{path} is damaged: an entry has no readable size")
    return int(digits)


def _pax_attributes(data: bytes, path: str) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of a pax header."""
    attributes: dict[bytes, bytes] = {}
    place, end = 0, len(data.rstrip(b"\0"))
    while place < end:
        record = _PAX_RECORD.match(data, place)
        following = place + int(record[1]) if record else 0
        if record is None or not record.end() < following <= len(data):
            raise UsageError(f"{path} is damaged: unreadable pax attributes")
        attributes[record[2]] = data[record.end() : following - 1]
        place = following
    return attributes
