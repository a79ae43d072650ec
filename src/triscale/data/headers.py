"""What the bytes of an image file say that Pillow does not ask, asks too late, or holds against a limit of its own."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

_SCAN = 0xDA
_TABLES = (0xC4, 0xC8, 0xCC)
"""Markers among those of frames that are none."""
_BASELINE = (0xC0, 0xC1)
"""Frames in Huffman coding whose scans come one after another."""
_HUFFMAN = (*_BASELINE, 0xC2)
_APPLICATION_1 = 0xE1
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Colour type to channels (ISO/IEC 15948, 11.2.2)."""
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row and column, and steps, of an interlaced PNG's passes (ISO/IEC 15948, 8.2)."""
_INFLATED_AT_A_TIME = 2**20


class JpegHeader(NamedTuple):
    """What stands before a JPEG's first scan (ITU-T T.81, annex B)."""

    coding: int
    """The marker of its frame."""
    bits: int
    """Of a sample."""
    height: int
    width: int
    channels: int
    exif: bool
    """Whether there is an EXIF segment."""

    @property
    def plain(self) -> bool:
        """Whether it is of grey or RGB with 8 bits, in Huffman coding, and lies as it is to be seen: most JPEGs."""
        common = self.coding in _HUFFMAN and self.bits == 8 and self.channels in (1, 3)
        return common and not self.exif and self.width > 0 and self.height > 0


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG, read in a fifth of the time that Pillow takes; None where there is no frame."""
    frame, exif, place = None, False, 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in _TABLES and frame is None and place + 10 <= len(data):
            frame = (marker, *struct.unpack_from(">BHHB", data, place + 4))
        exif = exif or (marker == _APPLICATION_1 and data[place + 4 : place + 8] == b"Exif")
        place += 1 if marker == 0xFF else 2 + max(length, 2)  # 0xFF may fill up before a marker
    return None if frame is None else JpegHeader(*frame, exif)


def jpeg_scans(data: bytes, header: JpegHeader | None) -> int:
    """How often a JPEG goes over its pixels. 1 for a baseline one, in whose scans every block takes some bits."""
    # A scan's header begins so, and nothing between headers does (ITU-T T.81, B.1.1.5).
    return 1 if header is not None and header.coding in _BASELINE else data.count(b"\xff\xda\0")


def webp_pixels(data: bytes) -> int:
    """Width times height by the header of a WebP file (RFC 9649), whose decoder allocates them at once; or 0."""
    kind = data[12:16]
    if len(data) < 30:
        return 0
    if kind == b"VP8X":
        return (int.from_bytes(data[24:27], "little") + 1) * (int.from_bytes(data[27:30], "little") + 1)
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return ((bits & 0x3FFF) + 1) * ((bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return (width & 0x3FFF) * (height & 0x3FFF)
    return 0


def png_bits(data: bytes) -> int:
    """Bits of a PNG's samples: 1, 2, 4, 8 or 16."""
    return data[24]


def png_lacks_rows(data: bytes) -> bool:
    """Whether a PNG's compressed pixels end well, but before its last row; Pillow leaves the others black.

    Costs as much as decoding, but no memory.
    """
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    expected = 0
    for top, left, down, right in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        rows, columns = len(range(top, height, down)), len(range(left, width, right))
        expected += rows * (1 + -(-columns * bits * _PNG_CHANNELS[colour] // 8)) if columns else 0
    return _inflated_bytes(data) < expected


def _inflated_bytes(data: bytes) -> int:
    """What the IDAT chunks hold when they are unpacked, in bytes."""
    inflate, size, place = zlib.decompressobj(), 0, 8
    while place + 8 <= len(data) and not inflate.eof:
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IDAT":
            rest = data[place + 8 : place + 8 + length]
            while rest:
                size += len(inflate.decompress(rest, _INFLATED_AT_A_TIME))
                rest = inflate.unconsumed_tail
        place += 12 + length
    while not inflate.eof and (more := inflate.decompress(b"", _INFLATED_AT_A_TIME)):
        size += len(more)
    return size
