"""The tokenizer: trained alike everywhere, from whatever captions there are, giving rows that a tower can read."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from triscale.data.text import END, PAD, UNKNOWN, SentencePieceTokenizer, train_tokenizer
from triscale.errors import UsageError

SHAPES = ["circle", "square", "triangle", "star", "heart"]
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
CAPTIONS = [f"a {colour} {shape} above a {other} one" for colour in COLOURS for shape in SHAPES for other in COLOURS]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(CAPTIONS, 200)


def test_training_gives_equal_bytes_in_another_process(model: bytes):
    assert train_tokenizer(iter(CAPTIONS), 200) == model
    script = (
        "import hashlib; from triscale.data.text import train_tokenizer; "
        f"print(hashlib.sha256(train_tokenizer({CAPTIONS!r}, 200)).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(model).hexdigest()
    assert done.stderr == ""


def test_training_is_quiet(capfd: pytest.CaptureFixture[str]):
    train_tokenizer(CAPTIONS, 100)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("captions", [["a"], ["a", "b"], ["cat"] * 10, ["", "😀"], ["a\tb\nc"], ["x" * 100_000]])
def test_the_vocabulary_shrinks_to_what_few_captions_allow(captions: list[str]):
    tokenizer = SentencePieceTokenizer(train_tokenizer(captions, 8192), 8)
    assert 4 < tokenizer.vocabulary_size < 100
    row = tokenizer.encode(captions[-1:])[0]
    assert UNKNOWN not in row
    assert END in row


def test_the_vocabulary_is_at_most_what_was_asked(model: bytes):
    assert SentencePieceTokenizer(model, 8).vocabulary_size <= 200
    assert SentencePieceTokenizer(train_tokenizer(CAPTIONS, 60), 8).vocabulary_size <= 60


@pytest.mark.parametrize("captions", [[], ["", " \n", "\x00"]])
def test_no_captions_is_a_mistake_of_the_user(captions: list[str]):
    with pytest.raises(UsageError, match="no captions"):
        train_tokenizer(captions, 100)


@pytest.mark.parametrize("vocabulary", [-1, 0, 3, 10])
def test_a_vocabulary_too_small_for_the_characters_is_refused_in_one_line(vocabulary: int):
    with pytest.raises(UsageError, match="raise --data.vocabulary") as caught:
        train_tokenizer(CAPTIONS, vocabulary)
    assert "\n" not in str(caught.value)


def test_scripts_with_more_characters_than_tokens_are_spelled_not_unknown():
    common = ["猫と犬"] * 20_000
    rare = ["".join(chr(0x4E00 + 30 * line + i) for i in range(30)) for line in range(20)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(common + rare, 500), 128)
    assert tokenizer.vocabulary_size <= 500
    rows = tokenizer.encode(rare)
    assert UNKNOWN not in rows
    assert len({row.tobytes() for row in rows}) == len(rare)


def test_rows_are_tokens_then_the_end_then_padding(model: bytes):
    tokenizer = SentencePieceTokenizer(model, 6)
    texts = ["", "a", "a red circle above a blue one and much more besides", "日本"]
    rows = tokenizer.encode(texts)
    assert rows.shape == (4, 6)
    assert rows.dtype == np.int64
    assert rows[0].tolist() == [END, PAD, PAD, PAD, PAD, PAD]
    assert rows[2, -1] == END
    for row in rows:
        end = row.tolist().index(END)
        assert PAD not in row[:end]
        assert not row[end + 1 :].any()
    assert rows.max() < tokenizer.vocabulary_size
    assert tokenizer.encode([]).shape == (0, 6)


def test_case_and_width_do_not_matter(model: bytes):
    tokenizer = SentencePieceTokenizer(model, 12)
    rows = tokenizer.encode(["a red circle", "A Red CIRCLE", "ａ ｒｅｄ circle", "  a red   circle "])
    assert (rows == rows[0]).all()


def test_a_tokenizer_pickles_to_workers(model: bytes):
    tokenizer = SentencePieceTokenizer(model, 12)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.content == model
    assert np.array_equal(copy.encode(CAPTIONS), tokenizer.encode(CAPTIONS))


def test_a_damaged_model_is_a_mistake_of_the_user(model: bytes):
    for damaged in (b"", b"hello", model[: len(model) // 2], model[100:]):
        with pytest.raises(UsageError, match="tokenizer is not a sentencepiece model"):
            SentencePieceTokenizer(damaged, 8)


def test_a_model_whose_padding_is_not_0_is_refused():
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=written, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(UsageError, match="pad with id 0"):
        SentencePieceTokenizer(written.getvalue(), 8)


def test_a_row_without_room_for_a_word_is_refused(model: bytes):
    with pytest.raises(UsageError, match="raise --data.tokens"):
        SentencePieceTokenizer(model, 1)
