"""Weights between those that a run began with and those that it came to (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.training.checkpoint import load_into, module_tensors
from triscale.training.parallel import drop_gathered, local_part


def interpolate(initial: Mapping[str, Tensor], trained: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """(1 - a) initial + a trained, a = `share`, of every tensor, in its own arithmetic; equation 1 of WiSE-FT.

    At a = 0 and 1, and where both are equal, such as in frozen parts, the result is bitwise theirs. Running statistics
    of BatchNorm are interpolated like weights (they are approximately those of the interpolated tower), the temperature
    as its logarithm; whole numbers, such as BatchNorm's counters, are the trained ones unless a = 0.

    Args:
        initial: by name.
        trained: the same names and shapes.
        share: a, in [0, 1].

    Raises:
        UsageError: names or shapes differ.
    """
    if initial.keys() != trained.keys() or any(initial[name].shape != trained[name].shape for name in initial):
        raise UsageError("the initial weights are not of the model that was trained: nothing can be interpolated")
    return {name: _between(initial[name], tensor, share) for name, tensor in trained.items()}


def _between(initial: Tensor, trained: Tensor, share: float) -> Tensor:
    if not trained.is_floating_point() or share in (0, 1):
        return (trained if share else initial).clone()
    return torch.lerp(initial.to(trained.dtype), trained, share)


@contextmanager
def with_weights(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the modules hold `tensors`; afterwards what they held, bit for bit, buffers as well.

    Args:
        modules: by name, bare or sharded.
        tensors: whole ones, as `checkpoint.module_tensors` names them.

    Raises:
        UsageError: they do not fit.
    """
    kept = {name: local_part(tensor).clone() for name, tensor in module_tensors(modules).items()}
    try:
        load_into(modules, tensors)
        yield
    finally:
        for module in modules.values():
            drop_gathered(module)
        with torch.no_grad():
            for name, tensor in module_tensors(modules).items():
                local_part(tensor).copy_(kept[name])
