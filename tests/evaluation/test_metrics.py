"""Every score against a literal loop, and at the edges where a formula is easily wrong."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from triscale.evaluation import metrics
from triscale.randomness import generator

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=40)


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, ranks and guesses, made consistent: who is first is the guess."""
    labels, ahead, guesses = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    guesses = np.where(ahead == 0, labels, np.where(guesses == labels, (labels + 1) % 5, guesses))
    return labels, ahead, guesses


@given(ROWS)
def test_class_table_and_top_k_count_as_loops_do(rows: list[tuple[int, int, int]]) -> None:
    labels, ahead, guesses = columns(rows)
    table = metrics.class_table(labels, ahead, guesses, 5)
    triples = list(zip(labels.tolist(), ahead.tolist(), guesses.tolist(), strict=True))
    for k in range(5):
        assert table.samples[k] == sum(label == k for label, _, _ in triples)
        assert table.right[k] == sum(label == k and rank == 0 for label, rank, _ in triples)
        assert table.among_five[k] == sum(label == k and rank < 5 for label, rank, _ in triples)
        assert table.guessed[k] == sum(guess == k for _, _, guess in triples)
    expected = reference.mean_per_class(labels.tolist(), (ahead == 0).tolist())
    assert table.mean_per_class == pytest.approx(expected, abs=1e-12)
    for k in (1, 5):
        assert metrics.top_k(ahead, k) == sum(rank < k for _, rank, _ in triples) / len(triples)


@given(ROWS, st.integers(0, 10))
def test_confusion_pairs_are_the_most_frequent_mistakes(rows: list[tuple[int, int, int]], most: int) -> None:
    labels, ahead, guesses = columns(rows)
    wrong = Counter((int(a), int(b)) for a, b in zip(labels, guesses, strict=True) if a != b)
    expected = sorted(((*pair, count) for pair, count in wrong.items()), key=lambda each: (-each[2], *each[:2]))
    assert metrics.confusion_pairs(labels, ahead, guesses, most) == expected[:most]


def test_the_most_confident_mistakes_come_first_and_right_guesses_never() -> None:
    ahead = np.array([0, 3, 1, 1, 0, 2])
    confidence = np.array([0.99, 0.2, 0.7, 0.5, 0.9, 0.7], dtype=np.float32)
    assert metrics.confident_mistakes(ahead, confidence, 3).tolist() == [2, 5, 3]
    assert metrics.confident_mistakes(ahead, confidence, 99).tolist() == [2, 5, 3, 1]


@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_error_is_that_of_the_loop_over_bins(rows: list[tuple[float, bool]], bins: int) -> None:
    confidence, right = np.array([p for p, _ in rows], np.float32), np.array([hit for _, hit in rows])
    found = metrics.reliability(confidence, right, bins)
    expected = reference.expected_calibration_error(confidence.astype(float).tolist(), right.tolist(), bins)
    assert found.expected_error == pytest.approx(expected, abs=1e-9)
    assert found.samples.sum() == len(rows) and len(found.samples) == bins


def test_confidence_on_the_edge_of_two_bins_is_of_the_lower() -> None:
    found = metrics.reliability(np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32), np.ones(5, bool), bins=4)
    assert found.samples.tolist() == [2, 1, 1, 1]


def test_a_model_as_sure_as_it_is_right_has_no_calibration_error() -> None:
    right = np.arange(100) % 10 < 7
    assert metrics.reliability(np.full(100, 0.7, np.float32), right).expected_error < 1e-7
    assert metrics.reliability(np.full(100, 1.0, np.float32), right).expected_error == pytest.approx(0.3)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_median_rank_counts_from_one(ahead: list[int]) -> None:
    assert metrics.median_rank(np.array(ahead)) == reference.median_loop([rank + 1 for rank in ahead])


def outcomes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of 4 uneven classes, some of which are found far more often than others, and ranks."""
    rng = generator("outcomes", n)
    labels = rng.choice(4, n, p=[0.5, 0.3, 0.15, 0.05])
    return labels, np.where(rng.random(n) < 0.2 + 0.2 * labels, 0, rng.integers(1, 9, n))


def test_intervals_are_those_of_drawing_the_samples_with_replacement() -> None:
    labels, ahead = outcomes(150)
    rows = [(int(label), bool(rank < 1)) for label, rank in zip(labels, ahead, strict=True)]
    top1 = reference.bootstrap_interval(rows, lambda drawn: sum(hit for _, hit in drawn) / len(drawn), 2000, 1)
    per_class = reference.bootstrap_interval(
        rows, lambda drawn: reference.mean_per_class([label for label, _ in drawn], [hit for _, hit in drawn]), 2000, 2
    )
    assert metrics.top_k_intervals(ahead, (1, 5), "a")[1] == pytest.approx(top1, abs=0.015)
    assert metrics.mean_per_class_interval(labels, ahead, "a") == pytest.approx(per_class, abs=0.02)


def test_each_resample_is_scored_as_its_samples_written_out_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, ahead = outcomes(40)
    monkeypatch.setattr(metrics, "RESAMPLES", 30)
    kinds = 2 * labels + (ahead < 1)
    distinct, counts = np.unique(kinds, return_counts=True)
    resamples = generator("bootstrap", "b").multinomial(40, counts / 40, size=30)
    scores = []
    for resample in resamples:
        drawn = [int(kind) for kind, count in zip(distinct, resample, strict=True) for _ in range(count)]
        scores.append(reference.mean_per_class([kind // 2 for kind in drawn], [kind % 2 == 1 for kind in drawn]))
    expected = np.percentile(scores, [2.5, 97.5]).tolist()
    assert metrics.mean_per_class_interval(labels, ahead, "b") == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(metrics, "_LARGEST_BLOCK", 7 * len(distinct))  # in blocks of 7, with a rest
    assert metrics.mean_per_class_interval(labels, ahead, "b") == pytest.approx(expected, abs=1e-12)


def test_intervals_hold_the_score_shrink_with_the_samples_and_depend_on_the_name_alone() -> None:
    widths = []
    for n in (50, 5000):
        _, ahead = outcomes(n)
        intervals = metrics.top_k_intervals(ahead, (1, 5, 10), "c")
        for depth, (low, high) in intervals.items():
            assert low <= metrics.top_k(ahead, depth) <= high
        assert intervals == metrics.top_k_intervals(ahead, (1, 5, 10), "c")
        assert n == 50 or intervals[1] != metrics.top_k_intervals(ahead, (1, 5, 10), "d")[1]
        assert intervals[10] == [1.0, 1.0]
        widths.append(intervals[1][1] - intervals[1][0])
    assert 7 < widths[0] / widths[1] < 13, "ten times as narrow for a hundred times as many"


def test_a_single_sample_has_an_interval() -> None:
    one = np.array([0])
    assert metrics.top_k_intervals(one, (1,), "e") == {1: [1.0, 1.0]}
    assert metrics.mean_per_class_interval(one, one, "e") == [1.0, 1.0]
