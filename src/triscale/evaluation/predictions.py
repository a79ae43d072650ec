"""What a model answered on a classification set, image by image: enough to make every score and picture again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triscale.data.samples import REASONS
from triscale.errors import RunError, UsageError, first_line

GUESSES = 5
"""Likeliest classes that are kept of each image."""
EMBEDDINGS = 1000
"""Most embeddings that are kept of a set."""
MAX_BYTES = 2**32
"""Largest file that is read."""
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
    embedded: Int64[np.ndarray, " e"]
    """Rows of which there is an embedding: at most 1,000, evenly spread."""
    embeddings: Float32[np.ndarray, "e d"]
    """Image embeddings of length 1."""
    bad: Mapping[str, int]
    """Samples left out for what is wrong in them, by reason (data.samples.REASONS)."""

    def __len__(self) -> int:
        """n."""
        return len(self.samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, in place of what is there only once it is complete on the disk.

        Raises:
            RunError: it can't be written.
        """
        content = save(
            {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS},
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
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
                bad = json.loads((file.metadata() or {})[_BAD])
            _check(arrays, bad)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UsageError(f"predictions {str(path)!r} cannot be read: {first_line(error)}") from error
        return cls(**arrays, bad=bad)


_ARRAYS = tuple(each.name for each in fields(Predictions) if each.name != _BAD)
_KINDS = dict(zip(_ARRAYS, ["i8", "i8", "i8", "i8", "f4", "b1", "i8", "f4"], strict=True))
_AXES = dict(zip(_ARRAYS, ["n", "n", "n", "nt", "nt", "ns", "e", "ed"], strict=True))


def _check(arrays: Mapping[str, np.ndarray], bad: object) -> None:
    """Raise ValueError unless shapes, dtypes and indices are those of predictions."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        if array.dtype != np.dtype(_KINDS[name]) or array.ndim != len(_AXES[name]):
            raise ValueError(f"{name} is {array.dtype} of {array.ndim} axes")
        for axis, size in zip(_AXES[name], array.shape, strict=True):
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
