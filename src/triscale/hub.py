"""Models of Hugging Face's hub as folders on this machine."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from triscale.errors import UsageError
from triscale.models import interop_hf, interop_open_clip
from triscale.models.weights import INDEX, find_weights

SCHEME = "hf-hub:"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ["*.json", "merges.txt"]
_MODULES = (interop_open_clip, interop_hf)


def local_folder(name: str) -> Path:
    """`name` as a path, a model of the hub downloaded: "hf-hub:ORGANISATION/NAME", or ORGANISATION/NAME if neither it
    nor a folder ORGANISATION is there.

    Configurations come first, then the weights of one kind, safetensors where there are any.

    Raises:
        UsageError: the hub does not give it.
    """
    path = Path(name)
    if name.startswith(SCHEME):
        return _downloaded(name.removeprefix(SCHEME), name)
    if path.exists() or path.parent.exists() or not _NAME.fullmatch(name):
        return path
    return _downloaded(name, name)


def _downloaded(repository: str, name: str) -> Path:
    if not _NAME.fullmatch(repository):
        raise UsageError(f"{name!r} is no model of the hub: write {SCHEME}ORGANISATION/NAME")
    folder = _fetch(repository, name, _SMALL)
    for module in _MODULES:
        if not (folder / module.CONFIG).is_file():
            continue
        for weights in module.WEIGHTS:
            folder = _fetch(repository, name, [weights])
            index = folder / (weights + INDEX)
            if index.is_file():
                folder = _fetch(repository, name, [weights.replace(".safetensors", "-*.safetensors")])
            if find_weights(folder, (weights,)):
                return folder
    return folder


def _fetch(repository: str, name: str, patterns: list[str]) -> Path:
    hub: Any = import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # network, permission, a name that is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(f"{name!r}: no such folder, and the hub does not give it: {reason}") from error
