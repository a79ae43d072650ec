"""Batches of distinct ids: were these to fail, an id would come twice, or a sample be lost without being counted."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data import distinct
from triscale.data.distinct import BAD, NO_ID, WINDOW_BATCHES, DistinctOrder
from triscale.data.order import Order
from triscale.errors import RunError, UsageError


def column(size: int, ids: int, seed: int = 0, skew: float = 1.0) -> np.ndarray:
    """Ids of `size` samples, each of range(ids) at least once, the low ones more often under a `skew` above 1."""
    drawn = (np.random.default_rng(seed).random(size) ** skew * ids).astype(np.int64)
    drawn[: min(size, ids)] = np.arange(min(size, ids))
    return drawn


def drawn_ids(order: DistinctOrder, positions: range) -> list[int]:
    draws = [order[position] for position in positions]
    return [int(order.ids[source][np.array([sample])][0]) for source, sample in draws]


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 12),
    spare=st.integers(0, 10),
    size=st.integers(0, 200),
    skew=st.floats(1.0, 6.0),
    seed=st.integers(0, 2**31),
    window=st.integers(0, 10**6),
)
def test_no_batch_holds_an_id_twice_and_what_is_left_out_is_counted(batch, spare, size, skew, seed, window) -> None:
    ids = column(batch + spare + size, batch + spare, seed, skew)
    base = Order([len(ids)], seed=seed)
    order = DistinctOrder(base, [ids], batch)
    first, stop = window * WINDOW_BATCHES * batch, (window + 1) * WINDOW_BATCHES * batch
    for start in range(first, stop, batch):
        assert len(set(drawn_ids(order, range(start, start + batch)))) == batch
    before = Counter(base[position] for position in range(first, stop))
    after = Counter(order[position] for position in range(first, stop))
    assert sum((before - after).values()) <= order.left_out(first)
    # Left out is what no window could hold, and nothing else.
    held = Counter(int(ids[sample]) for _, sample in before.elements())
    assert order.left_out(first) == sum(max(0, count - WINDOW_BATCHES) for count in held.values())


@settings(max_examples=15, deadline=None)
@given(positions=st.lists(st.integers(0, 5000), min_size=1, max_size=10), seed=st.integers(0, 2**31))
def test_a_position_has_the_same_sample_whatever_was_asked_before_and_in_any_process(positions, seed) -> None:
    ids = column(300, 40, skew=2.0)

    def make() -> DistinctOrder:
        return DistinctOrder(Order([200, 100], [1, 2], seed=seed), [ids[:200], ids[200:]], 20)

    used = make()
    answers = [(used[position], used.replacement(position, 2)) for position in positions]
    assert answers[::-1] == [(used[position], used.replacement(position, 2)) for position in reversed(positions)]
    for fresh in (make(), pickle.loads(pickle.dumps(used))):
        assert answers == [(fresh[position], fresh.replacement(position, 2)) for position in positions]


def test_without_repeated_ids_every_sample_is_drawn_exactly_once_an_epoch_of_whole_windows() -> None:
    batch, windows = 5, 4
    size = batch * WINDOW_BATCHES * windows
    order = DistinctOrder(Order([size], seed=1), [np.arange(size)], batch)
    for epoch in range(2):
        draws = [order[position] for position in range(epoch * size, (epoch + 1) * size)]
        assert sorted(draws) == [(0, sample) for sample in range(size)]
    assert all(order.left_out(position) == 0 for position in range(0, 2 * size, batch * WINDOW_BATCHES))


def test_batches_stay_random_draws() -> None:
    """Neither the batch nor the place within it tells the sample: no order of ids shines through."""
    batch, size = 50, 50 * WINDOW_BATCHES * 3
    order = DistinctOrder(Order([size], seed=0), [np.arange(size)], batch)
    drawn = np.array([order[position][1] for position in range(size)], dtype=float)
    for sequence in (np.arange(size), np.arange(size) % batch, np.arange(size) // batch % WINDOW_BATCHES):
        assert abs(np.corrcoef(drawn, sequence)[0, 1]) < 5 / size**0.5
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / size**0.5


def test_ids_of_all_sources_of_a_mixture_are_held_apart() -> None:
    shared = column(120, 60)
    order = DistinctOrder(Order([120, 120], [3, 1], seed=0), [shared, shared], 40)
    for start in range(0, 40 * WINDOW_BATCHES * 2, 40):
        assert len(set(drawn_ids(order, range(start, start + 40)))) == 40
    assert {order[position][0] for position in range(40)} == {0, 1}


def test_samples_without_an_id_come_once_a_batch_too() -> None:
    order = DistinctOrder(Order([12], seed=0), [np.full(12, NO_ID)], 12)
    for start in range(0, 12 * 40, 12):
        assert len({order[position] for position in range(start, start + 12)}) == 12


@pytest.mark.parametrize("ids", [1000, 110])
def test_whatever_rows_are_bad_their_replacements_repeat_no_id_of_the_batch(ids: int) -> None:
    """With ids to spare, and with hardly any: then a sample of the row's own id takes its place."""
    batch = 100
    values = column(3000, ids)
    order = DistinctOrder(Order([3000], seed=0), [values], batch)
    for start in (0, 700, 5 * batch * WINDOW_BATCHES):
        rows = [order[position][1] for position in range(start, start + batch)]
        own = [int(values[row]) for row in rows]
        stand_ins = [
            order.replacement(position, attempt) for attempt in (1, 2) for position in range(start, start + batch)
        ]
        for number, (_, sample) in enumerate(stand_ins):
            row, new = number % batch, int(values[sample])
            assert sample != rows[row]
            assert new == own[row] or new not in own
        fresh = [
            int(values[sample]) for number, (_, sample) in enumerate(stand_ins) if values[sample] != own[number % batch]
        ]
        assert len(fresh) == len(set(fresh))
        assert (len(fresh) == 2 * batch) == (ids == 1000)


def test_samples_whose_id_cannot_be_read_are_drawn_but_replace_nobody() -> None:
    values = column(400, 300)
    values[::4] = BAD
    order = DistinctOrder(Order([400], seed=0), [values], 50)
    drawn = {order[position][1] for position in range(50 * WINDOW_BATCHES)}
    assert sum(values[sample] == BAD for sample in drawn) > 50
    assert all(values[order.replacement(position, 1)[1]] != BAD for position in range(200))


def test_a_single_id_among_many_draws_is_left_out_where_each_batch_has_one_already() -> None:
    values = np.where(np.arange(1000) % 2 == 0, 7, np.arange(1000) + 10)
    order = DistinctOrder(Order([1000], seed=0), [values], 20)
    window = 20 * WINDOW_BATCHES
    for number in range(3):
        ids = Counter(drawn_ids(order, range(number * window, (number + 1) * window)))
        assert ids[7] == WINDOW_BATCHES
        assert abs(order.left_out(number * window) - (window / 2 - WINDOW_BATCHES)) < 60


def test_shards_to_come_begin_with_the_window() -> None:
    counts = np.full(60, 20)
    base = Order([1200], seed=0, shards=[counts], window_shards=4)
    order = DistinctOrder(base, [np.arange(1200)], 10)
    for position in (0, 155, 160, 479):
        window = range(position // 160 * 160, (position // 160 + 1) * 160)
        shards = {base[p][1] // 20 for p in window}
        assert shards <= set(islice(order.upcoming(0, position), 12))
        assert order[position][1] // 20 in shards


def test_too_few_ids_are_refused_in_one_line_and_ids_that_hardly_come_end_the_run(monkeypatch) -> None:
    values = column(500, 30)
    with pytest.raises(UsageError, match="have 30 distinct ids, which cannot fill a batch of 31") as refused:
        DistinctOrder(Order([500], seed=0), [values], 31)
    assert "\n" not in str(refused.value)
    DistinctOrder(Order([500], seed=0), [values], 30)[0]
    monkeypatch.setattr(distinct, "_MOST_WINDOWS", 1)
    with pytest.raises(RunError, match="too unevenly spread"):
        DistinctOrder(Order([500], seed=0), [column(500, 30, skew=8.0)], 30)[0]


def test_positions_before_the_start_are_refused() -> None:
    with pytest.raises(IndexError):
        DistinctOrder(Order([500], seed=0), [np.arange(500)], 31)[-1]
