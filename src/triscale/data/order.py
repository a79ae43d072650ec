"""The order of training data: which sample of which source stands at a position, as a pure function of the seed.

A *position* counts the samples drawn since the start of training and is never reset, so a checkpoint's data state is
one integer, and workers, processes and resumes cannot change what is trained on. Nothing is listed or shuffled in
memory, see data.shuffle and data.permutation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from triscale.data.shuffle import Shuffle, WholeShuffle, WindowedShuffle
from triscale.errors import UsageError
from triscale.randomness import derive_seed, generator

BLOCK_POSITIONS = 1024
"""Positions among which a mixture's shares hold exactly."""


@runtime_checkable
class Positions(Protocol):
    """Which sample stands at each position of a run, and what takes the place of a bad one."""

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, sample) at `position` >= 0."""
        ...

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(source, sample) that stands in at `position` after `attempt` >= 1 bad samples there."""
        ...

    def upcoming(self, source: int, position: int) -> Iterator[int]:
        """The shards of `source` that `position` and those after it draw from, in order of need and without end.

        Nothing where every position may be of any shard. A shard may come more than once.
        """
        ...


class Order:
    """`order[position]` is the (source, sample) drawn at a position, both as numbers.

    One source: its samples in an order that is new in every epoch, each exactly once an epoch. Several: every block
    of 1,024 positions holds a fixed number of draws from each, by largest remainder, shuffled by (seed, block); and
    each source has its own epochs. A source's n-th draw is element n % N of the permutation for (seed, source, n // N);
    or, in windows of shards, what `WindowedShuffle` says.

    Args:
        sizes: number of samples N of every source.
        weights: share of every source, of any sum; None: in proportion to the sizes.
        seed: of the run.
        shards: of every source, the number of samples in each of its shards, or None where it has none; used with
            `window_shards` alone.
        window_shards: shards whose samples are mixed with each other; 0: all samples of a source are.

    Raises:
        UsageError: a source is empty, or its weight earns it no position in a block.

    Example:
        >>> order = Order([5_000, 200], weights=[3, 1], seed=0)
        >>> source, sample = order[1_234_567]
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        shards: Sequence[Sequence[int] | np.ndarray | None] = (),
        window_shards: int = 0,
    ) -> None:
        if not sizes:
            raise UsageError("there is no data source to draw from: name at least one")
        for source, size in enumerate(sizes):
            if size < 1:
                raise UsageError(f"data source {source} is empty: leave it out or name one with samples")
        self.sizes = tuple(int(size) for size in sizes)
        self.seed = seed
        self.block_counts = _block_counts(self.sizes if weights is None else weights, len(sizes))
        counts = list(shards) or [None] * len(sizes)
        self._shuffles: list[Shuffle] = [
            WholeShuffle(size, seed=seed, source=source)
            if each is None or not window_shards
            else WindowedShuffle(each, window_shards, seed=seed, source=source)
            for source, (size, each) in enumerate(zip(self.sizes, counts, strict=True))
        ]
        self._block = -1
        self._slots = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, sample) at `position` >= 0."""
        source, draw = self._draw(int(position))
        return source, self._shuffles[source][draw]

    def at(self, positions: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Sources and samples at `positions`, each as `self[position]` gives it."""
        sources, draws = self._draws(positions)
        samples = np.empty(len(positions), dtype=np.int64)
        for source, shuffle in enumerate(self._shuffles):
            here = np.flatnonzero(sources == source)
            samples[here] = shuffle.at(draws[here])
        return sources, samples

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(source, sample) that stands in at `position` after `attempt` >= 1 bad samples there.

        The same source's, and within its window if it has windows; each attempt names another sample, none of them the
        one at `position`, until all had a turn.
        """
        source, draw = self._draw(int(position))
        key = derive_seed("replacement", self.seed, int(position))
        return source, self._shuffles[source].replacement(draw, attempt, key)

    def upcoming(self, source: int, position: int) -> Iterator[int]:
        """The shards of `source` that `position` and those after it draw from, in order of need and without end.

        Nothing where the source has no windows.
        """
        if len(self.sizes) == 1:
            return self._shuffles[0].upcoming(position)
        block, offset = divmod(position, BLOCK_POSITIONS)
        drawn = int(np.count_nonzero(self._shuffled_block(block)[0][:offset] == source))
        return self._shuffles[source].upcoming(block * self.block_counts[source] + drawn)

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, n): `position` is the source's n-th draw."""
        if position < 0:
            raise IndexError(f"positions start at 0, got {position}")
        if len(self.sizes) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK_POSITIONS)
        sources, ranks = self._shuffled_block(block)
        source = int(sources[offset])
        return source, block * self.block_counts[source] + int(ranks[offset])

    def _draws(self, positions: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Of every position, its source and the number n of its draw there."""
        if len(self.sizes) == 1:
            return np.zeros(len(positions), dtype=np.int64), positions
        blocks, offsets = np.divmod(positions, BLOCK_POSITIONS)
        distinct, place = np.unique(blocks, return_inverse=True)
        slots = [self._shuffled_block(block) for block in distinct.tolist()]
        sources = np.stack([each[0] for each in slots])[place, offsets]
        ranks = np.stack([each[1] for each in slots])[place, offsets]
        return sources, blocks * np.array(self.block_counts)[sources] + ranks

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For every position of the block: its source, and how many draws of that source precede it in the block."""
        if block != self._block:
            sources = np.repeat(np.arange(len(self.sizes)), self.block_counts)
            generator("order", self.seed, "block", block).shuffle(sources)
            ranks = np.empty_like(sources)
            for source, count in enumerate(self.block_counts):
                ranks[sources == source] = np.arange(count)
            self._slots = (sources, ranks)
            self._block = block
        return self._slots


def _block_counts(weights: Sequence[float], sources: int) -> tuple[int, ...]:
    """Draws of every source in a block, by largest remainder (the first of equal remainders goes first)."""
    if len(weights) != sources:
        raise UsageError(f"there are {sources} data sources but {len(weights)} weights: give one weight a source")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UsageError(f"weights of data sources must be positive numbers, got {list(weights)}")
    # Fractions: which remainder is the largest must not hang on the rounding of a machine.
    total = sum(Fraction(weight) for weight in weights)
    shares = [Fraction(weight) * BLOCK_POSITIONS / total for weight in weights]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(sources), key=lambda source: counts[source] - shares[source])
    for source in by_remainder[: BLOCK_POSITIONS - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        raise UsageError(
            f"data source {counts.index(0)} would never be drawn: its weight is under 1/{BLOCK_POSITIONS} of the sum, "
            "so raise the weight or leave the source out"
        )
    return tuple(counts)
