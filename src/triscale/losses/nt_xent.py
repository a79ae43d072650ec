"""NT-Xent, the loss of SimCLR: two views of each image, one tower."""

from __future__ import annotations

from typing import ClassVar, final

from jaxtyping import Float, Int
from torch import Tensor

from triscale.errors import UsageError
from triscale.losses import dense, tiled
from triscale.losses.columns import Exchange
from triscale.losses.contrastive import ContrastiveLoss, check_ids, full_precision, without_autocast
from triscale.losses.tiled import Options
from triscale.losses.tiles import Products


@final
class NTXent(ContrastiveLoss):
    """Softmax contrastive loss of two views of each image against all other rows, with several positives by id.

        -1/N sum_i 1/|P(i)| sum_{j in P(i)} log softmax_{j != i}(z_i . z_j / temperature),  N = 2B rows,

    P(i) the other rows with the id of i's image: without ids, or with a negative one, its other view.

    Args:
        temperature: divides the cosines. The parameter `logit_scale` is ln(1 / temperature).
        learn_temperature: whether that parameter takes a gradient; SimCLR keeps it fixed.
        tiled, max_logit_scale, exchange, products, skip_negligible: see `ContrastiveLoss`.

    Source: Chen et al., arXiv 2002.05709, equation 1.

    Example:
        >>> loss = NTXent()
        >>> loss(torch.cat([first_views, second_views])).backward()
    """

    views: ClassVar[int] = 2

    def __init__(
        self,
        temperature: float = 0.1,
        tiled: bool = True,
        *,
        learn_temperature: bool = False,
        max_logit_scale: float = 100.0,
        exchange: Exchange = "auto",
        products: Products = "inputs",
        skip_negligible: bool = False,
    ) -> None:
        if not temperature > 0:
            raise UsageError(f"temperature must be positive, got {temperature}")
        super().__init__(
            tiled, 1 / temperature, max_logit_scale, Options(exchange, products, skip_negligible), learn_temperature
        )

    def forward(self, z: Float[Tensor, "n d"], ids: Int[Tensor, " b"] | None = None) -> Float[Tensor, ""]:
        """The loss of tower outputs z (2b, d), the views of image i at rows i and b+i; they are normalised here.

        Args:
            ids: (b,); images with an equal id are positives of each other; a negative id is unique.

        Raises:
            UsageError: an odd number of rows, a rank holds none, or ids are not one per image.
        """
        if z.ndim != 2 or len(z) % 2:
            raise UsageError(f"NTXent needs two views of each image, (2b, d), got {(*z.shape,)}")
        check_ids("NTXent", len(z) // 2, ids)
        with without_autocast(z):
            if self.takes_local_rows:
                loss, accuracy = tiled.nt_xent(z, self.logit_scale, ids, self.options)
            else:
                loss, accuracy = dense.nt_xent(full_precision(z), self.logit_scale, ids)
        self.metrics = {"accuracy": accuracy, "logit_scale": self.logit_scale.detach().exp()}
        return loss
