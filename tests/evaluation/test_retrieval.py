"""Recall, median rank and examples of retrieval sets against the definitions, alone and over processes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ranks
import reference
import toy_sets
from triscale.errors import RunError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.matches import Matches
from triscale.evaluation.ranking import candidates_ahead
from triscale.evaluation.retrieval import evaluate_retrieval, scores

CAPTIONS = [f"kind {n}\n" + "\n".join(f"kind {n} of {m}" for m in range(n % 4)) for n in range(30)]


def embedded(folder: Path, batch_size: int) -> tuple[Tensor, Tensor, list[int]]:
    """Embeddings of a whole set, read and embedded sample by sample, and each text's image."""
    examples, encoder = open_set(str(folder)), toy_sets.encoder(batch_size)
    read = [examples.read(index) for index in range(len(examples))]
    x = encoder.embed_images([example.image for example in read])
    y = encoder.embed_texts([text for example in read for text in example.captions])
    return x, y, [index for index, example in enumerate(read) for _ in example.captions]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_a_set_is_scored_as_the_definition_says(tmp_path: Path, batch_size: int) -> None:
    folder = toy_sets.write_retrieval_set(tmp_path / "set", CAPTIONS)
    result, _ = evaluate_retrieval(toy_sets.encoder(batch_size), open_set(str(folder)))
    x, y, image_of_text = embedded(folder, batch_size)
    assert (result["task"], result["samples"], result["captions"]) == ("retrieval", 30, len(y))
    for k in (1, 5, 10):
        expected = reference.recall_at(x, y, image_of_text, k)
        assert 0 < expected[0] != expected[1] > 0
        for found, way in zip(expected, ("image_to_text", "text_to_image"), strict=True):
            assert result[f"{way}_recall@{k}"] == pytest.approx(found, abs=1e-12)
            low, high = result[f"{way}_recall@{k}_interval"]
            assert low <= found <= high and low < high
    medians = [reference.median_loop(each) for each in reference.retrieval_ranks(x, y, image_of_text)]
    assert [result["image_to_text_median_rank"], result["text_to_image_median_rank"]] == medians
    assert len(result) == 3 + 2 * (2 * 3 + 1)


@settings(max_examples=20)
@given(st.data())
def test_recall_is_that_of_clip_benchmark(data: st.DataObject) -> None:
    """Its recall@k is the share of a query's positives among the k best, and a query counts where that is above 0."""
    captions = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    image_of_text = torch.repeat_interleave(torch.arange(len(captions)), torch.tensor(captions))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x, y = (torch.randn(len(rows), 5, dtype=torch.float64, generator=rng) for rows in (captions, image_of_text))
    ahead = candidates_ahead(x, y, image_of_text, 3, 4)
    found = scores(*(each.numpy() for each in (*ahead, image_of_text)), "set")
    positive = image_of_text[:, None] == torch.arange(len(captions))
    for way, matrix, right in (("text_to_image", y @ x.T, positive), ("image_to_text", x @ y.T, positive.T)):
        for k in (1, 5, 10):
            best = matrix.topk(min(k, matrix.shape[1]), dim=1).indices
            share = right.gather(1, best).sum(dim=1) / right.sum(dim=1)
            assert found[f"{way}_recall@{k}"] == pytest.approx(float((share > 0).double().mean()), abs=1e-12)


def test_intervals_of_recalls_are_wider_where_captions_of_an_image_stand_together(rng: torch.Generator) -> None:
    """Two hundred images with five captions that are all found or all missed tell no more than two hundred captions."""
    image_of_text = np.repeat(np.arange(200), 5)
    found = (torch.rand(200, generator=rng) < 0.5).numpy()
    together = np.where(found, 0, 99)[image_of_text]
    apart = np.where(np.arange(1000) % 2 == 0, 0, 99)
    widths = []
    for ahead in (together, apart):
        low, high = scores(np.zeros(200, dtype=np.int64), ahead, image_of_text, "set")[
            "text_to_image_recall@1_interval"
        ]
        widths.append(high - low)
    assert widths[0] == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 200), rel=0.1)
    assert widths[1] < widths[0] / 3


def evaluate_everything(rank: int, world: int, folder: str) -> list[Any]:
    """All that comes of two batch sizes, as plain values; one of 256 leaves most processes without a batch."""
    found = []
    for batch_size in (7, 256):
        result, matches = evaluate_retrieval(toy_sets.encoder(batch_size), open_set(folder))
        found.append([result, {name: torch.as_tensor(each) for name, each in arrays_of(matches).items()}])
        found.append(list(matches.captions))
    return found


def arrays_of(matches: Matches) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(matches).items() if name != "captions"}


def test_three_processes_find_bit_for_bit_what_one_finds(tmp_path: Path) -> None:
    folder = str(toy_sets.write_retrieval_set(tmp_path / "set", CAPTIONS, bad=(4,)))
    alone = evaluate_everything(0, 1, folder)
    for found in ranks.run_ranks(evaluate_everything, 3, folder):
        for ours, theirs in zip(found, alone, strict=True):
            if isinstance(ours[0], dict):
                assert ours[0] == theirs[0]
                assert all(torch.equal(ours[1][name], value) for name, value in theirs[1].items())
            else:
                assert ours == theirs


def test_bad_samples_take_their_captions_with_them(tmp_path: Path) -> None:
    whole = toy_sets.write_retrieval_set(tmp_path / "whole/set", CAPTIONS[:20])
    captions = [*CAPTIONS[:20], "\n", *CAPTIONS[21:23]]
    damaged = toy_sets.write_retrieval_set(tmp_path / "damaged/set", captions, bad=(21, 22))
    found = [evaluate_retrieval(toy_sets.encoder(1), open_set(str(folder))) for folder in (whole, damaged)]
    reasons = {"caption-empty": 1, "image-unreadable": 2}
    assert found[1][0] == found[0][0] | {"bad": 3, "bad_reasons": reasons}
    assert found[1][1].captions == found[0][1].captions


def test_fewer_candidates_than_k_are_no_trouble(tmp_path: Path) -> None:
    result, matches = evaluate_retrieval(
        toy_sets.encoder(), open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"])))
    )
    assert result["image_to_text_recall@10"] == result["text_to_image_recall@5"] == 1
    assert matches.best_texts.shape == matches.best_images.shape == (2, 2)


def test_one_image_with_one_caption_is_found(tmp_path: Path) -> None:
    result, _ = evaluate_retrieval(
        toy_sets.encoder(), open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a"])))
    )
    assert result["image_to_text_recall@1"] == result["text_to_image_recall@1"] == 1
    assert result["image_to_text_median_rank"] == result["text_to_image_median_rank"] == 1


def test_a_set_without_a_readable_sample_ends_in_one_line(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"], bad=(0, 1))))
    with pytest.raises(RunError, match="none of its 2 samples"):
        evaluate_retrieval(toy_sets.encoder(), examples)


def test_a_model_whose_embeddings_are_not_finite_gets_no_score(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_retrieval_set(tmp_path / "set", ["a", "b"])))
    broken = dataclasses.replace(toy_sets.encoder(), text=lambda texts: torch.full((len(texts), 48), math.inf))
    with pytest.raises(RunError, match="not finite"):
        evaluate_retrieval(broken, examples)
