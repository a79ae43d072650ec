"""How far the exact step's gradients are from plain autograd's, once: half of what is there is computed again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from triscale.losses import InfoNCE
from triscale.training.step import ContrastiveStep
from triscale.training.verify import direct_gradients, named_gradients, relative_errors


def step_errors(
    towers: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    micro_batch: int,
    batch_norm: Literal["refuse", "per_micro_batch"] = "per_micro_batch",
) -> dict[str, float]:
    """The error of each parameter's gradient in float64, by the design's measure; the last micro-batch is kept.

    The towers become float64 ones in training mode.
    """
    loss = InfoNCE().double()
    for tower in towers.values():
        tower.double().train()
    direct = direct_gradients(towers, loss, inputs, None, dict.fromkeys(towers, micro_batch), seed=0)
    for module in (*towers.values(), loss):
        module.zero_grad(set_to_none=True)
    ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=1, seed=0, batch_norm=batch_norm)(inputs)
    return relative_errors(named_gradients(towers, loss), direct)
