"""Makes the files that bad and odd inputs are: images, JPEG and PNG by their parts, tar shards with any header."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from PIL import Image

TarPart = tuple[str, bytes] | tarfile.TarInfo | bytes
"""Of a shard: a name with its content, a header without a body, or blocks as they are."""

SOI, EOI, SOS = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"

UPRIGHT_STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: seen[::-1, ::-1].transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}
"""How a camera stores the picture that is to be seen, by EXIF 2.3 table 6: where row 0 and column 0 lie."""


def encode(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    file = io.BytesIO()
    whole = Image.fromarray(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image
    whole.save(file, form, **options)
    return file.getvalue()


def picture(height: int = 24, width: int = 36) -> np.ndarray:
    """A smooth picture without any symmetry, uint8 (h, w, 3)."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + 2 * y) * 255 // (width + 2 * height)], -1).astype(
        np.uint8
    )


def oriented(seen: np.ndarray, orientation: int, form: str) -> bytes:
    """A file that stores `seen` as a camera held in that orientation does."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(UPRIGHT_STORED[orientation](seen), form, exif=exif, lossless=True, quality=95)


# JPEG by its parts (ITU-T T.81, annex B).


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    """`jpeg` with further segments at its beginning."""
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def frame_header(jpeg: bytes) -> int:
    """Where the frame's segment (SOF0 or SOF2) begins."""
    return max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))


def with_frame(jpeg: bytes, *, marker: int = 0xC0, bits: int = 8, height: int = 24, width: int = 24) -> bytes:
    """`jpeg` with another kind of frame, depth or size in its header."""
    at = frame_header(jpeg)
    return jpeg[: at + 1] + struct.pack(">BHBHH", marker, 17, bits, height, width) + jpeg[at + 9 :]


def ycck(image: np.ndarray) -> bytes:
    """A JPEG of four components as Adobe's programs write them: inverted ink, the first three as YCbCr."""
    negative = Image.fromarray(255 - image).convert("YCbCr")
    stored = [255 - np.asarray(band) for band in negative.split()]  # Pillow inverts what it writes
    bands = [Image.fromarray(band) for band in [*stored, np.zeros_like(stored[0])]]
    data = bytearray(encode(Image.merge("CMYK", bands), "JPEG", quality=100, subsampling=0))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2  # the transform: YCCK
    return bytes(data)


def subsampled(image: np.ndarray, kind: str) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=95, colorsubsampling=kind)


def arithmetic_grey() -> bytes:
    """An 8 x 8 grey JPEG in arithmetic coding (SOF9). Its one block has no coefficient but zeros: the two decisions
    that say so (no difference, end of block) leave the code at 0, whose bytes the flush leaves out (T.81, D.1.8).
    """
    tables = segment(0xDB, b"\0" + b"\x01" * 64) + segment(0xC9, struct.pack(">BHHBBBB", 8, 8, 8, 1, 1, 0x11, 0))
    return SOI + tables + segment(0xDA, b"\x01\x01\x00\x00\x3f\x00") + EOI


def scan_bomb(side: int, scans: int) -> bytes:
    """A progressive grey JPEG of side x side whose scans say, again and again, that nothing follows."""
    dc = segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")
    # End-of-band runs of 2**14 blocks: one code, and 14 bits that count.
    ac = segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\xe0")
    frame = segment(0xDB, b"\0" + b"\x01" * 64) + segment(0xC2, struct.pack(">BHHBBBB", 8, side, side, 1, 1, 0x11, 0))
    blocks = (side // 8) ** 2
    first = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + b"\0" * -(-blocks // 8)
    runs = "".join("0" + format(2**14 - 1, "014b") for _ in range(-(-blocks // (2**15 - 1)) or 1))
    bits = int(runs.ljust(-(-len(runs) // 8) * 8, "1"), 2).to_bytes(-(-len(runs) // 8), "big")
    further = segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + bits.replace(b"\xff", b"\xff\0")
    return SOI + frame + dc + ac + first + further * scans + EOI


# PNG by its parts (ISO/IEC 15948).


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"", *, interlaced: bool = False
) -> bytes:
    """A PNG of filtered rows. `extra`: chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def plain_rows(pixels: np.ndarray) -> bytes:
    """Rows of any dtype, each after the filter byte for none; numbers big-endian."""
    wide = pixels.astype(pixels.dtype.newbyteorder(">"))
    return b"".join(b"\0" + row.tobytes() for row in wide)


def adam7(pixels: np.ndarray) -> bytes:
    """The rows of the seven passes of an interlaced PNG."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = (pixels[top::down, left::right] for top, left, down, right in passes)
    return b"".join(plain_rows(part) for part in parts if part.size)


def zeros(count: int) -> bytes:
    """`count` zero bytes, compressed by zlib, without ever holding them."""
    packer, block = zlib.compressobj(1), bytes(2**20)
    parts = [packer.compress(block) for _ in range(count // len(block))]
    return b"".join([*parts, packer.compress(bytes(count % len(block))), packer.flush()])


def png_of_zeros(side: int, depth: int, colour: int, channels: int, extra: bytes = b"") -> bytes:
    """A PNG of side x side whose pixels are all 0."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0))
    pixels = zeros(side * (1 + side * channels * depth // 8))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


# WebP's header (RFC 9649).


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    """A WebP file that is nothing but a header of that size; kind b"VP8 ", b"VP8L" or b"VP8X"."""
    if kind == b"VP8X":
        body = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + ((height - 1) << 14 | (width - 1)).to_bytes(4, "little") + bytes(5)
    else:
        body = b"\x30\x01\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(8)
    whole = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


# Tar shards.


def tar_bytes(entries: Sequence[TarPart], form: int = tarfile.USTAR_FORMAT, *, end: bool = True) -> bytes:
    """A tar of these entries; without `end`, nothing stands behind the last."""
    file = io.BytesIO()
    for entry in entries:
        if isinstance(entry, bytes):
            file.write(entry)
            continue
        header, body = (entry, b"") if isinstance(entry, tarfile.TarInfo) else (tarfile.TarInfo(entry[0]), entry[1])
        header.size = len(body) or header.size
        file.write(header.tobuf(form, errors="surrogateescape"))
        file.write(body + bytes(-len(body) % 512))
    return file.getvalue() + (bytes(1024) if end else b"")


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    """The header of a link, device or other thing without a body."""
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def with_checksum(header: bytes) -> bytes:
    """A header block with the sum of what is in it."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def with_size_field(entry: tuple[str, bytes], field: bytes) -> bytes:
    """A file's blocks with `field` where the header has its size (12 bytes)."""
    blocks = tar_bytes([entry], end=False)
    return with_checksum(blocks[:124] + field + blocks[136:512]) + blocks[512:]


def pax(records: dict[str, bytes]) -> bytes:
    """A pax header with these attributes, for the entry behind it."""
    body = b""
    for name, value in records.items():
        rest = b" " + name.encode() + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(str(length)) + len(rest) != length:
            length += 1
        body += str(length).encode() + rest
    header = tarfile.TarInfo("PaxHeaders/x")
    header.type, header.size = tarfile.XHDTYPE, len(body)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
