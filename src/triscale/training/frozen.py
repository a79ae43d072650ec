"""Parts of towers that are not trained: no gradient, no random numbers, statistics as they are."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from triscale.errors import UsageError


def freeze(towers: Mapping[str, nn.Module], parts: Sequence[str]) -> None:
    """Freeze parts of towers: their parameters take no gradient, their modules are in evaluation mode. In place.

    So BatchNorm normalises by its running statistics, which stay, and dropout and stochastic depth are off. Evaluation
    mode lasts because whoever evaluates puts each module's own mode back (`lane.evaluation_mode`). To be called before
    rematerialisation, compilation and sharding, which see by `requires_grad` what is trained.

    Args:
        towers: by name.
        parts: paths of modules behind a tower's name, such as "image" or "image.backbone".

    Raises:
        UsageError: there is no such part, or nothing of any tower is left to train.
    """
    modules = {
        f"{tower}.{path}".removesuffix("."): module
        for tower, root in towers.items()
        for path, module in root.named_modules()
    }
    for part in parts:
        if part not in modules:
            near = difflib.get_close_matches(part, modules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(towers)}"
            raise UsageError(f"--train.frozen: the towers have no part {part!r}: {hint}")
        modules[part].eval().requires_grad_(False)
    if not any(parameter.requires_grad for root in towers.values() for parameter in root.parameters()):
        raise UsageError(f"--train.frozen {' '.join(parts)}: nothing of {' and '.join(towers)} is left to train")


def is_frozen(module: nn.Module) -> bool:
    """Whether a module's outputs stay what they are: nothing of it is trained, nothing is in training mode."""
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return not trains and not any(part.training for part in module.modules())
