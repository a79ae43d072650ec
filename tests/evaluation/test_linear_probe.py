"""The linear probe: scikit-learn's optimum, whatever the chunks, the start and the device it is streamed from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from triscale.data.features import FeatureParts
from triscale.errors import RunError
from triscale.evaluation import linear_probe, probe_rows
from triscale.evaluation.linear_probe import GRID, choose_l2, fit, probe, split, sweep
from triscale.evaluation.probe_rows import LabelledRows, fit_scaling, rows_in_memory, stored_rows, unit

CPU = torch.device("cpu")
NAMES = ("red", "green", "blue", "white")


def blobs(count: int = 120, width: int = 6, seed: int = 0, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping classes, off the origin, of features of different sizes; the last class has no sample."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(3, width))
    labels = rng.integers(0, 3, count)
    rows = (centres[labels] + spread * rng.normal(size=(count, width))) * np.geomspace(0.3, 3, width) + 1
    return rows.astype(np.float32), labels


def make_rows(count: int = 120, seed: int = 0) -> LabelledRows:
    return rows_in_memory("blobs", *blobs(count, seed=seed))


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("scale", ["raw", "unit", "standard"])
def test_probabilities_are_those_of_scikit_learn(l2: float, scale: probe_rows.Scale) -> None:
    features, labels = blobs()
    scaling = fit_scaling(make_rows(), scale)
    found = fit(make_rows(), 3, l2, scaling, device=CPU, tolerance=1e-6)
    reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(
        scaling(features).astype(np.float64), labels
    )
    others, _ = blobs(seed=1)
    expected = reference.predict_proba(scaling(others).astype(np.float64))
    np.testing.assert_allclose(found.scores(others, CPU).softmax(1).numpy(), expected, atol=1e-4)
    assert found.converged and found.iterations > 1
    ahead = found.ahead(rows_in_memory("others", others, labels), CPU)
    assert ((ahead == 0) == (expected.argmax(1) == labels)).all()


def test_scales_are_what_they_say() -> None:
    features, _ = blobs()
    standard = fit_scaling(make_rows(), "standard")(features)
    np.testing.assert_allclose(standard.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std(0), 1, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(fit_scaling(make_rows(), "unit")(features), axis=1), 1, atol=1e-6)
    assert fit_scaling(make_rows(), "raw")(features) is features
    constant = rows_in_memory("constant", np.full((5, 2), 3, dtype=np.float32), np.zeros(5, dtype=np.int64))
    assert np.isfinite(fit_scaling(constant, "standard")(np.ones((1, 2), dtype=np.float32))).all()


def test_features_on_the_disk_give_the_same_fit_a_chunk_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, labels = blobs()
    scaling = fit_scaling(make_rows(), "raw")
    whole = fit(make_rows(), 4, 1.0, scaling, device=CPU, tolerance=1e-7)
    monkeypatch.setattr("triscale.data.features.PART_SAMPLES", 50)
    monkeypatch.setattr(probe_rows, "CHUNK_ROWS", 16)
    parts = FeatureParts(tmp_path, [len(features)], features.shape[1])
    for part in range(len(parts)):
        rows = features[parts.samples(part)[1]]
        parts.write(part, rows, np.ones(len(rows), dtype=bool))
    streamed = stored_rows("blobs", parts, np.arange(len(features)), labels)
    chunks = [len(rows) for rows, _ in streamed.chunks()]
    assert sum(chunks) == len(features) and max(chunks) == 16
    found = fit(streamed, 4, 1.0, scaling, device=CPU, tolerance=1e-7)
    np.testing.assert_allclose(found.weight, whole.weight, atol=2e-3)
    again = fit(streamed, 4, 1.0, scaling, device=CPU, tolerance=1e-7)
    assert np.array_equal(found.weight, again.weight) and np.array_equal(found.bias, again.bias)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_chosen_rows_are_those_rows_however_they_are_streamed(chosen: list[bool], chunk: int) -> None:
    features = np.arange(2 * len(chosen), dtype=np.float32).reshape(-1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_rows, "CHUNK_ROWS", chunk)
        rows = rows_in_memory("rows", features, np.arange(len(chosen)))
        places = np.flatnonzero(chosen)
        some = rows.select(places).joined(rows.select(places[::2]))
        found = np.concatenate([np.empty((0, 2), dtype=np.float32), *(x for x, _ in some.chunks())])
        held = np.concatenate([np.empty((0, 2), dtype=np.float32), *(x for x, _ in some.held().chunks())])
    expected = np.concatenate([features[places], features[places[::2]]])
    assert np.array_equal(found, expected) and np.array_equal(held, expected)
    assert np.array_equal(some.labels, np.concatenate([places, places[::2]]))


def test_the_start_does_not_matter() -> None:
    scaling = fit_scaling(make_rows(), "standard")
    strong = fit(make_rows(), 3, 100.0, scaling, device=CPU)
    cold = fit(make_rows(), 3, 0.1, scaling, device=CPU, tolerance=1e-6)
    warm = fit(make_rows(), 3, 0.1, scaling, device=CPU, start=strong, tolerance=1e-6)
    np.testing.assert_allclose(cold.weight, warm.weight, atol=1e-3)


@given(st.integers(0, len(GRID) - 1))
def test_a_peak_is_found_among_all_strengths(peak: int) -> None:
    asked: list[int] = []

    def score(index: int) -> float:
        asked.append(index)
        return -abs(index - peak)

    assert choose_l2(score) == peak
    assert len(asked) == len(set(asked)) <= 7 + 8
    assert GRID[0] == pytest.approx(1e-6) and GRID[-1] == pytest.approx(1e6) and len(GRID) == 97


def test_of_equal_scores_the_strongest_penalty_wins() -> None:
    assert choose_l2(lambda index: 1.0) == len(GRID) - 1


def test_the_chosen_strength_is_best_on_validation_data_and_the_last_fit_is_on_all() -> None:
    train, validation = make_rows(), make_rows(seed=1)
    scaling = fit_scaling(train, "standard")
    best, scores = sweep(train, validation, 3, scaling, CPU)
    assert max(scores.values()) == scores[GRID[best]]
    found, said = probe(train, validation, NAMES[:3], scaling, seed=0, device=CPU)
    assert said == scores and found.l2 == GRID[best]
    expected = fit(train.joined(validation), 3, GRID[best], scaling, device=CPU)
    np.testing.assert_allclose(found.weight, expected.weight, atol=1e-6)


def test_the_validation_part_is_of_each_class_a_fifth_by_seed_and_name_and_never_all() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2])
    learn, check = split(labels, NAMES, seed=0)
    assert np.array_equal(np.sort(np.concatenate([learn, check])), np.arange(14))
    assert [int((labels[check] == label).sum()) for label in range(3)] == [2, 1, 0]
    alone = split(labels[:10], NAMES, seed=0)[1]
    assert np.array_equal(alone, check[check < 10]), "a class's part depends on the other classes"
    assert not np.array_equal(split(labels, NAMES, seed=1)[1], check)
    one_each, nothing = split(np.arange(3), NAMES, seed=0)
    assert len(one_each) == 3 and not len(nothing)


def test_without_a_sample_to_spare_the_strength_is_the_usual_one() -> None:
    rows = rows_in_memory("one each", np.eye(3, dtype=np.float32), np.arange(3))
    found, scores = probe(rows, None, NAMES[:3], fit_scaling(rows, "raw"), seed=0, device=CPU)
    assert found.l2 == linear_probe.UNCHOSEN and scores == {}
    assert (found.ahead(rows, CPU) == 0).all()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_features_that_are_not_finite_are_named(wrong: float) -> None:
    features, labels = blobs()
    features[17, 3] = wrong
    with pytest.raises(RunError, match="blobs: the features of row 17 are not finite"):
        fit(rows_in_memory("blobs", features, labels), 3, 1.0, fit_scaling(make_rows(), "raw"), device=CPU)


def test_rows_of_length_one_keep_zeros() -> None:
    assert np.array_equal(
        unit(np.array([[3, 4], [0, 0]], dtype=np.float32)), np.array([[0.6, 0.8], [0, 0]], np.float32)
    )
