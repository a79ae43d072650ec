"""Prompt templates and class names that go by a name, such as open_clip's, or stand in a file of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from triscale.data.lists import CLASS_MARK, did_you_mean, quote, read_classnames, read_templates
from triscale.data.mixture import CLIP_TEMPLATES
from triscale.data.tables import require_package
from triscale.errors import UsageError

OPEN_CLIP = "open_clip:"
TEMPLATES = {"imagenet": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}
"""What stands behind "open_clip:" to the list's name there: CLIP's 80 prompts for ImageNet, and 7 of them."""
CLASSNAMES = {"imagenet": "IMAGENET_CLASSNAMES"}
"""The same for class names: those of ImageNet's 1,000 classes as CLIP's authors have cleaned them."""


def named_templates(spec: str, root: str = "") -> tuple[str, ...]:
    """The prompt templates that `spec` names.

    Args:
        spec: "open_clip:imagenet" or "open_clip:simple" (package open_clip_torch), "clip", or a file with a template
            on each line.
        root: what a file is relative to.

    Raises:
        UsageError: there is no such list or file, the package is missing, or a template lacks its `{c}`.
    """
    if spec == "clip":
        return CLIP_TEMPLATES
    if not spec.startswith(OPEN_CLIP):
        return read_templates(Path(root, spec))
    return tuple(str(template(CLASS_MARK)) for template in _open_clip(spec, TEMPLATES, "--templates"))


def named_classes(spec: str, root: str = "") -> tuple[str, ...]:
    """The class names that `spec` names: "open_clip:imagenet", or a file with a name on each line.

    Args:
        spec, root: as of `named_templates`.

    Raises:
        UsageError: there is no such list or file, the package is missing, or a line is empty.
    """
    if not spec.startswith(OPEN_CLIP):
        return read_classnames(Path(root, spec))
    return tuple(str(name) for name in _open_clip(spec, CLASSNAMES, "--classes"))


def _open_clip(spec: str, lists: dict[str, str], option: str) -> Any:
    name = spec.removeprefix(OPEN_CLIP)
    if name not in lists:
        hint = did_you_mean(spec, [OPEN_CLIP + each for each in lists])
        raise UsageError(f"{option} {quote(spec)}: there is no such list; {hint}")
    return getattr(require_package("open_clip.zero_shot_metadata", "clip", f"{option} {spec}"), lists[name])
