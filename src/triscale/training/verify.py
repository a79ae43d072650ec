"""The step held against *direct*: the same partition and seeds, all micro-batches in ONE autograd graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from triscale.losses.contrastive import ContrastiveLoss
from triscale.randomness import derive_seed
from triscale.training.lane import Rows, seeded, split_evenly
from triscale.training.step import ContrastiveStep

SMALLEST_SHARE = 1e-3


def relative_errors(gradients: Mapping[str, Tensor], direct: Mapping[str, Tensor]) -> dict[str, float]:
    """The error of each parameter's gradient: |g - g*| / max(|g*|, 1e-3 |G*|), |G*| the norm of the whole gradient.

    The floor is there because some gradients are truly zero, such as that of a key projection's bias.
    """
    if set(gradients) != set(direct):
        raise ValueError(f"gradients of different parameters: {sorted(set(gradients) ^ set(direct))}")
    whole = math.sqrt(sum(float(g.double().pow(2).sum()) for g in direct.values()))
    return {
        name: float((gradients[name].double() - g.double()).norm())
        / max(float(g.double().norm()), SMALLEST_SHARE * whole, torch.finfo(torch.float64).tiny)
        for name, g in direct.items()
    }


def named_gradients(towers: Mapping[str, nn.Module], loss: nn.Module) -> dict[str, Tensor]:
    """The gradients of all trainable parameters, by lane or "loss" and the parameter's name."""
    modules = {**towers, "loss": loss}
    return {
        f"{lane}.{name}": torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for lane, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def dense_twin(loss: nn.Module) -> nn.Module:
    """`loss` in its dense form, over the same parameters; a loss without a tiled form is its own twin."""
    twin = copy.copy(loss)
    if isinstance(twin, ContrastiveLoss):
        twin.takes_local_rows = False
    return twin


def direct_gradients(
    towers: Mapping[str, nn.Module],
    loss: nn.Module,
    inputs: Mapping[str, Rows],
    ids: Tensor | None,
    micro_batch: Mapping[str, int],
    seed: int,
) -> dict[str, Tensor]:
    """Gradients by plain autograd over one graph and the dense loss, written without ContrastiveStep. One process."""
    embeddings = []
    for lane, tower in towers.items():
        parts = split_evenly(len(inputs[lane]), math.ceil(len(inputs[lane]) / micro_batch[lane]))
        outputs = []
        for rows in parts:
            batch = torch.as_tensor(inputs[lane][rows])
            with seeded(derive_seed("tower", seed, 0, lane, rows.start), batch.device):
                outputs.append(tower(batch))
        embeddings.append(torch.cat(outputs))
    dense_twin(loss)(*embeddings, **({} if ids is None else {"ids": ids})).backward()
    return named_gradients(towers, loss)


def verify(
    towers: Mapping[str, nn.Module],
    loss: nn.Module,
    inputs: Mapping[str, Rows],
    ids: Tensor | None,
    *,
    micro_batch: Mapping[str, int],
    batch_norm: Literal["refuse", "per_micro_batch"],
    seed: int,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[Mapping[str, nn.Module]], None] = lambda towers: None,
) -> dict[str, float]:
    """The largest error of each parameter's gradient, by the design's measure, over keep = 0, 1 and all.

    Works on copies in `dtype`, on the CPU; towers in the modes that they are in.

    Args:
        towers, loss, inputs, ids: as a step takes them; the loss's dense form is the yardstick.
        prepare: what is done to the step's towers and not to those that it is held against, such as rematerialisation.
    """
    plain, towers = ({lane: copy.deepcopy(tower).cpu().to(dtype) for lane, tower in towers.items()} for _ in range(2))
    prepare(towers)
    loss = copy.deepcopy(loss).cpu().to(dtype)
    direct = direct_gradients(plain, loss, inputs, ids, micro_batch, seed)
    errors = dict.fromkeys(direct, 0.0)
    for keep in (0, 1, max(len(rows) for rows in inputs.values())):
        for module in (*towers.values(), loss):
            module.zero_grad(set_to_none=True)
        step = ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=keep, seed=seed, batch_norm=batch_norm)
        step(inputs, ids)
        for name, error in relative_errors(named_gradients(towers, loss), direct).items():
            errors[name] = max(error, errors[name])
    return errors
