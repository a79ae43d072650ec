"""From a sample's sidecars to the one caption that a draw of it trains on, and to its id among positives.

Sidecars are untrusted: sizes are limited, control characters go, and what is wrong raises BadSample with a reason.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from triscale.data.samples import BadSample, Sample

MAX_CAPTION_BYTES = 16 * 1024
MAX_METADATA_BYTES = 1024 * 1024

# C0 and C1 control characters other than white space; NUL among them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_LABEL = re.compile(rb"\s*([0-9]{1,18})\s*")


def all_captions(sample: Sample, fields: Sequence[str]) -> list[str]:
    """Every candidate caption of `sample`, cleaned, field after field.

    Args:
        fields: "txt" (each line of the `.txt` is a candidate) or "json:NAME" (a string, or a list of them, in the
            `.json`). A field that a sample lacks is passed over.

    Raises:
        BadSample: caption-missing, caption-empty, caption-not-utf8, caption-too-long, metadata-not-json or
            metadata-too-large.
    """
    return [caption for candidates in _candidates(sample, fields) for caption in candidates]


def choose_caption(
    sample: Sample, *, fields: Sequence[str], part_dropout: float = 0.0, rng: np.random.Generator
) -> str:
    """Draw one caption: a field among those that `sample` has, then a candidate, then the parts that stay.

    Args:
        fields: as in `all_captions`.
        part_dropout: probability that a comma-separated part, other than the first, is left out.

    Raises:
        BadSample: as `all_captions`; the draw does not matter to it.
    """
    candidates = _candidates(sample, fields)
    field = candidates[int(rng.integers(len(candidates)))]
    caption = field[int(rng.integers(len(field)))]
    parts = [part for part in caption.split(",") if part.strip()]
    if part_dropout == 0 or len(parts) < 2:
        return caption
    first, *others = parts
    kept = rng.random(len(others)) >= part_dropout
    return ",".join([first, *(part for part, keep in zip(others, kept, strict=True) if keep)])


def fill_template(caption: str, templates: Sequence[str], rng: np.random.Generator) -> str:
    """Put `caption` in place of the {c} of one of `templates`, drawn at random; without templates it stays as it is."""
    if not templates:
        return caption
    return templates[int(rng.integers(len(templates)))].replace("{c}", caption)


def read_label(sample: Sample) -> int:
    """The number in the `.cls` sidecar, at least 0. Raises BadSample: label-missing or label-not-a-number."""
    if sample.label is None:
        raise BadSample("label-missing")
    match = _LABEL.fullmatch(sample.label)
    if match is None or len(sample.label) > MAX_CAPTION_BYTES:
        raise BadSample("label-not-a-number")
    return int(match[1])


def sample_id(sample: Sample, mode: Literal["none", "label", "caption"], caption: str) -> int:
    """What makes samples positives of each other: those of an equal id; a negative id is unique.

    Args:
        mode: "label" is the `.cls` number; "caption" a 63-bit hash of `caption`, whatever its case and spacing;
            "none" is -1.
        caption: the drawn caption, before any template.
    """
    if mode == "none":
        return -1
    if mode == "label":
        return read_label(sample)
    spelled = " ".join(caption.casefold().split())
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little") >> 1


def _candidates(sample: Sample, fields: Sequence[str]) -> list[list[str]]:
    """The non-empty captions of each field that the sample has; at least one field, at least one caption in each."""
    found = [raw for raw in (_raw_captions(sample, field) for field in fields) if raw is not None]
    if not found:
        raise BadSample("caption-missing")
    candidates = [[caption for caption in map(_clean, raw) if caption] for raw in found]
    candidates = [field for field in candidates if field]
    if not candidates:
        raise BadSample("caption-empty")
    return candidates


def _raw_captions(sample: Sample, field: str) -> list[str] | None:
    """A field's captions as they stand; None where the sample lacks the field."""
    if field == "txt":
        return None if sample.text is None else _decode(sample.text).splitlines()
    value = _metadata(sample).get(field.removeprefix("json:"))
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list):
        return None
    captions = [caption for caption in captions if isinstance(caption, str)]
    if any(len(caption.encode("utf-8", "ignore")) > MAX_CAPTION_BYTES for caption in captions):
        raise BadSample("caption-too-long")
    return captions


def _decode(text: bytes) -> str:
    if len(text) > MAX_CAPTION_BYTES:
        raise BadSample("caption-too-long")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("caption-not-utf8") from None


def _metadata(sample: Sample) -> dict[str, object]:
    """The `.json` sidecar; empty where there is none."""
    if sample.metadata is None:
        return {}
    if len(sample.metadata) > MAX_METADATA_BYTES:
        raise BadSample("metadata-too-large")
    try:
        value = json.loads(sample.metadata)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise BadSample("metadata-not-json") from None
    if not isinstance(value, dict):
        raise BadSample("metadata-not-json")
    return value


def _clean(caption: str) -> str:
    """Without control characters and lone surrogates (JSON can spell them), runs of white space as one space."""
    visible = _CONTROL.sub("", caption).encode("utf-8", "ignore").decode("utf-8")
    return " ".join(visible.split())
