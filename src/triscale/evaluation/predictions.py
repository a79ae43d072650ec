"""What a model answered on a classification set, image by image: enough to make every score and picture again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triscale.data.samples import REASONS
from triscale.errors import RunError, UsageError, first_line
from triscale.evaluation.sets import EvaluationSet
from triscale.randomness import derive_seed

GUESSES = 5
"""Likeliest classes that are kept of each image."""
EMBEDDINGS = 1000
"""Most embeddings that are kept of a set."""
MAX_BYTES = 2**32
"""Largest file that is read."""
LONGEST_FILE_NAME = 150
_BAD = "bad"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of a set, a row for each sample that is readable and has a label, in the set's order; all processes hold all."""

    samples: Int64[np.ndarray, " n"]
    """The number of each in its set, ascending."""
    labels: Int64[np.ndarray, " n"]
    """The right class; of several the one that ranks best."""
    ahead: Int64[np.ndarray, " n"]
    """How many classes rank before it; 0: the guess is right. One that may not be guessed ranks behind all."""
    guesses: Int64[np.ndarray, "n t"]
    """The likeliest classes, likeliest first, of equal ones the lower index first; t: 5, or all classes allowed."""
    probabilities: Float32[np.ndarray, "n t"]
    """Of these guesses: softmax(logit scale * cosine) over the classes allowed."""
    in_slices: Bool[np.ndarray, "n s"]
    """Whether it is in each of the set's slices, in their order."""
    at_levels: Bool[np.ndarray, "n l"]
    """Whether the likeliest class is in the group of a right one at each of the set's levels, in their order."""
    embedded: Int64[np.ndarray, " e"]
    """Rows of which there is an embedding: at most 1,000, evenly spread."""
    embeddings: Float32[np.ndarray, "e d"]
    """Image embeddings of length 1."""
    bad: Mapping[str, int]
    """Samples left out for what is wrong in them, by reason (data.samples.REASONS)."""

    def __len__(self) -> int:
        """n."""
        return len(self.samples)

    def require_fit(self, evaluation_set: EvaluationSet) -> None:
        """Raise UsageError unless these can be predictions of the set, which may have changed since."""
        classes = len(evaluation_set.classnames)
        indices = ((self.samples, len(evaluation_set)), (self.labels, classes), (self.guesses, classes))
        columns = (self.in_slices, evaluation_set.slices), (self.at_levels, evaluation_set.levels)
        if any(array.size and array.max() >= limit for array, limit in indices) or any(
            array.shape[1] != len(names) for array, names in columns
        ):
            raise UsageError(f"predictions of evaluation set {evaluation_set.name!r} are of other samples or classes")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in place of what is there only once it is complete on the disk.

        Raises:
            RunError: it can't be written.
        """
        content = save(
            {name: np.ascontiguousarray(getattr(self, name)) for name in _FORM},
            metadata={_BAD: json.dumps(dict(sorted(self.bad.items())))},
        )
        write_whole(Path(path), content, "predictions")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is not there, too large, damaged or not of this kind.
        """
        path = Path(path)
        try:
            if not path.is_file():
                raise ValueError("there is no such file")
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES / 2**30:.0f} GiB")
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in _FORM}
                bad = json.loads((file.metadata() or {})[_BAD])
            _check(arrays, bad)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise UsageError(f"predictions {str(path)!r} cannot be read: {first_line(error)}") from error
        return cls(**arrays, bad=bad)


def predictions_file(folder: Path, name: str) -> Path:
    """Where a run folder, or that of `triscale eval --output`, holds the predictions of the set `name`."""
    spelled = quote(name, safe=" ", errors="surrogateescape")
    if len(spelled) > LONGEST_FILE_NAME:
        spelled = f"{spelled[:LONGEST_FILE_NAME]}-{derive_seed(name):016x}"
    return folder / "predictions" / f"{spelled}.safetensors"


_FORM = {
    "samples": ("i8", "n"),
    "labels": ("i8", "n"),
    "ahead": ("i8", "n"),
    "guesses": ("i8", "nt"),
    "probabilities": ("f4", "nt"),
    "in_slices": ("b1", "ns"),
    "at_levels": ("b1", "nl"),
    "embedded": ("i8", "e"),
    "embeddings": ("f4", "ed"),
}
"""Type and axes of every array of `Predictions`; axes of one letter are as long as each other."""


def _check(arrays: Mapping[str, np.ndarray], bad: object) -> None:
    """Raise ValueError unless shapes, dtypes and indices are those of predictions."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        kind, axes = _FORM[name]
        if array.dtype != np.dtype(kind) or array.ndim != len(axes):
            raise ValueError(f"{name} is {array.dtype} of {array.ndim} axes")
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has {size} rows or columns where others have {sizes[axis]}")
    if any(arrays[name].size and arrays[name].min() < 0 for name in ("samples", "labels", "ahead", "guesses")):
        raise ValueError("an index is negative")
    embedded = arrays["embedded"]
    if embedded.size and not (embedded.min() >= 0 and embedded.max() < sizes["n"]):
        raise ValueError("an embedding is of a row that is not there")
    if not isinstance(bad, dict) or not all(isinstance(n, int) and reason in REASONS for reason, n in bad.items()):
        raise ValueError("the counts of bad samples are not those of known reasons")


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Write a file whole or not at all, and onto the disk; RunError, which says `what` it is, where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{str(path)!r}: {what} could not be written: {error.strerror}") from error
