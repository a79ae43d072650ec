"""The data order: were these to fail, samples would be lost, repeated or change with the history of a run."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data.order import BLOCK_POSITIONS, Order
from triscale.data.permutation import Permutation
from triscale.errors import UsageError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**63 - 1))
def test_a_permutation_holds_every_element_once_whatever_the_size(size: int, key: int) -> None:
    permutation = Permutation(size, key)
    assert sorted(permutation[index] for index in range(size)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2**20, 2**40), key=st.integers(0, 2**63 - 1), data=st.data())
def test_a_huge_permutation_stays_within_its_size_and_maps_neighbours_apart(size: int, key: int, data) -> None:
    permutation = Permutation(size, key)
    start = data.draw(st.integers(0, size - 64))
    images = [permutation[index] for index in range(start, start + 64)]
    assert len(set(images)) == 64
    assert min(images) >= 0 and max(images) < size


def test_all_orders_of_four_elements_are_about_equally_likely() -> None:
    drawn = Counter(tuple(Permutation(4, key)[index] for index in range(4)) for key in range(1200))
    assert len(drawn) == 24
    chi_square = sum((count - 50) ** 2 / 50 for count in drawn.values())
    assert chi_square < 60  # 23 degrees of freedom: exceeded with probability 4e-5


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_every_sample_is_drawn_exactly_once_an_epoch(size: int) -> None:
    order = Order([size], seed=3)
    for epoch in range(3):
        draws = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
        assert sorted(draws) == [(0, sample) for sample in range(size)]


def test_every_epoch_and_every_seed_has_an_order_unrelated_to_the_one_before() -> None:
    size = 2000
    order, other = Order([size], seed=0), Order([size], seed=1)
    first, second = ([order[epoch * size + i][1] for i in range(size)] for epoch in (0, 1))
    for one, two in ((first, second), (first, [other[i][1] for i in range(size)]), (first, list(range(size)))):
        # The number of fixed points of a random permutation is Poisson(1); its correlation N(0, 1/size).
        assert sum(a == b for a, b in zip(one, two, strict=True)) < 9
        assert abs(np.corrcoef(one, two)[0, 1]) < 5 / size**0.5


def test_neighbouring_positions_do_not_draw_neighbouring_samples() -> None:
    size = 2000
    order = Order([size], seed=0)
    drawn = np.array([order[i][1] for i in range(size)])
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / size**0.5
    assert np.sum(np.abs(np.diff(drawn)) == 1) < 15  # Poisson(2)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
    positions=st.lists(st.integers(0, 2**45), min_size=1, max_size=20),
    seed=st.integers(0, 2**31),
)
def test_a_position_gives_the_same_sample_whatever_was_asked_before(sizes, positions, seed) -> None:
    weights = [1.0 + 0.3 * source for source in range(len(sizes))]
    used = Order(sizes, weights, seed=seed)
    answers = [used[position] for position in positions]
    assert answers == [Order(sizes, weights, seed=seed)[position] for position in positions]
    assert answers[::-1] == [used[position] for position in reversed(positions)]
    assert answers == [used[int(np.int64(position))] for position in positions]


def test_the_drawn_samples_are_those_of_the_first_release() -> None:
    # A change of these numbers changes what every run in progress is trained on.
    order = Order([100, 7], weights=[2, 1], seed=0)
    assert [order[p] for p in (0, 1, 1023, 1024, 10**12)] == [(0, 42), (0, 20), (0, 45), (1, 0), (0, 6)]


def test_every_block_holds_each_sources_share_exactly_and_in_an_order_of_its_own() -> None:
    order = Order([500, 900, 40], weights=[0.5, 0.3, 0.2], seed=5)
    assert order.block_counts == (512, 307, 205)
    blocks = [[order[b * BLOCK_POSITIONS + i][0] for i in range(BLOCK_POSITIONS)] for b in range(3)]
    for block in blocks:
        assert [block.count(source) for source in range(3)] == [512, 307, 205]
    assert blocks[0] != blocks[1] != blocks[2]
    assert max(len(run) for run in "".join(map(str, blocks[0])).replace("1", " ").replace("2", " ").split()) < 30


def test_in_a_mixture_each_source_has_epochs_of_its_own() -> None:
    sizes = [500, 90]
    order = Order(sizes, weights=[1, 1], seed=2)
    draws: list[list[int]] = [[], []]
    for position in range(4 * BLOCK_POSITIONS):
        source, sample = order[position]
        draws[source].append(sample)
    for size, drawn in zip(sizes, draws, strict=True):
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_without_weights_sources_are_drawn_in_proportion_to_their_sizes() -> None:
    assert Order([300, 100], seed=0).block_counts == (768, 256)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.02, 1.0), min_size=2, max_size=12))
def test_shares_are_within_one_draw_of_the_weights(weights: list[float]) -> None:
    counts = Order([10] * len(weights), weights, seed=0).block_counts
    assert sum(counts) == BLOCK_POSITIONS
    assert all(abs(n - w / sum(weights) * 1024) < 1 for n, w in zip(counts, weights, strict=True))


def test_each_replacement_is_another_sample_of_the_same_source() -> None:
    order = Order([40, 6], weights=[1, 1], seed=9)
    again = Order([40, 6], weights=[1, 1], seed=9)
    for position in range(12):
        source, sample = order[position]
        attempts = range(1, order.sizes[source])
        others = [order.replacement(position, attempt) for attempt in attempts]
        assert sorted([*others, (source, sample)]) == [(source, s) for s in range(order.sizes[source])]
        assert others[::-1] == [again.replacement(position, attempt) for attempt in reversed(attempts)]


def test_replacements_at_different_positions_are_unrelated() -> None:
    order = Order([1000], seed=0)
    steps = {(order.replacement(p, 1)[1] - order[p][1]) % 1000 for p in range(200)}
    assert len(steps) > 150


def test_a_single_sample_is_its_own_replacement() -> None:
    assert Order([1], seed=0).replacement(5, 1) == (0, 0)


@pytest.mark.parametrize(
    ("sizes", "weights", "says"),
    [
        ([], None, "at least one"),
        ([5, 0], None, "data source 1 is empty"),
        ([5, 5], [1.0], "2 data sources but 1 weights"),
        ([5, 5], [1.0, 0.0], "positive"),
        ([5, 5], [1.0, float("nan")], "positive"),
        ([10**7, 5], None, "data source 1 would never be drawn"),
    ],
)
def test_a_mixture_that_cannot_be_drawn_is_refused_in_one_line(sizes, weights, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        Order(sizes, weights, seed=0)
    assert "\n" not in str(refused.value)


def test_positions_before_the_start_are_refused() -> None:
    with pytest.raises(IndexError):
        Order([5], seed=0)[-1]
