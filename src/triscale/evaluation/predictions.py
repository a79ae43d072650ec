"""What a model answered on a classification set, image by image: enough to make every score and picture again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Float32, Int64

from triscale.data.samples import REASONS
from triscale.errors import UsageError
from triscale.evaluation.array_file import Kind, load_arrays, save_arrays
from triscale.evaluation.sets import EvaluationSet
from triscale.randomness import derive_seed

GUESSES = 5
"""Likeliest classes that are kept of each image."""
EMBEDDINGS = 1000
"""Most embeddings that are kept of a set."""
LONGEST_FILE_NAME = 150


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
        save_arrays(Path(path), {name: getattr(self, name) for name in _FORM}, dict(sorted(self.bad.items())), _WHAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote.

        Raises:
            UsageError: the file is not there, too large, damaged or not of this kind.
        """
        arrays, bad = load_arrays(Path(path), _FORM, _WHAT, _check)
        return cls(**arrays, bad=bad)


def predictions_file(folder: Path, name: str) -> Path:
    """Where a run folder, or that of `triscale eval --output`, holds the predictions of the set `name`."""
    spelled = quote(name, safe=" ", errors="surrogateescape")
    if len(spelled) > LONGEST_FILE_NAME:
        spelled = f"{spelled[:LONGEST_FILE_NAME]}-{derive_seed(name):016x}"
    return folder / "predictions" / f"{spelled}.safetensors"


_WHAT = "predictions"
_FORM = {
    "samples": Kind("i8", "n"),
    "labels": Kind("i8", "n"),
    "ahead": Kind("i8", "n"),
    "guesses": Kind("i8", "nt"),
    "probabilities": Kind("f4", "nt"),
    "in_slices": Kind("b1", "ns"),
    "at_levels": Kind("b1", "nl"),
    "embedded": Kind("i8", "e"),
    "embeddings": Kind("f4", "ed"),
}


def _check(arrays: Mapping[str, np.ndarray], bad: object) -> None:
    """Raise ValueError unless embeddings are of rows that are there, and bad samples counted by known reasons."""
    if arrays["embedded"].size and arrays["embedded"].max() >= len(arrays["samples"]):
        raise ValueError("an embedding is of a row that is not there")
    if not isinstance(bad, dict) or not all(isinstance(n, int) and reason in REASONS for reason, n in bad.items()):
        raise ValueError("the counts of bad samples are not those of known reasons")
