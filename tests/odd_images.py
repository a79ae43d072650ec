"""Bad and odd images: what each file is to be called, or which pixels are to be seen."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from odd_files import (
    EOI,
    SOI,
    adam7,
    arithmetic_grey,
    chunk,
    encode,
    frame_header,
    oriented,
    picture,
    plain_rows,
    png,
    png_of_zeros,
    scan_bomb,
    segment,
    subsampled,
    webp_header,
    with_frame,
    with_segments,
    ycck,
)

SIDE = 24
SEEN = picture(SIDE, SIDE)
GREY = np.repeat(SEEN[..., :1], 3, 2)
BITS = np.repeat((SEEN[..., :1] > 128) * np.uint8(255), 3, 2)
ALPHA = np.where(np.arange(SIDE)[:, None] < 8, 0, np.where(np.arange(SIDE)[:, None] < 16, 128, 255)) + 0 * SEEN[..., 0]
OVER_WHITE = np.rint((SEEN * (ALPHA[..., None] / 255.0)) + 255 * (1 - ALPHA[..., None] / 255.0))
GREY_OVER_WHITE = np.rint((GREY * (ALPHA[..., None] / 255.0)) + 255 * (1 - ALPHA[..., None] / 255.0))


class Seen(NamedTuple):
    """An odd file that is valid, and what is to be seen."""

    data: bytes
    pixels: np.ndarray
    """(h, w, 3), values in 0..255."""
    mean_error: float = 0.0
    """Largest mean distance from `pixels`: 0 where nothing is lost."""


class Bad(NamedTuple):
    """A file that is not a usable image, and the reason that it counts under."""

    data: bytes
    reason: str


JPEG = encode(SEEN, "JPEG", quality=95, subsampling=0)
PNG = encode(SEEN, "PNG")
WEBP = encode(SEEN, "WEBP", lossless=True)
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
STRIPES = np.repeat(picture(1, 64).repeat(16, 0)[None], 16, 0).reshape(256, 64, 3)
BLACK = np.concatenate([SEEN[:-4], 0 * SEEN[-4:]])
RANDOM = np.random.default_rng(1).integers(0, 256, 3000, dtype=np.uint8).tobytes()
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LOSSY = 3.0


def _rgba(mode: str) -> Image.Image:
    bands = Image.fromarray(SEEN).split() if mode == "RGBA" else Image.fromarray(SEEN).split()[:1]
    return Image.merge(mode, [*bands, Image.fromarray(ALPHA.astype(np.uint8))])


def _jpegs() -> dict[str, Seen]:
    files = {
        "plain": JPEG,
        "progressive": encode(SEEN, "JPEG", quality=95, subsampling=0, progressive=True),
        "restart markers": encode(SEEN, "JPEG", quality=95, subsampling=0, restart_marker_blocks=1),
        "4:2:0": subsampled(SEEN, "420"),
        "4:2:2": subsampled(SEEN, "422"),
        "4:4:0": subsampled(SEEN, "440"),
        "RGB components": encode(SEEN, "JPEG", quality=95, keep_rgb=True),
        "YCCK": ycck(SEEN),
        "a segment of length 0": JPEG[:2] + b"\xff\xe5\0\0" + JPEG[2:],
        "no JFIF header": SOI + JPEG[JPEG.index(b"\xff\xdb") :],
        "fill bytes before a marker": JPEG[:2] + b"\xff\xff\xff" + JPEG[2:],
        "trailing garbage": JPEG + RANDOM,
        "a second JPEG behind": JPEG + encode(NOISE, "JPEG"),
        "several pictures (MPO)": encode(
            Image.fromarray(SEEN), "MPO", save_all=True, append_images=[Image.fromarray(NOISE)], quality=95
        ),
        "comment of 64 KiB": with_segments(JPEG, segment(0xFE, b"\x1b[31m" * 13_000)),
        "many application segments": with_segments(JPEG, *[segment(0xEB, RANDOM)] * 200),
        "colour profile": encode(SEEN, "JPEG", quality=95, subsampling=0, icc_profile=PROFILE),
        "damaged colour profile": with_segments(JPEG, segment(0xE2, b"ICC_PROFILE\0\x07\x01")),
        "damaged EXIF": with_segments(JPEG, segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
        "EXIF of tags that all claim the rest": with_segments(JPEG, *[segment(0xE1, b"Exif\0\0" + _exif_bomb())] * 20),
        "EXIF orientation 9": with_segments(JPEG, segment(0xE1, b"Exif\0\0" + _exif(9))),
        "EXIF orientation as text": with_segments(JPEG, segment(0xE1, b"Exif\0\0" + _exif(6, kind=2))),
    }
    found = {f"JPEG: {name}": Seen(data, SEEN, LOSSY) for name, data in files.items()}
    found |= {f"JPEG: EXIF orientation {o}": Seen(oriented(SEEN, o, "JPEG"), SEEN, LOSSY) for o in range(1, 9)}
    ink = [Image.fromarray(255 - band) for band in SEEN.transpose(2, 0, 1)]
    whole = Image.merge("CMYK", [*ink, Image.new("L", (SIDE, SIDE), 0)])
    cmyk = encode(whole, "JPEG", quality=100, subsampling=0)
    adobe = cmyk.index(b"\xff\xee")
    return found | {
        "JPEG: CMYK": Seen(cmyk, SEEN, LOSSY),
        "JPEG: CMYK without Adobe's segment": Seen(cmyk[:adobe] + cmyk[adobe + 16 :], SEEN, LOSSY),
        "JPEG: grey": Seen(encode(GREY[..., 0], "JPEG", quality=95), GREY, LOSSY),
        "JPEG: 4:1:1": Seen(subsampled(SEEN, "411"), SEEN, 5.0),
        "JPEG: second half missing, end mark there": Seen(
            _half(encode(STRIPES, "JPEG", quality=95, restart_marker_blocks=1)) + EOI, _first_rows(STRIPES), LOSSY
        ),
        "JPEG: a damaged restart interval": Seen(_damaged(), _first_rows(STRIPES), LOSSY),
        "JPEG: arithmetic coding": Seen(arithmetic_grey(), np.full((8, 8, 3), 128)),
    }


def _first_rows(pixels: np.ndarray) -> np.ndarray:
    """`pixels` with NaN, for whatever is seen, below the first quarter."""
    rows = np.arange(len(pixels))[:, None, None]
    return np.where(rows < len(pixels) // 4, pixels, np.nan)


def _damaged() -> bytes:
    """A JPEG in the middle of which a restart interval is overwritten."""
    data = encode(STRIPES, "JPEG", quality=95, restart_marker_blocks=1)
    middle = data.index(b"\xff\xd0", len(data) // 2)
    return data[: middle + 4] + b"\x12\x34\x56" + data[middle + 7 :]


def _exif(orientation: int, kind: int = 3) -> bytes:
    """A TIFF header and a directory with the orientation alone."""
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, kind, 1, orientation, 0, 0)


def _exif_bomb() -> bytes:
    """5,000 tags, each of the 60,000 bytes that all of them are."""
    entries = b"".join(struct.pack("<HHII", 0x8000 + tag, 7, 60_000, 0) for tag in range(5_000))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 5_000) + entries + bytes(4)


def _pngs() -> dict[str, Seen]:
    wide = SEEN.astype(np.uint16) * 257
    levels = SEEN[..., 0] // 16
    packed = levels[:, ::2] << 4 | levels[:, 1::2]
    text = b"<script>\x1b[31m[/red]\n"
    quantized = Image.fromarray(SEEN).quantize(16)
    palette = np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(SIDE, 0)
    colours = np.array([(255, 0, 0), (255, 255, 255), (127, 127, 255)])[palette]
    plte = chunk(b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
    exact = {
        "plain": (PNG, SEEN),
        "interlaced": (png(SIDE, SIDE, 8, 2, adam7(SEEN), interlaced=True), SEEN),
        "interlaced 16 bit": (png(SIDE, SIDE, 16, 2, adam7(wide), interlaced=True), SEEN),
        "1 bit": (encode(Image.fromarray(SEEN[..., 0] > 128), "PNG"), BITS),
        "4 bit grey": (png(SIDE, SIDE, 4, 0, plain_rows(packed)), (levels * 17)[..., None].repeat(3, 2)),
        "grey": (encode(GREY[..., 0], "PNG"), GREY),
        "16 bit grey": (png(SIDE, SIDE, 16, 0, plain_rows(wide[..., 0])), GREY),
        "16 bit RGB": (png(SIDE, SIDE, 16, 2, plain_rows(wide)), SEEN),
        "palette": (encode(quantized, "PNG"), np.array(quantized.convert("RGB"))),
        "palette with transparency": (
            png(SIDE, SIDE, 8, 3, plain_rows(palette), plte + chunk(b"tRNS", b"\xff\0\x80")),
            colours,
        ),  # noqa: E501  # fmt: skip
        "a transparent colour": (
            png(SIDE, SIDE, 8, 2, plain_rows(SEEN), chunk(b"tRNS", struct.pack(">3H", *SEEN[3, 4]))),
            _but(SEEN, 3, 4),
        ),  # noqa: E501  # fmt: skip
        "a transparent 16 bit grey": (
            png(SIDE, SIDE, 16, 0, plain_rows(wide[..., 0]), chunk(b"tRNS", struct.pack(">H", wide[0, 5, 0]))),
            _but_column(GREY, 5),
        ),  # noqa: E501  # fmt: skip
        "a transparent 4 bit grey": (
            png(SIDE, SIDE, 4, 0, plain_rows(packed), chunk(b"tRNS", struct.pack(">H", levels[0, 5]))),
            _but((levels * 17)[..., None].repeat(3, 2), 0, 5),
        ),  # noqa: E501  # fmt: skip
        "animation": (
            encode(Image.fromarray(SEEN), "PNG", save_all=True, append_images=[Image.fromarray(NOISE)]),
            SEEN,
        ),  # noqa: E501  # fmt: skip
        "gamma": (png(SIDE, SIDE, 8, 2, plain_rows(SEEN), chunk(b"gAMA", struct.pack(">I", 100_000))), SEEN),
        "colour profile": (encode(SEEN, "PNG", icc_profile=PROFILE), SEEN),
        "hostile text": (png(SIDE, SIDE, 8, 2, plain_rows(SEEN), chunk(b"tEXt", b"Comment\0" + text)), SEEN),
        "an unknown chunk": (png(SIDE, SIDE, 8, 2, plain_rows(SEEN), chunk(b"xyZz", RANDOM)), SEEN),
        "last chunk missing": (PNG[:-12], SEEN),
        "a chunk longer than the file": (PNG[:33] + b"\x7f\xff\xff\xffIDAT" + PNG[41:], SEEN),
        "a black last row": (encode(BLACK, "PNG"), BLACK),
        "interlaced with a black last row": (png(SIDE, SIDE, 8, 2, adam7(BLACK), interlaced=True), BLACK),
        "EXIF orientation 6": (oriented(SEEN, 6, "PNG"), SEEN),
        "damaged EXIF": (encode(SEEN, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0"), SEEN),
        "trailing garbage": (PNG + RANDOM, SEEN),
        "1 x 1": (encode(SEEN[:1, 7:8], "PNG"), SEEN[:1, 7:8]),
        "1 x 10,000": (encode(picture(1, 10_000), "PNG"), picture(1, 10_000)),
        "10,000 x 1": (encode(picture(10_000, 1), "PNG"), picture(10_000, 1)),
    }
    found = {f"PNG: {name}": Seen(data, pixels) for name, (data, pixels) in exact.items()}
    sixteen = np.concatenate([wide, (ALPHA * 257).astype(np.uint16)[..., None]], 2)
    return found | {
        "PNG: RGBA": Seen(encode(_rgba("RGBA"), "PNG"), OVER_WHITE, 0.5),
        "PNG: RGBA of 16 bit": Seen(png(SIDE, SIDE, 16, 6, plain_rows(sixteen)), OVER_WHITE, 0.5),
        "PNG: grey with alpha": Seen(encode(_rgba("LA"), "PNG"), GREY_OVER_WHITE, 0.5),
        "PNG: grey with alpha of 16 bit": Seen(
            png(SIDE, SIDE, 16, 4, plain_rows(sixteen[..., [0, 3]])), GREY_OVER_WHITE, 0.5
        ),
    }


def _but(pixels: np.ndarray, row: int, column: int) -> np.ndarray:
    """`pixels` with white wherever the colour is that of one of them."""
    return np.where((pixels == pixels[row, column]).all(-1, keepdims=True), 255, pixels)


def _but_column(pixels: np.ndarray, column: int) -> np.ndarray:
    return _but(pixels, 0, column)


def _text_bomb(name: bytes, head: bytes) -> bytes:
    return png(SIDE, SIDE, 8, 2, plain_rows(SEEN), chunk(name, head + zlib.compress(bytes(2**26))))


def _webps() -> dict[str, Seen]:
    animated = encode(
        Image.fromarray(SEEN), "WEBP", save_all=True, append_images=[Image.fromarray(NOISE)], lossless=True
    )
    return {
        "WebP: lossless": Seen(WEBP, SEEN),
        "WebP: lossy": Seen(encode(SEEN, "WEBP", quality=95), SEEN, LOSSY),
        "WebP: lossless with alpha": Seen(encode(_rgba("RGBA"), "WEBP", lossless=True, exact=True), OVER_WHITE, 0.5),
        "WebP: animation": Seen(animated, SEEN),
        "WebP: EXIF orientation 8": Seen(oriented(SEEN, 8, "WEBP"), SEEN),
        "WebP: trailing garbage": Seen(WEBP + RANDOM, SEEN),
    }


def _other_formats() -> dict[str, Bad]:
    files = {
        "GIF": encode(Image.fromarray(SEEN), "GIF"),
        "BMP": encode(SEEN, "BMP"),
        "TIFF": encode(SEEN, "TIFF"),
        "ICO": encode(Image.fromarray(SEEN), "ICO"),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + RANDOM,
        "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + RANDOM,
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + RANDOM,
        "JPEG XL": b"\xff\x0a" + RANDOM,
        "SVG": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "PDF": b"%PDF-1.7\n" + RANDOM,
        "an HTML page": b"<!doctype html><html><body>404 Not Found</body></html>",
        "a ZIP": b"PK\x03\x04" + RANDOM,
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        "random bytes": RANDOM,
        "zero bytes": bytes(4096),
        "a JPEG after other bytes": b"\r\n" + JPEG,
    }
    return {f"no image: {name}": Bad(data, "image-unreadable") for name, data in files.items()}


def _bad_jpegs() -> dict[str, Bad]:
    scan = JPEG.index(b"\xff\xda")
    at = frame_header(JPEG)
    two = segment(0xC0, struct.pack(">BHHB", 8, SIDE, SIDE, 2) + b"\x01\x11\0\x02\x11\0")
    noise = encode(NOISE, "JPEG", quality=95)
    unreadable, truncated = "image-unreadable", "image-truncated"
    return {
        "end mark missing": Bad(JPEG[:-2], truncated),
        "last byte missing": Bad(JPEG[:-1], truncated),
        "header alone": Bad(JPEG[:scan], truncated),
        "first three bytes": Bad(JPEG[:3], truncated),
        "half": Bad(noise[: len(noise) // 2], truncated),
        "progressive, half": Bad(_half(encode(NOISE, "JPEG", progressive=True)), truncated),
        "65,500 x 65,500": Bad(with_frame(JPEG, height=65_500, width=65_500), "image-too-large"),
        "height 0": Bad(with_frame(JPEG, height=0), unreadable),
        "width 0": Bad(with_frame(JPEG, width=0), unreadable),
        "12 bit": Bad(with_frame(JPEG, marker=0xC1, bits=12), unreadable),
        "lossless coding": Bad(with_frame(JPEG, marker=0xC3), unreadable),
        "hierarchical coding": Bad(with_frame(JPEG, marker=0xC5), unreadable),
        "101 scans of a progressive one": Bad(scan_bomb(16, 101), "image-too-large"),
        "two components": Bad(JPEG[:at] + two + JPEG[at + 19 :], unreadable),
        "no tables": Bad(SOI + JPEG[at : at + 19] + JPEG[scan:], unreadable),
        "no frame": Bad(JPEG[:at] + JPEG[scan:], unreadable),
        "start and end alone": Bad(SOI + EOI, unreadable),
    }


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _bad_pngs() -> dict[str, Bad]:
    crc = bytearray(PNG)
    crc[PNG.index(b"IDAT") + 6] ^= 0xFF
    header = bytearray(PNG)
    header[29] ^= 0xFF
    noise, rows = encode(NOISE, "PNG"), plain_rows(SEEN)
    unreadable, truncated, large = "image-unreadable", "image-truncated", "image-too-large"
    size = struct.pack(">IIBBBBB", 2**31, 1, 8, 2, 0, 0, 0)
    return {
        "half": Bad(_half(noise), truncated),
        "signature alone": Bad(PNG[:8], truncated),
        "wrong checksum of the pixels": Bad(bytes(crc), unreadable),
        "wrong checksum of the header": Bad(bytes(header), unreadable),
        "fewer rows than it says": Bad(png(SIDE, SIDE, 8, 2, rows[: len(rows) // 2]), unreadable),
        "fewer rows, interlaced": Bad(png(SIDE, SIDE, 8, 2, adam7(SEEN)[:-80], interlaced=True), unreadable),
        "width 0": Bad(png(0, SIDE, 8, 2, rows), unreadable),
        "height 0": Bad(png(SIDE, 0, 8, 2, b""), unreadable),
        "60,000 x 60,000": Bad(png(60_000, 60_000, 8, 2, bytes(1000)), large),
        "2**31 - 1 wide": Bad(png(2**31 - 1, 2**31 - 1, 1, 0, bytes(1000)), large),
        "2**31 wide": Bad(
            PNG[:8] + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""), large
        ),  # noqa: E501  # fmt: skip
        "a depth that does not exist": Bad(png(SIDE, SIDE, 3, 2, rows), unreadable),
        "a filter that does not exist": Bad(png(SIDE, SIDE, 8, 2, b"\x09" + rows[1:]), unreadable),
        "a palette image without a palette": Bad(png(SIDE, SIDE, 8, 3, plain_rows(SEEN[..., 0])), unreadable),
        "no pixels": Bad(PNG[:33] + chunk(b"IEND", b""), unreadable),
        "text that unpacks to 64 MiB": Bad(_text_bomb(b"zTXt", b"Comment\0\0"), unreadable),
        "colour profile that unpacks to 64 MiB": Bad(_text_bomb(b"iCCP", b"Profile\0\0"), unreadable),
    }


def _bad_webps() -> dict[str, Bad]:
    noise = encode(NOISE, "WEBP", lossless=True)
    return {
        "half": Bad(_half(noise), "image-truncated"),
        "header alone": Bad(WEBP[:20], "image-truncated"),
        "16,383 x 16,383 (VP8)": Bad(webp_header(16_383, 16_383, b"VP8 "), "image-too-large"),
        "16,383 x 16,383 (VP8L)": Bad(webp_header(16_383, 16_383, b"VP8L"), "image-too-large"),
        "2**24 x 2**24 (VP8X)": Bad(webp_header(2**24, 2**24, b"VP8X"), "image-too-large"),
        "no picture inside": Bad(webp_header(SIDE, SIDE, b"VP8X"), "image-unreadable"),
        "damaged": Bad(noise[:40] + bytes(40) + noise[80:], "image-unreadable"),
    }


def _largest() -> dict[str, Callable[[], bytes]]:
    """What is just small enough to be decoded, from few bytes; made when it is asked for."""
    side = 8192
    halved = chunk(b"PLTE", bytes(range(6))) + chunk(b"tRNS", b"\x10")
    return {
        "PNG: RGB": lambda: png_of_zeros(side, 8, 2, 3),
        "PNG: RGBA": lambda: png_of_zeros(side, 8, 6, 4),
        "PNG: 1 bit": lambda: png_of_zeros(side, 1, 0, 1),
        "PNG: 16 bit grey": lambda: png_of_zeros(side, 16, 0, 1),
        "PNG: palette with transparency": lambda: png_of_zeros(side, 1, 3, 1, halved),
        "JPEG: progressive, 100 scans": lambda: scan_bomb(side, 99),
        "WebP: RGBA": lambda: encode(Image.new("RGBA", (side, side)), "WEBP", lossless=True, method=0),
    }


LARGEST = _largest()
ODD_IMAGES: dict[str, Seen] = _jpegs() | _pngs() | _webps()
BAD_IMAGES: dict[str, Bad] = (
    {"empty file": Bad(b"", "image-empty")}
    | _other_formats()
    | {f"JPEG: {name}": bad for name, bad in _bad_jpegs().items()}
    | {f"PNG: {name}": bad for name, bad in _bad_pngs().items()}
    | {f"WebP: {name}": bad for name, bad in _bad_webps().items()}
)
