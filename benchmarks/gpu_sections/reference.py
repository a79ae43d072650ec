"""The losses and their gradients in float64, block by block, so that B=65,536 fits: what kernels are held against.

Written from the formulas of docs/math.md, without autograd and without the package's own losses.

Shape suffixes: B rows, d width, r rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 2048


class Reference(NamedTuple):
    """A loss, and its gradient by the name of the input or parameter."""

    loss: Tensor
    gradients: dict[str, Tensor]


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    norms = rows.norm(dim=1, keepdim=True)
    return rows / norms, norms


def _to_raw(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """dL/draw = (g - u (u . g)) / |raw|."""
    return (gradient - unit * (gradient * unit).sum(1, keepdim=True)) / norms


def _blocks(x: Tensor, y: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their scores (r, B)."""
    for start in range(0, len(x), BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, len(x)))
        yield rows, scale * x[rows] @ y.T


def _positives(ids: Tensor, rows: slice) -> Tensor:
    """(r, B): 1/|P(i)| inside P(i). Symmetric, since all of P(i) have equally many."""
    same = (ids[rows, None] == ids[None, :]).to(torch.float64)
    return same / same.sum(1, keepdim=True)


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor, ids: Tensor) -> Reference:
    """-1/B sum_i sum_j T_ij log softmax_j(s_ij), the mean of both directions, T_ij = 1/|P(i)| inside P(i).

        dL/ds = (softmax over rows + softmax over columns - 2 T) / 2B

    Args:
        x, y: (B, d) in float64, normalised here.
        ids: (B,), of rows that are positives of each other.
    """
    (u, u_norms), (v, v_norms), scale = _unit(x), _unit(y), logit_scale.exp()
    row_lse = torch.cat([scores.logsumexp(1) for _, scores in _blocks(u, v, scale)])
    column_lse = torch.cat([scores.logsumexp(1) for _, scores in _blocks(v, u, scale)])
    loss = (row_lse.sum() + column_lse.sum()) / 2

    def gradient_of_scores(rows: slice, scores: Tensor) -> Tensor:
        nonlocal loss
        targets = _positives(ids, rows)
        loss = loss - (targets * scores).sum()
        return ((scores - row_lse[rows, None]).exp() + (scores - column_lse).exp()) / 2 - targets

    du, dv, dscale = _gradients(u, v, scale, gradient_of_scores)
    gradients = {"x": _to_raw(du, u, u_norms), "y": _to_raw(dv, v, v_norms), "logit_scale": dscale}
    return Reference(loss / len(x), gradients)


def sigmoid(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, ids: Tensor) -> Reference:
    """-1/B sum_ij log sigmoid(z_ij l_ij), l = s + bias; dL/dl = (sigmoid(l) - [j in P(i)]) / B. As `info_nce`."""
    (u, u_norms), (v, v_norms), scale = _unit(x), _unit(y), logit_scale.exp()
    loss, dbias = x.new_zeros(()), x.new_zeros(())

    def gradient_of_scores(rows: slice, scores: Tensor) -> Tensor:
        nonlocal loss, dbias
        logits, positive = scores + logit_bias, (ids[rows, None] == ids[None, :]).to(x.dtype)
        loss = loss + F.softplus(torch.where(positive > 0, -logits, logits), threshold=700.0).sum()
        gradient = logits.sigmoid() - positive
        dbias = dbias + gradient.sum()
        return gradient

    du, dv, dscale = _gradients(u, v, scale, gradient_of_scores)
    gradients = {"x": _to_raw(du, u, u_norms), "y": _to_raw(dv, v, v_norms), "logit_scale": dscale}
    return Reference(loss / len(x), {**gradients, "logit_bias": dbias / len(x)})


def nt_xent(z: Tensor, logit_scale: Tensor, ids: Tensor) -> Reference:
    """-1/N sum_i sum_j T_ij log softmax_{j != i}(s_ij), i itself not in P(i); ids (N,) of both views."""
    (u, norms), scale = _unit(z), logit_scale.exp()
    loss = z.new_zeros(())

    def gradient_of_scores(rows: slice, scores: Tensor) -> Tensor:
        nonlocal loss
        itself = torch.zeros_like(scores, dtype=torch.bool)
        itself.diagonal(rows.start).fill_(True)
        same = (ids[rows, None] == ids[None, :]) & ~itself
        targets = same / same.sum(1, keepdim=True).to(z.dtype)
        lse = scores.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
        loss = loss + lse.sum() - (targets * scores).sum()
        return (scores - lse).exp().masked_fill(itself, 0.0) - targets

    du, dv, dscale = _gradients(u, u, scale, gradient_of_scores)
    return Reference(loss / len(z), {"z": _to_raw(du + dv, u, norms), "logit_scale": dscale})


def _gradients(
    u: Tensor, v: Tensor, scale: Tensor, gradient_of_scores: Callable[[slice, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """With respect to unit rows u and v and to ln(scale), of a loss that is a mean over rows."""
    du, dv, dscale = torch.zeros_like(u), torch.zeros_like(v), u.new_zeros(())
    for rows, scores in _blocks(u, v, scale):
        gradient = gradient_of_scores(rows, scores) / len(u)
        du[rows] += scale * gradient @ v
        dv += scale * gradient.T @ u[rows]
        dscale += (gradient * scores).sum()
    return du, dv, dscale
