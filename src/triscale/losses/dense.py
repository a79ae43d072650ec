"""The formulas, literal: every score at once, O(B*B) memory, gradients by autograd. The yardstick of `tiled`.

Shape suffixes: B pairs (or images), N = 2B rows of two views, d embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def positives(ids: Int[Tensor, " b"] | None, like: Float[Tensor, "b d"]) -> Bool[Tensor, "b b"]:
    """Whether j is in P(i): the rows with i's id, i itself included. A negative id is unique; no ids: the identity."""
    identity = torch.eye(len(like), dtype=torch.bool, device=like.device)
    if ids is None:
        return identity
    return ((ids[:, None] == ids[None, :]) & (ids >= 0)[:, None]) | identity


def accuracy(scores: Float[Tensor, "b c"], positive: Bool[Tensor, "b c"]) -> Float[Tensor, ""]:
    """The share of rows whose best match is a positive."""
    best = scores.detach().argmax(1, keepdim=True)
    return positive.gather(1, best).to(scores.dtype).mean()


def _soft_cross_entropy(scores: Float[Tensor, "b b"], positive: Bool[Tensor, "b b"]) -> Float[Tensor, ""]:
    """-1/B sum_i 1/|P(i)| sum_{j in P(i)} log softmax_j(s_ij)."""
    chosen = scores.log_softmax(1).masked_fill(~positive, 0.0)
    return -(chosen.sum(1) / positive.sum(1)).mean()


def info_nce(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The symmetric softmax loss of CLIP and BASIC, with several positives by id; and the accuracy.

        -1/B sum_i 1/|P(i)| sum_{j in P(i)} log softmax_j(exp(logit_scale) x_i . y_j),  the mean of both directions.

    Args:
        x, y: pair i at row i of both; normalised here.
        logit_scale: natural logarithm of the factor on the cosines.
        ids: rows with an equal id are positives of each other.

    Source: Radford et al., arXiv 2103.00020, figure 3; positives as in Khosla et al., arXiv 2004.11362, equation 2.
    """
    x, y = F.normalize(x), F.normalize(y)
    scores = logit_scale.exp() * x @ y.T  # (B, B)
    positive = positives(ids, x)
    loss = (_soft_cross_entropy(scores, positive) + _soft_cross_entropy(scores.T, positive)) / 2
    return loss, accuracy(scores, positive)


def sigmoid(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The sigmoid loss of SigLIP, with several positives by id; and the accuracy. Arguments as of `info_nce`.

        -1/B sum_ij log sigmoid(z_ij l_ij),  l = exp(logit_scale) x_i . y_j + logit_bias,  z = +1 inside P(i), else -1.

    Source: Zhai et al., arXiv 2303.15343, section 3.2 and algorithm 1.
    """
    x, y = F.normalize(x), F.normalize(y)
    logits = logit_scale.exp() * x @ y.T + logit_bias  # (B, B)
    positive = positives(ids, x)
    loss = -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(x)
    return loss, accuracy(logits, positive)


def nt_xent(
    z: Float[Tensor, "n d"], logit_scale: Float[Tensor, ""], ids: Int[Tensor, " b"] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss of SimCLR, with several positives by id; and the accuracy.

        -1/N sum_i 1/|P(i)| sum_{j in P(i)} log softmax_{j != i}(exp(logit_scale) z_i . z_j),  i itself not in P(i).

    Args:
        z: (2B, d), the views of image i at rows i and B+i; normalised here.
        logit_scale: -ln of the temperature.
        ids: (B,), images with an equal id are positives of each other.

    Source: Chen et al., arXiv 2002.05709, equation 1; positives as in Khosla et al., arXiv 2004.11362, equation 2.
    """
    z = F.normalize(z)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    scores = (logit_scale.exp() * z @ z.T).masked_fill(itself, -torch.inf)  # (N, N)
    positive = positives(ids, z[: len(z) // 2]).repeat(2, 2) & ~itself
    return _soft_cross_entropy(scores, positive), accuracy(scores, positive)
