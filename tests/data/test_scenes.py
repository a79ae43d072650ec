"""The embedded data set: if these fail, results on `scenes` mean something other than what they are called."""

from __future__ import annotations

import pickle
import re
from collections import Counter

import numpy as np
import pytest

from triscale.data import drawing
from triscale.data.drawing import COLOURS, PALETTE
from triscale.data.scene_words import CLASSNAMES, HELD_OUT, TEMPLATES, TRAINED
from triscale.data.scenes import LOOKS, RELATION_LABELS, SHIFTS, SPLITS, Scenes
from triscale.errors import UsageError

COLOUR_OF = {c: c for c in COLOURS} | {
    "crimson": "red",
    "teal": "turquoise",
    "violet": "purple",
    "rosy": "pink",
    "gray": "grey",
}
SHAPE_OF = {s: s for s in drawing.SHAPES} | {
    "disc": "circle",
    "hoop": "ring",
    "plus": "cross",
    "moon": "crescent",
    "teardrop": "drop",
    "blossom": "flower",
}
FIRST_IS_FIRST = ("above", "over", "on top of", "to the left of", "left of")
FIRST_IS_SECOND = ("below", "under", "beneath", "to the right of", "right of")
BETWEEN = re.compile(rf" (?:{'|'.join([*FIRST_IS_FIRST, *FIRST_IS_SECOND, 'and'])}) ")


def named_classes(caption: str) -> list[str]:
    """The classes that a caption names, in its order; read from the words alone."""
    caption = re.sub(r" on a \w+ background$", "", caption)
    names = []
    for part in BETWEEN.split(caption):
        words = re.findall(r"[a-z]+", part)
        colours = [COLOUR_OF[word] for word in words if word in COLOUR_OF]
        shapes = [SHAPE_OF[word] for word in words if word in SHAPE_OF]
        if colours or shapes:
            assert len(colours) == len(shapes) == 1, caption
            names.append(f"{colours[0]} {shapes[0]}")
    return names


@pytest.fixture(scope="module")
def captions_and_labels() -> list[tuple[str, int]]:
    source = Scenes()
    return [(source.caption(index), source.scene(index).label) for index in range(3000)]


def test_there_are_at_least_a_hundred_trained_classes_and_their_names_are_distinct():
    assert len(TRAINED) >= 100
    assert len(set(CLASSNAMES)) == len(CLASSNAMES) == len(TRAINED) + len(HELD_OUT)
    assert all("{c}" in template for template in TEMPLATES)
    assert set(SHIFTS) < set(SPLITS)


def test_each_colour_and_each_shape_is_trained_and_held_out():
    for classes, least in ((TRAINED, 8), (HELD_OUT, 2)):
        colours = Counter(CLASSNAMES[i].split()[0] for i in classes)
        shapes = Counter(CLASSNAMES[i].split()[1] for i in classes)
        assert len(colours) == len(COLOURS) and min(colours.values()) >= least
        assert len(shapes) == len(drawing.SHAPES) and min(shapes.values()) >= least


@pytest.mark.parametrize("split", SPLITS)
def test_a_sample_is_a_pure_function_of_split_seed_and_index(split: str):
    source = Scenes(split, size=24)
    again = pickle.loads(pickle.dumps(source))  # as it travels to a worker
    samples = [source.read(index) for index in range(6)]
    for index in reversed(range(6)):
        other = again.read(index)
        assert np.array_equal(other.image, samples[index].image)
        assert (other.key, other.text, other.label) == (
            samples[index].key,
            samples[index].text,
            samples[index].label,
        )
    other_seed = Scenes(split, size=24, seed=source.seed + 1)
    assert not any(np.array_equal(other_seed.read(i).image, samples[i].image) for i in range(6))


def test_splits_show_different_pictures():
    pictures = [Scenes(split, size=24).read(5).image for split in SPLITS]
    assert len({np.asarray(picture).tobytes() for picture in pictures}) == len(SPLITS)


def test_the_scene_is_the_same_at_any_size():
    small, large = (np.asarray(Scenes("val", size=size).read(11).image, np.float32) for size in (24, 96))
    shrunk = large.reshape(24, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 10


def test_no_training_image_shows_a_held_out_class():
    source = Scenes()
    shown = Counter(index for i in range(4000) for index in source.scene(i).classes)
    assert not HELD_OUT & shown.keys()
    assert set(TRAINED) == shown.keys()


def test_no_training_caption_names_a_held_out_class(captions_and_labels: list[tuple[str, int]]):
    held_out = {CLASSNAMES[index] for index in HELD_OUT}
    named = Counter(name for caption, _ in captions_and_labels for name in named_classes(caption))
    assert not held_out & named.keys()
    assert len(named) == len(TRAINED)


def test_captions_name_what_is_shown_but_for_a_few_percent(captions_and_labels: list[tuple[str, int]]):
    wrong = useless = 0
    for caption, label in captions_and_labels:
        names = named_classes(caption)
        if label < RELATION_LABELS:
            shown = [CLASSNAMES[label]]
        else:
            content = (label - RELATION_LABELS) // 2
            shown = [CLASSNAMES[content // len(CLASSNAMES)], CLASSNAMES[content % len(CLASSNAMES)]]
        useless += not names
        wrong += bool(names) and sorted(names) != sorted(shown)
    assert 0.015 < useless / len(captions_and_labels) < 0.05
    assert 0.01 < wrong / len(captions_and_labels) < 0.04


def test_relations_in_captions_are_those_in_the_picture():
    source, seen = Scenes(), Counter()
    for index in range(800):
        scene = source.scene(index)
        if len(scene.classes) == 1:
            continue
        one, other = scene.figures
        gap = (other.y - one.y) if scene.vertical else (other.x - one.x)
        assert gap > 0.3
        caption = source.caption(index)
        names = named_classes(caption)
        if sorted(names) != sorted(CLASSNAMES[i] for i in scene.classes) or " and " in caption:
            continue
        in_order = names[0] == CLASSNAMES[scene.classes[0]]
        words = FIRST_IS_FIRST if in_order else FIRST_IS_SECOND
        assert any(f" {word} " in caption for word in words), caption
        assert scene.vertical != bool(re.search(" (left|right) of ", caption)), caption
        seen[scene.vertical, in_order] += 1
    assert len(seen) == 4


@pytest.mark.parametrize("split", SPLITS[1:])
def test_an_evaluation_split_has_its_own_classes_evenly_and_one_figure(split: str):
    source = Scenes(split, size=16)
    labels = Counter(source.scene(index).label for index in range(len(source)))
    assert set(labels) == (HELD_OUT if split == "unseen" else set(TRAINED))
    assert max(labels.values()) - min(labels.values()) <= 1
    assert all(len(source.scene(index).figures) == 1 for index in range(20))
    sample = source.read(7)
    assert sample.label == str(source.scene(7).label).encode()
    assert sample.text == f"a {CLASSNAMES[source.scene(7).label]}".encode()


@pytest.mark.parametrize("split", ["val", "unseen", "v2", "objectnet"])
def test_a_label_says_the_colour_that_its_picture_has(split: str):
    source, right = Scenes(split), 0
    palette = np.array(list(PALETTE.values()))
    indices = range(0, len(source), 11)
    for index in indices:
        scene = source.scene(index)
        inside = drawing.figure_mask(scene.figures[0], source.size) > 0.99
        pixels = np.asarray(source.read(index).image)[inside] / 255
        nearest = ((pixels[:, None] - palette) ** 2).sum(-1).argmin(1)
        right += COLOURS[np.bincount(nearest).argmax()] == CLASSNAMES[scene.label].split()[0]
    assert right / len(indices) > 0.9


def test_shapes_differ_at_every_angle():
    """Nearest by overlap, the shape is found among all shapes at all angles: no turn makes one shape another."""

    def mask(shape: str, angle: float, radius: float) -> np.ndarray:
        colour = np.zeros(3, np.float32)
        figure = drawing.Figure(
            shape=shape, x=0.5, y=0.5, radius=radius, angle=angle, colour=colour, second=colour, texture="plain"
        )
        return drawing.figure_mask(figure, 32).ravel()

    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    gallery = {shape: np.stack([mask(shape, angle, 0.38) for angle in angles]) for shape in drawing.SHAPES}
    for shape in drawing.SHAPES:
        for angle in (0.05, 0.7, 2.3, 4.0):
            probe = mask(shape, angle, 0.38)
            overlap = {
                name: float((np.minimum(masks, probe).sum(1) / np.maximum(masks, probe).sum(1)).max())
                for name, masks in gallery.items()
            }
            assert overlap.pop(shape) > max(overlap.values()) + 0.1, (shape, angle, overlap)


def test_a_shape_lies_within_the_square_that_is_drawn():
    for shape in drawing.SHAPES:
        inside = drawing.shape_distance(shape) < 0
        axis = np.abs((np.arange(drawing.GRID) + 0.5) * (2 * drawing.SPAN / drawing.GRID) - drawing.SPAN)
        farthest = np.hypot(axis[None, :], axis[:, None])[inside].max()
        assert 0.9 < farthest < drawing.REACH, shape


def test_a_tabulated_distance_is_the_distance():
    axis = (np.arange(drawing.GRID) + 0.5) * (2 * drawing.SPAN / drawing.GRID) - drawing.SPAN
    from_centre = np.hypot(axis[None, :], axis[:, None])
    assert np.abs(drawing.shape_distance("circle") - (from_centre - 0.92)).max() < 0.005
    ring = np.abs(from_centre - (0.96 + 0.54) / 2) - (0.96 - 0.54) / 2
    assert np.abs(drawing.shape_distance("ring") - ring).max() < 0.005


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "test"}, "no split 'test'; it has train, val"),
        ({"size": 8}, "too small"),
        ({"samples": 0}, "at least 1"),
    ],
)
def test_a_wrong_argument_gets_one_line(arguments: dict, says: str):
    with pytest.raises(UsageError, match=says) as caught:
        Scenes(**arguments)
    assert "\n" not in str(caught.value)


def test_an_index_outside_the_split_is_refused():
    source = Scenes("val", samples=5)
    assert len(source) == 5 and len(Scenes("val")) == LOOKS["val"].samples
    with pytest.raises(IndexError):
        source.read(5)


def test_a_figure_of_any_size_and_place_can_be_drawn():
    rng = np.random.Generator(np.random.Philox(key=3))
    colour = np.ones(3, np.float32)
    for _ in range(500):
        x, y, angle = (float(number) for number in rng.random(3) * (1.4, 1.4, 6.3) - (0.2, 0.2, 0))
        radius = float(0.005 * 100 ** rng.random())
        figure = drawing.Figure(
            shape=str(rng.choice(drawing.SHAPES)), x=x, y=y, radius=radius, angle=angle, colour=colour, second=colour
        )
        canvas = np.zeros((32, 32, 3), np.float32)
        drawing.paint(canvas, figure, bend=0.09)
        assert canvas.min() >= 0 and canvas.max() <= 1
