"""scenes: the embedded data set. Coloured, textured shapes, alone or two in a spatial relation, with noisy captions.

Nothing is downloaded or stored: sample i of a split is a pure function of (split, seed, i), drawn when it is read. A
class is a colour and a shape. Some classes are never trained on, though each colour and each shape is: the split
`unseen` shows only those, and asks for them among all classes. Five further splits shift what is seen, after the sets
that BASIC (arXiv 2111.10050, table 1) is judged on: ImageNet-V2, -Sketch, -R(endition), -A(dversarial), ObjectNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from triscale.data import drawing
from triscale.data.drawing import COLOURS, LATTICE, PALETTE, PERIODS, SHAPES, TEXTURES, Figure
from triscale.data.samples import Sample
from triscale.data.scene_words import CLASSNAMES, HELD_OUT, TRAINED, pick, write_caption
from triscale.data.scene_words import TEMPLATES as TEMPLATES  # with the classes it names, what evaluation asks for
from triscale.errors import UsageError
from triscale.randomness import generator

RELATION_LABELS = 1000
"""Labels of training samples that show two figures begin here; an equal label means equal classes and relation."""
TRAIN_SAMPLES = 65_536
"""Samples of the split `train` unless said otherwise."""
_PAIR_SHARE = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a split's pictures look. Lengths are fractions of the image's side, angles radians, ranges (low, high)."""

    samples: int = 1440
    classes: tuple[int, ...] = TRAINED
    medium: Literal["flat", "pencil", "paint"] = "flat"
    radius: tuple[float, float] = (0.21, 0.4)
    turn: float = 0.35
    """Figures are turned by up to this, either way."""
    plain: float = 0.5
    """Probability of no texture."""
    jitter: float = 0.035
    """Standard deviation of what is added to a figure's colours."""
    contrast: float = 0.42
    """Least distance of background and figure in the colour cube; 0.42 is a quarter of its diagonal."""
    tint: tuple[float, float] = (0.1, 0.5)
    """Saturation of the background."""
    grounds: tuple[float, float, float] = (0.4, 0.3, 0.3)
    """Probabilities of a plain, a fading and a cloudy background; the rest is patches with sharp edges."""
    grain: float = 0.025
    """Largest standard deviation of the camera's noise."""
    margin: float = 0.9
    """How much of its radius a figure keeps inside the picture."""
    clutter: bool = False
    """Whether a bar hides a part of the figure and specks of other colours lie about."""


LOOKS = {
    "train": Look(samples=TRAIN_SAMPLES),
    "val": Look(),
    "unseen": Look(samples=1200, classes=tuple(sorted(HELD_OUT))),
    "v2": Look(samples=1200, radius=(0.15, 0.28), turn=0.6, plain=0.2, jitter=0.055, margin=0.75, grain=0.05),
    "sketch": Look(samples=1200, medium="pencil", plain=1.0, contrast=0.5, tint=(0.05, 0.2), grounds=(1, 0, 0)),
    "rendition": Look(samples=1200, medium="paint", jitter=0.06, tint=(0.2, 0.6)),
    "adversarial": Look(samples=1200, radius=(0.14, 0.21), clutter=True),
    "objectnet": Look(samples=1200, turn=np.pi, grounds=(0.1, 0.1, 0.1), tint=(0.3, 0.9), margin=0.6, contrast=0.5),
}
SPLITS = tuple(LOOKS)
"""Names of the splits: `train`, and the evaluation sets."""
SHIFTS = ("v2", "sketch", "rendition", "adversarial", "objectnet")
"""The splits whose mean top-1 measures robustness; what they show was trained on, how they show it was not."""


def _between(rng: np.random.Generator, low_high: tuple[float, float]) -> float:
    return low_high[0] + (low_high[1] - low_high[0]) * rng.random()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What a picture shows: one class, or two with the first above (vertical) or left of (horizontal) the second."""

    classes: tuple[int, ...]
    vertical: bool
    figures: tuple[Figure, ...]
    ground: Literal["plain", "fading", "cloudy", "patchy"]
    lattice: np.ndarray
    """Colours (LATTICE, LATTICE, 3) that the background is interpolated from."""

    @property
    def label(self) -> int:
        """The class of a single figure; for two, a number from RELATION_LABELS on that is the content's own."""
        if len(self.classes) == 1:
            return self.classes[0]
        first, second = self.classes
        return RELATION_LABELS + 2 * (first * len(CLASSNAMES) + second) + self.vertical


def _figure(rng: np.random.Generator, look: Look, index: int, place: tuple[float, float, float]) -> Figure:
    """A figure of class `index` at `place` (x, y, radius), with the look's texture, turn and shade of colour."""
    colour, shape = COLOURS[index // len(SHAPES)], SHAPES[index % len(SHAPES)]
    rgb = np.array(PALETTE[colour], np.float32) + np.float32(look.jitter) * rng.standard_normal(3, np.float32)
    bright = float(rgb.sum()) > 1.2
    second = rgb + (np.float32(0.0 if bright else 1.0) - rgb) * np.float32(0.3)
    x, y, radius = place
    return Figure(
        shape=shape,
        x=x,
        y=y,
        radius=radius,
        angle=look.turn * (2 * rng.random() - 1),
        colour=rgb,
        second=second,
        texture="plain" if rng.random() < look.plain else pick(rng, TEXTURES[1:]),
        period=int(rng.random() * len(PERIODS)),
    )


def _pair_places(rng: np.random.Generator, vertical: bool) -> list[tuple[float, float, float]]:
    """Where two figures stand, the first above or left of the second, each (x, y, radius)."""
    places = []
    for centre in (0.26, 0.74):
        along = centre + 0.05 * (2 * rng.random() - 1)
        across = 0.5 + 0.22 * (2 * rng.random() - 1)
        radius = 0.16 + 0.06 * rng.random()
        places.append((across, along, radius) if vertical else (along, across, radius))
    return places


def _lattice(
    rng: np.random.Generator, look: Look, figures: Sequence[Figure]
) -> tuple[Literal["plain", "fading", "cloudy", "patchy"], np.ndarray]:
    """The background's kind and colours, which keep the look's contrast with the figures where candidates allow."""
    value = rng.random((10, 1), np.float32)
    tint = np.float32(_between(rng, look.tint)) * (rng.random((10, 3), np.float32) - np.float32(0.5))
    candidates = np.clip(np.float32(0.08) + np.float32(0.88) * np.sqrt(value) + tint, 0.02, 0.98)
    gaps = np.sqrt(((candidates[:, None] - np.stack([f.colour for f in figures])) ** 2).sum(-1)).min(1).tolist()
    far = sorted(range(10), key=lambda i: -min(gaps[i], look.contrast))
    one, other = candidates[far[0]], candidates[far[1]]
    kind = rng.random()
    plain, fading, cloudy = look.grounds
    if kind < plain:
        return "plain", np.broadcast_to(one, (LATTICE, LATTICE, 3))
    if kind < plain + fading:
        slope, ramp = 2 * np.pi * rng.random(), np.linspace(-0.11, 0.11, LATTICE)
        shift = np.cos(slope) * ramp + np.sin(slope) * ramp[:, None]
        return "fading", np.clip(one + shift[:, :, None].astype(np.float32), 0, 1)
    noise = rng.random((LATTICE, LATTICE, 1), np.float32) - np.float32(0.5)
    if kind < plain + fading + cloudy:
        return "cloudy", np.clip(one + np.float32(0.3) * noise, 0, 1)
    return "patchy", np.where(noise < 0, one, other)


def _compose(rng: np.random.Generator, look: Look, classes: tuple[int, ...], vertical: bool) -> Scene:
    """Decide everything about a picture of these classes but its finish."""
    if len(classes) == 2:
        places = _pair_places(rng, vertical)
    else:
        radius = _between(rng, look.radius)
        room = max(0.0, 1 - 2 * look.margin * radius)
        places = [(0.5 + room * (rng.random() - 0.5), 0.5 + room * (rng.random() - 0.5), radius)]
    figures = tuple(_figure(rng, look, index, place) for index, place in zip(classes, places, strict=True))
    ground, lattice = _lattice(rng, look, figures)
    return Scene(classes=classes, vertical=vertical, figures=figures, ground=ground, lattice=lattice)


def _add_clutter(rng: np.random.Generator, canvas: np.ndarray, figure: Figure) -> None:
    """Lay specks of other colours about a figure, and a bar over a part of it, in place."""
    size = len(canvas)
    for _ in range(3 + int(rng.random() * 4)):
        angle, away = 2 * np.pi * rng.random(), figure.radius * 1.5 + 0.3 * rng.random()
        rgb = np.array(PALETTE[pick(rng, COLOURS)], np.float32)
        x, y = figure.x + away * np.cos(angle), figure.y + away * np.sin(angle)
        if 0.02 < x < 0.98 and 0.02 < y < 0.98:
            radius = 0.02 + 0.02 * rng.random()
            drawing.paint(canvas, Figure(shape="circle", x=x, y=y, radius=radius, angle=0, colour=rgb, second=rgb))
    shade = np.float32(0.25 + 0.5 * rng.random())
    width = figure.radius * (0.25 + 0.2 * rng.random())
    side = figure.radius * (0.25 + 0.4 * rng.random()) * pick(rng, (-1, 1))
    across = rng.random() < 0.5
    middle = (figure.y if across else figure.x) + side
    bar = slice(max(0, round((middle - width / 2) * size)), max(0, round((middle + width / 2) * size)))
    canvas[(bar, slice(None)) if across else (slice(None), bar)] = shade


def _render(rng: np.random.Generator, look: Look, scene: Scene, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """Draw a scene in its split's medium."""
    canvas = drawing.background(scene.lattice, size, hard=scene.ground == "patchy")
    for figure in scene.figures:
        if look.medium == "pencil":
            drawing.outline(canvas, figure, width=0.2 + 0.1 * rng.random(), hatching=0.1 + 0.4 * rng.random())
        else:
            drawing.paint(canvas, figure, bend=0.09 if look.medium == "paint" else 0.0)
    if look.clutter:
        _add_clutter(rng, canvas, scene.figures[0])
    if look.medium == "paint":
        canvas = drawing.brush(canvas, levels=5 + int(4 * rng.random()), strength=0.06 + 0.06 * rng.random())
    return drawing.finish(canvas, grain=look.grain * rng.random(), offset=(rng.random(), rng.random()))


SEED = 1
"""Of the scenes that are used. Recipes and the kinds of scenes were chosen while looking at those of seed 0."""


class Scenes:
    """A source of scenes.

    Args:
        split: one of SPLITS. `train` shows one figure or two with a drawn caption; an evaluation split shows one, whose
            class is the label and whose caption is "a CLASSNAME".
        size: side of the images in pixels; the content is the same at any size.
        seed: other seeds give other scenes of the same kinds.
        samples: number of samples; the default is the split's own.

    Raises:
        UsageError: there is no such split, or a number that is too small.
    """

    def __init__(self, split: str = "train", *, size: int = 32, seed: int = SEED, samples: int | None = None) -> None:
        if split not in LOOKS:
            raise UsageError(f"scenes has no split {split!r}; it has {', '.join(SPLITS)}")
        if size < 16:
            raise UsageError(f"scenes of {size} pixels are too small to tell shapes apart; take 16 or more")
        if samples is not None and samples < 1:
            raise UsageError(f"scenes needs at least 1 sample, not {samples}")
        self.split, self.size, self.seed = split, size, seed
        self._samples = LOOKS[split].samples if samples is None else samples

    @property
    def name(self) -> str:
        """`scenes:SPLIT`."""
        return f"scenes:{self.split}"

    def __len__(self) -> int:
        return self._samples

    def scene(self, index: int) -> Scene:
        """What sample `index` shows."""
        return self._describe(index)[0]

    def caption(self, index: int) -> str:
        """The caption of sample `index`, without drawing the sample."""
        return self._describe(index)[1]

    def file(self, index: int) -> str:
        """The source's name: samples are drawn, not read."""
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Draw sample `index`, 0 <= index < len: uint8 image (size, size, 3), caption and label."""
        scene, caption, rng = self._describe(index)
        return Sample(
            key=f"{self.split}-{index:07d}",
            image=_render(rng, LOOKS[self.split], scene, self.size) if image else b"",
            text=caption.encode(),
            label=str(scene.label).encode(),
        )

    def _describe(self, index: int) -> tuple[Scene, str, np.random.Generator]:
        """Scene and caption, and the generator as it stands after deciding on them."""
        if not 0 <= index < self._samples:
            raise IndexError(f"{self.name} has {self._samples} samples, none numbered {index}")
        rng = generator("scenes", self.split, self.seed, index)
        look = LOOKS[self.split]
        if self.split != "train":
            classes = (look.classes[index % len(look.classes)],)
        elif rng.random() < _PAIR_SHARE:
            first = int(rng.random() * len(TRAINED))
            second = (first + 1 + int(rng.random() * (len(TRAINED) - 1))) % len(TRAINED)
            classes = (TRAINED[first], TRAINED[second])
        else:
            classes = (pick(rng, TRAINED),)
        scene = _compose(rng, look, classes, vertical=rng.random() < 0.5)
        if self.split != "train":
            return scene, f"a {CLASSNAMES[scene.label]}", rng
        caption = write_caption(rng, classes, scene.figures, vertical=scene.vertical, ground=scene.ground)
        return scene, caption, rng
