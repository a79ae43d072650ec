"""The sweeps over tiles of scores: all that takes B*B time.

A sweep goes through the columns piece by piece and, under each piece, through this rank's rows tile by tile. Scores
and log-sum-exps are kept in bits (t = s / ln 2), since 2**t is the exponential that is fast and stays so where its
result is denormal.

**One exponential for rows and columns.** Where the scores of a tile lie close enough to each other and to the
log-sum-exps that they enter (`tiles.exponent_shift` says when), e = 2**(t - shift) serves both directions: its sums
over rows and over columns go into the log-sum-exps, and in the second sweep the sum of both softmaxes is
e * (2**(shift - row_lse) + 2**(shift - column_lse)). What must be known of the scores before they are computed comes
from two bounds: cosines are at most 1, and by Jensen's inequality a row's log-sum-exp is at least its mean score plus
the logarithm of the number of columns. Elsewhere the two directions get an exponential each, online and with maxima:
finite at any scale.

**Other devices.** Here are the sweeps in torch's own operations; `cuda_sweeps` has the same ones as kernels.

Shape suffixes: B rows over all ranks, b of this rank, d width, r and c rows and columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triscale import distributed
from triscale.losses.columns import Columns, Piece, RankRows
from triscale.losses.negligible import Tile, TileBounds
from triscale.losses.tiles import (
    BestMatch,
    TileMemory,
    TileShape,
    exponent_shift,
    precise,
    precise_dtype,
    precise_sum,
    row_tiles,
    tile_minima,
    tile_shape,
)

LARGEST_COSINE = 1 + 1e-4
"""Of unit rows, with rounding."""
ROWS_AT_ONCE = 128
"""Elementwise work goes through a tile in parts of so many rows, which stay in the cache and need little beside it."""
LINEAR_SOFTPLUS = 40.0
"""From here on softplus(l) = l in float64, too."""


class LogSumExps(NamedTuple):
    """What the first sweep of a softmax loss gives, in bits."""

    rows: Float[Tensor, " b"]
    """log2-sum-exp2 of the scores of each of this rank's rows."""
    columns: Float[Tensor, " n"] | None
    """The same of each of all B columns, over all ranks' rows, where wanted."""
    negligible: frozenset[Tile] = frozenset()
    """Tiles that the second sweep leaves out."""


@dataclass(frozen=True)
class Scores:
    """All scores of this rank's rows against all columns, a tile at a time."""

    x: Float[Tensor, "b d"]
    """Unit rows, in the precision of the products' operands."""
    columns: Columns
    ranks: RankRows
    scale: float
    """Factor on the cosines."""
    without_self: bool = False
    """Whether columns are the same rows, whose scores with themselves are -inf."""
    tf32: bool = False
    """Whether products of float32 operands may round these to TF32."""
    skip_negligible: bool = False
    """Whether the second sweep leaves out tiles whose weights are below rounding."""

    def tiles(
        self, piece: Piece, factor: float, memory: TileMemory, leave_out: frozenset[Tile] = frozenset()
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Number, rows and factor * cosines of each tile under a piece, valid until the next; may be overwritten."""
        for number, rows in enumerate(row_tiles(self.x)):
            if (piece.start, rows.start) in leave_out:
                continue
            tile = memory.scores(self.x[rows], piece.rows, factor)
            if self.without_self:
                tile.diagonal(self.ranks.first + rows.start - piece.start).fill_(-torch.inf)
            yield number, rows, tile

    def tile_memory(self) -> TileMemory:
        """For `tiles`."""
        return TileMemory(self.x, self.columns.longest)

    @property
    def bits(self) -> float:
        """The factor that makes scores in bits of cosines."""
        return self.scale / math.log(2)

    @property
    def terms(self) -> int:
        """How many scores a row has."""
        return self.ranks.total - self.without_self

    def shift(self, lowest: float) -> float | None:
        """`exponent_shift` of a tile none of whose log-sum-exps is below `lowest` bits."""
        return exponent_shift(self.bits * LARGEST_COSINE, lowest, self.x.dtype, self.terms)

    def mean_scores(self, rows: Float[Tensor, "n d"], sum_of_others: Float[Tensor, " d"]) -> Float[Tensor, " n"]:
        """The mean score of each row in bits, given the sum of all rows on the other side."""
        return (rows @ sum_of_others - float(self.without_self)) * (self.bits / self.terms)

    def bounds(self, tile: TileShape) -> TileBounds | None:
        """Where the first sweep notes what its tiles weigh, if the second is to leave some out."""
        if not self.skip_negligible:
            return None
        partners = self.columns.mine
        if self.without_self:  # the other view, half the rows further on
            partners = partners.roll(len(partners) // 2, 0)
        dtype = precise_dtype(self.x.dtype)
        own_scores = (self.x.to(dtype) * partners.to(dtype)).sum(1) * self.bits
        return TileBounds(own_scores, self.ranks, tile, torch.finfo(self.x.dtype).eps)


def log_sum_exps(scores: Scores, best: BestMatch, by_column: bool) -> LogSumExps:
    """Sweep one.

    Args:
        by_column: whether the columns' log-sum-exps are wanted.
    """
    x, memory = scores.x, scores.tile_memory()
    row_lse = x.new_full((len(x),), -torch.inf, dtype=precise(x))
    column_lse = row_lse.new_full((scores.ranks.total,), -torch.inf) if by_column else None
    column_sum = distributed.all_reduce_sum(scores.columns.mine.sum(0))
    row_sum = distributed.all_reduce_sum(x.sum(0)) if by_column else column_sum
    jensen = math.log2(scores.terms)
    row_bounds = tile_minima(scores.mean_scores(x, column_sum) + jensen)
    bounds = scores.bounds(tile_shape(x.device))
    for piece in scores.columns.pieces():
        column_bound = float(scores.mean_scores(piece.rows, row_sum).min()) + jensen if by_column else math.inf
        for number, rows, tile in scores.tiles(piece, scores.bits, memory):
            best.see(tile, rows, piece.start)
            shift = scores.shift(min(row_bounds[number], column_bound))
            if shift is not None:
                _exp2_(tile, shift)
            of_rows = _fold_(row_lse[rows], tile, shift, 1)[None]
            of_columns = None if column_lse is None else _fold_(column_lse[piece.columns], tile, shift, 0)[None]
            if bounds is not None:
                bounds.see(piece.columns, rows, of_rows, of_columns)
    if column_lse is not None:
        column_lse = over_ranks(column_lse)
    return LogSumExps(row_lse, column_lse, frozenset() if bounds is None else bounds.negligible())


def softmax_gradients(scores: Scores, lse: LogSumExps, grad_x: Float[Tensor, "b d"], by_column: bool) -> None:
    """Sweep two: adds G y to `grad_x` and gives G^T x to the columns, G the sum of the row and the column softmax.

    Args:
        lse: with that of the columns.
        by_column: whether the columns want a gradient; NT-Xent's do not, whose G is symmetric.
    """
    assert lse.columns is not None
    row_bounds, memory = tile_minima(lse.rows), scores.tile_memory()
    for piece in scores.columns.pieces():
        of_columns = lse.columns[piece.columns]
        column_bound = float(of_columns.min())
        grad_piece = torch.zeros_like(piece.rows) if by_column else None
        for number, rows, tile in scores.tiles(piece, scores.bits, memory, lse.negligible):
            shift = scores.shift(min(row_bounds[number], column_bound))
            _softmaxes_(tile, lse.rows[rows, None], of_columns, shift)
            _add_product_(grad_x[rows], tile, piece.rows)
            if grad_piece is not None:
                _add_product_(grad_piece, tile.T, scores.x[rows])
        if grad_piece is not None:
            scores.columns.give(piece, grad_piece)


def sigmoid_sweep(
    scores: Scores, bias: float, best: BestMatch, grad_x: Float[Tensor, "b d"] | None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The one sweep of the sigmoid loss: the sums of softplus(l) and of G = sigmoid(l), l = score + bias.

    With `grad_x`, adds G y to it and gives G^T x to the columns; without, makes no gradient.
    """
    loss, sum_of_g, memory = precise_sum(scores.x[:0]), precise_sum(scores.x[:0]), scores.tile_memory()
    for piece in scores.columns.pieces():
        grad_piece = None if grad_x is None else torch.zeros_like(piece.rows)
        for _, rows, tile in scores.tiles(piece, scores.scale, memory):
            best.see(tile, rows, piece.start)
            tile.add_(bias)
            for part in tile.split(ROWS_AT_ONCE):
                loss += F.softplus(part, threshold=LINEAR_SOFTPLUS).sum()
                if grad_x is not None:
                    sum_of_g += precise_sum(part.sigmoid_())  # from which the number of positives is taken off
            if grad_x is None or grad_piece is None:
                continue
            _add_product_(grad_x[rows], tile, piece.rows)
            _add_product_(grad_piece, tile.T, scores.x[rows])
        if grad_piece is not None:
            scores.columns.give(piece, grad_piece)
    return loss, sum_of_g


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. As `addmm_`, which torch's FLOP counter does not see."""
    torch.addmm(total, a, b, out=total)


def _exp2_(tile: Tensor, shift: float) -> Tensor:
    """2**(tile - shift) in place; a pass less without a shift."""
    return tile.sub_(shift).exp2_() if shift else tile.exp2_()


def _fold_(lse: Tensor, tile: Tensor, shift: float | None, dim: int) -> Tensor:
    """Fold a tile into the log-sum-exps along `dim`, in place: a tile of 2**(t - shift), or of t if `shift` is None.

    Returns the tile's own.

    Sums are turned into logarithms in float64: at a scale of 100 a log-sum-exp of 144 bits has a rounding error of
    8e-6 in float32, by which all of a row's probabilities would miss 1 together. What adds up to nothing is -inf.
    """
    if shift is None:
        largest = tile.amax(dim, keepdim=True).clamp_min_(torch.finfo(tile.dtype).min)  # no -inf less -inf
        sums, largest = (tile - largest).exp2_().sum(dim), largest.squeeze(dim)
    else:
        sums, largest = tile.sum(dim), shift
    own = sums.to(lse.dtype).log2_().add_(largest)
    torch.logaddexp2(lse, own, out=lse)
    return own


def _softmaxes_(tile: Tensor, row_lse: Tensor, column_lse: Tensor, shift: float | None) -> None:
    """Turn a tile of scores t into 2**(t - row_lse) + 2**(t - column_lse), in place.

    Args:
        row_lse: (r, 1).
        column_lse: (c,).
        shift: with which one exponential serves both; None: one each.
    """
    if shift is not None:
        of_rows, of_columns = ((shift - lse).exp2_().to(tile.dtype) for lse in (row_lse, column_lse))
        for part, of_part in zip(tile.split(ROWS_AT_ONCE), of_rows.split(ROWS_AT_ONCE), strict=True):
            _exp2_(part, shift).mul_(of_part + of_columns)
        return
    # Each log-sum-exp rounded to the tile's precision, and the factor that makes good for the rounding.
    near_rows, near_columns = row_lse.to(tile.dtype), column_lse.to(tile.dtype)
    of_rows, of_columns = (
        (n - lse).exp2_().to(tile.dtype) for n, lse in ((near_rows, row_lse), (near_columns, column_lse))
    )
    for part, near, of_part in zip(*(e.split(ROWS_AT_ONCE) for e in (tile, near_rows, of_rows)), strict=True):
        by_column = (part - near_columns).exp2_().mul_(of_columns)
        part.sub_(near).exp2_().mul_(of_part).add_(by_column)


def over_ranks(lse: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Combine the ranks' log-sum-exps of the same columns."""
    if distributed.world_size() == 1:
        return lse
    largest = distributed.all_reduce_max(lse.clone())
    return distributed.all_reduce_sum((lse - largest).exp2_()).log2_().add_(largest)
