"""Tables of samples: which columns hold what, and the sample that a row makes; for CSV, Parquet and Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from triscale.data.captions import LABEL_SEPARATOR
from triscale.data.entries import MAX_IMAGE_BYTES
from triscale.data.files import read_below
from triscale.data.samples import BadSample, Sample
from triscale.errors import UsageError

USUAL_COLUMNS = {
    "image": ("filepath", "image", "image_path", "img", "path", "file_name", "filename", "file"),
    "caption": ("title", "caption", "captions", "text"),
    "label": ("label", "labels", "cls", "class"),
}
"""Names that a column is found by where none is given; open_clip's CSV files have `filepath` and `title`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The names of a table's columns that samples are made of."""

    image: str
    """A path below the root, encoded bytes, or a struct {bytes, path} as Hugging Face's data sets have it."""
    captions: tuple[str, ...]
    """Text, or lists of text; all are candidates."""
    label: str | None

    @property
    def beside_image(self) -> list[str]:
        """All but the image, each once."""
        return list(dict.fromkeys([*self.captions, *([self.label] if self.label else [])]))


def choose_columns(available: Sequence[str], wanted: Sequence[str], where: str) -> Columns:
    """Find the columns of a table.

    Args:
        available: the table's columns.
        wanted: "image=NAME", "caption=NAME" (again for further ones), "label=NAME"; "caption=" says that there is none.
            What is not named is found by its usual names.
        where: the table, for errors.

    Raises:
        UsageError: `wanted` is of another form or names a column that is not there; or there is no image column, or
            neither caption nor label.
    """
    named: dict[str, list[str]] = {}
    for entry in wanted:
        field, equals, column = entry.partition("=")
        if field not in USUAL_COLUMNS or not equals:
            raise UsageError(f"--data.columns {entry!r}: write image=NAME, caption=NAME or label=NAME")
        if column and column not in available:
            raise UsageError(f"{where} has no column {column!r}: {_listed(available)}")
        named.setdefault(field, []).append(column)
    found = {
        field: [column for column in named[field] if column]
        if field in named
        else [column for column in usual if column in available][:1]
        for field, usual in USUAL_COLUMNS.items()
    }
    for field in ("image", "label"):
        if len(found[field]) > 1:
            raise UsageError(f"--data.columns names more than one {field}: {', '.join(found[field])}")
    if not found["image"]:
        raise UsageError(f"{where}: which column holds the images? --data.columns image=NAME; {_listed(available)}")
    if not found["caption"] and not found["label"] and "caption" not in named:
        raise UsageError(f"{where}: which column holds the captions? --data.columns caption=NAME; {_listed(available)}")
    return Columns(image=found["image"][0], captions=tuple(found["caption"]), label=(found["label"] or [None])[0])


def make_sample(key: str, image: object, captions: Sequence[object], label: object, folder: str) -> Sample:
    """The sample of a row.

    Args:
        image: bytes, a path below `folder`, {"bytes": ..., "path": ...}; b"" where it was not asked for.
        captions: text, lists of text, or None where there is none; each is one line of the sample's text.
        label: a number or its digits, or for evaluation a name, or a list of these; None where there is none.
        folder: what paths are relative to and must not leave, as os.path.realpath gives it.

    Raises:
        BadSample: the image is missing, empty, too large or outside of the folder, or a caption not UTF-8.
        OSError: reading failed.
    """
    lines = [
        " ".join(_text(text, "caption-not-utf8", key).split())
        for caption in captions
        for text in (caption if isinstance(caption, list | tuple) else [caption])
        if not _is_null(text)
    ]
    if isinstance(label, list | tuple):
        label = LABEL_SEPARATOR.join(str(each) for each in label)
    if isinstance(label, float) and label.is_integer():  # whole numbers among which one is missing, by pandas
        label = int(label)
    return Sample(
        key=key,
        image=_image(key, image, folder),
        text="\n".join(lines).encode("utf-8", "ignore") if lines else None,
        label=None if _is_null(label) else _text(label, "label-not-a-number", key).encode("utf-8", "ignore"),
    )


def require_package(module: str, extra: str, what: str) -> Any:
    """Import an optional dependency. Raises UsageError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"{what} needs {error.name}: pip install 'triscale[{extra}]'") from error


def _is_null(value: object) -> bool:
    """Whether there is nothing: what pandas writes for an empty cell of a column of numbers is no word, either."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: object, reason: str, key: str) -> str:
    """A cell as text; where it is bytes, as files without a type for text hold it, they must be UTF-8."""
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise BadSample(reason, key) from None


def _image(key: str, image: object, folder: str) -> bytes:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, str) and image:
        return read_below(folder, image, MAX_IMAGE_BYTES, key=key, field="image", too_large="image-too-large")
    if not isinstance(image, bytes):
        raise BadSample("image-missing", key)
    if len(image) > MAX_IMAGE_BYTES:
        raise BadSample("image-too-large", key)
    return image


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return f"its columns are {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
