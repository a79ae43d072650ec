"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import math
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.losses import dense, tiled
from triscale.losses.columns import Exchange
from triscale.losses.contrastive import ContrastiveLoss, check_pairs, full_precision, without_autocast
from triscale.losses.tiled import Options
from triscale.losses.tiles import Products


@final
class Sigmoid(ContrastiveLoss):
    """Every pair of rows a binary classification, with a learned temperature and bias and several positives by id.

        -1/B sum_ij log sigmoid(z_ij l_ij),  l = exp(logit_scale) x_i . y_j + logit_bias,  z = +1 inside P(i), else -1

    The bias starts where a pair is a positive with its prior probability: log(p / (1 - p)), p = 1 / batch_size. (The
    paper's own start, -10, is that of a batch of 22,027.)

    Args:
        batch_size: B, the contrastive batch over all ranks that the bias starts for; at least 2 is taken.
        tiled, logit_scale, max_logit_scale, exchange, products: see `ContrastiveLoss`.
        learn_temperature: whether `logit_scale` and `logit_bias` take a gradient.

    Source: Zhai et al., arXiv 2303.15343, section 3.2 and algorithm 1.

    Example:
        >>> loss = Sigmoid(batch_size=8)
        >>> loss(torch.randn(8, 4), torch.randn(8, 4)).backward()
    """

    def __init__(
        self,
        tiled: bool = True,
        *,
        batch_size: int,
        logit_scale: float = 10.0,
        max_logit_scale: float = 100.0,
        exchange: Exchange = "auto",
        products: Products = "inputs",
        learn_temperature: bool = True,
    ) -> None:
        super().__init__(tiled, logit_scale, max_logit_scale, Options(exchange, products), learn_temperature)
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.logit_bias = nn.Parameter(torch.tensor(-math.log(max(batch_size, 2) - 1)), requires_grad=learn_temperature)

    def forward(
        self, x: Float[Tensor, "b d"], y: Float[Tensor, "b d"], ids: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of tower outputs x and y, pair i at row i of both; they are normalised here.

        Args:
            ids: rows with an equal id are positives of each other; a negative id is unique.

        Raises:
            UsageError: x and y differ in shape, a rank holds no row, or ids has another number of rows.
        """
        check_pairs("Sigmoid", x, y, ids)
        with without_autocast(x):
            if self.takes_local_rows:
                loss, accuracy = tiled.sigmoid(x, y, self.logit_scale, self.logit_bias, ids, self.options)
            else:
                loss, accuracy = dense.sigmoid(
                    full_precision(x), full_precision(y), self.logit_scale, self.logit_bias, ids
                )
        self.metrics = {
            "accuracy": accuracy,
            "logit_scale": self.logit_scale.detach().exp(),
            "logit_bias": self.logit_bias.detach().clone(),
        }
        return loss
