"""What every contrastive loss has: a temperature of its own, its clamp, metrics, and the checks of its inputs."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.losses.columns import Exchange
from triscale.losses.tiled import Options
from triscale.losses.tiles import Products


class ContrastiveLoss(nn.Module, ABC):
    """Base of the losses; `forward` is theirs.

    Args:
        tiled: compute in tiles, O(B*d) memory, over the rows of all ranks; otherwise the dense formula, which sees
            only the rows that it is given.
        logit_scale: initial factor on the cosines. The parameter `logit_scale` is its natural logarithm, as CLIP's.
        max_logit_scale: `clamp_()` keeps the factor at most this; 0: no clamp.
        exchange: how tiles get the rows of other ranks: "gather" all at once, O(B*d) memory on each; "blocks" a piece
            after the other, O(B*d/W) memory and up to twice the traffic; "auto" the first up to 1 GiB of these rows.
            The results are the same.
        products: arithmetic of the tiles' products on CUDA, summed in float32 whatever it is: "float32", "tf32", "bf16"
            or "fp16" round unit rows and weights to that; "inputs" takes that of the rows. Other devices compute in
            float32 or better.
        skip_negligible: leave tiles out of the gradients whose weights are below the products' rounding in both
            directions (`negligible` bounds the error). It saves time where trained rows come in clusters.
        learn_temperature: whether `logit_scale` takes a gradient.

    Raises:
        UsageError: a factor is not positive, or `exchange` or `products` is another word.
    """

    views: ClassVar[int] = 1
    """How many rows of a lane belong to one sample, view by view."""

    def __init__(
        self,
        tiled: bool,
        logit_scale: float,
        max_logit_scale: float,
        options: Options,
        learn_temperature: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < logit_scale < math.inf:
            raise UsageError(f"logit_scale must be a positive factor, got {logit_scale}")
        for name, words in (("exchange", get_args(Exchange)), ("products", get_args(Products))):
            if (given := getattr(options, name)) not in words:
                raise UsageError(f"{name} is {given!r}: it must be one of {', '.join(words)}")
        self.takes_local_rows = tiled
        """Whether `forward` takes a rank's rows and returns the loss over all ranks' (ContrastiveStep asks)."""
        self.max_logit_scale = max_logit_scale
        self.options = options
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)), requires_grad=learn_temperature)
        self.metrics: dict[str, Tensor] = {}
        """Of the last forward pass: in-batch accuracy, and the parameters as factor and bias on the cosines."""

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep a learned factor at most `max_logit_scale`; to be called after each optimizer step."""
        if self.max_logit_scale > 0 and self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))


def check_pairs(name: str, x: Tensor, y: Tensor, ids: Tensor | None) -> None:
    """Raise UsageError unless x and y are matrices of one shape with one id per row."""
    if x.ndim != 2 or x.shape != y.shape:
        raise UsageError(f"{name} needs two tensors of one shape (B, d), got {(*x.shape,)} and {(*y.shape,)}")
    check_ids(name, len(x), ids)


def check_ids(name: str, samples: int, ids: Tensor | None) -> None:
    """Raise UsageError unless `ids`, if given, are one integer per sample."""
    if ids is not None and (ids.shape != (samples,) or ids.dtype.is_floating_point):
        raise UsageError(f"{name} needs one whole number per sample as id: {samples} samples, ids {(*ids.shape,)}")


def full_precision(rows: Tensor) -> Tensor:
    """The rows in float32 or better, for a dense formula. Raises UsageError if there are none."""
    if not len(rows):
        raise UsageError("the loss needs at least one row, got none")
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def without_autocast(like: Tensor) -> torch.autocast:
    """Scores are float32 or better, whatever the arithmetic of the towers that made the rows."""
    return torch.autocast(like.device.type, enabled=False)
