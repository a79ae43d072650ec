"""Recall against the whole score matrix sorted, and that the package itself never holds that matrix."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import toy_sets
from triscale.errors import RunError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.retrieval import candidates_ahead, evaluate_retrieval

CAPTIONS = [f"kind {n}\n" + "\n".join(f"kind {n} of {m}" for m in range(n % 4)) for n in range(30)]


def literal_recall(images: Tensor, texts: Tensor, image_of_text: Tensor, k: int) -> tuple[float, float]:
    """Recall as CLIP_benchmark defines it (zeroshot_retrieval.py): a query is a hit if at least one of its positives is
    among its k best candidates; of equal scores the earlier candidate is better."""
    scores = images @ texts.T
    best_texts = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best_images = scores.T.sort(dim=1, descending=True, stable=True).indices[:, :k]
    text_hits = [bool((image_of_text[best_texts[image]] == image).any()) for image in range(len(images))]
    image_hits = [bool((best_images[text] == image_of_text[text]).any()) for text in range(len(texts))]
    return sum(text_hits) / len(images), sum(image_hits) / len(texts)


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
@pytest.mark.parametrize("tile", [(4, 3), (7, 50), (64, 1), (1000, 1000)])
def test_blocks_of_any_shape_rank_as_the_sorted_matrix_does(
    rng: torch.Generator, tile: tuple[int, int], levels: int | None
) -> None:
    x, y, image_of_text = embeddings(rng, 41, levels)
    texts_ahead, images_ahead = candidates_ahead(x, y, image_of_text, *tile)
    for k in (1, 2, 5, 10, 41):
        found = (texts_ahead < k).double().mean().item(), (images_ahead < k).double().mean().item()
        assert found == pytest.approx(literal_recall(x, y, image_of_text, k), abs=1e-12)


def test_of_equal_scores_the_first_candidate_ranks_first() -> None:
    image_of_text = torch.tensor([0, 0, 1, 2, 2])
    texts_ahead, images_ahead = candidates_ahead(torch.ones(3, 2), torch.ones(5, 2), image_of_text, 2, 2)
    assert texts_ahead.tolist() == [0, 2, 3]
    assert images_ahead.tolist() == [0, 0, 1, 2, 2]


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_more_than_a_block_of_scores_is_held(rng: torch.Generator) -> None:
    x, y, image_of_text = embeddings(rng, 100)
    with LargestTensor() as largest:
        candidates_ahead(x, y, image_of_text, 16, 64)
    assert 16 * 64 <= largest.elements <= max(16 * 64, y.numel())
    assert largest.elements < len(x) * len(y) / 10


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_a_set_is_scored_as_the_definition_says(tmp_path: Path, batch_size: int) -> None:
    examples = open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", CAPTIONS)))
    encoder = toy_sets.encoder(batch_size)
    result = evaluate_retrieval(encoder, examples)
    read = [examples.read(index) for index in range(len(examples))]
    image_of_text = torch.tensor([index for index, example in enumerate(read) for _ in example.captions])
    x = encoder.embed_images([example.image for example in read])
    y = encoder.embed_texts([text for example in read for text in example.captions])
    assert (result["task"], result["samples"], result["captions"]) == ("retrieval", 30, len(y))
    for k in (1, 5, 10):
        expected = literal_recall(x, y, image_of_text, k)
        assert 0 < expected[0] != expected[1] > 0
        found = result[f"image_to_text_recall@{k}"], result[f"text_to_image_recall@{k}"]
        assert found == pytest.approx(expected, abs=1e-12)
    assert len(result) == 9


def test_bad_samples_take_their_captions_with_them(tmp_path: Path) -> None:
    whole = toy_sets.write_retrieval_set(tmp_path / "whole", CAPTIONS[:20])
    damaged = toy_sets.write_retrieval_set(tmp_path / "damaged", CAPTIONS[:20] + ["\n", *CAPTIONS[21:23]], bad=(21, 22))
    scores = [evaluate_retrieval(toy_sets.encoder(1), open_set(str(folder))) for folder in (whole, damaged)]
    assert scores[1] == scores[0] | {"bad": 3}


def test_fewer_candidates_than_k_are_no_trouble(tmp_path: Path) -> None:
    result = evaluate_retrieval(
        toy_sets.encoder(), open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"])))
    )
    assert result["image_to_text_recall@10"] == result["text_to_image_recall@5"] == 1


def test_a_set_without_a_readable_sample_ends_in_one_line(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"], bad=(0, 1))))
    with pytest.raises(RunError, match="none of its 2 samples"):
        evaluate_retrieval(toy_sets.encoder(), examples)


def test_a_model_whose_embeddings_are_not_finite_gets_no_score(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"])))
    broken = dataclasses.replace(toy_sets.encoder(), text=lambda texts: torch.full((len(texts), 48), math.inf))
    with pytest.raises(RunError, match="not finite"):
        evaluate_retrieval(broken, examples)
