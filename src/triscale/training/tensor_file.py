"""Files of tensors in the safetensors format, written whole from tensors that may be sharded, one at a time in memory.

The format (github.com/huggingface/safetensors) is eight bytes with the length of a JSON header, the header, and the
tensors' bytes one behind the other. The library writes what is in memory as a whole; it reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Larger numbers first, as the library has it, so that each stands at a multiple of its size; then by name."""
    return {name: tensors[name] for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))}


def write(path: Path, tensors: Mapping[str, Tensor], whole: Iterator[Tensor]) -> dict[str, int | str]:
    """Write the file and have it on disk; returns its size in "bytes" and its digest, "blake2b".

    Args:
        path: of the file.
        tensors: in file order; sharded or not.
        whole: gives as many, each whole.

    Raises:
        OSError: it cannot be written.
    """
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as file:
        for piece in _pieces(tensors, whole):
            digest.update(piece)
            file.write(piece)
        size = file.tell()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _pieces(tensors: Mapping[str, Tensor], whole: Iterator[Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of the file: the header, then each tensor's."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in islice(whole, len(tensors)):
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
