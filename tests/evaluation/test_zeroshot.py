"""Zero-shot scores against the definition written out, and what becomes of ties, bad images and broken models."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
import toy_sets
from triscale.errors import RunError, UsageError
from triscale.evaluation import zeroshot
from triscale.evaluation.datasets import open_set
from triscale.evaluation.encoder import Encoder
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.zeroshot import (
    build_classifier,
    classes_ahead,
    classification_scores,
    likeliest,
    predict,
    top_guesses,
)


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


RIGHT = {f"{n:04}": tuple({n % 12, n * 5 % 12, n * n % 12}) if n % 7 else () for n in range(60)}
GROUPS = tuple(n // 4 for n in range(12))


def demanding_set(folder: Path) -> EvaluationSet:
    """One with every complication: several right labels or none, a mask, merged names, levels, slices, bad images."""
    plain = open_set(str(toy_sets.write_set(folder / "demanding", labels=LABELS, bad=(5, 31))))
    return dataclasses.replace(
        plain,
        multi_label=True,
        right_labels=RIGHT,
        allowed=(1, 2, 4, 5, 6, 8, 11),
        levels={"groups": GROUPS, "halves": tuple(n // 6 for n in range(12))},
        slices={"first": frozenset(f"{n:04}" for n in range(20)), "none": frozenset({"nowhere"})},
    )


def test_masks_several_right_labels_levels_and_slices_are_scored_as_loops_do(tmp_path: Path) -> None:
    examples, encoder = demanding_set(tmp_path), toy_sets.encoder(7)
    found = predict(encoder, examples)
    scores = classification_scores(examples, found)
    classifier = build_classifier(encoder, examples)
    allowed = list(examples.allowed or ())
    ranks, at_level, hits, sure = [], [], {}, []
    for row, sample in enumerate(found.samples.tolist()):
        example = examples.read(sample)
        cosines = (encoder.embed_images([example.image]) @ classifier.T)[0].double().tolist()
        labels = RIGHT[example.key]
        rank, label = min((reference.rank_of(cosines, label, allowed), labels.index(label)) for label in labels)
        assert (found.ahead[row], found.labels[row]) == (rank, labels[label])
        chances = reference.softmax_loop(cosines, allowed, toy_sets.LOGIT_SCALE)
        best = sorted(allowed, key=lambda index, chances=chances: (-chances[index], index))[:5]
        assert found.guesses[row].tolist() == best
        assert found.probabilities[row].tolist() == pytest.approx([chances[index] for index in best], rel=1e-4)
        ranks.append(rank)
        sure.append(chances[best[0]])
        at_level.append(GROUPS[best[0]] in {GROUPS[label] for label in labels})
        hits[example.key] = rank == 0
    readable = [f"{n:04}" for n in range(60) if n not in (5, 31)]
    assert list(hits) == [key for key in readable if RIGHT[key]]
    first = [hit for key, hit in hits.items() if key < "0020"]
    expected = {
        "top1": sum(hits.values()) / len(hits),
        "top5": sum(rank < 5 for rank in ranks) / len(ranks),
        "ece": reference.expected_calibration_error(sure, list(hits.values()), 15),
        "unlabelled": sum(not RIGHT[key] for key in readable),
        "bad": 2,
        "bad_reasons": {"image-unreadable": 2},
        "allowed_classes": 7,
        "slices": {
            "first": {"samples": len(first), "top1": sum(first) / len(first)},
            "none": {"samples": 0, "top1": None},
        },
    }
    assert {key: scores[key] for key in expected} == {
        key: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value for key, value in expected.items()
    }
    assert scores["levels"]["groups"] == pytest.approx(sum(at_level) / len(at_level))
    assert scores["top1"] < scores["levels"]["groups"] < scores["levels"]["halves"]
    assert scores["samples"] + scores["unlabelled"] + scores["bad"] == 60


def test_a_class_that_may_not_be_guessed_ranks_behind_all_that_may(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=(3, 3, 0))))
    found = predict(toy_sets.encoder(), dataclasses.replace(examples, allowed=(0, 1)))
    assert found.ahead.tolist()[:2] == [2, 2] and found.labels.tolist() == [3, 3, 0]
    assert found.guesses.shape == (3, 2) and set(found.guesses.ravel().tolist()) == {0, 1}


def test_a_mask_of_all_classes_changes_nothing(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=LABELS)))
    masked = dataclasses.replace(examples, allowed=tuple(range(12)))
    scores = [scores_of(toy_sets.encoder(), each) for each in (examples, masked)]
    assert scores[1] == scores[0] | {"allowed_classes": 12}


def test_a_multi_label_set_without_any_label_ends_in_one_line(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set")))
    with pytest.raises(RunError, match="none of its 12 samples has a right class"):
        predict(toy_sets.encoder(), dataclasses.replace(examples, multi_label=True, right_labels={}))


@pytest.mark.parametrize(("labels", "says"), [((), "0 labels"), ((1, 2), "2 labels"), ((99,), "99 is out of range")])
def test_right_labels_that_do_not_fit_the_set_are_refused(tmp_path: Path, labels: tuple[int, ...], says: str) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set")))
    with pytest.raises(UsageError, match=says):
        predict(toy_sets.encoder(), dataclasses.replace(examples, right_labels={f"{n:04}": labels for n in range(12)}))


@given(st.lists(st.lists(st.integers(-2, 2), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_the_likeliest_classes_are_those_of_a_stable_sort(rows: list[list[int]], most: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32)
    assert torch.equal(likeliest(scores, most), scores.sort(dim=1, descending=True, stable=True).indices[:, :most])


def test_embeddings_are_kept_of_samples_all_over_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zeroshot, "EMBEDDINGS", 10)
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=LABELS, bad=(5,))))
    found = predict(toy_sets.encoder(), examples)
    assert found.samples[found.embedded].tolist() == [11, 17, 23, 29, 35, 41, 47, 53, 59]
    image = examples.read(int(found.samples[found.embedded[2]])).image
    np.testing.assert_allclose(found.embeddings[2], toy_sets.encoder().embed_images([image])[0].numpy(), atol=1e-6)
