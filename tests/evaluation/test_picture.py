"""The picture of guesses: whatever the names and images, it is drawn without a warning, and right and wrong differ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triscale.errors import RunError
from triscale.evaluation.picture import GuessRow, draw_guesses
from triscale.evaluation.zeroshot import Guess

HOSTILE = ("<script>", "[/red]", "$x_", "$\\frac{", "a\nb\x1b[2J\x00", "表 \U0001f600", "\udcff", "", "W" * 10_000)
RIGHT, WRONG = (45, 165, 99), (226, 96, 79)


def guess(
    truth: str, *names: str, shape: tuple[int, int] = (5, 5), chances: tuple[float, ...] = (0.7, 0.2, 0.1)
) -> Guess:
    image = np.full((*shape, 3), 128, np.uint8)
    return Guess(image=image, truth=truth, names=names, probabilities=chances[: len(names)])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((picture == colour).all(-1).sum())


def test_right_guesses_are_green_and_wrong_ones_red(tmp_path: Path) -> None:
    counts = {}
    for case, names in {"right": ("a", "b", "c"), "late": ("b", "a", "c"), "wrong": ("b", "c", "d")}.items():
        draw_guesses(tmp_path / f"{case}.png", "", [GuessRow(name="val", guesses=[guess("a", *names)])])
        picture = pixels(tmp_path / f"{case}.png")[150:]  # below the legend
        counts[case] = count(picture, RIGHT), count(picture, WRONG)
    assert counts["right"][0] > 500 and counts["right"][1] == 0
    assert counts["wrong"][1] > 500 and counts["wrong"][0] == 0
    assert min(counts["late"]) > 0


def test_a_longer_bar_is_a_larger_probability(tmp_path: Path) -> None:
    green = []
    for chance in (0.001, 0.3, 0.6, 1.0):
        draw_guesses(tmp_path / "a.png", "", [GuessRow(name="v", guesses=[guess("a", "a", chances=(chance,))])])
        green.append(count(pixels(tmp_path / "a.png")[150:], RIGHT))
    none, *bars = green
    assert (bars[1] - none) / (bars[0] - none) == pytest.approx(2, rel=0.1)
    assert (bars[2] - none) / (bars[0] - none) == pytest.approx(1 / 0.3, rel=0.1)


def test_names_are_drawn_as_they_stand_or_as_boxes_and_stay_on_the_page(tmp_path: Path) -> None:
    rows = [GuessRow(name=name, note=name, guesses=[guess(name, name, name + "x")]) for name in HOSTILE]
    # matplotlib warns of a glyph that its font lacks, and here a warning is an error.
    draw_guesses(tmp_path / "guesses.png", " ".join(HOSTILE), rows, note=" ".join(HOSTILE))
    picture = pixels(tmp_path / "guesses.png")
    assert picture.shape[1] == 1800
    assert (picture[:, -40:] == 255).all(), "something runs over the right margin"


@pytest.mark.parametrize("shape", [(1, 1), (20, 500), (500, 20), (300, 200)])
def test_images_of_any_shape_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    draw_guesses(tmp_path / "guesses.png", "title", [GuessRow(name="v", guesses=[guess("a", "a", shape=shape)])])
    assert count(pixels(tmp_path / "guesses.png"), (128, 128, 128)) > 0


def test_the_same_guesses_give_the_same_file(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw_guesses(tmp_path / name, "title", [GuessRow(name="val", guesses=[guess("a", "b", "a", "c")])])
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_fifth_guess_begins_a_new_line(tmp_path: Path) -> None:
    heights = []
    for number in (0, 1, 4, 5):
        draw_guesses(tmp_path / "a.png", "title", [GuessRow(name="val", guesses=[guess("a", "b")] * number)])
        heights.append(pixels(tmp_path / "a.png").shape[0])
    assert heights[0] < heights[1] == heights[2] < heights[3]


def test_rows_without_guesses_and_pictures_without_rows_are_drawn(tmp_path: Path) -> None:
    draw_guesses(tmp_path / "new/none.png", "title", [])
    draw_guesses(tmp_path / "new/empty.png", "title", [GuessRow(name="val", guesses=[])])
    assert pixels(tmp_path / "new/empty.png").shape[0] > pixels(tmp_path / "new/none.png").shape[0]


def test_a_picture_that_cannot_be_written_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        draw_guesses(tmp_path / "file/guesses.png", "title", [])
