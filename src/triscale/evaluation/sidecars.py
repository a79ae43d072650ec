"""Small files beside a set that say more of it: which classes may be guessed, which are right, slices, hierarchy.

| file | form | what it says |
|---|---|---|
| `class_mapping.json` | `{label: class or [class, ...]}` | for the samples' labels, the classes that they stand for;
  all other classes are masked, and samples of labels that are not there are left out |
| `right_labels.json` | `{key: [class, ...]}`, or a list of `[class, ...]` | the right classes of each sample |
| `slices.json` | `{slice: [key, ...]}` | samples that are scored by themselves, too |
| `levels.csv` | a header `class,LEVEL,...` and a row a class | the class's group at each level |

A class is its name in the class list, or its number there, from 0.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from triscale.data.lists import decode_text, did_you_mean, quote
from triscale.errors import UsageError

MAPPING_FILE = "class_mapping.json"
RIGHT_LABELS_FILE = "right_labels.json"
SLICES_FILE = "slices.json"
LEVELS_FILE = "levels.csv"
_IMAGENET_KEY = re.compile(r"ILSVRC2012_val_([0-9]{8})")
"""Lists of right labels for ImageNet go by the number in the images' names (google-research/reassessed-imagenet)."""


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file beside a set, with its path or URL for messages."""

    where: str
    content: bytes


class ClassList:
    """The class names of a set, as the files beside it refer to them.

    Args:
        classnames: of labels 0, 1, ...; one that is there twice is meant by its first label.
    """

    def __init__(self, classnames: Sequence[str]) -> None:
        self.classnames = classnames
        self._labels: dict[str, int] = {}
        for label, name in enumerate(classnames):
            self._labels.setdefault(name, label)

    def label(self, named: object, where: str) -> int:
        """The label of a class that is named, or numbered from 0. Raises UsageError where there is none."""
        if isinstance(named, str) and named in self._labels:
            return self._labels[named]
        if isinstance(named, str) and named.isascii() and named.isdigit() and len(named) < 10:
            named = int(named)
        if type(named) is int:
            if not 0 <= named < len(self.classnames):
                raise UsageError(f"{where}: class {named} is out of range; {len(self.classnames)} names count from 0")
            return named
        if not isinstance(named, str):
            raise UsageError(f"{where}: {quote(str(named))} is neither a class name nor its number")
        raise UsageError(f"{where}: there is no class {quote(named)}; {did_you_mean(named, self._labels)}")

    def labels(self, named: object, where: str) -> tuple[int, ...]:
        """The distinct labels of a class or of a list of them; none for null."""
        several = named if isinstance(named, list) else [] if named is None else [named]
        return tuple(dict.fromkeys(self.label(each, where) for each in several))


def read_mapping(file: SmallFile, classes: ClassList, label_names: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """For the labels of samples, those of the class list that they stand for, of labels that stand for any.

    Args:
        label_names: of labels 0, 1, ... of the samples, where they have names: keys are these, or numbers.

    Raises:
        UsageError: the file is not of the documented form, or names a label or a class that is not there.
    """
    where, mapping = quote(file.where), _json_object(file, "{label: class or [class, ...]}")
    numbers = {name: number for number, name in reversed(list(enumerate(label_names)))}
    found: dict[int, tuple[int, ...]] = {}
    for name, named in mapping.items():
        number = numbers.get(name, _digits(name))
        if number is None or (label_names and number >= len(label_names)):
            hint = did_you_mean(name, numbers) if numbers else "labels of these samples are numbers, from 0"
            raise UsageError(f"{where}: there is no label {quote(name)}; {hint}")
        if number in found:
            raise UsageError(f"{where}: label {quote(name)} is there twice, by its name and by its number")
        found[number] = classes.labels(named, f"{where}, label {quote(name)}")
    found = {number: labels for number, labels in found.items() if labels}
    if not found:
        raise UsageError(f"{where}: no label stands for any class")
    return found


def read_right_labels(
    file: SmallFile, classes: ClassList, keys: Callable[[], Sequence[str]]
) -> dict[str, tuple[int, ...]]:
    """The labels of the class list that are right, by sample key; a key that is not there has none.

    Args:
        keys: gives the keys of all samples in their order; "" of one whose key cannot be read.

    Raises:
        UsageError: the file is not of the documented form, names a class that is not there, or is of other samples.
    """
    where, value = quote(file.where), _json(file)
    if isinstance(value, dict):
        right = {key: classes.labels(named, f"{where}, key {quote(key)}") for key, named in value.items()}
        _check_keys(right, keys(), where)
        return right
    if not isinstance(value, list):
        raise UsageError(f"{where}: it must hold {{key: [class, ...]}} or a list of [class, ...]")
    rows = [classes.labels(named, f"{where}, entry {number}") for number, named in enumerate(value)]
    return _by_number(rows, keys(), where)


def read_slices(file: SmallFile, keys: Callable[[], Sequence[str]]) -> dict[str, frozenset[str]]:
    """By name of a slice, the keys of its samples.

    Raises:
        UsageError: the file is not of the documented form, or a slice has no sample of the set.
    """
    where, slices = quote(file.where), _json_object(file, "{slice: [key, ...]}")
    known = keys()
    for name, listed in slices.items():
        is_named = bool(name.strip()) and name.isprintable()
        if not is_named or not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
            raise UsageError(f"{where}: slice {quote(name)} must have a name to print and a list of sample keys")
        _check_keys(listed, known, f"{where}, slice {quote(name)}")
    return {name: frozenset(listed) for name, listed in slices.items()}


def read_levels(file: SmallFile, classes: ClassList) -> dict[str, tuple[int, ...]]:
    """By name of a level, for each label of the class list the number of its group; an empty cell is one of its own.

    Raises:
        UsageError: the file is not of the documented form, names a class that is not there, or lacks one.
    """
    where = quote(file.where)
    try:
        rows = [row for row in csv.reader(io.StringIO(decode_text(file.content, file.where), newline="")) if row]
    except csv.Error as error:
        raise UsageError(f"{where}: it is no CSV file ({error})") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if len(header) < 2 or header[0] != "class" or "" in header or len(set(header)) < len(header):
        raise UsageError(f"{where}: its first line must be class,LEVEL,... with distinct names of levels")
    groups: dict[int, list[str]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise UsageError(f"{where}: row {number} has {len(row)} fields, and the header {len(header)}")
        named_class = classes.label(row[0].strip(), f"{where}, row {number}")
        label = classes.label(classes.classnames[named_class], where)  # the first of that name
        if label in groups:
            raise UsageError(f"{where}: row {number}: class {quote(row[0])} is there twice")
        groups[label] = [cell.strip() for cell in row[1:]]
    named = [groups.get(classes.label(name, where)) for name in classes.classnames]
    if None in named:
        missing = named.count(None)
        raise UsageError(
            f"{where}: {missing} classes have no row, the first is {classes.classnames[named.index(None)]!r}"
        )
    return {level: _numbered([row[place] for row in named if row]) for place, level in enumerate(header[1:])}


def _numbered(groups: Sequence[str]) -> tuple[int, ...]:
    """The number of each group in order of appearance; those without a name are all different."""
    numbers: dict[str | int, int] = {}
    return tuple(numbers.setdefault(group or place, len(numbers)) for place, group in enumerate(groups))


def _by_number(rows: Sequence[tuple[int, ...]], keys: Sequence[str], where: str) -> dict[str, tuple[int, ...]]:
    """Rows by the keys of the samples that they are of: by the number in ImageNet's names, or in the set's order."""
    found = [_IMAGENET_KEY.search(key) for key in keys]
    numbers = [int(match[1]) - 1 if match else -1 for match in found]
    if not all(0 <= number < len(rows) for number in numbers):
        if len(rows) != len(keys):
            raise UsageError(f"{where}: it is a list of {len(rows)}, and the set has {len(keys)} samples")
        numbers = list(range(len(keys)))
    if len(set(keys)) < len(keys):
        raise UsageError(f"{where}: samples of the set share keys, so that right labels cannot be told by them")
    return {key: rows[number] for key, number in zip(keys, numbers, strict=True)}


def _check_keys(listed: Iterable[str], keys: Sequence[str], where: str) -> None:
    """Raise UsageError where none of the keys listed is a sample's."""
    listed = list(listed)
    if set(listed).isdisjoint(keys):
        first = f": {quote(listed[0])}; {did_you_mean(listed[0], keys)}" if listed else ""
        raise UsageError(f"{where}: none of its {len(listed)} keys is a sample's{first}")


def _digits(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _json(file: SmallFile) -> Any:
    try:
        return json.loads(decode_text(file.content, file.where), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{quote(file.where)}: it is no JSON ({str(error)[:100]})") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{quote(next(name for name in names if names.count(name) > 1))} is there twice")
    return found


def _json_object(file: SmallFile, form: str) -> Mapping[str, Any]:
    value = _json(file)
    if not isinstance(value, dict):
        raise UsageError(f"{quote(file.where)}: it must hold {form}")
    return value
