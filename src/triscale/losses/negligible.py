"""Tiles whose weights are below rounding in both directions, which the second sweep may leave out.

The gradient of a unit row x_i is scale / (2B) * (sum_j G_ij y_j - positives), G_ij = p_ij + q_ij the sum of the softmax
over row i and that over column j. Leaving a tile out takes from it at most the tile's share of sum_j p_ij and of
sum_j q_ij, since |y_j| = 1. The first sweep computes log2 sum_{j in tile} 2**t_ij of each row anyway; with t in bits,

    sum_{j in tile} p_ij  = 2**(log sum - row_lse_i)
    sum_{j in tile} q_ij <= 2**(log sum - min_{j in tile} column_lse_j)

and a log-sum-exp is at least any of its terms, such as the score of a row with its own partner, which is known before
the sweep. So the first sweep bounds both shares of every tile by a number. A tile is left out if that is at most
eps / n for all its rows and columns, n the number of tiles that a row or column passes, eps the rounding unit of the
products' operands. Then no row loses more than eps of its two softmaxes, which add up to 1 each:

    |error of dL/dx_i| <= scale / (2B) * 2 eps,   and the same for y_j,

as much as rounding the operands of one product takes. The loss itself comes from the first sweep and is not touched.
(docs/math.md has the derivation and what was measured.)

Shape suffixes: B rows over all ranks, b of this rank, r and c rows and columns of a tile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triscale import distributed
from triscale.losses.columns import RankRows
from triscale.losses.tiles import TileShape

Tile = tuple[int, int]
"""A tile by the number of its first column among all B, and of its first row among this rank's."""


class TileBounds:
    """Bounds on each tile's share of the softmaxes that it enters, gathered during the first sweep. Collective.

    Args:
        own_scores: (b,) of each of this rank's rows, a score in bits that enters its own log-sum-exp and that of the
            column of the same number.
        tile: of tiles that are left out or not.
        eps: what a row may lose in all of each softmax.
    """

    def __init__(self, own_scores: Float[Tensor, " b"], ranks: RankRows, tile: TileShape, eps: float) -> None:
        self._rows, self._tile, self._eps = own_scores, tile, eps
        self._columns = distributed.all_gather_rows(own_scores, ranks.counts)
        self._tiles_of_column = sum(-(-count // tile.rows) for count in ranks.counts)
        self._tiles: list[Tile] = []
        self._bounds: list[Tensor] = []

    def see(
        self,
        columns: slice,
        rows: slice,
        of_rows: Float[Tensor, "k r"],
        of_columns: Float[Tensor, "n c"] | None,
    ) -> None:
        """Take notice of k x n tiles: `columns` among all B by `rows` of this rank, both from a multiple of a tile on.

        Args:
            of_rows: log2 of the sum of 2**t over each tile's columns, of each row.
            of_columns: the same over each tile's rows, of each column; None where columns want no gradient.
        """
        shape, row_scores, column_scores = self._tile, self._rows[rows], self._columns[columns]
        least_of_columns = -_largest(-column_scores[None], shape.columns)  # (1, k)
        bounds = _largest(of_rows - torch.minimum(row_scores, least_of_columns.T), shape.rows)  # (k, n)
        if of_columns is not None:
            least_of_rows = -_largest(-row_scores[None], shape.rows)  # (1, n)
            of_columns = of_columns - torch.minimum(column_scores, least_of_rows.T)
            bounds = torch.maximum(bounds, _largest(of_columns, shape.columns).T)
        self._bounds.append(bounds.flatten())
        column_starts = range(columns.start, columns.stop, shape.columns)
        row_starts = range(rows.start, rows.stop, shape.rows)
        self._tiles += [(column, row) for column in column_starts for row in row_starts]

    def negligible(self) -> frozenset[Tile]:
        """The tiles that may be left out."""
        tiles_of_row = len({column for column, _ in self._tiles})
        most = math.log2(self._eps / max(self._tiles_of_column, tiles_of_row))
        bounds = torch.cat(self._bounds).tolist()
        return frozenset(tile for tile, bound in zip(self._tiles, bounds, strict=True) if bound <= most)


def _largest(values: Float[Tensor, "k n"], size: int) -> Float[Tensor, "k m"]:
    """The largest of every `size` consecutive values of each row."""
    missing = -values.shape[1] % size
    return F.pad(values, (0, missing), value=-torch.inf).unflatten(1, (-1, size)).amax(2)
