"""Prompt ensembles: class names put into templates, and their embeddings averaged to one classifier row a class."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triscale.errors import UsageError

CLASS_MARK = "{c}"


def fill_templates(classname: str, templates: Sequence[str]) -> list[str]:
    """Put `classname` in place of every `{c}` of each template. Nothing else in either string has a meaning.

    Raises:
        UsageError: no template, or one without `{c}` (it would give every class the same prompt).
    """
    if not templates:
        raise UsageError("no prompt template: give at least one, such as 'a photo of a {c}'")
    for template in templates:
        if CLASS_MARK not in template:
            raise UsageError(f"prompt template {template!r} has no {CLASS_MARK}, which is where the class name goes")
    return [template.replace(CLASS_MARK, classname) for template in templates]


def class_embeddings(
    encode_text: Callable[[list[str]], Tensor], classnames: Sequence[str], templates: Sequence[str]
) -> Float[Tensor, "k d"]:
    """Zero-shot classifier: per class the normalised mean of its prompts' normalised embeddings (CLIP, section 3.1.4).

    Args:
        encode_text: embeds n texts as an (n, d) tensor; it may be normalised already or not. All prompts, class by
            class, come in one call, so that it chunks them as it likes.
        classnames: k names.
        templates: prompt templates with `{c}`.

    Raises:
        UsageError: no class name, no template, or a template without `{c}`.
    """
    if not classnames:
        raise UsageError("no class names: give at least one label")
    prompts = [prompt for name in classnames for prompt in fill_templates(name, templates)]
    embeddings = F.normalize(encode_text(prompts), dim=-1)
    means = embeddings.reshape(len(classnames), len(templates), -1).mean(dim=1)
    return F.normalize(means, dim=-1)
