"""The sweeps of `sweeps` on CUDA, out of kernels and library products.

The first sweep of the fused form stores no score at all; the second, in both forms, stores the weights G of a tile
once, in the operands' precision, and adds G y and G^T x by library products: kept in registers, the (rows, d) sums of a
fused tile would take more than a multiprocessor has at d = 768. Whatever the operands, products accumulate in float32,
log-sum-exps across blocks are added up in float64 and no two blocks write to one place, so that results do not vary
from run to run.

Shape suffixes: B rows over all ranks, b of this rank, d width, r and c rows and columns of a tile, k blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triscale.losses import launch, tiles
from triscale.losses.columns import Piece
from triscale.losses.launch import Tile
from triscale.losses.sweeps import LogSumExps, Scores, over_ranks
from triscale.losses.tiles import BestMatch, TileShape, precise_dtype, row_tiles, slices

STATISTICS_ROWS = 65536
"""The first sweep of the fused form stores no scores, so its tiles may be tall: few launches, and 16 MiB for sums."""
SKIP_TILE = 2048
"""Rows and columns of a tile that is left out or not, where negligible ones are."""
HALF_GAIN = 2.0**14
"""Weights are at most 2; times this they use the range of float16, and what is below 4e-12 is lost instead of 6e-8."""


def _log_sums(largest: Float[Tensor, "k n"], total: Float[Tensor, "k n"], group: int) -> Float[Tensor, "m n"]:
    """log2 of the sum of 2**t over every `group` blocks, float64, from each block's maximum and its sum above that."""
    missing = -len(largest) % group
    own = largest.double() + total.double().log2()
    own = F.pad(own, (0, 0, 0, missing), value=-torch.inf).unflatten(0, (-1, group))
    base = own.amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).min)  # no -inf less -inf
    return (own - base).exp2_().sum(1).log2_().add_(base[:, 0])


def _see_best(scores: Scores, piece: Piece, best: BestMatch) -> None:
    first = slice(0, best.rows)
    tile = launch.score_product(scores.x[first], piece.rows)
    if scores.without_self:
        tile.diagonal(scores.ranks.first - piece.start).fill_(-torch.inf)
    best.see(tile, first, piece.start)


def log_sum_exps(scores: Scores, best: BestMatch, by_column: bool) -> LogSumExps:
    """Sweep one, as `sweeps.log_sum_exps`."""
    x = scores.x
    row_lse = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
    column_lse = row_lse.new_full((scores.ranks.total,), -torch.inf) if by_column else None
    bounds = scores.bounds(TileShape(SKIP_TILE, SKIP_TILE))
    height = STATISTICS_ROWS if launch.form() == "fused" else tiles.tile_shape(x.device).rows
    with launch.library_products(scores.tf32):
        for piece in scores.columns.pieces():
            _see_best(scores, piece, best)
            for rows in slices(len(x), height):
                tile = Tile(scores, piece, rows, slice(0, len(piece.rows)))
                of_rows, of_columns = _statistics(scores, tile, by_column, bounds is not None)
                torch.logaddexp2(row_lse[rows], _over_groups(of_rows), out=row_lse[rows])
                if column_lse is not None and of_columns is not None:
                    mine = column_lse[piece.columns]
                    torch.logaddexp2(mine, _over_groups(of_columns), out=mine)
                if bounds is not None:
                    bounds.see(piece.columns, rows, of_rows, of_columns)
    if column_lse is not None:
        column_lse = over_ranks(column_lse)
    return LogSumExps(row_lse, column_lse, frozenset() if bounds is None else bounds.negligible())


def _statistics(scores: Scores, tile: Tile, by_column: bool, in_groups: bool) -> tuple[Tensor, Tensor | None]:
    """log2-sum-exp2 of a tile's rows (k, r) and columns (m, c), over all of it or in groups of SKIP_TILE."""
    kernel = "softmax_statistics"
    blocks, (over_rows, over_columns) = tile.blocks(kernel), tile.counts(kernel)
    row_parts = tile.x.new_empty((2, over_columns, len(tile.x)), dtype=torch.float32)
    column_parts = tile.x.new_empty((2, over_rows, len(tile.y)) if by_column else (2, 1, 1), dtype=torch.float32)
    tile.run(
        kernel,
        *row_parts,
        *column_parts,
        after=(scores.bits, tile.diagonal),
        WITHOUT_SELF=scores.without_self,
        BY_COLUMN=by_column,
    )
    by_rows, by_columns = over_columns, over_rows
    if in_groups:
        by_rows, by_columns = max(1, SKIP_TILE // blocks.columns), max(1, SKIP_TILE // blocks.rows)
    of_rows = _log_sums(row_parts[0], row_parts[1], by_rows)
    return of_rows, _log_sums(column_parts[0], column_parts[1], by_columns) if by_column else None


def _over_groups(log_sums: Float[Tensor, "k n"]) -> Float[Tensor, " n"]:
    return log_sums[0] if len(log_sums) == 1 else torch.logsumexp(log_sums * math.log(2), 0) / math.log(2)


def _near(lse: Float[Tensor, " n"], gain: float) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """A log-sum-exp rounded to float32, and the factor, times `gain`, that makes good for the rounding."""
    near = lse.float()
    return near, (near - lse).exp2_().mul_(gain).float()


def _gain(scores: Scores) -> float:
    return HALF_GAIN if scores.x.dtype == torch.float16 else 1.0


class _Weights:
    """The memory of a tile's weights, used for one after the other, and the products with them."""

    def __init__(self, scores: Scores, tile: TileShape) -> None:
        self._scores, self._gain = scores, _gain(scores)
        rows, columns = min(len(scores.x), tile.rows), min(scores.columns.longest, tile.columns)
        self._memory = scores.x.new_empty(rows * columns)

    def of(self, tile: Tile) -> Float[Tensor, "r c"]:
        """Room for those of a tile, valid until the next."""
        return self._memory[: len(tile.x) * len(tile.y)].view(len(tile.x), len(tile.y))

    def multiply(self, tile: Tile, grad_x: Float[Tensor, "r d"], grad_y: Float[Tensor, "c d"] | None) -> None:
        """Add G y and G^T x."""
        weights = self.of(tile)
        launch.add_product_(grad_x, weights, tile.y, 1 / self._gain)
        if grad_y is not None:
            launch.add_product_(grad_y, weights.T, tile.x, 1 / self._gain)


def softmax_gradients(scores: Scores, lse: LogSumExps, grad_x: Float[Tensor, "b d"], by_column: bool) -> None:
    """Sweep two, as `sweeps.softmax_gradients`."""
    assert lse.columns is not None
    shape = TileShape(SKIP_TILE, SKIP_TILE) if scores.skip_negligible else tiles.tile_shape(scores.x.device)
    near_rows, row_factors = _near(lse.rows, _gain(scores))
    near_columns, column_factors = _near(lse.columns, _gain(scores))
    memory = _Weights(scores, shape)
    with launch.library_products(scores.tf32):
        for piece in scores.columns.pieces():
            grad_piece = _zeros_like(piece.rows) if by_column else None
            for columns in slices(len(piece.rows), shape.columns):
                among_all = slice(piece.start + columns.start, piece.start + columns.stop)
                for rows in slices(len(scores.x), shape.rows):
                    if (among_all.start, rows.start) in lse.negligible:
                        continue
                    tile = Tile(scores, piece, rows, columns)
                    tile.run(
                        "softmax_weights",
                        near_rows[rows],
                        row_factors[rows],
                        near_columns[among_all],
                        column_factors[among_all],
                        memory.of(tile),
                        after=(scores.bits, tile.diagonal),
                        WITHOUT_SELF=scores.without_self,
                    )
                    memory.multiply(tile, grad_x[rows], None if grad_piece is None else grad_piece[columns])
            if grad_piece is not None:
                scores.columns.give(piece, grad_piece)


def sigmoid_sweep(
    scores: Scores, bias: float, best: BestMatch, grad_x: Float[Tensor, "b d"] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The one sweep of the sigmoid loss, as `sweeps.sigmoid_sweep`."""
    shape = tiles.tile_shape(scores.x.device)
    memory = _Weights(scores, shape if grad_x is not None else TileShape(1, 1))
    sums = scores.x.new_zeros(2, dtype=torch.float64)
    with launch.library_products(scores.tf32):
        for piece in scores.columns.pieces():
            _see_best(scores, piece, best)
            grad_piece = None if grad_x is None else _zeros_like(piece.rows)
            for rows in row_tiles(scores.x):
                tile = Tile(scores, piece, rows, slice(0, len(piece.rows)))
                over_rows, over_columns = tile.counts("sigmoid_weights")
                parts = sums.new_zeros((2, over_rows * over_columns), dtype=torch.float32)
                tile.run(
                    "sigmoid_weights",
                    *parts,
                    parts if grad_x is None else memory.of(tile),
                    after=(scores.scale, bias, _gain(scores)),
                    WEIGHTS=grad_x is not None,
                )
                sums += parts.sum(1, dtype=torch.float64)
                if grad_x is not None:
                    memory.multiply(tile, grad_x[rows], grad_piece)
            if grad_piece is not None:
                scores.columns.give(piece, grad_piece)
    return sums[0], sums[1]


def _zeros_like(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows, dtype=precise_dtype(rows.dtype))
