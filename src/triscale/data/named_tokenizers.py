"""Tokenizers by name, for `--data.tokenizer`: open_clip's, Hugging Face's, and sentencepiece models in files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from triscale.data.tokenizer import (
    BEGIN_OF_TEXT,
    CLIP_WORDS,
    END_OF_TEXT,
    JSON_FILE,
    MAX_TOKENIZER_BYTES,
    Cleaning,
    file_name,
    library_part,
    pack_tokenizer,
    require,
)
from triscale.errors import UsageError

OPEN_CLIP = "open_clip"
HUB = "hf:"
_MERGES = 49152 - 256 - 2
"""Of OpenAI's file of merges only so many are in CLIP's vocabulary."""


def read_tokenizer(name: str) -> bytes:
    """The content of the tokenizer that `name` says, for `open_tokenizer`.

    Args:
        name: "open_clip"; "hf:NAME", NAME being a folder or a model of the hub; else a file, a sentencepiece model or a
            run's tokenizer.json.

    Raises:
        UsageError: it cannot be read, or a library that it needs is not installed.
    """
    if name == OPEN_CLIP:
        return clip_tokenizer(open_clip_merges())
    if name.startswith(HUB):
        return hub_tokenizer(name.removeprefix(HUB))
    return _read(Path(name))


def open_clip_merges() -> list[str]:
    """OpenAI's merges, as the installed open_clip has them; its code is not run."""
    found = find_spec("open_clip")
    if found is None or found.origin is None:
        raise UsageError("CLIP's merges come with open_clip: pip install 'triscale[clip]'")
    with gzip.open(Path(found.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in islice(file, 1, 1 + _MERGES)]  # the first line tells the version


def clip_tokenizer(merges: Iterable[str]) -> bytes:
    """CLIP's byte-level BPE (Radford et al., arXiv 2103.00020, section 2.4), with the same ids as open_clip's.

    Args:
        merges: lines of two pieces, the first merge first.
    """
    library = require("tokenizers")
    pairs = [_pair(line) for line in merges]
    units = _byte_units()
    pieces = [
        *units,
        *(unit + "</w>" for unit in units),
        *("".join(pair) for pair in pairs),
        BEGIN_OF_TEXT,
        END_OF_TEXT,
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    begin, end = len(pieces) - 2, len(pieces) - 1
    try:
        tokenizer = library.Tokenizer(library.models.BPE(vocabulary, pairs, end_of_word_suffix="</w>"))
    except Exception as error:  # what the library raises is a bare Exception
        raise UsageError(f"the merges make no tokenizer: {str(error)[:200]}") from error
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([library.AddedToken(text, normalized=False) for text in (BEGIN_OF_TEXT, END_OF_TEXT)])
    tokenizer.post_processor = library.processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A {END_OF_TEXT}", special_tokens=[(BEGIN_OF_TEXT, begin), (END_OF_TEXT, end)]
    )
    return pack_tokenizer(json.loads(tokenizer.to_str()), cleaning="clip", padding=0, end=end)


def is_clip(content: bytes) -> bool:
    """Whether a tokenizer has CLIP's merges, so that open_clip's own gives the same ids."""
    if file_name(content) != JSON_FILE:
        return False
    merges = library_part(content).get("model", {}).get("merges")
    return isinstance(merges, list) and [_pair(each) for each in merges] == [_pair(each) for each in open_clip_merges()]


def for_hub(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json, as transformers reads them, of a `LibraryTokenizer`'s content.

    Of CLIP's, the library's own normalisers take the place of what open_clip does to a text, so that damaged or escaped
    texts may have other ids.
    """
    values = json.loads(content)
    if values["cleaning"] == "clip":
        return _clip_for_hub(values["tokenizer"])
    names = {each["id"]: each["content"] for each in values["tokenizer"].get("added_tokens") or ()}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if values["end"] in names:
        settings |= {"eos_token": names[values["end"]], "pad_token": names[values["end"]]}
    if values["padding"] in names and (values["padding"] or "pad_token" not in settings):
        settings["pad_token"] = names[values["padding"]]
    return values["tokenizer"], settings


def _clip_for_hub(tokenizer: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {BEGIN_OF_TEXT: "<|startoftext|>", END_OF_TEXT: "<|endoftext|>"}
    text = json.dumps(tokenizer)
    for ours, theirs in names.items():
        text = text.replace(json.dumps(ours), json.dumps(theirs))
    library = require("tokenizers")
    parts, normal = library.pre_tokenizers, library.normalizers
    whole = library.Tokenizer.from_str(text)
    whole.normalizer = normal.Sequence([normal.NFC(), normal.Replace(library.Regex(r"\s+"), " "), normal.Lowercase()])
    split = parts.Split(library.Regex(CLIP_WORDS), behavior="removed", invert=True)
    whole.pre_tokenizer = parts.Sequence([split, parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    begin, end = names.values()
    settings = {"tokenizer_class": "CLIPTokenizer", "bos_token": begin, "eos_token": end, "unk_token": end}
    return json.loads(whole.to_str()), {**settings, "pad_token": end}


def hub_tokenizer(name: str, *, attended_padding: bool = False, cleaning: Cleaning = "none") -> bytes:
    """The tokenizer of a folder or of a model of the hub, from its tokenizer.json.

    Args:
        name: the folder or the model.
        attended_padding: whether the model attends to padding, as SigLIP does, and so needs just the tokenizer's own.
            Otherwise, where the padding token ends texts too, as with OpenAI's CLIP, 0 fills rows behind the end.
        cleaning: what becomes of a text beforehand.

    Raises:
        UsageError: there is none that can be read.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(name)
    tokenizer = _object(folder / "tokenizer.json")
    settings = folder / "tokenizer_config.json"
    special = _object(settings) if settings.exists() else {}
    padding, end = _special(special, "pad_token", tokenizer), _special(special, "eos_token", tokenizer)
    if attended_padding:
        end = None  # the text goes on behind an end that it spells out itself
    elif padding is None or padding == end:
        padding = 0
    return pack_tokenizer(tokenizer, cleaning=cleaning, padding=padding or 0, end=end)


def _downloaded(name: str) -> Path:
    hub: Any = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer_config.json"]))
    except Exception as error:  # network, permission, a name that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"tokenizer hf:{name}: no such folder, and the hub does not give it: {reason}") from error


def _special(settings: Mapping[str, Any], role: str, tokenizer: Mapping[str, Any]) -> int | None:
    """The id of the token that tokenizer_config.json gives a role, by the names in tokenizer.json."""
    token = settings.get(role)
    text = token.get("content") if isinstance(token, dict) else token
    added = tokenizer.get("added_tokens")
    for each in added if isinstance(added, list) else ():
        if isinstance(each, dict) and each.get("content") == text and type(each.get("id")) is int:
            return each["id"]
    return None


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"tokenizer {str(path)!r} is not JSON") from error
    if not isinstance(values, dict):
        raise UsageError(f"tokenizer {str(path)!r} is not a JSON object")
    return values


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise UsageError(f"tokenizer {str(path)!r} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from error


def _pair(merge: str | list[str]) -> tuple[str, ...]:
    """A merge as two pieces; the library writes either form."""
    return tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)


def _byte_units() -> list[str]:
    """GPT-2's character for each byte (Radford et al., 2019), printable bytes first: the order of CLIP's first ids."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = sum(byte not in printable for byte in range(256))
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]
