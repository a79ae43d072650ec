"""The order of training data: which sample of which source stands at a position, as a pure function of the seed.

A *position* counts the samples drawn since the start of training and is never reset, so a checkpoint's data state is
one integer, and workers, processes and resumes cannot change what is trained on. Nothing is listed or shuffled in
memory: a permutation is computed where it is asked for, by a Feistel network over any number of samples (Black and
Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002, sections 4 and 5: generalised Feistel, cycle walking).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import isqrt

import numpy as np

from triscale.errors import UsageError
from triscale.randomness import derive_seed, generator

BLOCK_POSITIONS = 1024
"""Positions among which a mixture's shares hold exactly."""

_ROUNDS = 8
_MASK_64 = 2**64 - 1


class Permutation:
    """A pseudo-random permutation of range(size) that is computed one element at a time.

    Args:
        size: number of elements, 1 <= size <= 2**40 (more works, untested).
        key: names the permutation; other keys give unrelated ones.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        # range(size) is embedded in a grid only just larger, so that cycle walking seldom takes a second turn.
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._round_keys = tuple(_mix(key + turn * 0x9E3779B97F4A7C15) for turn in range(_ROUNDS))

    def __getitem__(self, index: int) -> int:
        """The element at `index`, 0 <= index < size."""
        rows, columns, keys = self._rows, self._columns, self._round_keys
        while True:
            row, column = divmod(index, columns)
            for turn in range(0, _ROUNDS, 2):
                row = (row + _mix(column ^ keys[turn])) % rows
                column = (column + _mix(row ^ keys[turn + 1])) % columns
            index = row * columns + column
            if index < self.size:
                return index


class Order:
    """`order[position]` is the (source, sample) drawn at a position, both as numbers.

    One source: its samples in an order that is new in every epoch, each exactly once an epoch. Several: every block
    of 1,024 positions holds a fixed number of draws from each, by largest remainder, shuffled by (seed, block); and
    each source has its own epochs, its n-th draw being element n % N of the permutation for (seed, source, n // N).

    Args:
        sizes: number of samples N of every source.
        weights: share of every source, of any sum; None: in proportion to the sizes.
        seed: of the run.

    Raises:
        UsageError: a source is empty, or its weight earns it no position in a block.

    Example:
        >>> order = Order([5_000, 200], weights=[3, 1], seed=0)
        >>> source, sample = order[1_234_567]
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int) -> None:
        if not sizes:
            raise UsageError("there is no data source to draw from: name at least one")
        for source, size in enumerate(sizes):
            if size < 1:
                raise UsageError(f"data source {source} is empty: leave it out or name one with samples")
        self.sizes = tuple(int(size) for size in sizes)
        self.seed = seed
        self.block_counts = _block_counts(self.sizes if weights is None else weights, len(sizes))
        self._block = -1
        self._block_slots: list[tuple[int, int]] = []
        self._permutations: list[tuple[int, Permutation] | None] = [None] * len(sizes)

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(source, sample) at `position` >= 0."""
        source, draw = self._draw(int(position))
        epoch, index = divmod(draw, self.sizes[source])
        cached = self._permutations[source]
        if cached is None or cached[0] != epoch:
            key = derive_seed("order", self.seed, source, epoch)
            cached = (epoch, Permutation(self.sizes[source], key))
            self._permutations[source] = cached
        return source, cached[1][index]

    def replacement(self, position: int, attempt: int) -> tuple[int, int]:
        """(source, sample) that stands in at `position` after `attempt` >= 1 bad samples there.

        The same source's; each attempt names another sample, none of them the one at `position`, until all had a turn.
        """
        source, sample = self[position]
        others = self.sizes[source] - 1
        if others == 0:
            return source, sample
        steps = Permutation(others, derive_seed("replacement", self.seed, int(position)))
        return source, (sample + 1 + steps[(attempt - 1) % others]) % (others + 1)

    def _draw(self, position: int) -> tuple[int, int]:
        """(source, n): `position` is the source's n-th draw."""
        if position < 0:
            raise IndexError(f"positions start at 0, got {position}")
        if len(self.sizes) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK_POSITIONS)
        if block != self._block:
            self._block_slots = self._shuffled_block(block)
            self._block = block
        source, rank = self._block_slots[offset]
        return source, block * self.block_counts[source] + rank

    def _shuffled_block(self, block: int) -> list[tuple[int, int]]:
        """For every position of the block: its source, and how many draws of that source precede it in the block."""
        sources = np.repeat(np.arange(len(self.sizes)), self.block_counts)
        generator("order", self.seed, "block", block).shuffle(sources)
        ranks = np.empty_like(sources)
        for source, count in enumerate(self.block_counts):
            ranks[sources == source] = np.arange(count)
        return list(zip(sources.tolist(), ranks.tolist(), strict=True))


def _mix(value: int) -> int:
    """Scramble 64 bits: the finaliser of MurmurHash3 (public domain, Austin Appleby)."""
    value &= _MASK_64
    value = (value ^ (value >> 33)) * 0xFF51AFD7ED558CCD & _MASK_64
    value = (value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53 & _MASK_64
    return value ^ (value >> 33)


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
