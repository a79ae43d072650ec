"""From the bytes of an image file to RGB pixels, and from any shape to a square. Bytes are untrusted.

Pillow reads headers, and every format and mode; plain JPEGs, most of what there is, are decoded by libjpeg-turbo
through simplejpeg, at a fraction of their size where that is enough. Resizing is torch's: antialiased bicubic of uint8
pixels, within 1 of Pillow's. (`benchmarks/decode.py` compares decoders.)
"""

from __future__ import annotations

import io
import warnings
from typing import Literal

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from triscale.data.headers import jpeg_scans, png_bits, png_lacks_rows, webp_pixels
from triscale.data.samples import BadSample
from triscale.errors import RunError

MAX_PIXELS = 2**26
"""Largest image, in pixels, that is decoded: 67 megapixels, 200 MB as RGB."""
MAX_SCANS = 100
"""Most times that a JPEG may go over its pixels. Progressive ones do so some ten times; thousands of empty scans, a few
bytes each, would keep a worker busy for minutes."""
_STRIP_PIXELS = 2**20

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (CIPA DC-008, 4.6.4)."""


def image_extension(data: bytes) -> str:
    """ "jpg", "png" or "webp", by the bytes that such a file begins with; "" for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def decode_image(
    data: bytes, *, max_pixels: int = MAX_PIXELS, min_side: int | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG, PNG or WebP file to RGB, upright, transparency over white; of an animation the first frame.

    Args:
        data: the file's bytes.
        max_pixels: width times height above which nothing is decoded.
        min_side: if given, a large JPEG may come out at a half of its size or less, in eighths, which is faster, as
            long as its shorter side keeps at least this many pixels.

    Raises:
        BadSample: "image-empty", "image-unreadable", "image-truncated" or "image-too-large".
        RunError: there is no memory for it.
    """
    if not data:
        raise BadSample("image-empty")
    if _asks_too_much(data, max_pixels):
        raise BadSample("image-too-large")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities that it then reads correctly
        try:
            image = _open(data)
            if image is not None and image.width * image.height <= max_pixels:
                pixels = _decode_jpeg(data, image, min_side)
                return _upright(_to_rgb(image, data) if pixels is None else pixels, image)
        except MemoryError as fault:  # says nothing about the bytes: another time they are decoded
            raise RunError("no memory to decode an image in: lower --data.workers") from fault
        except Exception as fault:
            # Not only OSError: on damaged files Pillow raises SyntaxError, ValueError, struct.error, KeyError, ...
            raise BadSample("image-truncated" if _is_cut_off(data) else "image-unreadable") from fault
    raise BadSample("image-unreadable" if image is None else "image-too-large")


def fit_square(image: UInt8[np.ndarray, "h w 3"], size: int, fit: Literal["crop", "pad"]) -> UInt8[np.ndarray, "s s 3"]:
    """Make an image (size, size, 3): the same for training and evaluation. Antialiased bicubic.

    Args:
        image: uint8 RGB. One of (size, size, 3) is returned as it is.
        size: side in pixels.
        fit: "crop" takes the middle square; "pad" shows the whole image, centred on white.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if fit == "crop":
        # Cropped before it is resized, or else a thin image would grow beyond all bounds.
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return _resize(image[top : top + side, left : left + side], size, size)
    scale = size / max(height, width)
    inner = _resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = np.full((size, size, 3), 255, dtype=np.uint8)
    top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def _resize(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Bicubic with a filter as wide as the reduction."""
    if image.shape[:2] == (height, width):
        return image
    # Without gaps and with the strides of a batch, or torch would resize, and give back, channel by channel.
    whole = np.ascontiguousarray(image) if image.flags.writeable else image.copy()
    pixels = torch.from_numpy(whole).view(1, *whole.shape).permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def _open(data: bytes) -> ImageFile.ImageFile | None:
    """Read the header, with just the reader that the first bytes call for; None if they call for none.

    Image.open would try further formats and hold its own, process-wide limit of pixels against the image.
    """
    reader = {
        "jpg": JpegImagePlugin.JpegImageFile,
        "png": PngImagePlugin.PngImageFile,
        "webp": WebPImagePlugin.WebPImageFile,
    }.get(image_extension(data))
    return None if reader is None else reader(io.BytesIO(data))


def _decode_jpeg(data: bytes, image: ImageFile.ImageFile, min_side: int | None) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels of a plain JPEG; None where Pillow has to decode, or to say what is wrong."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.mode not in ("RGB", "L"):
        return None
    side = 0 if min_side is None else min_side
    try:
        # Factors below 2 take longer than the whole image does.
        return simplejpeg.decode_jpeg(data, min_height=side, min_width=side, min_factor=2)
    except ValueError:  # damaged, or a kind of JPEG that this library does not know
        return None


def _asks_too_much(data: bytes, max_pixels: int) -> bool:
    """Whether a file would take too much memory or time before Pillow tells its size."""
    extension = image_extension(data)
    return (extension == "webp" and webp_pixels(data) > max_pixels) or (
        extension == "jpg" and jpeg_scans(data) > MAX_SCANS
    )


def _to_rgb(image: ImageFile.ImageFile, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Convert any mode that the three formats know, some rows at a time. Decodes the pixels of the file `data`."""
    if image.width == 0 or image.height == 0:
        raise ValueError("an image without pixels")
    image.load()
    if isinstance(image, PngImagePlugin.PngImageFile):
        _check_png(image, data)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        below = min(top + rows, image.height)
        # A crop is a copy, and small images need none.
        strip = image if rows >= image.height else image.crop((0, top, image.width, below))
        pixels[top:below] = _strip_to_rgb(strip)
    return pixels


def _strip_to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "h w 1"]:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        wide = np.asarray(image)
        grey = ((wide.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        if "transparency" in image.info:
            grey[wide == image.info["transparency"]] = 255
        return grey[..., None]
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    seen = image.convert("RGBA")
    white = Image.new("RGBA", seen.size, "white")
    return np.asarray(Image.alpha_composite(white, seen).convert("RGB"))


def _check_png(image: PngImagePlugin.PngImageFile, data: bytes) -> None:
    """Mend and refuse what Pillow reads wrongly of a PNG that it has decoded."""
    if image.mode == "P" and image.palette is None:
        raise ValueError("a palette image without a palette")
    if image.mode == "L" and png_bits(data) < 8 and "transparency" in image.info:
        # Told in samples of 2 or 4 bits, while the pixels have been scaled to 8.
        image.info["transparency"] *= 255 // (2 ** png_bits(data) - 1)
    last = image.getpixel((image.width - 1, image.height - 1))
    black = last == 0 or (isinstance(last, tuple) and not any(last))
    if (black or image.info.get("interlace")) and png_lacks_rows(data):
        raise ValueError("the pixels end before the last row")


def _upright(pixels: UInt8[np.ndarray, "h w 3"], image: ImageFile.ImageFile) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Turn `pixels` as the EXIF orientation of `image` says; one that can't be read says nothing."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # whatever a damaged EXIF block makes Pillow raise: the pixels are whole
        return pixels
    if orientation not in _UPRIGHT:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(_UPRIGHT[orientation]))


def _is_cut_off(data: bytes) -> bool:
    """Whether the mark is missing with which a whole file of this format ends."""
    extension = image_extension(data)
    if extension == "webp":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    end_mark = {"jpg": b"\xff\xd9", "png": b"IEND"}.get(extension)
    return end_mark is not None and end_mark not in data[-64:]
