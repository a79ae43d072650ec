"""InfoNCE, the softmax contrastive loss of CLIP, ALIGN and BASIC."""

from __future__ import annotations

from typing import final

from jaxtyping import Float, Int
from torch import Tensor

from triscale.losses import dense, tiled
from triscale.losses.columns import Exchange
from triscale.losses.contrastive import ContrastiveLoss, check_pairs, full_precision, without_autocast
from triscale.losses.tiled import Options
from triscale.losses.tiles import Products


@final
class InfoNCE(ContrastiveLoss):
    """Symmetric softmax contrastive loss with a learned temperature and several positives by id.

        -1/B sum_i 1/|P(i)| sum_{j in P(i)} log softmax_j(exp(logit_scale) x_i . y_j),  the mean of both directions,

    P(i) the rows with i's id, all rows in the denominator.

    Args:
        tiled, logit_scale, max_logit_scale, exchange, products, skip_negligible, learn_temperature: see
            `ContrastiveLoss`.

    Source: Radford et al., arXiv 2103.00020, figure 3; Pham et al., arXiv 2111.10050, section 3.

    Example:
        >>> loss = InfoNCE()
        >>> loss(torch.randn(8, 4), torch.randn(8, 4)).backward()
    """

    def __init__(
        self,
        tiled: bool = True,
        *,
        logit_scale: float = 1 / 0.07,
        max_logit_scale: float = 100.0,
        exchange: Exchange = "auto",
        products: Products = "inputs",
        skip_negligible: bool = False,
        learn_temperature: bool = True,
    ) -> None:
        options = Options(exchange, products, skip_negligible)
        super().__init__(tiled, logit_scale, max_logit_scale, options, learn_temperature)

    def forward(
        self, x: Float[Tensor, "b d"], y: Float[Tensor, "b d"], ids: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of tower outputs x and y, pair i at row i of both; they are normalised here.

        Args:
            ids: rows with an equal id are positives of each other; a negative id is unique.

        Raises:
            UsageError: x and y differ in shape, a rank holds no row, or ids has another number of rows.
        """
        check_pairs("InfoNCE", x, y, ids)
        with without_autocast(x):
            if self.takes_local_rows:
                loss, accuracy = tiled.info_nce(x, y, self.logit_scale, ids, self.options)
            else:
                loss, accuracy = dense.info_nce(full_precision(x), full_precision(y), self.logit_scale, ids)
        self.metrics = {"accuracy": accuracy, "logit_scale": self.logit_scale.detach().exp()}
        return loss
