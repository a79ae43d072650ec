"""What every tiled loss shares: tile sizes, memory of tiles, normalisation and its gradient, the best match of a row.

Shape suffixes: b rows of this rank, d width, r and c rows and columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Products = Literal["inputs", "float32", "tf32", "bf16", "fp16"]
"""In what the products of a loss are computed, where the device has kernels; "inputs": in that of x and y."""

TILE_ROWS = 512
TILE_COLUMNS = 1024
"""Of a tile on a CPU: with what a sweep makes of it, it stays in the cache."""
ACCELERATOR_TILE = 8192
"""Rows and columns of a tile elsewhere: products that fill the device, and few launches."""
ACCURACY_ROWS = 256
"""Of each rank's rows, the first so many are asked for their best match."""
SMALLEST_NORM = 1e-12
"""Shorter rows are divided by this, as torch's normalize does."""


class TileShape(NamedTuple):
    """The most rows and columns of scores that are worked on at once."""

    rows: int
    columns: int


def tile_shape(device: torch.device) -> TileShape:
    """What suits a device."""
    if device.type == "cpu":
        return TileShape(TILE_ROWS, TILE_COLUMNS)
    return TileShape(ACCELERATOR_TILE, ACCELERATOR_TILE)


def slices(rows: int, size: int) -> Iterator[slice]:
    """Consecutive slices of `rows` rows, at most `size` at a time."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def row_tiles(rows: Tensor) -> Iterator[slice]:
    """Consecutive slices of the rows of a tensor, as many at a time as suits its device."""
    return slices(len(rows), tile_shape(rows.device).rows)


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for what is: of losses, sums and gradients."""
    return torch.promote_types(dtype, torch.float32)


def unit_rows(rows: Float[Tensor, "b d"], dtype: torch.dtype) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1"]]:
    """The rows divided by their norms, rounded to `dtype`, new memory; and the norms, in float32 or better."""
    precision = precise_dtype(rows.dtype)
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=precision).clamp_min_(SMALLEST_NORM)
    if dtype == precision:
        return rows / norms, norms
    unit = torch.empty_like(rows, dtype=dtype)
    for tile in row_tiles(rows):
        unit[tile] = rows[tile] / norms[tile]
    return unit, norms


def precise(like: Tensor) -> torch.dtype:
    """float64 where the device has it: of what is O(B) and enters a difference in which much cancels."""
    return like.dtype if like.device.type == "mps" else torch.float64


def precise_sum(values: Tensor) -> Float[Tensor, ""]:
    """The sum in `precise` numbers."""
    return values.sum(dtype=precise(values))


def to_raw_rows_(
    gradient: Float[Tensor, "b d"], raw: Float[Tensor, "b d"], norms: Float[Tensor, "b 1"], factor: float
) -> Float[Tensor, ""]:
    """Turn the gradient with respect to unit rows, times `factor`, into that with respect to the raw ones, in place.

        dL/draw = (g - u (u . g)) / |raw|,  u = raw / |raw|,  g = factor * gradient

    Tile by tile, so that no second (b, d) is made. Returns sum_i u_i . g_i.
    """
    along_unit = precise_sum(gradient[:0])
    for rows in row_tiles(gradient):
        unit = raw[rows] / norms[rows]
        part = gradient[rows].mul_(factor)
        along = (part * unit).sum(1, keepdim=True)
        along_unit += precise_sum(along)
        part.addcmul_(unit, along, value=-1).div_(norms[rows])
    return along_unit


def tile_minima(values: Float[Tensor, " b"]) -> list[float]:
    """The smallest value of every row tile."""
    return torch.stack([values[rows].min() for rows in row_tiles(values)]).tolist()


def exponent_shift(highest: float, lowest: float, dtype: torch.dtype, terms: int) -> float | None:
    """The shift with which ONE 2**(t - shift) serves the sums over rows and over columns of a tile; None if none does.

    Args:
        highest: no score of the tile is above this (all in bits: base-2 logarithms).
        lowest: no log-sum-exp, of any row or column of the tile over all its terms, is below this.
        terms: how many terms such a sum has.

    A row's largest score may lie far below the tile's. 2**(t - shift) is lost where it falls below the smallest normal
    number, `tiny`. With `reach` = log2(eps / tiny / terms) and shift <= lowest + reach, each lost term is less than
    eps / terms of any row's or column's sum; with shift >= highest - reach, nothing overflows, and where
    2**(shift - lse) is lost, the probability 2**(t - lse) is below eps / terms, too. In float32 with 16,384 terms reach
    is 89 bits, so that scores may lie 123 apart (natural units); in float64 about 1,340.

    A shift is 0 where that will do. Otherwise it is a whole number, so that t - shift is exact for the scores that
    count: a fraction would be rounded alike in all scores of one size, another one in each sweep, and at a scale of 100
    all probabilities would be off by the same 4e-6.
    """
    info = torch.finfo(dtype)
    reach = math.log2(info.eps / info.tiny) - math.log2(terms)
    least, most = highest - reach, lowest + reach
    if not least <= most:  # also where a bound is not a number
        return None
    return 0.0 if least <= 0.0 <= most else float(round((least + most) / 2))


class TileMemory:
    """The memory of a tile of scores, used for one after the other."""

    def __init__(self, like: Float[Tensor, "b d"], columns: int) -> None:
        self._memory = like.new_empty(min(len(like), tile_shape(like.device).rows) * columns)

    def scores(self, x: Float[Tensor, "r d"], y: Float[Tensor, "c d"], factor: float) -> Float[Tensor, "r c"]:
        """factor * x @ y.T, valid until the next call."""
        tile = self._memory[: len(x) * len(y)].view(len(x), len(y))
        return torch.addmm(tile, x, y.T, beta=0, alpha=factor, out=tile)


class BestMatch:
    """The column with the largest score of each of the first rows, from tiles in any order of columns."""

    def __init__(self, rows: Float[Tensor, "b d"]) -> None:
        self.rows = min(len(rows), ACCURACY_ROWS)
        self._value = rows.new_full((self.rows,), -torch.inf, dtype=precise_dtype(rows.dtype))
        self.column: Int[Tensor, " n"] = torch.zeros(self.rows, dtype=torch.int64, device=rows.device)

    def see(self, scores: Float[Tensor, "r c"], rows: slice, first_column: int) -> None:
        """Take notice of a tile of scores, or of anything that rises with them."""
        if rows.start >= self.rows:
            return
        mine = slice(rows.start, min(rows.stop, self.rows))
        value, column = scores[: mine.stop - mine.start].max(1)
        better = value > self._value[mine]
        self._value[mine] = torch.where(better, value, self._value[mine])
        self.column[mine] = torch.where(better, column + first_column, self.column[mine])
