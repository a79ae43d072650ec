"""The rows of all ranks as columns of scores: gathered at once, or one block after the other.

Whoever sweeps over tiles asks for `pieces()`, a few rows of y at a time, and hands each piece's gradient back with
`give`. The memory that holds y ends as the memory of its gradient.

| | memory per rank | bytes sent per rank and sweep |
|---|---|---|
| `gather` | y of all ranks, O(B d) | y gathered once for all sweeps, dy reduce-scattered once |
| `blocks` | this rank's rows and pieces, O(B d / W) | each piece broadcast in every sweep, dy reduced to its owner |
| `auto` | `gather` up to GATHER_BYTES for y of all ranks, `blocks` above | |

With `blocks` a piece is on its way while the one before it is at work, and so is the gradient of the one before that.
Gathering is not overlapped with anything: with links between devices it takes 1 % of the loss (docs/math.md).

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

Exchange = Literal["auto", "gather", "blocks"]
GATHER_BYTES = 1 << 30
"""Up to so many bytes of y from all ranks, "auto" gathers."""


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
    """Consecutive rows of y as columns of scores; its memory is valid until the next piece is asked for."""

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
    """All ranks' rows of y, a piece at a time. Collective: every rank goes through the same pieces.

    Attributes:
        mine: this rank's rows (b, d), until a gradient is given.
        longest: how many rows a piece has at most.
    """

    mine: Float[Tensor, "b d"]
    longest: int

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """The pieces in order of their columns."""

    @abstractmethod
    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        """Take over this rank's part of the gradient of `piece`, in `precise_dtype`, before the next one is asked for.

        The rows of a piece whose gradient was given are not needed any more.
        """

    @abstractmethod
    def gradient(self) -> Float[Tensor, "b d"]:
        """The gradient of this rank's rows, summed over ranks, after every piece's was given."""


def _gradient_memory(rows: Tensor) -> Tensor:
    """Where the gradient of `rows` goes: piece by piece in their memory, or new memory if they are less precise."""
    dtype = tiles.precise_dtype(rows.dtype)
    return rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)


class Gathered(Columns):
    """Every rank holds all B rows."""

    def __init__(self, mine: Float[Tensor, "b d"], ranks: RankRows) -> None:
        self._ranks = ranks
        self._rows = distributed.all_gather_rows(mine, ranks.counts)
        self.mine = self._rows[ranks.mine]
        self.longest = min(ranks.total, tiles.tile_shape(mine.device).columns)
        self._gradient: Tensor | None = None

    def pieces(self) -> Iterator[Piece]:
        for piece in tiles.slices(len(self._rows), self.longest):
            yield Piece(self._rows[piece], piece.start, -1)

    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        if self._gradient is None:
            self._gradient = _gradient_memory(self._rows)
        self._gradient[piece.columns].copy_(gradient)

    def gradient(self) -> Float[Tensor, "b d"]:
        assert self._gradient is not None
        return distributed.reduce_scatter_rows(self._gradient, self._ranks.counts)


def gathers(exchange: Exchange, every_bytes: int, processes: int) -> bool:
    """Whether each process holds y of all ranks, which takes so many bytes; otherwise its own and four pieces."""
    if exchange == "auto":  # one process gathers nothing
        return processes == 1 or every_bytes <= GATHER_BYTES
    return exchange == "gather"


def piece_rows(rows: int, device: torch.device) -> int:
    """The rows of a piece that is broadcast, where a rank has up to `rows`.

    Four pieces live at once, two of y and two of its gradient: half a tile's columns each, or they would outweigh the
    (b, d) buffers of a rank with few rows.
    """
    return min(rows, -(-tiles.tile_shape(device).columns // 2))


class Broadcast(Columns):
    """Every rank holds its own rows and two pieces: one at work, and the next, which is on its way meanwhile.

    Every rank begins the same collectives in the same order: pieces 0 and 1, then the reduction of a piece's gradient
    and the broadcast of the piece after the next, in turns. A buffer is filled again when the work that reads it has
    been queued, and what fills it begins after that work.
    """

    def __init__(self, mine: Float[Tensor, "b d"], ranks: RankRows) -> None:
        self.mine, self._ranks = mine, ranks
        self.longest = piece_rows(max(ranks.counts), mine.device)
        others = len(ranks.counts) > 1
        self._arriving = mine.new_empty((2, self.longest if others else 0, mine.shape[1]))  # taken in turns
        self._gradient: Tensor | None = None
        self._reducing: tuple[Piece, distributed.Pending] | None = None

    def _begun(self) -> Iterator[tuple[distributed.Pending, int, int]]:
        """Each piece in order, its first column and its owner; its broadcast begins when it is asked for."""
        first, number = 0, 0
        for owner, count in enumerate(self._ranks.counts):
            for piece in tiles.slices(count, self.longest):
                mine = owner == self._ranks.rank
                rows = self.mine[piece] if mine else self._arriving[number % 2, : piece.stop - piece.start]
                yield distributed.start_broadcast(rows, owner), first + piece.start, owner
                number += 1
            first += count

    def pieces(self) -> Iterator[Piece]:
        begun = self._begun()
        this = next(begun, None)
        while this is not None:
            following = next(begun, None)  # before the work on this piece is queued, or it would wait for that work
            rows, start, owner = this
            yield Piece(rows.wait(), start, owner)
            this = following

    def give(self, piece: Piece, gradient: Float[Tensor, "c d"]) -> None:
        self._finish()  # so that at most one is under way
        self._reducing = piece, distributed.start_reduce(gradient, piece.owner)

    def _finish(self) -> None:
        """Put the gradient that is being reduced into its place, where it is this rank's."""
        if self._reducing is None:
            return
        (piece, reducing), self._reducing = self._reducing, None
        gradient = reducing.wait()
        if piece.owner != self._ranks.rank:
            return
        if self._gradient is None:
            self._gradient = _gradient_memory(self.mine)
        start = piece.start - self._ranks.first
        self._gradient[start : start + len(gradient)].copy_(gradient)

    def gradient(self) -> Float[Tensor, "b d"]:
        self._finish()
        assert self._gradient is not None
        return self._gradient


def columns(exchange: Exchange, mine: Float[Tensor, "b d"], ranks: RankRows) -> Columns:
    """All ranks' rows of y, of which this rank has `mine`, whose memory the result takes over."""
    every_bytes = ranks.total * mine.shape[1] * mine.element_size()
    return Gathered(mine, ranks) if gathers(exchange, every_bytes, len(ranks.counts)) else Broadcast(mine, ranks)
