"""Texts to token rows, by one of two kinds of tokenizer: sentencepiece, and those of Hugging Face's `tokenizers`.

A tokenizer is its content, bytes that a run folder keeps: a sentencepiece model (tokenizer.model), or JSON around the
library's own tokenizer.json with what that leaves open: how texts are cleaned beforehand, and the padding id.
"""

from __future__ import annotations

import html
import json
import string
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from jaxtyping import Int64

from triscale.data.text import SentencePieceTokenizer
from triscale.errors import UsageError

Cleaning = Literal["none", "clip", "whitespace", "lower", "canonicalize"]
"""What becomes of a text before the library sees it: nothing; CLIP's words; or, as open_clip names what it does before
tokenizers of the hub, mended and with single spaces, in lower case besides, or without punctuation as well."""
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
MAX_TOKENIZER_BYTES = 256 << 20
"""Most that is read as a tokenizer."""

# open_clip's and OpenAI's words: https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py
BEGIN_OF_TEXT, END_OF_TEXT = "<start_of_text>", "<end_of_text>"
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
"""What CLIP takes as a word, as a pattern."""


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to token rows of one length."""

    @property
    def content(self) -> bytes:
        """What `open_tokenizer` makes it from again."""
        ...

    @property
    def length(self) -> int:
        """Tokens in a row."""
        ...

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens, special ones included; every token is below it."""
        ...

    @property
    def padding(self) -> int:
        """The id that fills a row."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with the special ones, uncut: above `length`, `encode` cuts it."""
        ...

    def encode(self, texts: Sequence[str]) -> Int64[np.ndarray, "n length"]:
        """Token rows, cut where too long, padded where short."""
        ...


class LibraryTokenizer:
    """A tokenizer of Hugging Face's library `tokenizers`; the extra `clip`.

    Args:
        content: as `pack_tokenizer` writes it.
        length: tokens in a row; at least 2.

    Attributes:
        padding: the id that fills a row.
        end: the id behind which there is padding only; None if any id may follow any.

    Raises:
        UsageError: `content` is damaged, or a library is not installed.
    """

    def __init__(self, content: bytes, length: int) -> None:
        if length < 2:
            raise UsageError(f"a row of {length} tokens cannot hold a word and the end token: raise --data.tokens")
        self.content, self.length = content, length
        values = _parse(content)
        self.padding: int = values["padding"]
        self.end: int | None = values["end"]
        self._clean: Callable[[str], str | list[str]] | None = _cleaning(values["cleaning"])
        library = require("tokenizers")
        try:
            self._library: Any = library.Tokenizer.from_str(json.dumps(values["tokenizer"]))
        except Exception as error:  # what the library raises is a bare Exception
            raise UsageError(f"the tokenizer cannot be read: {str(error)[:200]}") from error
        self._library.no_padding()

    def __reduce__(self) -> tuple[type[LibraryTokenizer], tuple[bytes, int]]:
        return LibraryTokenizer, (self.content, self.length)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=0) + 1

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text with the special ones, uncut."""
        self._library.no_truncation()
        return [len(self._ids(text)) for text in texts]

    def encode(self, texts: Sequence[str]) -> Int64[np.ndarray, "n length"]:
        """Token rows: special tokens as the tokenizer has them, padding behind the end of the text.

        An end of the text that the text itself spells out is its end, as for the models, which pool there.
        """
        self._library.enable_truncation(self.length)
        rows = np.full((len(texts), self.length), self.padding, dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self._ids(text)
            if self.end is not None and self.end in ids:
                ids = ids[: ids.index(self.end) + 1]
            row[: len(ids)] = ids
        return rows

    def _ids(self, text: str) -> list[int]:
        # Python's str may hold half of a surrogate pair, the library's not.
        text = text.encode("utf-8", "replace").decode("utf-8")
        cleaned = text if self._clean is None else self._clean(text)
        return self._library.encode(cleaned, is_pretokenized=isinstance(cleaned, list)).ids


def open_tokenizer(content: bytes, length: int) -> Tokenizer:
    """The tokenizer that `content` holds, of rows of `length` tokens.

    Raises:
        UsageError: it holds none, or one that needs a library which is not installed.
    """
    kind = LibraryTokenizer if file_name(content) == JSON_FILE else SentencePieceTokenizer
    return kind(content, length)


def file_name(content: bytes) -> str:
    """What a run folder calls the file of a tokenizer."""
    return JSON_FILE if content.startswith(b"{") else MODEL_FILE


def pack_tokenizer(tokenizer: dict[str, Any], *, cleaning: Cleaning, padding: int, end: int | None) -> bytes:
    """The content of a `LibraryTokenizer`.

    Args:
        tokenizer: the library's own tokenizer.json.
        cleaning: what becomes of a text beforehand; "clip" before CLIP's merges.
        padding: the id that fills a row.
        end: the id behind which there is padding only; None if any id may follow any.
    """
    return json.dumps({"cleaning": cleaning, "padding": padding, "end": end, "tokenizer": tokenizer}).encode()


def library_part(content: bytes) -> dict[str, Any]:
    """The library's own tokenizer.json in the content of a `LibraryTokenizer`."""
    return _parse(content)["tokenizer"]


def require(name: str) -> Any:
    """A library of the extra `clip`; UsageError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UsageError(f"this tokenizer needs {name}: pip install 'triscale[clip]'") from error


def _cleaning(kind: Cleaning) -> Callable[[str], str | list[str]] | None:
    """The function that cleans a text: mended and unescaped, then as `kind` says; of "clip" its words."""
    if kind == "none":
        return None
    ftfy = require("ftfy")

    def mended(text: str) -> str:
        return html.unescape(html.unescape(ftfy.fix_text(text)))

    if kind == "canonicalize":
        removed = str.maketrans("", "", string.punctuation)
        return lambda text: " ".join(mended(text).replace("_", " ").translate(removed).lower().split())
    if kind in ("whitespace", "lower"):
        return lambda text: " ".join((mended(text).lower() if kind == "lower" else mended(text)).split())
    pattern = require("regex")
    words = pattern.compile(f"{BEGIN_OF_TEXT}|{END_OF_TEXT}|{CLIP_WORDS}", pattern.IGNORECASE)
    return lambda text: words.findall(" ".join(mended(text).split()).lower())


def _parse(content: bytes) -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError("the tokenizer is damaged: it is not JSON") from error
    if not isinstance(values, dict) or set(values) != {"cleaning", "padding", "end", "tokenizer"}:
        raise UsageError("the tokenizer is no tokenizer.json of a run: name one of Hugging Face's as hf:FOLDER")
    ends = values["end"] is None or type(values["end"]) is int
    if values["cleaning"] not in get_args(Cleaning) or type(values["padding"]) is not int or not ends:
        raise UsageError("the tokenizer is damaged: cleaning, padding or end cannot be")
    return values
