"""From the bytes of an image file to RGB pixels, whole or as squares of boxes of it. Bytes are untrusted.

Plain JPEGs, most of what there is, are decoded by libjpeg-turbo through simplejpeg, at a fraction of their size where
that is enough; Pillow reads the headers of all others, and every format and mode. (`benchmarks/decode.py` compares
decoders, `benchmarks/loader.py` whole pipelines.)
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from triscale.data.crop import Box
from triscale.data.headers import jpeg_header, jpeg_scans, png_bits, png_lacks_rows, webp_pixels
from triscale.data.resize import EIGHTHS, cut, resize
from triscale.data.samples import BadSample
from triscale.errors import RunError

MAX_PIXELS = 2**26
"""Largest image, in pixels, that is decoded: 67 megapixels, 200 MB as RGB."""
MAX_SCANS = 100
"""Most times that a JPEG may go over its pixels. Progressive ones do so some ten times; thousands of empty scans, a few
bytes each, would keep a worker busy for minutes."""
_STRIP_PIXELS = 2**20

_ORIENTATION_TAG = 0x0112
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
"""What undoes each EXIF orientation (CIPA DC-008, 4.6.4), as views."""
_ON_ITS_SIDE = (5, 6, 7, 8)
_REDUCED = (1, 2, 4)
"""Those below the whole that save time; 3/8 takes longer than 4/8, and any above longer than the whole."""


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
    return EncodedImage(data, max_pixels=max_pixels).decode(min_side=min_side)


class EncodedImage:
    """A JPEG, PNG or WebP file of which only the header was read.

    Args:
        data: the file's bytes.
        max_pixels: width times height above which it is refused.

    Raises:
        BadSample: "image-empty", "image-unreadable", "image-truncated" or "image-too-large".
        RunError: there is no memory for it; so from all that decodes.
    """

    def __init__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
        if not data:
            raise BadSample("image-empty")
        self._data = data
        extension = image_extension(data)
        self._header = jpeg_header(data) if extension == "jpg" else None
        # These would take too much memory or time before Pillow tells their size.
        if (extension == "webp" and webp_pixels(data) > max_pixels) or (
            extension == "jpg" and jpeg_scans(data, self._header) > MAX_SCANS
        ):
            raise BadSample("image-too-large")
        self._plain = self._header is not None and self._header.plain
        width, height = self._stored_size
        if width * height > max_pixels:
            raise BadSample("image-too-large")

    @property
    def longer_side(self) -> int:
        """In pixels."""
        return max(self._stored_size)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, upright.

        Raises:
            BadSample: "image-unreadable" or "image-truncated".
        """
        if not self._is_jpeg:
            with _faults_named(self._data):
                self._image.load()  # EXIF may stand behind the pixels, and these are decoded whole anyway
        width, height = self._stored_size
        return (height, width) if self._orientation in _ON_ITS_SIDE else (width, height)

    def decode(self, *, min_side: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels, as `decode_image` gives them.

        Raises:
            BadSample: "image-unreadable" or "image-truncated".
        """
        side = 0 if min_side is None else min_side
        return np.ascontiguousarray(self._upright_view(side, side))

    def crops(self, boxes: Sequence[Box], size: int) -> list[UInt8[np.ndarray, "s s 3"]]:
        """Each box resized to (size, size), antialiased bicubic, in one decoding.

        A large JPEG is decoded at a fraction of its size, see `reduction`; boxes are then rounded to whole pixels of
        what was decoded, that is by at most four pixels of the image.

        Args:
            boxes: within the upright image; at least one.
            size: side in pixels.

        Raises:
            BadSample: "image-unreadable" or "image-truncated".
        """
        eighths = reduction(boxes, size)
        width, height = self._stored_size
        # Chroma that is about to be reduced need not be interpolated first.
        coarse_chroma = all(min(box.width, box.height) >= size for box in boxes)
        pixels = self._upright_view(-(-width * eighths // EIGHTHS), -(-height * eighths // EIGHTHS), coarse_chroma)
        if max(pixels.shape[:2]) == max(width, height):  # not a JPEG, or not reduced
            eighths = EIGHTHS
        return [resize(cut(pixels, box, eighths), size, size) for box in boxes]

    def _upright_view(self, min_width: int, min_height: int, coarse_chroma: bool = False) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels turned upright; of a JPEG at least so many across and down, as it is stored."""
        pixels, image = None, None if self._plain else self._image
        with _faults_named(self._data):
            if image is None or (self._is_jpeg and image.mode in ("RGB", "L")):
                # Factors below 2 take longer than the whole image does.
                with suppress(ValueError):  # damaged, or a kind that this library does not know: Pillow decodes or says
                    pixels = simplejpeg.decode_jpeg(
                        self._data,
                        min_height=min_height,
                        min_width=min_width,
                        min_factor=2,
                        fastupsample=coarse_chroma,
                    )
        if pixels is None:
            image = self._image
            with _faults_named(self._data):
                pixels = _to_rgb(image, self._data)
        return _UPRIGHT.get(self._orientation, np.asarray)(pixels)

    @cached_property
    def _image(self) -> ImageFile.ImageFile:
        """What Pillow makes of the header."""
        with _faults_named(self._data):
            image = _open(self._data)
        if image is None:
            raise BadSample("image-unreadable")
        return image

    @property
    def _stored_size(self) -> tuple[int, int]:
        """Width and height."""
        header = self._header
        return (header.width, header.height) if header is not None and header.plain else self._image.size

    @property
    def _is_jpeg(self) -> bool:
        return self._plain or isinstance(self._image, JpegImagePlugin.JpegImageFile)

    @cached_property
    def _orientation(self) -> int:
        """What EXIF says; 1, upright, where that cannot be read."""
        if self._plain:
            return 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                orientation = self._image.getexif().get(_ORIENTATION_TAG)
            except Exception:  # whatever a damaged EXIF block makes Pillow raise: the pixels are whole
                return 1
        return orientation if isinstance(orientation, int) else 1


def reduction(boxes: Sequence[Box], size: int) -> int:
    """The least of 1, 2, 4 and 8 eighths of a JPEG at which every box keeps at least `size` pixels a side, if any."""
    smallest = min(min(box.width, box.height) for box in boxes)
    return next((eighths for eighths in _REDUCED if smallest * eighths >= size * EIGHTHS), EIGHTHS)


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


@contextmanager
def _faults_named(data: bytes) -> Iterator[None]:
    """Whatever goes wrong with `data` meanwhile is a BadSample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities that it then reads correctly
        try:
            yield
        except MemoryError as fault:  # says nothing about the bytes: another time they are decoded
            raise RunError("no memory to decode an image in: lower --data.workers") from fault
        except Exception as fault:
            # Not only OSError: on damaged files Pillow raises SyntaxError, ValueError, struct.error, KeyError, ...
            raise BadSample("image-truncated" if _is_cut_off(data) else "image-unreadable") from fault


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


def _is_cut_off(data: bytes) -> bool:
    """Whether the mark is missing with which a whole file of this format ends."""
    extension = image_extension(data)
    if extension == "webp":
        return len(data) < int.from_bytes(data[4:8], "little") + 8
    end_mark = {"jpg": b"\xff\xd9", "png": b"IEND"}.get(extension)
    return end_mark is not None and end_mark not in data[-64:]
