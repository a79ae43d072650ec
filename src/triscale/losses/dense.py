"""The formulas, literal: every score at once, O(B*B) memory, gradients by autograd. The yardstick of `tiled`.

Shape suffixes: B pairs, d embedding width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def positives(ids: Int[Tensor, " b"] | None, like: Float[Tensor, "b d"]) -> Float[Tensor, "b b"]:
    """The matrix with 1/|P(i)| where j is a positive of i, else 0. A negative id is unique; no ids: the identity."""
    identity = torch.eye(len(like), dtype=like.dtype, device=like.device)
    if ids is None:
        return identity
    same = ((ids[:, None] == ids[None, :]) & (ids >= 0)[:, None]).to(like.dtype).maximum(identity)
    return same / same.sum(1, keepdim=True)


def info_nce(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, ""]:
    """The symmetric softmax loss of CLIP and BASIC, with several positives by id.

        -1/B sum_i 1/|P(i)| sum_{j in P(i)} log softmax_j(exp(logit_scale) x_i . y_j),  the mean of both directions.

    Args:
        x, y: rows of unit length, pair i at row i of both.
        logit_scale: natural logarithm of the factor on the cosines.
        ids: rows with an equal id are positives of each other.

    Source: Radford et al., arXiv 2103.00020, figure 3; positives as in Khosla et al., arXiv 2004.11362, equation 2.
    """
    scores = logit_scale.exp() * x @ y.T  # (B, B)
    weights = positives(ids, x)
    by_image = -(weights * scores.log_softmax(1)).sum(1).mean()
    by_text = -(weights * scores.T.log_softmax(1)).sum(1).mean()
    return (by_image + by_text) / 2
