"""Random numbers as pure functions of words: were these to fail, runs would not go on as they began."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from triscale.randomness import derive_seed, generator

WORDS = st.lists(st.integers() | st.text(max_size=5), min_size=1, max_size=5)


@given(WORDS)
def test_a_generator_is_philox_with_the_seed_of_its_words_for_a_key(words: list[int | str]) -> None:
    expected = np.random.Generator(np.random.Philox(key=derive_seed(*words)))
    found = generator(*words)
    assert np.array_equal(found.random(9), expected.random(9))
    assert np.array_equal(found.integers(0, 1000, 9), expected.integers(0, 1000, 9))


def test_a_generator_may_be_pickled_and_goes_on_where_it_was() -> None:
    rng = generator("a", 1)
    rng.random(3)
    assert pickle.loads(pickle.dumps(rng)).random() == rng.random()


def test_words_of_different_kinds_and_groupings_are_different_words() -> None:
    seeds = {derive_seed(*words) for words in [("1",), (1,), ("1", "2"), ("12",), (12,), (1, 2), ("1\0", "2")]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)
