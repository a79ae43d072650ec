"""Pseudo-random permutations of any size that are computed where they are asked for, and hold no list.

A Feistel network over any number of elements (Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002,
sections 4 and 5: generalised Feistel, cycle walking).
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 8
_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53
_CHUNK = 1 << 14
"""Elements computed at once: their intermediate values stay in a core's cache."""


class Permutation:
    """A pseudo-random permutation of range(size) that is computed one element, or one array of them, at a time.

    Args:
        size: number of elements, 1 <= size <= 2**40 (more works, untested).
        key: names the permutation; other keys give unrelated ones.
    """

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        # range(size) is embedded in a grid only just larger, so that cycle walking seldom takes a second turn.
        self._rows = isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        self._round_keys = tuple(mix(key + turn * _GOLDEN) for turn in range(_ROUNDS))

    def __getitem__(self, index: int) -> int:
        """The element at `index`, 0 <= index < size."""
        rows, columns, keys = self._rows, self._columns, self._round_keys
        while True:
            row, column = divmod(index, columns)
            for turn in range(0, _ROUNDS, 2):
                row = (row + mix(column ^ keys[turn])) % rows
                column = (column + mix(row ^ keys[turn + 1])) % columns
            index = row * columns + column
            if index < self.size:
                return index

    def at(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The elements at `indices`, each as `self[index]` gives it."""
        found = np.empty(len(indices), dtype=np.int64)
        for start in range(0, len(indices), _CHUNK):
            walking = self._turn(indices[start : start + _CHUNK].astype(np.uint64))
            outside = np.flatnonzero(walking >= np.uint64(self.size))
            while len(outside):
                walking[outside] = self._turn(walking[outside])
                outside = outside[walking[outside] >= np.uint64(self.size)]
            found[start : start + _CHUNK] = walking
        return found

    def _turn(self, indices: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        """One pass through the network, which may end outside of range(size)."""
        rows, columns = np.uint64(self._rows), np.uint64(self._columns)
        row, column = np.divmod(indices, columns)
        for turn in range(0, _ROUNDS, 2):
            # The hash is reduced first, so that the sum stays below 2**64 as it does among Python's integers.
            row = (row + mix_array(column ^ np.uint64(self._round_keys[turn])) % rows) % rows
            column = (column + mix_array(row ^ np.uint64(self._round_keys[turn + 1])) % columns) % columns
        return row * columns + column


def mix(value: int) -> int:
    """Scramble 64 bits, one to one: the finaliser of MurmurHash3 (public domain, Austin Appleby)."""
    value &= _MASK_64
    value = (value ^ (value >> 33)) * _FIRST & _MASK_64
    value = (value ^ (value >> 33)) * _SECOND & _MASK_64
    return value ^ (value >> 33)


def mix_array(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """`mix` of each of `values`."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(33))
