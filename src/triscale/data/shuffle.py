"""The order of one source's samples, epoch after epoch: over all of it at once, or in windows of some shards.

A *draw* n counts the samples of a source since the start; its epoch is n // N. Both orders are pure functions of
(seed, source, n), hold every sample exactly once an epoch, and are computed where they are asked for.

`WholeShuffle` is one permutation of all N samples, for sources that are read at any place at equal cost.

`WindowedShuffle` is for shards that are slow to come by: the shards are permuted by (seed, source, epoch), K after one
another in that order make a *window*, and the window's samples are permuted among themselves. So shards come one window
after the other, and memory is O(shards). Peers do the like with less: a buffer that is filled from shards in sequence
(WebDataset, tf.data; its content is lost at a resume), blocks of samples of an epoch's whole listed order (MosaicML
Streaming, py1br and py1e: 8 bytes a sample on each node).

How well a window mixes, against one permutation of all (held by tests/data/test_shuffle.py): a sample's place in the
epoch is as uniform, since shards are permuted. But the samples of one shard stay together: the standard deviation of
their places, in epochs, is K/S/sqrt(12) for S shards instead of 1/sqrt(12), and two samples of a batch are of one shard
with probability 1/K instead of 1/S. With K = 64 that is 1.6 %: as if the data had 64 shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from triscale.data.permutation import Permutation
from triscale.randomness import derive_seed


@runtime_checkable
class Shuffle(Protocol):
    """Which sample of a source is its n-th draw."""

    @property
    def size(self) -> int:
        """N, the number of samples."""
        ...

    def __getitem__(self, draw: int) -> int:
        """The sample that is draw `draw` >= 0."""
        ...

    def at(self, draws: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The samples that are `draws`, each as `self[draw]` gives it."""
        ...

    def replacement(self, draw: int, attempt: int, key: int) -> int:
        """A sample in place of draw `draw`, another for each `attempt` >= 1, never its own, until all had a turn.

        `key` makes the replacements of one place unrelated to those of others.
        """
        ...

    def upcoming(self, draw: int) -> Iterator[int]:
        """The shards to come, from the one of `draw` on and without end; none where every draw may be of any shard."""
        ...


class WholeShuffle:
    """Every epoch is a permutation of all `size` samples of source number `source`."""

    def __init__(self, size: int, *, seed: int, source: int) -> None:
        self._size = size
        self.seed = seed
        self.source = source
        self._cached = (-1, Permutation(1, 0))

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return self._size

    def __getitem__(self, draw: int) -> int:
        """The sample that is draw `draw` >= 0."""
        epoch, index = divmod(draw, self._size)
        return self._epoch(epoch)[index]

    def at(self, draws: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The samples that are `draws`."""
        found = np.empty(len(draws), dtype=np.int64)
        for epoch, here in _grouped(draws // self._size):
            found[here] = self._epoch(epoch).at(draws[here] - epoch * self._size)
        return found

    def replacement(self, draw: int, attempt: int, key: int) -> int:
        """A sample in place of draw `draw`; any other of the source."""
        return _another(self[draw], self._size, attempt, key)

    def upcoming(self, draw: int) -> Iterator[int]:
        """No shards: any may come."""
        return iter(())

    def _epoch(self, epoch: int) -> Permutation:
        if self._cached[0] != epoch:
            self._cached = (epoch, Permutation(self._size, derive_seed("order", self.seed, self.source, epoch)))
        return self._cached[1]


class _Epoch(NamedTuple):
    """The shards in the order of an epoch, and how many samples there are up to the end of each."""

    number: int
    shards: Int64[np.ndarray, " s"]
    ends: Int64[np.ndarray, " s"]


class _Window(NamedTuple):
    """Draws `start` to `stop` of an epoch, of shards whose samples end, within the window, at `ends`."""

    epoch: int
    start: int
    stop: int
    shards: list[int]
    ends: list[int]
    permutation: Permutation


class WindowedShuffle:
    """Every epoch is a permutation of the shards, cut into windows of some shards, whose samples are permuted.

    Args:
        counts: samples of every shard.
        window_shards: K, shards of a window; the last window of an epoch may have fewer.
        seed: of the run.
        source: the source's number in the mixture.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, window_shards: int, *, seed: int, source: int) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.window_shards = window_shards
        self.seed = seed
        self.source = source
        self._firsts = np.cumsum(self.counts) - self.counts
        self._epochs: list[_Epoch] = []
        self._window = _Window(-1, 0, 0, [], [], Permutation(1, 0))

    @property
    def size(self) -> int:
        """N, the number of samples."""
        return int(self._firsts[-1] + self.counts[-1])

    def __getstate__(self) -> dict[str, object]:
        """Epochs are computed again rather than sent to workers."""
        return {**vars(self), "_epochs": []}

    def __getitem__(self, draw: int) -> int:
        """The sample that is draw `draw` >= 0."""
        window, index = self._window_at(draw)
        return self._sample(window, window.permutation[index])

    def at(self, draws: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The samples that are `draws`."""
        found = np.empty(len(draws), dtype=np.int64)
        epochs = draws // self.size
        for number, here in _grouped(epochs):
            epoch = self._epoch(number)
            indices = draws[here] - number * self.size
            slots = np.searchsorted(epoch.ends, indices, side="right")
            for window_number, within in _grouped(slots // self.window_shards):
                window = self._make_window(epoch, window_number)
                places = window.permutation.at(indices[within] - window.start) + window.start
                slots[within] = np.searchsorted(epoch.ends, places, side="right")
                indices[within] = places
            shards = epoch.shards[slots]
            found[here] = self._firsts[shards] + indices - (epoch.ends[slots] - self.counts[shards])
        return found

    def replacement(self, draw: int, attempt: int, key: int) -> int:
        """A sample in place of draw `draw`; any other of its window, whose shards are at hand."""
        window, index = self._window_at(draw)
        place = window.permutation[index]
        return self._sample(window, _another(place, window.stop - window.start, attempt, key))

    def upcoming(self, draw: int) -> Iterator[int]:
        """The shards of the window of `draw`, then those of the next one, and so on, from one epoch into the next."""
        number, index = divmod(draw, self.size)
        epoch = self._epoch(number)
        first = int(np.searchsorted(epoch.ends, index, side="right"))
        first -= first % self.window_shards
        while True:
            # Epochs that lie ahead are not kept: it is the present one's that draws ask for.
            shards = self._permuted(number)[0] if number != epoch.number else epoch.shards
            for start in range(first, len(shards), self.window_shards):
                window = shards[start : start + self.window_shards]
                yield from window[self.counts[window] > 0].tolist()
            number, first = number + 1, 0

    def _window_at(self, draw: int) -> tuple[_Window, int]:
        """The window of a draw, and the draw's number within it."""
        number, index = divmod(draw, self.size)
        window = self._window
        if window.epoch != number or not window.start <= index < window.stop:
            epoch = self._epoch(number)
            slot = int(np.searchsorted(epoch.ends, index, side="right"))
            window = self._window = self._make_window(epoch, slot // self.window_shards)
        return window, index - window.start

    def _make_window(self, epoch: _Epoch, number: int) -> _Window:
        first = number * self.window_shards
        here = slice(first, first + self.window_shards)
        start = int(epoch.ends[first - 1]) if first else 0
        ends = (epoch.ends[here] - start).tolist()
        key = derive_seed("window", self.seed, self.source, epoch.number, number)
        permutation = Permutation(ends[-1], key)
        return _Window(epoch.number, start, start + ends[-1], epoch.shards[here].tolist(), ends, permutation)

    def _sample(self, window: _Window, place: int) -> int:
        """The sample at a place of a window, before its permutation."""
        slot = bisect_right(window.ends, place)
        before = window.ends[slot - 1] if slot else 0
        return int(self._firsts[window.shards[slot]]) + place - before

    def _epoch(self, number: int) -> _Epoch:
        """The order of the shards in an epoch; the last two that were asked for are kept."""
        for epoch in self._epochs:
            if epoch.number == number:
                return epoch
        epoch = _Epoch(number, *self._permuted(number))
        self._epochs = [epoch, *self._epochs[:1]]
        return epoch

    def _permuted(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        shards = Permutation(len(self.counts), derive_seed("shards", self.seed, self.source, epoch))
        permuted = shards.at(np.arange(len(self.counts), dtype=np.int64))
        return permuted, np.cumsum(self.counts[permuted])


def _another(place: int, size: int, attempt: int, key: int) -> int:
    """A place of range(size) other than `place`, for each attempt >= 1 another one; `place` where there is none."""
    others = size - 1
    if others == 0:
        return place
    return (place + 1 + Permutation(others, key)[(attempt - 1) % others]) % size


def _grouped(numbers: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, np.ndarray]]:
    """Each distinct number, ascending, with the places where it stands, ascending."""
    by_number = np.argsort(numbers, kind="stable")
    distinct, firsts = np.unique(numbers[by_number], return_index=True)
    # Split at every first place: what lies before the first one is empty.
    yield from zip(distinct.tolist(), np.split(by_number, firsts)[1:], strict=True)
