"""Draw shapes, backgrounds and finishes with numpy alone: what the embedded data set `scenes` is painted with.

A shape is a set of closed outlines. Its signed distance to them is tabulated once, on a grid in the shape's own
coordinates (x to the right, y up, the shape within about the unit circle); a figure of any place, size and angle is
then a look-up, antialiased because coverage falls from 1 to 0 over one pixel of distance. Textures are tabulated on
the same grid, so they turn with the shape. Geometry is in fractions of the image's side: a picture has the same
content at any size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, floor

import numpy as np
from jaxtyping import Float32, Int32, UInt8

PALETTE = {
    "red": (0.86, 0.13, 0.15),
    "orange": (0.97, 0.52, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.18, 0.60, 0.24),
    "turquoise": (0.15, 0.76, 0.75),
    "blue": (0.13, 0.33, 0.84),
    "purple": (0.49, 0.20, 0.68),
    "pink": (0.97, 0.53, 0.74),
    "brown": (0.46, 0.27, 0.14),
    "black": (0.07, 0.07, 0.08),
    "grey": (0.53, 0.54, 0.56),
    "white": (0.97, 0.97, 0.96),
}
"""The colours: red, green and blue in [0, 1] of each."""
COLOURS = tuple(PALETTE)
"""Names of the colours."""
GRID = 256
"""Side of the tables of distances and textures."""
SPAN = 1.85
"""The tables cover [-SPAN, SPAN] in both of the shape's coordinates."""
REACH = 1.2
"""Half the side of the square, in radii, outside which a figure of any shape leaves the canvas as it is."""
LATTICE = 6
"""Side of the lattice of colours that a background is interpolated from."""

Outline = np.ndarray  # (n, 2) corners of a closed polygon


def _circle(radius: float, corners: int = 48) -> Outline:
    t = np.arange(corners) * (2 * np.pi / corners)
    return radius * np.stack([np.cos(t), np.sin(t)], axis=1)


def _polar(radii: list[float], turn: float) -> Outline:
    """Corners at equal angles, the first of them `turn` radians from the x axis, at these distances."""
    t = turn + np.arange(len(radii)) * (2 * np.pi / len(radii))
    return np.array(radii)[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)


def _heart() -> Outline:
    t = np.arange(48) * (2 * np.pi / 48)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y + 2], axis=1) / 16.5


def _crescent(inner: float = 0.8, offset: float = 0.46) -> Outline:
    """The unit disc less a disc of radius `inner` whose centre lies `offset` to the right."""
    x = (1 + offset**2 - inner**2) / (2 * offset)
    outer_tip, inner_tip = np.arccos(x), np.arccos((x - offset) / inner)
    s = np.linspace(outer_tip, 2 * np.pi - outer_tip, 32)
    t = np.linspace(2 * np.pi - inner_tip, inner_tip, 24)[1:-1]
    outer = np.stack([np.cos(s), np.sin(s)], axis=1)
    hollow = inner * np.stack([np.cos(t), np.sin(t)], axis=1) + [offset, 0]
    return np.concatenate([outer, hollow]) + [0.15, 0]


def _drop() -> Outline:
    t = np.arange(48) * (2 * np.pi / 48)
    return np.stack([0.92 * np.sin(t) * np.sin(t / 2) ** 1.6, 1.08 * np.cos(t) + 0.02], axis=1)


def _flower() -> Outline:
    t = np.arange(72) * (2 * np.pi / 72)
    return (0.74 + 0.3 * np.cos(6 * t))[:, None] * np.stack([np.cos(t), np.sin(t)], axis=1)


def _cross(arm: float = 0.33, reach: float = 1.0) -> Outline:
    quarter = np.array([[arm, arm], [arm, reach], [-arm, reach]])
    turns = [np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in np.arange(4) * np.pi / 2]
    return np.concatenate([quarter @ turn.T for turn in turns])


OUTLINES: dict[str, Callable[[], list[Outline]]] = {
    "circle": lambda: [_circle(0.92)],
    "square": lambda: [_polar([1.16] * 4, np.pi / 4)],
    "triangle": lambda: [_polar([1.17] * 3, np.pi / 2)],
    "star": lambda: [_polar([1.12, 0.46] * 5, np.pi / 2)],
    "heart": lambda: [_heart()],
    "cross": lambda: [_cross()],
    "ring": lambda: [_circle(0.96), _circle(0.54)],
    "crescent": lambda: [_crescent()],
    "arrow": lambda: [
        np.array([[1.1, 0], [0.2, 0.9], [0.2, 0.32], [-1.05, 0.32], [-1.05, -0.32], [0.2, -0.32], [0.2, -0.9]])
    ],
    "drop": lambda: [_drop()],
    "flower": lambda: [_flower(), _circle(0.24, 24)],
    "bolt": lambda: [np.array([[0.3, 1.1], [-0.62, -0.14], [-0.08, -0.14], [-0.34, -1.1], [0.66, 0.3], [0.1, 0.3]])],
}
SHAPES = tuple(OUTLINES)
"""Names of the shapes. Turning one never makes it another."""


def _own_coordinates() -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(GRID) + 0.5) * (2 * SPAN / GRID) - SPAN).astype(np.float32)
    return axis[None, :], axis[:, None]


@cache
def shape_distance(shape: str) -> Float32[np.ndarray, "grid grid"]:
    """The signed distance to a shape's outlines, negative inside (even-odd rule); rows are y, columns x."""
    x, y = _own_coordinates()
    squared = np.full((GRID, GRID), np.inf, np.float32)
    inside = np.zeros((GRID, GRID), bool)
    for outline in OUTLINES[shape]():
        for (ax, ay), (bx, by) in zip(outline, np.roll(outline, -1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1, dtype=np.float32)
            np.minimum(squared, (x - ax - ex * along) ** 2 + (y - ay - ey * along) ** 2, out=squared)
            if ay != by:
                inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return (np.sqrt(squared) * np.where(inside, -1, 1)).astype(np.float32)


def _texture(name: str, coarse: float) -> np.ndarray:
    """Values in [0, 1] on the grid; `coarse` is the pattern's period in radii."""
    x, y = _own_coordinates()
    k = 2 * np.pi / coarse
    if name == "striped":
        return 0.5 + 2.5 * np.sin(k * (0.6 * x + 0.8 * y))
    if name == "dotted":
        return 0.5 + 3 * (np.cos(k * x) * np.cos(k * y) - 0.25)
    if name == "checkered":
        return 0.5 + 4 * np.sin(k / 2 * x) * np.sin(k / 2 * y)
    if name == "shaded":
        return 0.5 + 0.55 * (0.3 * x + y) * np.ones_like(x)
    if name == "speckled":
        cells = np.random.Generator(np.random.Philox(key=7)).random((GRID, GRID), np.float32)
        pitch = round(GRID * coarse / (6 * SPAN))
        return 3.0 * cells[np.arange(GRID)[:, None] // pitch, np.arange(GRID) // pitch] - 1
    return np.zeros((GRID, GRID))


TEXTURES = ("plain", "striped", "dotted", "checkered", "shaded", "speckled")
"""Names of the textures."""
PERIODS = (0.45, 0.62)
"""Periods of the patterns, in radii."""


@cache
def texture_table(texture: str, period: int) -> Float32[np.ndarray, "grid grid"]:
    """How much of a figure's second colour shows, 0 to 1, on the grid of `shape_distance`; `period` indexes PERIODS."""
    return np.clip(_texture(texture, PERIODS[period]), 0, 1).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One coloured, textured shape. Lengths are fractions of the image's side, y downwards, colours in [0, 1]."""

    shape: str
    x: float
    y: float
    radius: float
    angle: float
    colour: np.ndarray
    """(3,)"""
    second: np.ndarray
    """(3,), the texture's other colour."""
    texture: str = "plain"
    period: int = 0
    """Index of the texture's period in PERIODS."""


Canvas = Float32[np.ndarray, "s s 3"]
"""A picture under way: red, green and blue in [0, 1]."""


@cache
def _interpolation(size: int, hard: bool) -> np.ndarray:
    """(size, LATTICE) weights that bring a lattice to pixels: linear, or the nearest point's value if `hard`."""
    at = (np.arange(size) + 0.5) / size * (LATTICE if hard else LATTICE - 1)
    if hard:
        return np.eye(LATTICE, dtype=np.float32)[at.astype(int)]
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(LATTICE))).astype(np.float32)


def background(lattice: Float32[np.ndarray, "l l 3"], size: int, hard: bool = False) -> Canvas:
    """A new canvas from LATTICE x LATTICE colours, interpolated linearly, or as patches with sharp edges if `hard`."""
    weights = _interpolation(size, hard)
    rows = weights @ lattice.reshape(LATTICE, LATTICE * 3)
    return np.matmul(weights, rows.reshape(size, LATTICE, 3))


@cache
def _wobble(size: int) -> np.ndarray:
    """(2, 2 size, 2 size) smooth noise in [-1, 1], cut from at random offsets."""
    cells = np.random.Generator(np.random.Philox(key=11)).standard_normal((2, 24, 24), np.float32)
    at = np.linspace(0, 23, 2 * size)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(24))).astype(np.float32)
    return np.tanh(weights @ cells @ weights.T)


def _footprint(
    figure: Figure, size: int, bend: float = 0.0
) -> tuple[tuple[slice, slice], Int32[np.ndarray, "h w"], float]:
    """The part of the canvas that a figure may touch, its pixels' places in the flattened tables, pixels per radius.

    `bend` moves every pixel's place by smooth noise of at most that many radii: a drawing by an unsteady hand.
    """
    radius = figure.radius * size
    # Pixels whose centres are at most REACH radii away along each axis: all of them have a place in the tables.
    left, top = (max(0, ceil(centre * size - REACH * radius - 0.5)) for centre in (figure.x, figure.y))
    right, bottom = (min(size, floor(centre * size + REACH * radius + 0.5)) for centre in (figure.x, figure.y))
    right, bottom = max(left, right), max(top, bottom)
    dx = (np.arange(left, right, dtype=np.float32) + 0.5 - figure.x * size)[None, :]
    dy = (np.arange(top, bottom, dtype=np.float32) + 0.5 - figure.y * size)[:, None]
    per_pixel = GRID / (2 * SPAN * radius)
    c, s = np.float32(np.cos(figure.angle) * per_pixel), np.float32(np.sin(figure.angle) * per_pixel)
    u = (c * dx + np.float32(GRID / 2)) - s * dy
    v = (np.float32(GRID / 2) - s * dx) - c * dy
    if bend:
        offset = int((figure.x + figure.y) * 997) % size
        noise = _wobble(size)[:, top + offset :, left + offset :][:, : bottom - top, : right - left]
        u += noise[0] * np.float32(bend * GRID / (2 * SPAN))
        v += noise[1] * np.float32(bend * GRID / (2 * SPAN))
    places = v.astype(np.int32) * np.int32(GRID) + u.astype(np.int32)
    return (slice(top, bottom), slice(left, right)), places, radius


def _blend(patch: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> None:
    """Lay `colour`, (3,) or (h, w, 3), over `patch` (h, w, 3) in place, `coverage` (h, w) of it."""
    patch += coverage[:, :, None] * (colour - patch)


def figure_mask(figure: Figure, size: int, bend: float = 0.0) -> Float32[np.ndarray, "s s"]:
    """How much of each pixel a figure covers, 0 to 1."""
    mask = np.zeros((size, size), np.float32)
    part, places, radius = _footprint(figure, size, bend)
    mask[part] = np.clip(0.5 - shape_distance(figure.shape).take(places) * radius, 0, 1)
    return mask


def paint(canvas: Canvas, figure: Figure, bend: float = 0.0) -> None:
    """Paint a filled, textured figure onto the canvas, in place."""
    part, places, radius = _footprint(figure, len(canvas), bend)
    coverage = np.clip(0.5 - shape_distance(figure.shape).take(places) * np.float32(radius), 0, 1)
    colour = figure.colour
    if figure.texture != "plain":
        share = texture_table(figure.texture, figure.period).take(places)
        colour = colour + share[:, :, None] * (figure.second - colour)
    _blend(canvas[part], coverage, colour)


def outline(canvas: Canvas, figure: Figure, width: float, hatching: float) -> None:
    """Draw a figure with a pencil, in place: its outline, `width` radii wide, and strokes of strength `hatching`."""
    part, places, radius = _footprint(figure, len(canvas), bend=0.05)
    distance = shape_distance(figure.shape).take(places)
    line = np.clip(0.5 + (np.float32(width / 2) - np.abs(distance)) * np.float32(radius), 0, 1)
    strokes = texture_table("striped", 0).take(places) * np.float32(hatching)
    inside = np.clip(0.5 - distance * np.float32(radius), 0, 1) * strokes
    _blend(canvas[part], np.maximum(line, inside), figure.colour)


def brush(canvas: Canvas, levels: int, strength: float) -> Canvas:
    """Make a picture look painted: brightness in diagonal strokes, then at most `levels` levels of each colour."""
    size = len(canvas)
    at = np.arange(size, dtype=np.float32) / size
    noise = _wobble(size)[0, :size, :size]
    strokes = np.sin(70 * (at[:, None] + 0.6 * at) + 3 * noise) * noise
    return np.round((canvas + np.float32(strength) * strokes[:, :, None]) * np.float32(levels)) / np.float32(levels)


@cache
def _grain(size: int) -> np.ndarray:
    """(2 size, 2 size, 1) white noise, cut from at random offsets."""
    noise = np.random.Generator(np.random.Philox(key=13)).standard_normal((2 * size, 2 * size, 1), np.float32)
    return np.clip(noise, -2.5, 2.5)


def finish(canvas: Canvas, grain: float, offset: tuple[float, float]) -> UInt8[np.ndarray, "s s 3"]:
    """Add `grain` of a camera's noise, cut at `offset` (two numbers in [0, 1)), and round to bytes."""
    size = len(canvas)
    row, column = int(offset[0] * size), int(offset[1] * size)
    noisy = canvas + np.float32(grain) * _grain(size)[row : row + size, column : column + size]
    noisy *= 255
    noisy += 0.5
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
