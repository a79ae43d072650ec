"""Decoding: were these to fail, odd pictures would be seen wrongly, or a stranger's file could stop a run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from odd_files import encode, oriented, picture, png
from triscale.data import decode
from triscale.data.crop import Box
from triscale.data.decode import EncodedImage, decode_image, image_extension, reduction
from triscale.data.resize import crop_square, fit_square
from triscale.data.samples import BadSample


def reason_for(data: bytes, **options) -> str:
    with pytest.raises(BadSample) as bad:
        decode_image(data, **options)
    return bad.value.reason


# Odd but valid: the pixels are compared.


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_lossless_rgb_comes_back_exactly(form: str) -> None:
    decoded = decode_image(encode(Image.fromarray(picture()), form, lossless=True))
    assert np.array_equal(decoded, picture())
    assert decoded.dtype == np.uint8 and decoded.flags.writeable


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_comes_back_closely(progressive: bool) -> None:
    data = encode(Image.fromarray(picture()), "JPEG", quality=95, progressive=progressive)
    assert np.abs(decode_image(data).astype(int) - picture()).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_grey_becomes_three_equal_channels(form: str) -> None:
    grey = picture()[..., 0]
    decoded = decode_image(encode(Image.fromarray(grey), form, lossless=True, quality=95))
    assert np.abs(decoded.astype(int) - grey[..., None]).max() <= (4 if form == "JPEG" else 0)


def test_one_bit_pictures_become_black_and_white() -> None:
    bits = picture()[..., 0] > 128
    assert np.array_equal(decode_image(encode(Image.fromarray(bits), "PNG")), bits[..., None] * np.full(3, 255))


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 129, 255, 256, 257, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    decoded = decode_image(encode(Image.fromarray(values), "PNG"))
    assert np.array_equal(decoded[..., 0], np.rint(values / 257).astype(np.uint8))
    assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_sixteen_bit_rgb_is_scaled() -> None:
    values = np.array([[[0, 257, 65535], [32768, 1000, 60000]]], dtype=np.uint16)
    decoded = decode_image(png(2, 1, 16, 2, b"\0" + values.astype(">u2").tobytes()))
    assert np.abs(decoded - values / 257).max() <= 1


@pytest.mark.parametrize(("mode", "opaque"), [("RGBA", (10, 20, 30)), ("LA", (10,))])
def test_transparency_shows_white(mode: str, opaque: tuple[int, ...]) -> None:
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*opaque, alpha))
    colour = np.array(opaque if mode == "RGBA" else opaque * 3)
    row = decode_image(encode(image, "PNG"))[0]
    assert row[0].tolist() == [255, 255, 255]
    assert np.abs(row[1] - (colour * 128 + 255 * 127) / 255).max() <= 1
    assert row[2].tolist() == colour.tolist()


def test_transparent_webp_shows_white() -> None:
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (decode_image(encode(image, "WEBP", lossless=True, exact=True)) == 255).all()


def test_a_palette_is_looked_up() -> None:
    image = Image.fromarray(picture()).quantize(16)
    assert np.array_equal(decode_image(encode(image, "PNG")), np.array(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"])
def test_a_palette_with_transparency_shows_white(transparency: int | bytes) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for x in range(3):
        image.putpixel((x, 0), x)
    row = decode_image(encode(image, "PNG", transparency=transparency))[0].tolist()
    assert row[0] == [255, 0, 0] and row[1] == [255, 255, 255]
    assert row[2] == ([0, 0, 255] if transparency == 1 else [127, 127, 255])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_shows_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), 0 if mode == "L" else (0, 0, 0))
    image.putpixel((1, 0), 90 if mode == "L" else (90, 90, 90))
    transparency = 0 if mode == "L" else (0, 0, 0)
    assert decode_image(encode(image, "PNG", transparency=transparency))[0, :, 0].tolist() == [255, 90]


@pytest.mark.parametrize("adobe", [True, False])
def test_cmyk_jpegs_which_hold_inverted_ink_come_out_in_their_colours(adobe: bool) -> None:
    colours = {(0, 255, 255, 0): (255, 0, 0), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for ink, colour in colours.items():
        data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
        marker = data.index(b"\xff\xee")
        assert data[marker + 4 : marker + 9] == b"Adobe"
        if not adobe:
            data = data[:marker] + data[marker + 16 :]
        assert np.abs(decode_image(data)[8, 8].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_undone(orientation: int, form: str) -> None:
    seen = picture()
    data = oriented(seen, orientation, form)
    decoded = decode_image(data)
    assert decoded.shape == seen.shape
    assert np.abs(decoded.astype(int) - seen).mean() < (3 if form == "JPEG" else 1e-9)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x01\0"]
)
def test_damaged_exif_does_not_cost_the_picture(exif: bytes) -> None:
    assert np.array_equal(decode_image(encode(Image.fromarray(picture()), "PNG", exif=exif)), picture())


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode_image(encode(Image.fromarray(picture()), "PNG", exif=exif)), picture())


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_seen(form: str) -> None:
    first, second = Image.fromarray(picture()), Image.new("RGB", (36, 24), "blue")
    data = encode(first, form, save_all=True, append_images=[second], lossless=True, duration=100)
    assert np.array_equal(decode_image(data), picture())


def test_a_colour_profile_and_a_comment_change_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encode(Image.fromarray(picture()), "PNG", icc_profile=profile)
    assert np.array_equal(decode_image(data), picture())


def test_a_single_pixel_and_a_thin_line_are_pictures() -> None:
    for shape in ((1, 1), (1, 900), (900, 1)):
        assert decode_image(encode(Image.fromarray(picture(*shape)), "PNG")).shape == (*shape, 3)


def test_bytes_after_the_end_are_ignored() -> None:
    assert np.array_equal(decode_image(encode(Image.fromarray(picture()), "PNG") + b"trailing"), picture())


# Bad: the reason is told apart.


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("fraction", [0.3, 0.6, 0.95])
def test_a_cut_off_file_is_truncated(form: str, fraction: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form)
    assert reason_for(data[: int(len(data) * fraction)]) == "image-truncated"


@pytest.mark.parametrize(
    "data",
    [b"GIF89a" + b"\0" * 50, b"<svg/>", b"hello", b"\0" * 1000, b"BM" + b"\0" * 100, b"II*\0" + b"\0" * 100],
)
def test_other_formats_and_other_bytes_are_unreadable(data: bytes) -> None:
    assert reason_for(data) == "image-unreadable"


def test_formats_outside_the_three_are_not_even_tried() -> None:
    for form in ("GIF", "BMP", "TIFF", "PPM", "EPS"):
        data = encode(Image.fromarray(picture()), form)
        assert image_extension(data) == "" and reason_for(data) == "image-unreadable"


def test_a_damaged_png_is_unreadable() -> None:
    data = bytearray(encode(Image.fromarray(picture()), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    assert reason_for(bytes(data)) == "image-unreadable"


def test_no_bytes_are_an_empty_image() -> None:
    assert reason_for(b"") == "image-empty"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_too_many_pixels_are_refused_by_the_header(form: str) -> None:
    data = encode(Image.fromarray(picture(24, 36)), form)
    assert decode_image(data, max_pixels=24 * 36).shape == (24, 36, 3)
    assert reason_for(data, max_pixels=24 * 36 - 1) == "image-too-large"


def test_a_decompression_bomb_is_refused_whatever_pillows_own_limit(monkeypatch) -> None:
    bomb = png(60_000, 60_000, 8, 2, b"\0" * 1000)
    assert reason_for(bomb) == "image-too-large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason_for(bomb) == "image-too-large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(encode(Image.fromarray(picture()), "PNG")).shape == (24, 36, 3)


@settings(max_examples=150)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8)
)
def test_damaged_files_give_pixels_or_a_bad_sample_and_nothing_else(form: str, changes: list[tuple[int, int]]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.fromarray(picture()), form, exif=exif))
    for offset, value in changes:
        data[offset % len(data)] = value
    try:
        assert decode_image(bytes(data), max_pixels=10**6).shape[2] == 3
    except BadSample as bad:
        assert bad.reason in ("image-unreadable", "image-truncated", "image-too-large")


@settings(max_examples=60)
@given(st.binary(max_size=60), st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBP", b""]))
def test_arbitrary_bytes_give_a_bad_sample(tail: bytes, magic: bytes) -> None:
    assert reason_for(magic + tail) in ("image-unreadable", "image-truncated", "image-too-large", "image-empty")


# Smaller on request.


@pytest.mark.parametrize(
    ("min_side", "shape"), [(None, (240, 320)), (121, (240, 320)), (120, (120, 160)), (91, (120, 160)), (30, (30, 40))]
)
def test_a_jpeg_may_come_smaller_but_never_below_the_wanted_side(min_side: int | None, shape: tuple[int, int]) -> None:
    big = picture(240, 320)
    decoded = decode_image(encode(Image.fromarray(big), "JPEG", quality=95), min_side=min_side)
    assert decoded.shape == (*shape, 3)
    step = 240 // shape[0]
    mean = big.reshape(shape[0], step, shape[1], step, 3).mean((1, 3))
    assert np.abs(decoded - mean).mean() < 3


def test_a_png_keeps_its_size_whatever_side_is_wanted() -> None:
    assert np.array_equal(decode_image(encode(Image.fromarray(picture()), "PNG"), min_side=4), picture())


# Squares.


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_square_of_the_right_size_is_left_as_it_is(fit) -> None:
    image = picture(32, 32)
    assert fit_square(image, 32, fit) is image


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (31, 32), (33, 32), (100, 60), (7, 5)])
def test_every_shape_becomes_a_square(fit, shape: tuple[int, int]) -> None:
    square = fit_square(picture(*shape), 32, fit)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8 and square.flags.writeable


def test_crop_takes_the_middle_and_pad_shows_all_on_white() -> None:
    image = picture(20, 32)
    assert np.array_equal(fit_square(image, 20, "crop"), image[:, 6:26])
    padded = fit_square(image, 32, "pad")
    assert np.array_equal(padded[6:26], image)
    assert (padded[:6] == 255).all() and (padded[26:] == 255).all()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_reducing_averages_rather_than_skips_pixels(fit) -> None:
    board = np.indices((256, 256)).sum(0) % 2 * np.uint8(255)
    reduced = fit_square(np.repeat(board[..., None], 3, 2).astype(np.uint8), 16, fit)
    assert np.abs(reduced.astype(int) - 127).max() <= 2


def test_squash_resizes_the_whole_image_as_pillow_does() -> None:
    image = picture(40, 64)
    expected = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fit_square(image, 24, "squash") - expected).max() <= 1


@pytest.mark.parametrize(("size", "shape"), [(24, (48, 64)), (17, (200, 90)), (64, (20, 33))])
def test_resizing_is_pillows_antialiased_bicubic(size: int, shape: tuple[int, int]) -> None:
    image = picture(*shape)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = Image.fromarray(image[top : top + side, left : left + side].copy())
    expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(fit_square(image, size, "crop") - expected).max() <= 1


def test_an_image_that_may_not_be_written_to_is_resized() -> None:
    image = picture(40, 40)
    image.flags.writeable = False
    assert fit_square(image, 16, "crop").shape == (16, 16, 3)


def test_enlarging_keeps_a_plain_colour() -> None:
    assert (fit_square(np.full((5, 5, 3), 77, np.uint8), 48, "crop") == 77).all()


def test_a_thin_picture_does_not_grow_beyond_bounds() -> None:
    thin = np.zeros((1, 2_000_000, 3), np.uint8)  # resized before it is cropped it would take 1.5 GB
    assert (fit_square(thin, 16, "crop") == 0).all()


# Boxes.


def boxed(whole: np.ndarray, box: Box, size: int, unit: int = 1) -> np.ndarray:
    """Pillow's antialiased bicubic of the box of the whole image, its edges rounded to multiples of `unit`."""
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    edges = tuple((corner + unit // 2) // unit * unit for corner in corners)
    return np.asarray(Image.fromarray(whole).resize((size, size), Image.Resampling.BICUBIC, box=edges)).astype(int)


def noise(height: int, width: int) -> np.ndarray:
    """Smoothed noise, with detail at every scale as photographs have it."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3))
    for side in (3, 8, 20, 60, 200):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) / side**0.5
    return ((image - image.min()) / np.ptp(image) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "box", "size", "unit"),
    [
        ((375, 500), Box(3, 6, 476, 365), 224, 1),
        ((375, 500), Box(60, 31, 120, 90), 224, 1),
        ((768, 1024), Box(5, 13, 974, 747), 224, 2),
        ((768, 1024), Box(301, 200, 451, 455), 224, 2),
        ((1201, 1603), Box(9, 2, 1590, 1199), 224, 4),
        ((1200, 1600), Box(7, 5, 1590, 1190), 96, 8),
    ],
)
@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_box_comes_out_as_the_whole_image_cropped_and_reduced_by_pillow(
    shape: tuple[int, int], box: Box, size: int, unit: int, subsampling: int
) -> None:
    """Within a mean of one grey level: what decodes a fraction of a JPEG averages fine detail in other proportions, and
    chroma of half the resolution is reduced without being interpolated before, unless the box is enlarged.
    """
    data = encode(Image.fromarray(noise(*shape)), "JPEG", quality=90, subsampling=subsampling)
    assert 8 // reduction([box], size) == unit
    (square,) = EncodedImage(data).crops([box], size)
    distance = np.abs(square.astype(int) - boxed(decode_image(data), box, size, unit))
    exact = unit == 1 and (subsampling == 0 or min(box.width, box.height) < size)
    assert distance.mean() <= (0.1 if exact else 1.0)
    assert distance.max() <= (3 if exact else 16)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.sampled_from(["JPEG", "PNG"]), st.data())
@settings(max_examples=60)
def test_every_box_of_every_image_becomes_a_square(width: int, height: int, size: int, form: str, data) -> None:
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = Box(left, top, data.draw(st.integers(1, width - left)), data.draw(st.integers(1, height - top)))
    image = EncodedImage(encode(Image.fromarray(np.full((height, width, 3), 90, np.uint8)), form))
    assert image.size == (width, height)
    (square,) = image.crops([box], size)
    assert square.shape == (size, size, 3) and square.flags.writeable
    assert np.abs(square.astype(int) - 90).max() <= 2


def test_a_box_of_a_lossless_image_is_cut_before_it_is_resized() -> None:
    image = picture(60, 80)
    (square,) = EncodedImage(encode(Image.fromarray(image), "PNG")).crops([Box(11, 7, 32, 32)], 32)
    assert np.array_equal(square, image[7:39, 11:43])
    assert np.array_equal(crop_square(image, Box(11, 7, 32, 32), 32), square)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_boxes_of_grey_and_cmyk_jpegs(mode: str) -> None:
    data = encode(Image.fromarray(picture(200, 240)).convert(mode), "JPEG", quality=95)
    box = Box(20, 30, 200, 150)
    (square,) = EncodedImage(data).crops([box], 50)
    unit = 2 if mode == "L" else 1
    assert np.abs(square.astype(int) - boxed(decode_image(data), box, 50, unit)).mean() < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_told_in_the_upright_image(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(picture(240, 320)), form, exif=exif, lossless=True, quality=95)
    image, upright = EncodedImage(data), decode_image(data)
    assert image.size == (upright.shape[1], upright.shape[0])
    assert image.size == ((240, 320) if orientation >= 5 else (320, 240))
    box = Box(40, 24, 160, 176)
    (square,) = image.crops([box], 40)
    assert np.abs(square.astype(int) - boxed(upright, box, 40)).mean() < 2


def test_two_boxes_of_one_decoding_are_those_that_need_it_most() -> None:
    data = encode(Image.fromarray(noise(800, 800)), "JPEG", quality=90, subsampling=0)
    large, small = Box(0, 0, 800, 800), Box(100, 100, 60, 60)
    assert (reduction([large], 50), reduction([small], 50), reduction([large, small], 50)) == (1, 8, 8)
    both = EncodedImage(data).crops([large, small], 50)
    assert np.array_equal(both[1], EncodedImage(data).crops([small], 50)[0])
    for square, box in zip(both, (large, small), strict=True):
        assert np.abs(square.astype(int) - boxed(decode_image(data), box, 50)).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_cut_off_file_has_no_boxes(form: str) -> None:
    data = encode(Image.fromarray(noise(64, 64)), form, lossless=True)
    with pytest.raises(BadSample) as bad:
        image = EncodedImage(data[: len(data) // 2])
        image.crops([Box(0, 0, *image.size)], 8)
    assert bad.value.reason == "image-truncated"


def test_pillow_is_not_asked_about_plain_jpegs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.fromarray(picture()), "JPEG", comment=b"Exif here is no segment", icc_profile=b"profile")
    monkeypatch.setattr(decode, "_open", None)
    assert decode_image(data).shape == (24, 36, 3)
