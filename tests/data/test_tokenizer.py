"""Tokenizers of CLIP and of Hugging Face: the ids of their own libraries, cut and padded for our towers."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from foreign_models import MERGES, WORDS
from triscale.data.named_tokenizers import clip_tokenizer, for_hub, hub_tokenizer, is_clip, read_tokenizer
from triscale.data.text import SentencePieceTokenizer, train_tokenizer
from triscale.data.tokenizer import (
    JSON_FILE,
    MODEL_FILE,
    Cleaning,
    LibraryTokenizer,
    Tokenizer,
    file_name,
    library_part,
    open_tokenizer,
    pack_tokenizer,
)
from triscale.errors import UsageError

pytest.importorskip("ftfy", reason="the extra clip is not installed")
pytest.importorskip("regex", reason="the extra clip is not installed")
pytest.importorskip("tokenizers", reason="the extra clip is not installed")

BEGIN, END = WORDS - 2, WORDS - 1
THE, CAT, DOG = 512 + 1, 512 + 3, 512 + 5
ODD_TEXTS = [
    "",
    " \t\n ",
    "A photo of a CAT!",
    "don't I'LL we've 'tis 'S ſ's",
    "héllo ŵorld ½ ² ١ 漢字 ﷺ K İ ẞ ß",
    "😀👍🏽 👨‍👩‍👧 \u200b\ufeff\x00\x01",
    "&lt;b&gt; &amp;amp; &eacute;",
    "âœ” No problems, Ã©tÃ©",
    "<start_of_text> hi !!<start_of_text>",
    "<end_of_text>",
    "<ſtart_of_text> <START_OF_TEXT>",
    "12 345 --!!?? a-b_c",
    "word " * 200,
    "x" * 500,
]


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return open_tokenizer(clip_tokenizer(MERGES), 6)


def without_what_follows_the_end(rows: np.ndarray, end: int) -> np.ndarray:
    """Rows as a model sees them that pools at their first end."""
    ended = np.cumsum(rows == end, axis=1) - (rows == end) > 0
    return np.where(ended, 0, rows)


def test_words_are_merged_put_between_begin_and_end_and_padded_with_0(small: Tokenizer) -> None:
    assert small.vocabulary_size == WORDS and small.padding == 0
    expected = [[BEGIN, THE, CAT, END, 0, 0], [BEGIN, DOG, END, 0, 0, 0], [BEGIN, END, 0, 0, 0, 0]]
    assert small.encode(["The  cat", "dog", ""]).tolist() == expected


def test_what_is_too_long_is_cut_before_the_end_and_counted_whole(small: Tokenizer) -> None:
    text = "the cat the dog the cat the dog"
    assert small.encode([text]).tolist() == [[BEGIN, THE, CAT, THE, DOG, END]]
    assert small.count([text, "dog"]) == [10, 3]
    assert small.encode([text]).tolist() == [[BEGIN, THE, CAT, THE, DOG, END]]


def test_an_end_that_a_text_spells_out_is_its_end(small: Tokenizer) -> None:
    assert small.encode(["cat <end_of_text> dog"]).tolist() == [[BEGIN, CAT, END, 0, 0, 0]]


def test_a_tokenizer_is_its_content_and_travels_to_other_processes(small: Tokenizer) -> None:
    for again in (open_tokenizer(small.content, 6), pickle.loads(pickle.dumps(small))):
        assert isinstance(again, LibraryTokenizer)
        assert again.encode(["the cat"]).tolist() == small.encode(["the cat"]).tolist()
    assert file_name(small.content) == JSON_FILE
    assert file_name(train_tokenizer(["one two"] * 9, 20)) == MODEL_FILE


def test_both_kinds_are_tokenizers(small: Tokenizer) -> None:
    assert isinstance(small, Tokenizer)
    assert isinstance(SentencePieceTokenizer(train_tokenizer(["one two"] * 9, 20), 4), Tokenizer)


def test_ids_are_open_clips_on_odd_texts() -> None:
    open_clip = pytest.importorskip("open_clip.tokenizer", reason="open_clip is not installed")
    theirs, ours = open_clip.SimpleTokenizer(), open_tokenizer(read_tokenizer("open_clip"), 77)
    expected = without_what_follows_the_end(theirs(ODD_TEXTS).numpy(), theirs.eot_token_id)
    np.testing.assert_array_equal(ours.encode(ODD_TEXTS), expected)
    assert ours.vocabulary_size == 49408


@settings(max_examples=300)
@given(text=st.text(max_size=40))
def test_ids_are_open_clips_on_any_text(text: str) -> None:
    open_clip = pytest.importorskip("open_clip.tokenizer", reason="open_clip is not installed")
    theirs = open_clip._tokenizer
    expected = without_what_follows_the_end(theirs([text]).numpy(), theirs.eot_token_id)
    np.testing.assert_array_equal(_open_clips().encode([text]), expected)


_CACHE: list[Tokenizer] = []


def _open_clips() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(open_tokenizer(read_tokenizer("open_clip"), 77))
    return _CACHE[0]


@pytest.mark.parametrize("kind", ["whitespace", "lower", "canonicalize"])
def test_texts_are_cleaned_as_open_clip_does_before_tokenizers_of_the_hub(kind: Cleaning) -> None:
    open_clip = pytest.importorskip("open_clip.tokenizer", reason="open_clip is not installed")
    clean, library = open_clip.get_clean_fn(kind), library_part(clip_tokenizer(MERGES))
    ours = open_tokenizer(pack_tokenizer(library, cleaning=kind, padding=0, end=None), 600)
    plain = open_tokenizer(pack_tokenizer(library, cleaning="none", padding=0, end=None), 600)
    assert ours.encode(ODD_TEXTS).tolist() == plain.encode([clean(text) for text in ODD_TEXTS]).tolist()


def test_half_a_surrogate_pair_is_no_crash(small: Tokenizer) -> None:
    assert small.encode(["cat \ud800"])[0, 1] == CAT


def test_clips_tokenizer_written_for_the_hub_comes_back_with_the_same_ids(small: Tokenizer, tmp_path: Path) -> None:
    tokenizer, special = for_hub(small.content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    back = open_tokenizer(read_tokenizer(f"hf:{tmp_path}"), 6)
    texts = ["The  cat", "dog's", "", "the cat the dog the cat", "ÉTÉ 12"]
    assert back.encode(texts).tolist() == small.encode(texts).tolist()
    assert back.padding == 0 and back.vocabulary_size == WORDS
    assert open_tokenizer(hub_tokenizer(str(tmp_path), attended_padding=True), 6).padding == END


def test_clips_merges_are_known_whoever_wrote_them(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip is not installed")
    content = read_tokenizer("open_clip")
    tokenizer, special = for_hub(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(special))
    assert is_clip(content) and is_clip(hub_tokenizer(str(tmp_path)))
    assert not is_clip(clip_tokenizer(MERGES)) and not is_clip(b"\x0a")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{}",
        b'{"cleaning": "none", "padding": 0, "end": null, "tokenizer": {}}',
        b'{"cleaning": "pickle", "padding": 0, "end": null, "tokenizer": {}}',
        b'{"cleaning": "none", "padding": "0", "end": null, "tokenizer": {}}',
        b"{" * 100_000,
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        open_tokenizer(content, 6)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing.model"):
        read_tokenizer(str(tmp_path / "missing.model"))
    with pytest.raises(UsageError, match="tokenizer.json"):
        read_tokenizer(f"hf:{tmp_path}")
    with pytest.raises(UsageError, match="merges make no tokenizer"):
        clip_tokenizer(["no-such-piece another"])


def test_a_row_too_short_for_a_word_is_refused(small: Tokenizer) -> None:
    with pytest.raises(UsageError, match="1 tokens"):
        open_tokenizer(small.content, 1)
