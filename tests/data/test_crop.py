"""Random resized crop: were these to fail, boxes would leave images, or crops would not be torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from triscale.data.crop import Box, Crop, draw_crop
from triscale.data.settings import AugmentSettings
from triscale.randomness import generator

SIMCLR = AugmentSettings(crop_area=(0.08, 1.0))


def drawn(settings: AugmentSettings, *words: int | str) -> Crop:
    crop = draw_crop(settings, generator(*words))
    assert crop is not None
    return crop


@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.tuples(st.floats(1e-6, 1.0), st.floats(1e-6, 1.0)).map(sorted),
    st.tuples(st.floats(0.01, 100.0), st.floats(0.01, 100.0)).map(sorted),
    st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=22, max_size=22),
)
def test_a_box_lies_within_its_image_and_is_not_empty(
    width: int, height: int, area: list[float], aspect: list[float], uniforms: list[float]
) -> None:
    crop = Crop(area=(area[0], area[1]), aspect=(aspect[0], aspect[1]), uniforms=uniforms)
    box = crop.box(width, height)
    assert box.width >= 1 and box.height >= 1
    assert 0 <= box.left <= width - box.width and 0 <= box.top <= height - box.height


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_a_box_is_a_pure_function_of_the_draw_and_the_size(width: int, height: int, number: int) -> None:
    assert drawn(SIMCLR, number).box(width, height) == drawn(SIMCLR, number).box(width, height)


def test_nothing_is_drawn_where_the_crop_is_off() -> None:
    rng, untouched = generator("a"), generator("a")
    assert draw_crop(AugmentSettings(), rng) is None
    assert rng.random() == untouched.random()


def test_a_draw_takes_as_many_numbers_for_any_settings() -> None:
    rng, other = generator("a"), generator("a")
    draw_crop(SIMCLR, rng)
    draw_crop(AugmentSettings(crop_area=(0.9, 1.0), crop_aspect=(1.0, 1.0)), other)
    assert rng.random() == other.random()


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (300, 300), (900, 200)])
def test_boxes_are_distributed_as_torchvisions(area: tuple[float, float], width: int, height: int) -> None:
    """Means and spreads of share of the area, ratio of the sides and centre, of 3,000 boxes each."""
    settings = AugmentSettings(crop_area=area)
    boxes = [drawn(settings, "crop", number).box(width, height) for number in range(3000)]
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = [RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(3000)]
    peers = [Box(left, top, w, h) for top, left, h, w in theirs]

    def figures(found: list[Box]) -> np.ndarray:
        shares = [box.width * box.height / (width * height) for box in found]
        ratios = [np.log(box.width / box.height) for box in found]
        across = [(box.left + box.width / 2) / width for box in found]
        down = [(box.top + box.height / 2) / height for box in found]
        return np.array([shares, ratios, across, down])

    mine, others = figures(boxes), figures(peers)
    standard_errors = np.sqrt((mine.var(1) + others.var(1)) / 3000)
    assert (np.abs(mine.mean(1) - others.mean(1)) <= 4 * standard_errors + 1e-12).all()
    assert np.allclose(mine.std(1), others.std(1), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "box"),
    [((1, 1000), Box(0, 499, 1, 1)), ((1000, 1), Box(499, 0, 1, 1)), ((1, 1), Box(0, 0, 1, 1))],
)
def test_where_nothing_fits_the_middle_is_seen(size: tuple[int, int], box: Box) -> None:
    crop = Crop(area=(1.0, 1.0), aspect=(3 / 4, 4 / 3), uniforms=[0.5] * 22)
    assert crop.box(*size) == box
