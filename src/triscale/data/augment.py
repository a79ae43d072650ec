"""Augmentation in two halves: `draw` picks a few numbers, `apply` does the same to the same numbers anywhere.

Only the random resized crop is not applied here but while the image is decoded, see data.crop.

Drawing is a pure function of the generator it is given and costs microseconds; applying is batched, runs in a worker or
on the device, and draws nothing. An image's result does not depend on the batch it is in: every operation works on each
row by itself, and nothing whose rounding depends on a row's place (matrix products, transcendental functions) is used.

The numbers of an image, in this order:

======== == =====================================================================================================
resample 18 affine map (source x from output x, y, 1; source y likewise), then four warp curves of three cosines
tone      9 outline strength, how much of the fill stays; two-tone gain (0: off), lower and upper bound, channel mix,
            how much tones count relative to their surroundings
colour   12 rows of a 3 x 3 matrix with an offset: output channel from red, green, blue, 1
blur      1 how much of the blurred image is mixed in
erase     7 rectangle (left, top, right, bottom, in [0, 1]) and its colour
======== == =====================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from triscale.data.crop import Crop, draw_crop
from triscale.data.settings import AugmentSettings

_RESAMPLE, _TONE, _COLOUR, _BLUR, _ERASE = slice(0, 18), slice(18, 27), slice(27, 39), slice(39, 40), slice(40, 47)
_UNIFORMS = 50
_LUMA = (0.299, 0.587, 0.114)
_WARP_WAVES = 3
_OUTLINE_GAIN = 2.5
_SURROUNDINGS = 1 / 3
"""Side of the square that a tone is compared with, as a fraction of the image's."""
_LIGHT = 0.8
"""Surroundings lighter than this count as this, so that a white ground stays white."""
_LARGEST_ERASED_SIDE = 0.5
_MOVES = ("zoom", "stretch", "rotation", "shear", "shift", "warp")
"""What puts pixels between the old ones; flip alone does not."""
_RECOLOURS = ("outline", "two_tone", "brightness", "contrast", "saturation", "hue", "grayscale", "blur", "erase")
_CHUNK = 32
"""Rows worked on at once: so many stay in a core's cache."""


class Augmentation:
    """Random changes of images as `settings` say, giving squares of `image_size` pixels.

    Settings that are off cost nothing; with all of them off and images of `image_size` pixels it is the identity, and
    with nothing but `flip` on it moves bytes.
    """

    def __init__(self, settings: AugmentSettings, image_size: int) -> None:
        self.settings = settings
        self.image_size = image_size
        self._moves = _differs(settings, _MOVES)
        self._recolours = _differs(settings, _RECOLOURS)
        # What is off draws the same whatever the uniform numbers are, as far as anything looks at it.
        self._draws = [
            (
                draw,
                uniforms,
                None if _differs(settings, names) else draw(settings, [0.5] * len(range(_UNIFORMS)[uniforms])),
            )
            for draw, uniforms, names in _DRAWS
        ]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the numbers of one image: float32, always as many and always from as many uniform draws."""
        u = rng.random(_UNIFORMS).tolist()
        numbers: list[float] = []
        for draw, uniforms, still in self._draws:
            numbers += draw(self.settings, u[uniforms]) if still is None else still
        return np.asarray(numbers, dtype=np.float32)

    def draw_crop(self, rng: np.random.Generator) -> Crop | None:
        """Draw the crop that the image is decoded with, after `draw` from the same generator; None: there is none."""
        return draw_crop(self.settings, rng)

    def apply(self, images: UInt8[Tensor, "n 3 c c"], numbers: Float[Tensor, "n k"]) -> UInt8[Tensor, "n 3 s s"]:
        """Change c x c images as `numbers` say, each row by itself; antialiased when c is above `image_size`.

        Gives `images` themselves where there is nothing to change.
        """
        if not self._resamples(images):
            images = _mirror(images, numbers[:, _RESAMPLE])
            if not self._recolours:
                return images
        parts = zip(images.split(_CHUNK), numbers.split(_CHUNK), strict=True)
        return torch.cat([self._apply(part, its_numbers) for part, its_numbers in parts])

    def _resamples(self, images: Tensor) -> bool:
        return self._moves or images.shape[-1] != self.image_size

    def _apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        s = self.settings
        x = images.float() / 255
        if self._resamples(images):
            x = _resample(x, numbers[:, _RESAMPLE], self.image_size, white=s.fill == "white")
        if s.outline > 0:
            _change_rows(x, numbers[:, _TONE], 0, _outline)
        if s.two_tone > 0:
            _change_rows(x, numbers[:, _TONE], 2, _two_tone)
        if s.brightness > 0 or s.contrast > 0 or s.saturation > 0 or s.hue > 0 or s.grayscale > 0:
            x = _colour(x, numbers[:, _COLOUR])
        if s.blur > 0:
            _change_rows(x, numbers[:, _BLUR], 0, _blur)
        if s.erase > 0:
            x = _erase(x, numbers[:, _ERASE])
        return (x * 255 + 0.5).clamp_(0, 255).to(torch.uint8)


def _differs(settings: AugmentSettings, names: Sequence[str]) -> bool:
    """Whether any setting of `names` is on."""
    off = AugmentSettings()
    return any(getattr(settings, name) != getattr(off, name) for name in names)


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _draw_affine(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    """Source coordinates of output coordinates, both in [-1, 1]: zoom, stretch, shear, rotation, flip, shift."""
    zoom = math.exp(_between(math.log(s.zoom[0]), math.log(s.zoom[1]), u[0]))
    stretch = math.exp(_between(-0.5, 0.5, u[1]) * math.log(s.stretch))
    angle = math.radians(s.rotation) * _between(-1, 1, u[2])
    shear = math.tan(math.radians(s.shear) * _between(-1, 1, u[3]))
    mirror = -1.0 if u[4] < s.flip else 1.0
    wide, high = mirror / (zoom * stretch), stretch / zoom
    cos, sin = math.cos(angle), math.sin(angle)
    # source = scale . shear . rotation . output + shift
    return [
        wide * (cos + shear * sin),
        wide * (shear * cos - sin),
        2 * s.shift * _between(-1, 1, u[5]),
        high * sin,
        high * cos,
        2 * s.shift * _between(-1, 1, u[6]),
    ]


def _draw_warp(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    """Weights of the cosines in the four curves x(x), x(y), y(x), y(y); the faster the wave, the smaller its weight."""
    amplitudes = [2 * s.warp / (wave + 1) for wave in range(_WARP_WAVES)] * 4
    return [amplitude * _between(-1, 1, one) for amplitude, one in zip(amplitudes, u, strict=True)]


def _draw_tone(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    """Outline strength and remaining fill; two-tone gain, band of tones, channel mix and share of the surroundings."""
    outline = _between(0.5, 1.0, u[1]) if u[0] < s.outline else 0.0
    fill = 0.0 if u[2] < 1 / 3 else _between(0.0, 1.0, u[3])
    gain = _between(4.0, 12.0, u[11]) if u[4] < s.two_tone else 0.0
    relative = 0.0 if u[10] < 0.5 else 2 * u[10] - 1
    upper = _between(0.55 - 0.1 * relative, 0.9 - 0.3 * relative, u[5])
    lower = -1.0 if relative or u[6] < 0.5 else upper * _between(0.2, 0.7, u[7])
    return [outline, fill, gain, lower, upper, *_draw_mix(u[8], u[9]), relative]


def _draw_mix(u: float, v: float) -> list[float]:
    """Three non-negative weights that sum to 1, uniform over the triangle of all such."""
    low, high = min(u, v), max(u, v)
    return [low, high - low, 1 - high]


def _draw_colour(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    """One affine map of colours: hue rotation and saturation about grey, contrast about mid-grey, brightness."""
    angle = math.radians(s.hue) * _between(-1, 1, u[0])
    saturation = 1 + s.saturation * _between(-1, 1, u[1])
    grey: Sequence[float] = _LUMA
    if u[2] < s.grayscale:
        saturation, grey = 0.0, _draw_mix(u[3], u[4])
    contrast = 1 + s.contrast * _between(-1, 1, u[5])
    offset = 0.5 - 0.5 * contrast + s.brightness * _between(-1, 1, u[6])
    cos, sin = math.cos(angle), math.sin(angle) / math.sqrt(3)
    # Rotation about the grey axis (Rodrigues): cos * (I - 1/3) + sin * cross + 1/3.
    cross = ((0, -1, 1), (1, 0, -1), (-1, 1, 0))
    rows = []
    for i in range(3):
        turned = [cos * ((i == j) - 1 / 3) + sin * cross[i][j] + 1 / 3 for j in range(3)]
        rows += [contrast * _between(grey[j], turned[j], saturation) for j in range(3)] + [offset]
    return rows


def _draw_blur(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    return [_between(0.2, 1.0, u[1]) if u[0] < s.blur else 0.0]


def _draw_erase(s: AugmentSettings, u: Sequence[float]) -> list[float]:
    """A rectangle around a random centre, sides up to half of the image; left of 0 and empty when not drawn."""
    if u[0] >= s.erase:
        return [-1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0]
    half_width, half_height = (_between(0.1, _LARGEST_ERASED_SIDE, side) / 2 for side in u[1:3])
    x, y = u[3:5]
    return [x - half_width, y - half_height, x + half_width, y + half_height, *u[5:8]]


def _mirror(images: UInt8[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 18"]) -> UInt8[Tensor, "n 3 s s"]:
    """Mirror the images whose affine map does, and nothing else, left and right."""
    rows = torch.nonzero(numbers[:, 0] < 0).flatten()
    return images.index_copy(0, rows, images[rows].flip(-1)) if len(rows) else images


_DRAWS: Sequence[tuple[Callable[[AugmentSettings, Sequence[float]], list[float]], slice, Sequence[str]]] = (
    (_draw_affine, slice(0, 7), ("zoom", "stretch", "rotation", "shear", "shift", "flip")),
    (_draw_warp, slice(7, 19), ("warp",)),
    (_draw_tone, slice(19, 31), ("outline", "two_tone")),
    (_draw_colour, slice(31, 39), ("brightness", "contrast", "saturation", "hue", "grayscale")),
    (_draw_blur, slice(39, 41), ("blur",)),
    (_draw_erase, slice(41, 49), ("erase",)),
)
"""The draws in the order of their numbers, the uniform numbers that each takes, and the settings that turn it on."""


def _resample(
    x: Float[Tensor, "n 3 c c"], numbers: Float[Tensor, "n 18"], size: int, *, white: bool
) -> Float[Tensor, "n 3 s s"]:
    """Look every output pixel up where the affine map and the warp curves say, averaging sub-pixels when shrinking.

    Both maps are sums of a function of the output's column and one of its row, so only their sum is two-dimensional.
    """
    samples = -(-x.shape[-1] // size)
    fine = size * samples
    along = (torch.arange(fine, device=x.device, dtype=torch.float32) * 2 + 1) / fine - 1
    waves = [torch.cos(math.pi * (wave + 1) * (along + 1) / 2) for wave in range(_WARP_WAVES)]

    def curve(slope: int, warp: int) -> Tensor:
        """(n, fine): slope * position + sum of weighted cosines."""
        out = numbers[:, slope, None] * along
        for wave, values in enumerate(waves):
            out = out + numbers[:, warp + wave, None] * values
        return out

    grid = x.new_empty(x.shape[0], fine, fine, 2)
    for axis in range(2):
        columns = curve(3 * axis, 6 + 6 * axis) + numbers[:, 3 * axis + 2, None]
        rows = curve(3 * axis + 1, 9 + 6 * axis)
        torch.add(columns[:, None, :], rows[:, :, None], out=grid[..., axis])
    if white:  # grid_sample fills with zeros: work on the distance from white
        x = 1 - F.grid_sample(1 - x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    else:
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(x, samples) if samples > 1 else x


def _change_rows(x: Tensor, numbers: Tensor, flag: int, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace, in place, the rows whose number `flag` is not zero by `change(rows, their numbers)`."""
    rows = torch.nonzero(numbers[:, flag]).flatten()
    if len(rows):
        x[rows] = change(x[rows], numbers[rows])


def _outline(x: Float[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 9"]) -> Float[Tensor, "n 3 s s"]:
    """Draw dark lines where colours change, over the picture or what is left of it on white."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]).abs()
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]).abs()
    lines = ((across + down).amax(dim=1, keepdim=True) * (_OUTLINE_GAIN / 2)).clamp_(max=1)
    strength, fill = numbers[:, 0, None, None, None], numbers[:, 1, None, None, None]
    return (1 - (1 - x) * fill) * (1 - lines * strength)


def _two_tone(x: Float[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 9"]) -> Float[Tensor, "n 3 s s"]:
    """Black where the mix of channels, in itself or against its surroundings, is between the bounds; else white."""
    gain, lower, upper, *mix, relative = (numbers[:, i, None, None] for i in range(2, 9))
    tone = x[:, 0] * mix[0] + x[:, 1] * mix[1] + x[:, 2] * mix[2]
    reach = max(1, round(x.shape[-1] * _SURROUNDINGS / 2))
    around = F.avg_pool2d(F.pad(tone, (reach, reach, reach, reach), value=1.0), 2 * reach + 1, stride=1)
    tone = tone - (around.clamp(max=_LIGHT) - 0.5) * relative
    above = ((tone - lower) * gain + 0.5).clamp_(0, 1)
    below = ((upper - tone) * gain + 0.5).clamp_(0, 1)
    return (1 - above * below)[:, None].expand_as(x)


def _colour(x: Float[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 12"]) -> Float[Tensor, "n 3 s s"]:
    out = torch.empty_like(x)
    red, green, blue = x.unbind(1)
    for i in range(3):
        m = [numbers[:, 4 * i + j, None, None] for j in range(4)]
        out[:, i] = red * m[0] + green * m[1] + blue * m[2] + m[3]
    return out.clamp_(0, 1)


def _blur(x: Float[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 1"]) -> Float[Tensor, "n 3 s s"]:
    """Mix in a binomial blur with a standard deviation of one pixel (weights 1 4 6 4 1, both ways)."""
    blurred = x
    for _ in range(2):
        padded = F.pad(blurred, (1, 1, 1, 1), mode="replicate")
        wide = (padded[..., :-2] + padded[..., 2:]) * 0.25 + padded[..., 1:-1] * 0.5
        blurred = (wide[..., :-2, :] + wide[..., 2:, :]) * 0.25 + wide[..., 1:-1, :] * 0.5
    return x + (blurred - x) * numbers[:, :, None, None]


def _erase(x: Float[Tensor, "n 3 s s"], numbers: Float[Tensor, "n 7"]) -> Float[Tensor, "n 3 s s"]:
    size = x.shape[-1]
    along = (torch.arange(size, device=x.device, dtype=torch.float32) + 0.5) / size
    left, top, right, bottom = (numbers[:, i, None] for i in range(4))
    columns, rows = (along >= left) & (along < right), (along >= top) & (along < bottom)
    inside = columns[:, None, None, :] & rows[:, None, :, None]
    return torch.where(inside, numbers[:, 4:7, None, None], x)
