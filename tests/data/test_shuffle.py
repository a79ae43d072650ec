"""Shuffles: were these to fail, samples would be lost or repeated, or shards come that nobody has fetched."""

from __future__ import annotations

import pickle
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data.order import Order
from triscale.data.permutation import Permutation
from triscale.data.shuffle import Shuffle, WholeShuffle, WindowedShuffle

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def windowed(counts, window_shards: int, seed: int = 0) -> WindowedShuffle:
    return WindowedShuffle(counts, window_shards, seed=seed, source=0)


def shard_of(counts, samples) -> np.ndarray:
    return np.searchsorted(np.cumsum(counts), samples, side="right")


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 2**40), key=st.integers(0, 2**63 - 1), data=st.data())
def test_an_array_of_a_permutations_elements_is_each_of_them(size: int, key: int, data) -> None:
    permutation = Permutation(size, key)
    indices = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    array = permutation.at(np.array(indices, dtype=np.int64))
    assert array.tolist() == [permutation[index] for index in indices]


@settings(max_examples=80, deadline=None)
@given(counts=COUNTS, window_shards=st.integers(1, 12), seed=st.integers(0, 2**31), epoch=st.integers(0, 10**6))
def test_windows_draw_every_sample_exactly_once_an_epoch(counts, window_shards, seed, epoch) -> None:
    shuffle = windowed(counts, window_shards, seed)
    draws = range(epoch * shuffle.size, (epoch + 1) * shuffle.size)
    assert sorted(shuffle[draw] for draw in draws) == list(range(sum(counts)))


@settings(max_examples=80, deadline=None)
@given(counts=COUNTS, window_shards=st.integers(1, 12), seed=st.integers(0, 2**31), data=st.data())
def test_a_draw_is_the_same_sample_in_any_order_of_asking_one_by_one_or_together(
    counts, window_shards, seed, data
) -> None:
    draws = data.draw(st.lists(st.integers(0, 50 * sum(counts)), min_size=1, max_size=60))
    for make in (
        lambda: windowed(counts, window_shards, seed),
        lambda: WholeShuffle(sum(counts), seed=seed, source=0),
    ):
        used: Shuffle = make()
        answers = [used[draw] for draw in draws]
        assert answers[::-1] == [used[draw] for draw in reversed(draws)]
        assert answers == [make()[draw] for draw in draws]
        assert answers == used.at(np.array(draws)).tolist()
        assert answers == pickle.loads(pickle.dumps(used)).at(np.array(draws)).tolist()


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, window_shards=st.integers(1, 12), seed=st.integers(0, 2**31), first=st.integers(0, 3000))
def test_the_shards_to_come_begin_with_the_window_of_the_draw_and_leave_none_out(
    counts, window_shards, seed, first
) -> None:
    shuffle = windowed(counts, window_shards, seed)
    filled = [shard for shard, count in enumerate(counts) if count]
    epochs = 3000 // shuffle.size + 2
    whole = list(islice(shuffle.upcoming(0), epochs * len(filled)))
    for epoch in range(epochs):
        assert sorted(whole[epoch * len(filled) : (epoch + 1) * len(filled)]) == filled
    come = list(islice(shuffle.upcoming(first), len(filled)))
    assert shuffle[first] in np.flatnonzero(np.isin(shard_of(counts, np.arange(shuffle.size)), come[:window_shards]))
    begun = first // shuffle.size * len(filled)
    assert come in [whole[start : start + len(come)] for start in range(begun, begun + len(filled))]


def test_a_window_holds_the_samples_of_its_shards_alone() -> None:
    counts = np.random.default_rng(0).integers(5, 30, 50)
    shuffle = windowed(counts, 8)
    shards = shard_of(counts, shuffle.at(np.arange(shuffle.size)))
    order = list(dict.fromkeys(islice(shuffle.upcoming(0), 50)))
    start = 0
    for window in range(0, 50, 8):
        members = order[window : window + 8]
        stop = start + int(counts[members].sum())
        assert set(shards[start:stop]) == set(members)
        start = stop
    assert start == shuffle.size


def test_the_shards_of_a_window_are_mixed_and_other_in_every_epoch_and_under_every_seed() -> None:
    counts = [100] * 40
    shuffle = windowed(counts, 10)
    epochs = [shuffle.at(np.arange(e * 4000, (e + 1) * 4000)) for e in (0, 1)]
    other = windowed(counts, 10, seed=1).at(np.arange(4000))
    for one, two in ((epochs[0], epochs[1]), (epochs[0], other)):
        assert np.count_nonzero(one == two) < 9  # Poisson(1)
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.12  # of 40 shards: 5 / sqrt(40) would be one by chance
        assert set(shard_of(counts, one[:1000])) != set(shard_of(counts, two[:1000]))
    runs = np.diff(shard_of(counts, epochs[0])) == 0
    assert abs(runs.mean() - 0.1) < 0.02  # neighbours are of one shard as often as chance has it among ten


def test_a_windows_mixing_is_what_the_module_says() -> None:
    """Places uniform over the epoch; those of one shard spread by K/S/sqrt(12)."""
    shards, count, window_shards = 200, 50, 20
    counts = [count] * shards
    shuffle = windowed(counts, window_shards)
    places = np.empty(shuffle.size)
    places[shuffle.at(np.arange(shuffle.size))] = np.arange(shuffle.size) / shuffle.size
    spread = places.reshape(shards, count).std(axis=1).mean()
    assert abs(spread / (window_shards / shards / 12**0.5) - 1) < 0.03
    whole = np.empty(shuffle.size)
    whole[WholeShuffle(shuffle.size, seed=0, source=0).at(np.arange(shuffle.size))] = places[np.argsort(places)]
    assert abs(whole.reshape(shards, count).std(axis=1).mean() * 12**0.5 - 1) < 0.03
    # Over seeds, any one sample stands anywhere in the epoch: a mean of 1/2 and a variance of 1/12.
    of_one = [
        np.argmax(windowed(counts, window_shards, seed).at(np.arange(10_000)) == 7) / 10_000 for seed in range(300)
    ]
    assert abs(np.mean(of_one) - 0.5) < 4 * (1 / 12 / 200) ** 0.5
    assert abs(np.var(of_one) * 12 - 1) < 0.25


@pytest.mark.parametrize("window_shards", [1, 3])
def test_replacements_come_from_the_same_window(window_shards: int) -> None:
    counts = [4, 0, 7, 3, 5, 1, 6]
    shuffle = windowed(counts, window_shards)
    for draw in range(shuffle.size):
        window = set(islice(shuffle.upcoming(draw), sum(1 for _ in range(window_shards))))
        own, attempts = shuffle[draw], range(1, 40)
        others = [shuffle.replacement(draw, attempt, key=draw) for attempt in attempts]
        reach = len(set(others))
        assert len(set(others[:reach])) == reach
        assert own not in others or set(others) == {own}
        if window_shards == 1:
            assert set(shard_of(counts, others)) <= window


def test_a_mixture_of_windowed_and_whole_sources_gives_its_positions_one_by_one_or_together() -> None:
    shards = [np.array([30] * 40), None, np.array([7, 9, 50])]
    order = Order([1200, 300, 66], [3, 2, 1], seed=4, shards=shards, window_shards=4)
    positions = np.concatenate([np.arange(3000), np.array([10**9, 5, 10**12])])
    sources, samples = order.at(positions)
    assert [order[int(p)] for p in positions] == list(zip(sources.tolist(), samples.tolist(), strict=True))
    drawn = samples[:3000][sources[:3000] == 0][:1200]
    assert sorted(drawn.tolist()) == list(range(1200))
    assert list(islice(order.upcoming(1, 77), 3)) == []
    for position in (0, 1, 1023, 1024, 2500):
        later = next(p for p in range(position, 3000) if sources[p] == 0)
        shard = int(shard_of(shards[0], [samples[later]])[0])
        assert shard in list(islice(order.upcoming(0, position), 4))


def test_a_position_among_ten_billion_is_found_without_a_list_of_samples() -> None:
    """10^10 samples in 10^4 shards: what is held is O(shards), and neither grows with what is asked for."""
    counts = np.full(10**4, 10**6)
    order = Order([10**10], seed=0, shards=[counts], window_shards=64)
    shuffle = order._shuffles[0]
    assert isinstance(shuffle, WindowedShuffle)
    for position in np.random.default_rng(0).integers(0, 10**13, 300).tolist():
        assert 0 <= order[position][1] < 10**10
    held = sum(epoch.shards.nbytes + epoch.ends.nbytes for epoch in shuffle._epochs)
    assert held + shuffle.counts.nbytes + shuffle._firsts.nbytes == 6 * 8 * 10**4
    assert len(pickle.dumps(order)) < 3 * 8 * 10**4
