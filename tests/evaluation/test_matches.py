"""Examples of retrieval: what is shown is what the whole score matrix says; their file survives being read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import reference
import toy_sets
from triscale.errors import RunError, UsageError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.matches import BEST, QUERIES, Matches, find_matches
from triscale.evaluation.retrieval import embed, evaluate_retrieval

CAPTIONS = [f"kind {n}\n" + "\n".join(f"kind {n} of {m}" for m in range(n % 4)) for n in range(60)]
BAD = (0, 7, 33)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(toy_sets.write_retrieval_set(tmp_path / "set", CAPTIONS, bad=BAD))


def test_the_best_captions_and_images_are_those_of_the_sorted_matrix(folder: str) -> None:
    _, matches = evaluate_retrieval(toy_sets.encoder(7), open_set(folder))
    found = embed(toy_sets.encoder(7), open_set(folder))
    image_of_text = found.image_of_text.tolist()
    of_images, of_texts = reference.retrieval_order(found.images, found.texts)
    text_ranks, image_ranks = reference.retrieval_ranks(found.images, found.texts, image_of_text)
    readable = [number for number in range(60) if number not in BAD]
    all_texts = [text for number in readable for text in CAPTIONS[number].strip().split("\n")]
    for query in range(QUERIES):
        image = query * len(readable) // QUERIES
        best = of_images[image][:BEST]
        assert matches.images[query] == readable[image] and matches.text_ranks[query] == text_ranks[image]
        assert [matches.captions[index] for index in matches.best_texts[query]] == [all_texts[text] for text in best]
        assert matches.text_is_own[query].tolist() == [image_of_text[text] == image for text in best]
        cosines = (found.images[image] @ found.texts[best].T).numpy()
        np.testing.assert_allclose(matches.text_scores[query], cosines, rtol=0, atol=1e-6)
        own = all_texts[of_images[image][text_ranks[image] - 1]]
        assert matches.captions[matches.own_texts[query]] == own
    for query in range(QUERIES):
        text = query * len(all_texts) // QUERIES
        best = of_texts[text][:BEST]
        assert matches.captions[matches.texts[query]] == all_texts[text]
        assert matches.own_images[query] == readable[image_of_text[text]]
        assert matches.image_ranks[query] == image_ranks[text]
        assert matches.best_images[query].tolist() == [readable[image] for image in best]


def test_what_is_saved_is_read_again(folder: str, tmp_path: Path) -> None:
    _, matches = evaluate_retrieval(toy_sets.encoder(), open_set(folder))
    matches.save(tmp_path / "predictions" / "set.safetensors")
    again = Matches.load(tmp_path / "predictions" / "set.safetensors")
    assert again.captions == matches.captions
    for name, array in vars(matches).items():
        np.testing.assert_array_equal(getattr(again, name), array, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros(24, dtype=np.int32)}, "images is int32"),
        ({"images": np.zeros(5, dtype=np.int64)}, "rows or columns where others have"),
        ({"best_images": np.full((24, 5), -1)}, "best_images is negative"),
        ({"best_texts": np.full((24, 5), 10_000)}, "a caption that is not there"),
        ({"text_scores": None}, "text_scores"),
        ("[1]", "no list of texts"),
        ('{"a": "b"}', "no list of texts"),
        ("[" * 100_000, "recursion"),
        (None, "value"),
    ],
)
def test_a_file_that_holds_something_else_is_one_line(
    folder: str, tmp_path: Path, change: dict[str, np.ndarray] | str | None, message: str
) -> None:
    path = tmp_path / "set.safetensors"
    _, matches = evaluate_retrieval(toy_sets.encoder(), open_set(folder))
    matches.save(path)
    arrays, value = load_file(path), json.dumps(list(matches.captions))
    if isinstance(change, dict):
        arrays = {name: array for name, array in (arrays | change).items() if array is not None}
        save_file(arrays, path, metadata={"value": value})
    else:
        save_file(arrays, path, metadata=None if change is None else {"value": change})
    with pytest.raises(UsageError, match=message) as caught:
        Matches.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_damaged_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        Matches.load(tmp_path / "none")
    (tmp_path / "damaged").write_bytes(b"\x10\0\0\0\0\0\0\0not a header at all")
    with pytest.raises(UsageError, match="cannot be read"):
        Matches.load(tmp_path / "damaged")


def test_a_set_that_has_changed_under_way_ends_in_one_line(folder: str, tmp_path: Path) -> None:
    found = embed(toy_sets.encoder(), open_set(folder))
    shorter = open_set(str(toy_sets.write_retrieval_set(tmp_path / "other", ["one caption"] * 60)))
    zeros = [torch.zeros(len(rows), dtype=torch.int64) for rows in (found.images, found.texts)]
    with pytest.raises(RunError, match="could not be read again"):
        find_matches(shorter, found.images, found.texts, found.image_of_text, found.samples, *zeros)
