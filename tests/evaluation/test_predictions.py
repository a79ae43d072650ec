"""Predictions come back from their file as they were, and a file that is not one is refused in a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import toy_sets
from triscale.errors import RunError, UsageError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.predictions import Predictions, predictions_file
from triscale.evaluation.zeroshot import classification_scores, predict


def made() -> Predictions:
    return Predictions(
        samples=np.array([0, 2, 3]),
        labels=np.array([1, 0, 1]),
        ahead=np.array([0, 1, 0]),
        guesses=np.array([[1, 0], [1, 0], [1, 0]]),
        probabilities=np.array([[0.75, 0.25], [0.5, 0.5], [1, 0]], np.float32),
        in_slices=np.array([[True], [False], [False]]),
        at_levels=np.zeros((3, 0), bool),
        embedded=np.array([0, 2]),
        embeddings=np.array([[1, 0], [0.6, 0.8]], np.float32),
        bad={"image-empty": 1},
    )


def same(one: Predictions, other: Predictions) -> bool:
    pairs = ((getattr(one, each.name), getattr(other, each.name)) for each in dataclasses.fields(Predictions))
    return all((a.dtype == b.dtype and np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    made().save(tmp_path / "new/a.safetensors")
    assert same(Predictions.load(tmp_path / "new/a.safetensors"), made())


def test_scores_can_be_made_again_from_the_file_alone(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", labels=[n % 12 for n in range(40)], bad=(3, 17))))
    predictions = predict(toy_sets.encoder(), examples)
    predictions.save(tmp_path / "a.safetensors")
    loaded = Predictions.load(tmp_path / "a.safetensors")
    loaded.require_fit(examples)
    assert classification_scores(examples, loaded) == classification_scores(examples, predictions)


FAULTS: dict[str, Callable[[dict[str, np.ndarray]], object]] = {
    "lacks": lambda arrays: arrays.pop("ahead"),
    "is int32": lambda arrays: arrays.update(labels=arrays["labels"].astype(np.int32)),
    "axes": lambda arrays: arrays.update(labels=arrays["labels"][None]),
    "has 2 rows": lambda arrays: arrays.update(labels=arrays["labels"][:2]),
    "negative": lambda arrays: arrays.update(guesses=-arrays["guesses"]),
    "row that is not there": lambda arrays: arrays.update(embedded=np.array([0, 3])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_whose_arrays_do_not_fit_each_other_is_refused(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    arrays = load_file(path)
    FAULTS[fault](arrays)
    save_file(arrays, path, metadata={"value": "{}"})
    with pytest.raises(UsageError, match="cannot be read" if fault == "lacks" else fault):
        Predictions.load(path)


@pytest.mark.parametrize("bad", ['{"no such reason": 1}', '{"image-empty": "1"}', "[1]", "{", "null", "[" * 100_000])
def test_counts_of_bad_samples_that_are_none_are_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "a.safetensors"
    made().save(path)
    save_file(load_file(path), path, metadata={"value": bad})
    with pytest.raises(UsageError, match="cannot be read"):
        Predictions.load(path)


@pytest.mark.parametrize("content", [None, b"", b"x" * 100, b"\xff" * 8 + b"{}", json.dumps({}).encode()])
def test_a_file_that_is_no_predictions_ends_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read") as error:
        Predictions.load(path)
    assert "\n" not in str(error.value)


def test_predictions_of_another_set_are_told_apart(tmp_path: Path) -> None:
    examples = open_set(str(toy_sets.write_set(tmp_path / "set", names=("a", "b"), labels=(0, 1, 0))))
    with pytest.raises(UsageError, match="'set' are of other samples"):
        made().require_fit(examples)


def test_every_name_of_a_set_has_a_file_of_its_own_inside_the_folder(tmp_path: Path) -> None:
    names = ["val", "a b", "../up", "..", ".", "a/b", "a%2Fb", "\udcff", "x" * 10_000, "x" * 9_999, "表", ""]
    paths = [predictions_file(tmp_path, name) for name in names]
    assert len(set(paths)) == len(names)
    for path in paths:
        assert path.parent == tmp_path / "predictions"
        made().save(path)
        assert path.is_file()


def test_predictions_that_cannot_be_written_end_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        made().save(tmp_path / "file/a.safetensors")
