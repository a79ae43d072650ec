"""Files of named arrays and one JSON value, in the safetensors format: whole or not there, and checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from triscale.errors import RunError, UsageError, first_line

MAX_BYTES = 2**32
"""Largest file that is read."""
_VALUE = "value"


class Kind(NamedTuple):
    """What an array must be."""

    dtype: str
    """As numpy spells it. Integers are indices or counts, hence not negative."""
    axes: str
    """A letter an axis; axes of one letter are equally long, in all arrays of the file."""


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], value: Any, what: str) -> None:
    """Write arrays and a JSON value, in place of what is there only once they are complete on the disk.

    Raises:
        RunError: they, called `what`, can't be written.
    """
    content = save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={_VALUE: json.dumps(value)}
    )
    write_whole(path, content, what)


def load_arrays(
    path: Path, kinds: Mapping[str, Kind], what: str, check: Callable[[dict[str, np.ndarray], Any], None]
) -> tuple[dict[str, np.ndarray], Any]:
    """Read what `save_arrays` wrote: the arrays that `kinds` names, and the JSON value.

    Args:
        check: raises ValueError where they can't be.

    Raises:
        UsageError: the file is not there, too large, damaged or does not hold this; it is called `what`.
    """
    try:
        if not path.is_file():
            raise ValueError("there is no such file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES / 2**30:.0f} GiB")
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in kinds}
            value = json.loads((file.metadata() or {})[_VALUE])
        _check_kinds(arrays, kinds)
        check(arrays, value)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read: {first_line(error)}") from error
    return arrays, value


def _check_kinds(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, Kind]) -> None:
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        if array.dtype != np.dtype(kinds[name].dtype) or array.ndim != len(kinds[name].axes):
            raise ValueError(f"{name} is {array.dtype} of {array.ndim} axes")
        for axis, size in zip(kinds[name].axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"{name} has {size} rows or columns where others have {sizes[axis]}")
        if array.dtype.kind == "i" and array.size and array.min() < 0:
            raise ValueError(f"a number in {name} is negative")


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
