"""The picture of a model's guesses: test images of every set with the likeliest classes as bars.

Lengths are in pixels of a page 900 wide; the file has twice as many, for sharp text on any screen. Text is drawn as it
stands: no mathtext, and characters that the font lacks become boxes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, get_font
from matplotlib.patches import FancyBboxPatch

from triscale.errors import RunError
from triscale.evaluation.zeroshot import Guess

PAGE_WIDTH, MARGIN, GAP = 900, 24, 18
COLUMNS = 4
IMAGE_SIDE = 78
CARD_WIDTH = (PAGE_WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
CARD_STEP = 90
TITLE_HEIGHT, ROW_TITLE_HEIGHT, ROW_GAP = 74, 29, 6
PIXELS_PER_INCH, SHARPNESS = 100, 2
SMALLEST_BAR = 0.005  # a probability that is written as "0 %" has no bar
MEASURING_SIZE = 200
LONGEST_TEXT = 200  # characters that are measured; what is cut for width is shorter by far

PAPER, INK, MUTED, TRACK, RULE = "#ffffff", "#1f2933", "#6b7785", "#eef1f4", "#dde3e9"
RIGHT, RIGHT_INK, WRONG, WRONG_BELOW = "#2da563", "#17763f", "#e2604f", "#f0a79d"
MISSING = "\N{WHITE SQUARE}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GuessRow:
    """One evaluation set in the picture."""

    name: str
    note: str = ""
    """Stands beside the name, such as "top-1 91.3 %"."""
    guesses: Sequence[Guess]
    """Four to a line."""


def draw_guesses(path: str | os.PathLike[str], title: str, rows: Sequence[GuessRow], note: str = "") -> None:
    """Draw a PNG: per set its images, each with its true class and its guesses, the right one green, others red.

    Args:
        note: a line below the title.

    Raises:
        RunError: the file can't be written.
    """
    lines = [-(-len(row.guesses) // COLUMNS) for row in rows]
    height = TITLE_HEIGHT + sum(ROW_TITLE_HEIGHT + n * CARD_STEP + ROW_GAP for n in lines)
    figure = Figure(figsize=(PAGE_WIDTH / PIXELS_PER_INCH, height / PIXELS_PER_INCH), facecolor=PAPER)
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, PAGE_WIDTH), ylim=(height, 0), autoscale_on=False)
    page.set_axis_off()
    _draw_head(page, title, note)
    top = float(TITLE_HEIGHT)
    for row, line_count in zip(rows, lines, strict=True):
        _draw_row(page, top, row)
        top += ROW_TITLE_HEIGHT + line_count * CARD_STEP + ROW_GAP
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=PIXELS_PER_INCH * SHARPNESS, facecolor=PAPER, bbox_inches=None)
    except OSError as error:
        raise RunError(f"{str(path)!r}: the picture could not be written: {error.strerror}") from error


def _draw_head(page: Axes, title: str, note: str) -> None:
    _text(page, MARGIN, 32, title, size=19, width=PAGE_WIDTH - 2 * MARGIN, bold=True)
    legend = PAGE_WIDTH - MARGIN - 112
    _text(page, MARGIN, 54, note, size=11.5, width=legend - MARGIN - GAP, colour=MUTED)
    for left, colour, word in ((legend, RIGHT, "right"), (legend + 58, WRONG, "wrong")):
        _bar(page, left, 45.5, 9, 9, colour)
        _text(page, left + 15, 54, word, size=11.5, width=50, colour=MUTED)


def _draw_row(page: Axes, top: float, row: GuessRow) -> None:
    page.plot([MARGIN, PAGE_WIDTH - MARGIN], [top, top], color=RULE, linewidth=0.8)
    end = _text(page, MARGIN, top + 20, row.name, size=12.5, width=PAGE_WIDTH / 2, bold=True)
    _text(page, end + 9, top + 20, row.note, size=11.5, width=PAGE_WIDTH - MARGIN - end - 9, colour=MUTED)
    for number, guess in enumerate(row.guesses):
        line, column = divmod(number, COLUMNS)
        left = MARGIN + column * (CARD_WIDTH + GAP)
        _draw_card(page, left, top + ROW_TITLE_HEIGHT + line * CARD_STEP, guess)


def _draw_card(page: Axes, left: float, top: float, guess: Guess) -> None:
    is_right = bool(guess.names) and guess.names[0] == guess.truth
    _draw_image(page, left, top + 1, guess.image, RIGHT if is_right else WRONG)
    text_left = left + IMAGE_SIDE + 10
    width = left + CARD_WIDTH - text_left
    _text(page, text_left, top + 11.5, guess.truth, size=11.5, width=width, bold=True)
    for place, (name, probability) in enumerate(zip(guess.names[:3], guess.probabilities[:3], strict=True)):
        baseline = top + 30.5 + place * 21
        hit = name == guess.truth
        percent = f"{100 * probability:.0f} %"
        percent_width = _width(percent, 10.5, False)
        ink = RIGHT_INK if hit else INK if place == 0 else MUTED
        _text(page, text_left + width - percent_width, baseline, percent, size=10.5, width=width, colour=ink)
        _text(page, text_left, baseline, name, size=10.5, width=width - percent_width - 7, colour=ink)
        _bar(page, text_left, baseline + 4, width, 4, TRACK)
        if probability >= SMALLEST_BAR:
            colour = RIGHT if hit else WRONG if place == 0 else WRONG_BELOW
            _bar(page, text_left, baseline + 4, width * min(1.0, probability), 4, colour)


def _draw_image(page: Axes, left: float, top: float, image: UInt8[np.ndarray, "h w 3"], colour: str) -> None:
    """Fit an image into its square, its shape kept, under a frame with round corners."""
    height, width = image.shape[:2]
    scale = IMAGE_SIDE / max(height, width)
    x = left + (IMAGE_SIDE - width * scale) / 2
    y = top + (IMAGE_SIDE - height * scale) / 2
    frame = {"boxstyle": "round,pad=0,rounding_size=7", "linewidth": 0, "transform": page.transData}
    inside = FancyBboxPatch((left, top), IMAGE_SIDE, IMAGE_SIDE, facecolor="none", **frame)
    page.add_patch(inside)
    shown = page.imshow(
        image, extent=(x, x + width * scale, y + height * scale, y), aspect="auto", interpolation="bicubic", zorder=2
    )
    shown.set_clip_path(inside)
    border = FancyBboxPatch((left, top), IMAGE_SIDE, IMAGE_SIDE, facecolor="none", edgecolor=colour, zorder=3, **frame)
    border.set_linewidth(1.6)
    page.add_patch(border)


def _bar(page: Axes, left: float, top: float, width: float, height: float, colour: str) -> None:
    """A filled bar with round ends; one too short for them is drawn as wide as they are."""
    rounding = f"round,pad=0,rounding_size={height / 2}"
    page.add_patch(
        FancyBboxPatch((left, top), max(width, height), height, boxstyle=rounding, color=colour, linewidth=0)
    )


def _text(
    page: Axes,
    left: float,
    baseline: float,
    text: str,
    *,
    size: float,
    width: float,
    bold: bool = False,
    colour: str = INK,
) -> float:
    """Write one line, shortened to `width`, and return where it ends."""
    line = _shorten(_drawable(text, bold), size, width, bold)
    font = FontProperties(fname=_font_path(bold), size=size * 72 / PIXELS_PER_INCH)
    page.text(left, baseline, line, fontproperties=font, color=colour, parse_math=False, usetex=False)
    return left + _width(line, size, bold)


def _drawable(text: str, bold: bool) -> str:
    """One line of characters that the font has."""
    known = _characters(bold)
    one_line = " ".join(text[:LONGEST_TEXT].split())
    return "".join(c if ord(c) in known and c.isprintable() else MISSING for c in one_line)


def _shorten(line: str, size: float, width: float, bold: bool) -> str:
    if _width(line, size, bold) <= width:
        return line
    shortest, longest = 0, len(line) - 1
    while shortest < longest:
        middle = (shortest + longest + 1) // 2
        fits = _width(line[:middle].rstrip() + "…", size, bold) <= width
        shortest, longest = (middle, longest) if fits else (shortest, middle - 1)
    return line[:shortest].rstrip() + "…"


def _width(line: str, size: float, bold: bool) -> float:
    if not line:
        return 0.0
    font = get_font(_font_path(bold))
    font.set_size(MEASURING_SIZE, 72)  # so large that hinting does not matter
    font.set_text(line, 0.0)
    return font.get_width_height()[0] / 64 * size / MEASURING_SIZE  # FreeType counts in 64ths


@cache
def _font_path(bold: bool) -> str:
    """matplotlib's own font: the picture looks the same on every machine."""
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))


@cache
def _characters(bold: bool) -> frozenset[int]:
    return frozenset(get_font(_font_path(bold)).get_charmap())
