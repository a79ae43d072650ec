"""The rows of all ranks as columns of scores: gathered at once, or one block after the other.

Whoever sweeps over tiles asks for `pieces()`, a few rows of y at a time, and hands each piece's gradient back with
`give`. The memory that holds y ends as the memory of its gradient.

| | memory per rank | bytes sent per rank and sweep |
|---|---|---|
| `gather` | y of all ranks, O(B d) | y gathered once for all sweeps, dy reduce-scattered once |
| `blocks` | this rank's rows and a piece, O(B d / W) | each piece broadcast in every sweep, dy reduced to its owner |

Shape suffixes: B rows over all ranks, b of this rank, d width, c columns of a piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import tiles

Exchange = Literal["gather", "blocks"]


@dataclass(frozen=True)
class RankRows:
    """How B rows lie on the ranks: rank r has counts[r] of them, in rank order."""

    counts: list[int]
    rank: int

    @property
    def total(self) -> int:
        """B."""
        return sum(self.counts)

    @property
    def first(self) -> int:
        """The number, among all B, of this rank's first row."""
        return sum(self.counts[: self.rank])

    @property
    def mine(self) -> slice:
        """This rank's rows among all B."""
        return slice(self.first, self.first + self.counts[self.rank])


def rank_rows(rows: int, device: torch.device) -> RankRows:
    """Agree on who holds how many rows. Raises UsageError on every rank if one of them is empty."""
    counts = distributed.row_counts(rows, device)
    if min(counts) == 0:
        where = "got none" if len(counts) == 1 else f"the ranks have {counts}"
        raise UsageError(f"the loss needs at least one row on every process: {where}")
    return RankRows(counts, distributed.rank())


class Piece(NamedTuple):
    """Consecutive rows of y as columns of scores."""

    rows: Float[Tensor, "c d"]
    start: int
    """The number, among all B, of the first."""
    owner: int
    """The rank whose rows they are; -1 where they may be of several."""

    @property
    def columns(self) -> slice:
        """Which of all B columns they are."""
        return slice(self.start, self.start + len(self.rows))


class Columns(ABC):
    """All ranks' rows of y, a piece at a time. Collective: every rank goes through the same pieces."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The pieces in order of their columns."""

    @abstractmethod
    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        """Take this rank's part of the gradient of `piece`, whose rows are not needed any more."""

    @abstractmethod
    def gradient(self) -> Float[Tensor, "b d"]:
        """The gradient of this rank's rows, summed over ranks, after every piece's was given."""


class Gathered(Columns):
    """Every rank holds all B rows."""

    def __init__(self, mine: Float[Tensor, "b d"], ranks: RankRows) -> None:
        self._ranks = ranks
        self._rows = distributed.all_gather_rows(mine, ranks.counts)

    def pieces(self) -> Iterator[Piece]:
        for start in range(0, len(self._rows), tiles.TILE_COLUMNS):
            yield Piece(self._rows[start : start + tiles.TILE_COLUMNS], start, -1)

    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        piece.rows.copy_(gradient)

    def gradient(self) -> Float[Tensor, "b d"]:
        return distributed.reduce_scatter_rows(self._rows, self._ranks.counts)


class Broadcast(Columns):
    """Every rank holds its own rows, and a piece of one rank at a time."""

    def __init__(self, mine: Float[Tensor, "b d"], ranks: RankRows) -> None:
        self._mine, self._ranks = mine, ranks

    def pieces(self) -> Iterator[Piece]:
        first = 0
        for owner, count in enumerate(self._ranks.counts):
            for start in range(0, count, tiles.TILE_COLUMNS):
                stop = min(start + tiles.TILE_COLUMNS, count)
                mine = self._mine[start:stop] if owner == self._ranks.rank else self._mine[:0]
                counts = [stop - start if rank == owner else 0 for rank in range(len(self._ranks.counts))]
                yield Piece(distributed.broadcast_rows(mine, counts, owner), first + start, owner)
            first += count

    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        distributed.reduce_rows_(gradient, piece.owner)
        if piece.owner == self._ranks.rank:
            piece.rows.copy_(gradient)  # a view of this rank's rows

    def gradient(self) -> Float[Tensor, "b d"]:
        return self._mine


def columns(exchange: Exchange, mine: Float[Tensor, "b d"], ranks: RankRows) -> Columns:
    """All ranks' rows of y, of which this rank has `mine`, whose memory the result takes over."""
    return Gathered(mine, ranks) if exchange == "gather" else Broadcast(mine, ranks)
