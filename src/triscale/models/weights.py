"""Weights of other packages from files that nobody vouches for: safetensors, or torch's own without unpickling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from triscale.errors import UsageError, first_line

INDEX = ".index.json"
"""Behind the name of weights that lie in several files: what is in which."""
MAX_JSON_BYTES = 32 << 20


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU, as many bytes in memory as the file has at most.

    A `.safetensors` file, one index of several, or a file of torch's that holds nothing but tensors, also below
    "state_dict" and behind "module.", as open_clip's training writes it.

    Raises:
        UsageError: it cannot be read, or not without unpickling, in one line.
    """
    try:
        if path.name.endswith(INDEX):
            return _read_several(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        size = path.stat().st_size
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{str(path)!r} cannot be read as safetensors: {first_line(error)}") from error
    return _checked(_read_torch(path), size, path)


def find_weights(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` in a folder, or the index of its parts."""
    candidates = (folder / each for name in names for each in (name, name + INDEX))
    return next((path for path in candidates if path.is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size.

    Raises:
        UsageError: there is none.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UsageError(f"{str(path)!r} is larger than {MAX_JSON_BYTES >> 20} MiB: it is no configuration")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged: it is not JSON") from error
    if not isinstance(values, dict):
        raise UsageError(f"{str(path)!r} is damaged: it is not a JSON object")
    return values


def _read_several(path: Path) -> dict[str, Tensor]:
    parts = read_json(path).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UsageError(f"{str(path)!r} is damaged: it has no weight_map")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(parts.values())):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UsageError(f"{str(path)!r} names {name[:80]!r}, which is no safetensors file beside it")
        tensors |= load_file(path.with_name(name))
    return tensors


def _read_torch(path: Path) -> object:
    try:
        # weights_only: torch's own reader of tensors, which can call nothing else
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be read: {first_line(error)}") from error
    except Exception as error:  # a damaged file can raise anything in torch's reader
        raise UsageError(
            f"{str(path)!r} is no file of weights: it holds more than tensors, which only unpickling could read, or it "
            "is damaged; have it saved as safetensors"
        ) from error


def _checked(content: object, size: int, path: Path) -> dict[str, Tensor]:
    """Tensors by name, no larger together than their file: strides can make much of little."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UsageError(f"{str(path)!r} holds no weights: it is no state dict")
    tensors = {str(name).removeprefix("module."): tensor.detach() for name, tensor in content.items()}
    if any(tensor.layout != torch.strided or tensor.is_quantized for tensor in tensors.values()):
        raise UsageError(f"{str(path)!r} holds sparse or quantised weights: unsupported")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise UsageError(f"{str(path)!r} claims more weights than it has bytes")
    return tensors
