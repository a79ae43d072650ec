"""Nearest neighbours: exact against a literal loop, in blocks of any size; what votes count and how they tie."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from triscale.errors import UsageError
from triscale.evaluation import probe_rows
from triscale.evaluation.knn import TEMPERATURE, knn_ranks, neighbours, ranks, votes
from triscale.evaluation.probe_rows import LabelledRows, rows_in_memory

CPU = torch.device("cpu")
CLASSES = 5


def make_rows(count: int, seed: int) -> LabelledRows:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    centres = np.random.default_rng(9).normal(size=(CLASSES, 8))
    rows = (centres[labels] + rng.normal(size=(count, 8))).astype(np.float32)
    return rows_in_memory(f"rows {seed}", rows, labels)


def array(rows: LabelledRows) -> np.ndarray:
    return np.concatenate([features for features, _ in rows.chunks()]).astype(np.float64)


def literal(train: LabelledRows, test: LabelledRows, k: int, weighted: bool) -> list[int]:
    """Rank of the right class, by loops over everything."""
    found = []
    keys = array(train)
    for query, truth in zip(array(test), test.labels.tolist(), strict=True):
        cosines = [float(key @ query / np.linalg.norm(key) / np.linalg.norm(query)) for key in keys]
        nearest = sorted(range(len(keys)), key=lambda index: -cosines[index])[:k]
        score: dict[int, float] = {}
        first: dict[int, int] = {}
        for place, index in enumerate(nearest):
            label = int(train.labels[index])
            score[label] = score.get(label, 0) + (math.exp(cosines[index] / TEMPERATURE) if weighted else 1)
            first.setdefault(label, place)
        order = sorted(score, key=lambda label: (-score[label], first[label]))
        found.append(order.index(truth) if truth in order else CLASSES)
    return found


@pytest.mark.parametrize("chunk", [3, 7, 1024])
def test_ranks_are_those_of_a_loop_over_all_cosines(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_rows, "CHUNK_ROWS", chunk)
    train, test = make_rows(60, 0), make_rows(31, 1)
    found = knn_ranks(train, test, [1, 5, 20], CLASSES, CPU)
    assert set(found) == {(k, weighted) for k in (1, 5, 20) for weighted in (True, False)}
    for (k, weighted), ahead in found.items():
        assert ahead.tolist() == literal(train, test, k, weighted), (k, weighted)


def test_one_neighbour_is_scikit_learns() -> None:
    train, test = make_rows(60, 0), make_rows(31, 1)
    reference = KNeighborsClassifier(1, metric="cosine").fit(array(train), train.labels).predict(array(test))
    assert ((knn_ranks(train, test, [1], CLASSES, CPU)[1, False] == 0) == (reference == test.labels)).all()


def test_of_equal_cosines_the_earlier_row_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_rows, "CHUNK_ROWS", 2)
    same = rows_in_memory("same", np.ones((6, 2), dtype=np.float32), np.array([3, 1, 4, 0, 2, 1]))
    _, classes = neighbours(same, rows_in_memory("one", np.ones((1, 2), dtype=np.float32), np.array([0])), 4, CPU)
    assert classes.tolist() == [[3, 1, 4, 0]]


def test_equal_votes_go_to_the_class_with_the_nearest_neighbour() -> None:
    scores = votes(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[2, 0, 0, 2]]), 3, weighted=False)
    assert int(scores.argmax()) == 2 and float(scores[0, 1]) == 0
    more = votes(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[2, 0, 0]]), 3, weighted=False)
    assert int(more.argmax()) == 0


def test_a_class_without_votes_ranks_behind_all() -> None:
    train = rows_in_memory("train", np.ones((3, 2), dtype=np.float32), np.array([1, 1, 2]))
    test = rows_in_memory("test", np.ones((1, 2), dtype=np.float32), np.array([0]))
    assert knn_ranks(train, test, [3], 4, CPU)[3, True].tolist() == [4]


def test_ranks_count_higher_scores_and_equal_ones_of_lower_classes() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.9], [0.1, 0.2, 0.2]])
    assert ranks(scores, torch.tensor([1, 1])).tolist() == [2, 0]


def test_more_neighbours_than_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="--knn 9: rows 0 has 4 samples"):
        knn_ranks(make_rows(4, 0), make_rows(2, 1), [1, 9], CLASSES, CPU)
