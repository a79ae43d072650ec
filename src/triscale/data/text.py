"""Captions to rows of tokens: a sentencepiece model trained from the captions at hand.

Unigram sentencepiece (Kudo, arXiv 1804.10959) after NFKC and case folding, as BASIC (arXiv 2111.10050) tokenizes.
"""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import sentencepiece
from jaxtyping import Int64

from triscale.errors import UsageError

PAD, UNKNOWN, BEGIN, END = 0, 1, 2, 3
MAX_TRAINING_CAPTIONS = 1_000_000
MAX_TRAINING_BYTES = 4096
_BYTES = 256
_LEAST_COVERAGE = 0.98  # sentencepiece takes no less
_ALPHABET = 64
"""So few characters are all worth a token, however small the vocabulary."""


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> bytes:
    """Train a sentencepiece model; the same captions in the same order give the same bytes.

    Args:
        captions: the first million are used, of each the first 4 KiB.
        vocabulary: largest number of tokens, 4 special ones among them; it shrinks to what the captions allow.

    Raises:
        UsageError: there is no caption, or `vocabulary` has no room for the characters that they use.
    """
    sentences = [caption for caption in islice(map(_shorten, captions), MAX_TRAINING_CAPTIONS) if caption]
    if not sentences:
        raise UsageError("no captions to train a tokenizer from: check --data.train and --data.caption-fields")
    coverage = _character_coverage(sentences, vocabulary)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            character_coverage=coverage,
            byte_fallback=coverage < 1,
            normalization_rule_name="nmt_nfkc_cf",
            max_sentence_length=2 * MAX_TRAINING_BYTES,
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=BEGIN,
            eos_id=END,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"no vocabulary of {vocabulary} tokens can be made of these {len(sentences)} captions: "
            f"raise --data.vocabulary ({_last_line(error)})"
        ) from error
    return model.getvalue()


class SentencePieceTokenizer:
    """Texts to token rows of one length.

    Args:
        content: a sentencepiece model, as `train_tokenizer` gives it or made elsewhere with pad id 0.
        length: tokens in a row; at least 2.

    Raises:
        UsageError: `content` is not a sentencepiece model, or lacks padding with id 0 or an end token.
    """

    def __init__(self, content: bytes, length: int) -> None:
        if length < 2:
            raise UsageError(f"a row of {length} tokens cannot hold a word and the end token: raise --data.tokens")
        self.content = content
        self.length = length
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = len(content) > 0 and self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError):
            loaded = False
        if not loaded:
            raise UsageError("the tokenizer is not a sentencepiece model, or it is damaged")
        if self._processor.pad_id() != PAD or self._processor.eos_id() < 0:
            raise UsageError("the tokenizer must pad with id 0 and have an end token: train one from the captions")

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, int]]:
        # To worker processes travels the model, not the C++ object.
        return SentencePieceTokenizer, (self.content, self.length)

    @property
    def padding(self) -> int:
        """The id that fills a row."""
        return PAD

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, special ones included; every token is below it."""
        return self._processor.vocab_size()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with the end token, uncut: above `length`, `encode` cuts it."""
        return [len(tokens) + 1 for tokens in self._processor.encode(list(texts), num_threads=1)]

    def encode(self, texts: Sequence[str]) -> Int64[np.ndarray, "n length"]:
        """Token rows: a text's tokens, cut where too long, the end token, then padding (0)."""
        rows = np.full((len(texts), self.length), PAD, dtype=np.int64)
        end = self._processor.eos_id()
        for row, tokens in zip(rows, self._processor.encode(list(texts), num_threads=1), strict=True):
            kept = tokens[: self.length - 1]
            row[: len(kept)] = kept
            row[len(kept)] = end
        return rows


def _shorten(caption: str) -> str:
    """Its first 4 KiB as one line, without NUL: the trainer takes a line as a sentence and drops longer ones."""
    one_line = " ".join(caption.replace("\0", " ").split())
    return one_line.encode("utf-8", "ignore")[:MAX_TRAINING_BYTES].decode("utf-8", "ignore")


def _character_coverage(sentences: Sequence[str], vocabulary: int) -> float:
    """Fraction of the text whose characters are tokens of their own, the most frequent first.

    1 where that leaves at least half of the vocabulary to words. Otherwise (scripts of thousands of characters) rarer
    ones are spelled in UTF-8 bytes, for which 256 tokens are set aside, instead of all becoming the one unknown token.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(unicodedata.normalize("NFKC", sentence).casefold())
    kept = (vocabulary - _BYTES) // 2
    if len(counts) <= max(vocabulary // 2, _ALPHABET) or kept < 1:
        return 1.0
    return max(_LEAST_COVERAGE, sum(number for _, number in counts.most_common(kept)) / counts.total())


def _last_line(error: Exception) -> str:
    """The sentence of a sentencepiece error, without source line and condition."""
    return " ".join(str(error).split()).rpartition("] ")[2].rstrip(".") or type(error).__name__
