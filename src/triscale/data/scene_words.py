"""The language of `scenes`: its classes, the prompts that ask for them, and captions as noisy as the web's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from triscale.data.drawing import COLOURS, SHAPES, Figure

CLASSNAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Every class, trained on or not; a label is an index into this."""
HELD_OUT = frozenset(
    c * len(SHAPES) + s for c in range(len(COLOURS)) for s in range(len(SHAPES)) if (s - c) % len(SHAPES) in (3, 8)
)
"""Classes that no training image shows and no training caption names: two of each colour and two of each shape."""
TRAINED = tuple(i for i in range(len(CLASSNAMES)) if i not in HELD_OUT)
"""The other classes."""
TEMPLATES = ("a {c}", "the {c}", "a picture of a {c}", "there is one {c}", "a drawing of the {c}", "{c}")
"""Prompt templates for zero-shot classification."""

_COLOUR_WORDS = {colour: (colour,) for colour in COLOURS} | {
    "red": ("red", "crimson"),
    "turquoise": ("turquoise", "teal"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rosy"),
    "grey": ("grey", "gray"),
}
_SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
    "drop": ("drop", "teardrop"),
    "flower": ("flower", "blossom"),
    "bolt": ("bolt", "lightning bolt"),
}
_TEXTURE_WORDS = {
    "plain": ("plain",),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "shaded": ("shaded", "fading"),
    "speckled": ("speckled", "grainy"),
}
_PREFIXES = ("a picture of", "a drawing of", "an image of", "there is", "we see", "look at")
_RELATIONS = (
    (("above", "over", "on top of"), ("below", "under", "beneath")),
    (("left of", "to the left of"), ("right of", "to the right of")),
)
"""By axis (vertical, horizontal): wordings that name the upper or left figure first, and those that name it last."""
_UNINFORMATIVE = ("untitled", "a picture", "some shapes", "img 0421", "no description", "new drawing")
_UNINFORMATIVE_SHARE, _WRONG_SHARE = 0.03, 0.02

T = TypeVar("T")


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of `choices`, each as likely."""
    return choices[int(rng.random() * len(choices))]


def _article(rng: np.random.Generator, phrase: str) -> str:
    kind = rng.random()
    if kind < 0.6:
        return ("an " if phrase[0] in "aeiou" else "a ") + phrase
    return ("the " if kind < 0.75 else "one " if kind < 0.85 else "") + phrase


def _phrase(rng: np.random.Generator, index: int, figure: Figure, detail: float) -> str:
    """Words for one figure; its texture and size are mentioned with probabilities that grow with `detail`."""
    colour, shape = COLOURS[index // len(SHAPES)], SHAPES[index % len(SHAPES)]
    colour = pick(rng, _COLOUR_WORDS[colour])
    shape = pick(rng, _SHAPE_WORDS[shape])
    words = [colour]
    if rng.random() < detail * (0.2 if figure.texture == "plain" else 1.0):
        words.insert(int(rng.random() * 2), pick(rng, _TEXTURE_WORDS[figure.texture]))
    if rng.random() < 0.4 * detail and not 0.22 < figure.radius < 0.33:
        words.insert(0, pick(rng, ("large", "big") if figure.radius > 0.3 else ("small", "little")))
    if rng.random() < 0.1:
        return _article(rng, f"{shape}, {' '.join(words)}")
    return _article(rng, f"{' '.join(words)} {shape}")


def write_caption(
    rng: np.random.Generator, classes: Sequence[int], figures: Sequence[Figure], *, vertical: bool, ground: str
) -> str:
    """Words for a scene as they are found on the web: of many kinds, some useless, a few wrong.

    Args:
        rng: decides on the words.
        classes: of the figure, or of two, the upper or left one first.
        figures: as they are drawn, in the same order.
        vertical: whether two figures stand one above the other.
        ground: what the background is like, as an adjective.
    """
    fate = rng.random()
    if fate < _UNINFORMATIVE_SHARE:
        return pick(rng, _UNINFORMATIVE)
    wrong = fate < _UNINFORMATIVE_SHARE + _WRONG_SHARE
    named = [pick(rng, TRAINED) if wrong else index for index in classes]
    prefix = pick(rng, _PREFIXES) + " " if rng.random() < 0.3 else ""
    if len(named) == 1:
        text = prefix + _phrase(rng, named[0], figures[0], detail=0.5)
        if rng.random() < 0.2:
            text += f" on a {ground} background"
        return text
    order = int(rng.random() * 2)
    phrases = [_phrase(rng, named[i], figures[i], detail=0.25) for i in (order, 1 - order)]
    if rng.random() < 0.15:
        return prefix + " and ".join(phrases)
    wordings = _RELATIONS[0 if vertical else 1][order]
    return f"{prefix}{phrases[0]} {pick(rng, wordings)} {phrases[1]}"
