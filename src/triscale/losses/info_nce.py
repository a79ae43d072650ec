"""InfoNCE, the softmax contrastive loss of CLIP, ALIGN and BASIC."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triscale.losses import dense, tiled


class InfoNCE(nn.Module):
    """Symmetric softmax contrastive loss with a learned temperature and several positives by id.

    Args:
        tiled: compute in tiles, O(B*d) memory, over the rows of all ranks; otherwise the dense formula, which sees
            only the rows that it is given.
        logit_scale: initial factor on the cosines. The parameter `logit_scale` is its natural logarithm, as CLIP's.
        max_logit_scale: `clamp_()` keeps the factor at most this; 0: no clamp.

    Example:
        >>> loss = InfoNCE()
        >>> loss(torch.randn(8, 4), torch.randn(8, 4)).backward()
    """

    def __init__(self, tiled: bool = True, *, logit_scale: float = 1 / 0.07, max_logit_scale: float = 100.0) -> None:
        super().__init__()
        self.takes_local_rows = tiled
        """Whether `forward` takes a rank's rows and returns the loss over all ranks' (ContrastiveStep asks)."""
        self.max_logit_scale = max_logit_scale
        self.logit_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.metrics: dict[str, Tensor] = {}
        """In-batch accuracy and logit scale of the last forward pass."""

    def forward(
        self, x: Float[Tensor, "b d"], y: Float[Tensor, "b d"], ids: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of tower outputs x and y, pair i at row i of both; they are normalised here.

        Args:
            ids: rows with an equal id are positives of each other; a negative id is unique.

        Raises:
            ValueError: x and y differ in shape, hold no row, or ids has another number of rows.
        """
        if x.shape != y.shape or len(x) == 0:
            raise ValueError(f"InfoNCE needs two tensors of one shape (B >= 1, d), got {(*x.shape,)} and {(*y.shape,)}")
        if ids is not None and ids.shape != x.shape[:1]:
            raise ValueError(f"InfoNCE needs one id per row: {len(x)} rows, ids of shape {(*ids.shape,)}")
        x, y = (e.to(torch.promote_types(e.dtype, torch.float32)) for e in (x, y))
        logit_scale = self.logit_scale.to(x.dtype)
        if self.takes_local_rows:
            loss, accuracy = tiled.info_nce(x, y, logit_scale, ids)
        else:
            x, y = F.normalize(x), F.normalize(y)
            loss = dense.info_nce(x, y, logit_scale, ids)
            with torch.no_grad():
                weights = dense.positives(ids, x)
                accuracy = (weights.gather(1, (x @ y.T).argmax(1, keepdim=True)) > 0).to(x.dtype).mean()
        self.metrics = {"accuracy": accuracy, "logit_scale": logit_scale.detach().exp()}
        return loss

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep the factor at most `max_logit_scale`; to be called after each optimizer step."""
        if self.max_logit_scale > 0:
            self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
