"""Places of positives, block by block and over processes, against the whole score matrix sorted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ranks
import reference
from triscale.evaluation.ranking import best_candidates, candidates_ahead


def embeddings(rng: torch.Generator, images: int, levels: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Related embeddings of images and of one to four texts each; with `levels`, small integers, hence many ties."""
    counts = torch.randint(1, 5, (images,), generator=rng)
    image_of_text = torch.repeat_interleave(torch.arange(images), counts)
    x = torch.randn(images, 6, dtype=torch.float64, generator=rng)
    y = x[image_of_text] + torch.randn(len(image_of_text), 6, dtype=torch.float64, generator=rng)
    if levels:
        x, y = (x * levels).round() / levels, (y * levels).round() / levels
    return x, y, image_of_text


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("tile", [(4, 3), (7, 50), (64, 1), (1, 7), (41, 200), (1000, 1000)])
def test_blocks_of_any_shape_rank_as_the_sorted_matrix_does(
    rng: torch.Generator, tile: tuple[int, int], levels: int | None
) -> None:
    x, y, image_of_text = embeddings(rng, 41, levels)
    found = candidates_ahead(x, y, image_of_text, *tile)
    expected = reference.retrieval_ranks(x, y, image_of_text.tolist())
    assert [[ahead + 1 for ahead in each.tolist()] for each in found] == list(expected)


@pytest.mark.parametrize("tile", [(1, 1), (2, 2), (3, 1)])
def test_of_equal_scores_the_first_candidate_ranks_first(tile: tuple[int, int]) -> None:
    image_of_text = torch.tensor([0, 0, 1, 2, 2])
    texts_ahead, images_ahead = candidates_ahead(torch.ones(3, 2), torch.ones(5, 2), image_of_text, *tile)
    assert texts_ahead.tolist() == [0, 2, 3]
    assert images_ahead.tolist() == [0, 0, 1, 2, 2]


def test_one_image_is_found_by_all_of_its_texts_and_the_best_of_them_by_it(rng: torch.Generator) -> None:
    x, y = torch.randn(1, 4, generator=rng), torch.randn(9, 4, generator=rng)
    texts_ahead, images_ahead = candidates_ahead(x, y, torch.zeros(9, dtype=torch.int64), 2, 4)
    assert texts_ahead.tolist() == [0] and images_ahead.tolist() == [0] * 9


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_more_than_two_blocks_of_scores_are_held(rng: torch.Generator) -> None:
    x, y, image_of_text = embeddings(rng, 100)
    with LargestTensor() as largest:
        candidates_ahead(x, y, image_of_text, 16, 64)
    assert 16 * 64 <= largest.elements <= 2 * 16 * 64
    with LargestTensor() as largest:
        best_candidates(x[:3], y, 5, block=64)
    assert largest.elements <= max(3 * (64 + 5), y.numel())
    assert largest.elements < len(x) * len(y) / 10


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize(("count", "block"), [(1, 1), (5, 3), (5, 64), (500, 7)])
def test_the_best_candidates_are_the_first_of_the_sorted_ones(
    rng: torch.Generator, levels: int | None, count: int, block: int
) -> None:
    x, y, _ = embeddings(rng, 30, levels)
    indices, scores = best_candidates(x[:4], y, count, block)
    of_images, _ = reference.retrieval_order(x[:4], y)
    assert indices.tolist() == [order[:count] for order in of_images]
    torch.testing.assert_close(scores, (x[:4] @ y.T).gather(1, indices), rtol=0, atol=1e-12)


def ahead_on_rank(rank: int, world: int) -> list[Tensor]:
    x, y, image_of_text = embeddings(torch.Generator().manual_seed(1), 83, levels=2)
    return list(candidates_ahead(x.float(), y.float(), image_of_text, 16, 32))


def test_three_processes_count_what_one_does() -> None:
    alone = ahead_on_rank(0, 1)
    for found in ranks.run_ranks(ahead_on_rank, 3):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, alone, strict=True))
