"""Zero-shot scores against the definition written out, and what becomes of ties, bad images and broken models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import toy_sets
from triscale.errors import RunError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.encoder import Encoder
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.zeroshot import classes_ahead, classification_scores, predict, top_guesses


def scores_of(encoder: Encoder, examples: EvaluationSet) -> dict[str, Any]:
    return classification_scores(examples, predict(encoder, examples))


LABELS = tuple(int(number * number) % 12 for number in range(60))  # uneven, and some classes never occur


def literal_scores(examples: EvaluationSet) -> dict[str, float]:
    """CLIP's classifier as its paper words it, class by class and image by image, in float64."""
    classifier = []
    for name in examples.classnames:
        rows = [toy_sets.embed_texts([template.replace("{c}", name)])[0].numpy() for template in examples.templates]
        mean = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
        classifier.append(mean / np.linalg.norm(mean))
    places: list[tuple[int, int]] = []
    for index in range(len(examples)):
        example = examples.read(index)
        image = toy_sets.embed_images(torch.from_numpy(example.image).permute(2, 0, 1)[None])[0].numpy()
        scores = [float(row @ image) / np.linalg.norm(image) for row in classifier]
        ranking = sorted(range(len(scores)), key=lambda index, scores=scores: (-scores[index], index))
        places.append((example.labels[0], ranking.index(example.labels[0])))
    labels = sorted({label for label, _ in places})
    by_class = [[place == 0 for label, place in places if label == wanted] for wanted in labels]
    return {
        "top1": sum(place < 1 for _, place in places) / len(places),
        "top5": sum(place < 5 for _, place in places) / len(places),
        "mean_per_class": sum(sum(hits) / len(hits) for hits in by_class) / len(by_class),
    }


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_scores_are_those_of_the_definition(tmp_path: Path, batch_size: int) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=LABELS)))
    result = scores_of(toy_sets.encoder(batch_size), examples)
    expected = literal_scores(examples)
    assert len(set(expected.values())) == 3, "scores that are alike would not tell which is which"
    assert 0.2 < expected["top1"] < 0.9
    assert {key: result[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert (result["task"], result["samples"], result["classes"]) == ("classification", 60, 12)
    intervals = {f"{key}_interval" for key in expected}
    assert set(result) == {"task", "samples", "classes", "ece", *expected, *intervals}
    assert all(result[f"{key}_interval"][0] < result[key] < result[f"{key}_interval"][1] for key in expected)


def test_bad_images_are_left_out_and_counted(tmp_path: Path) -> None:
    whole = scores_of(toy_sets.encoder(1), open_set(str(toy_sets.write_set(tmp_path / "whole", labels=LABELS[:40]))))
    damaged = toy_sets.write_set(tmp_path / "damaged", labels=LABELS, bad=range(40, 60))
    scores = scores_of(toy_sets.encoder(1), open_set(str(damaged)))
    assert scores.pop("bad") == 20 and scores.pop("bad_reasons") == {"image-unreadable": 20}
    same = [key for key in whole if not key.endswith("_interval")]  # which depend on the set's name
    assert scores.keys() == whole.keys() and [scores[key] for key in same] == [whole[key] for key in same]


def test_entries_that_a_shard_holds_twice_are_counted_as_bad(tmp_path: Path) -> None:
    folder = toy_sets.write_set(tmp_path / "set", labels=(1, 2))
    image = toy_sets.png(toy_sets.picture("kind 0", 0))
    toy_sets.write_tar(folder / "test/0.tar", {"a.png": image, "a.cls": b"0", "../b.png": image, "c.cls": b"1"})
    assert scores_of(toy_sets.encoder(), open_set(str(folder)))["bad"] == 2


def test_merged_classes_are_counted(tmp_path: Path) -> None:
    names = ("kind 0", "kind 1", "kind 0", "kind 1")
    result = scores_of(
        toy_sets.encoder(), open_set(str(toy_sets.write_set(tmp_path / "set", names=names, labels=(0, 1, 2, 3))))
    )
    assert (result["classes"], result["merged_classes"]) == (2, 2)


def test_of_equal_scores_the_first_class_ranks_first() -> None:
    assert classes_ahead(torch.zeros(3, 4), torch.tensor([0, 2, 3])).tolist() == [0, 2, 3]


def test_a_model_whose_embeddings_are_not_finite_gets_no_score(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set")))
    broken = dataclasses.replace(toy_sets.encoder(), image=lambda images: torch.full((len(images), 48), math.nan))
    with pytest.raises(RunError, match="not finite"):
        scores_of(broken, examples)


def test_a_set_without_a_readable_image_ends_in_one_line(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", bad=range(12))))
    with pytest.raises(RunError, match="none of its 12 samples"):
        scores_of(toy_sets.encoder(), examples)


def test_a_file_that_vanished_ends_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/1.png").write_bytes(toy_sets.png(toy_sets.picture("a", 1)))
    examples = open_set(str(tmp_path / "set"))
    (tmp_path / "set/a/1.png").unlink()
    with pytest.raises(RunError, match="could not be read"):
        scores_of(toy_sets.encoder(), examples)


def test_guesses_are_the_likeliest_classes_of_images_drawn_from_all_over_the_set(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=LABELS, bad=(20, 21))))
    guesses = top_guesses(examples, predict(toy_sets.encoder(), examples), count=6)
    read = {index: examples.read(index) for index in range(60) if index not in (20, 21)}
    shown = [next(i for i, each in read.items() if np.array_equal(each.image, guess.image)) for guess in guesses]
    assert len(set(shown)) == 6 and min(shown) < 20 < 40 < max(shown)
    assert [guess.truth for guess in guesses] == [toy_sets.NAMES[LABELS[index]] for index in shown]
    texts = toy_sets.encoder().embed_texts(
        [template.replace("{c}", n) for n in toy_sets.NAMES for template in toy_sets.TEMPLATES]
    )
    classifier = torch.nn.functional.normalize(texts.reshape(12, 3, -1).mean(1), dim=-1)
    chances = (20.0 * toy_sets.encoder().embed_images([guesses[2].image]) @ classifier.T).softmax(1)[0]
    best = sorted(range(12), key=lambda index: -float(chances[index]))[:3]
    assert guesses[2].names == tuple(toy_sets.NAMES[index] for index in best)
    assert guesses[2].probabilities == pytest.approx([float(chances[index]) for index in best], rel=1e-4)


def test_guesses_are_no_more_than_there_are_images_and_classes(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", names=("a", "b"), labels=(1, 0), bad=(0,))))
    guesses = top_guesses(examples, predict(toy_sets.encoder(), examples), count=5)
    assert [len(guess.names) for guess in guesses] == [2]
