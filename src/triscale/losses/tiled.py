"""The losses of `dense` in tiles: O(B*d) memory at any batch, over all processes, gradients made in the forward pass.

How InfoNCE goes, on a rank with b of the B rows of x and of y:

1. x and y are normalised; y and the ids are gathered once: (B, d).
2. Sweep one computes each tile of scores and folds it into the log-sum-exp of its rows (all columns are here) and of
   its columns (all-reduced over ranks afterwards). Log-sum-exps are combined online, so any scale stays finite.
3. Sweep two computes each tile again, turns it into G = softmax over rows + softmax over columns, and adds G y to dx
   and G^T x to dy. Together four products of 2*b*B*d FLOPs, each tile serving both directions.
4. dy is reduce-scattered to the ranks that own the rows.

Positives enter linearly, so tiles never see ids: sum_i s x_i . mean(y over P(i)) is a matter of group sums, O(B*d).

Shape suffixes: B pairs over all ranks, b of this rank, d width, r and c rows and columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triscale import distributed

TILE_ROWS = 512
TILE_COLUMNS = 1024
ACCURACY_ROWS = 256
SMALLEST_NORM = 1e-12
"""Shorter rows are divided by this, as torch's normalize does."""


class InfoNCEParts(NamedTuple):
    """What one forward pass gives: the global loss, this rank's gradients (None if not wanted), the accuracy."""

    loss: Float[Tensor, ""]
    grad_x: Float[Tensor, "b d"] | None
    grad_y: Float[Tensor, "b d"] | None
    grad_logit_scale: Float[Tensor, ""] | None
    accuracy: Float[Tensor, ""]


@dataclass(frozen=True)
class Groups:
    """Rows with an equal id: `index[i]` is the group of row i of all B, `size[i]` the number of rows in it."""

    index: Int[Tensor, " b"]
    size: Int[Tensor, " b"]
    count: int

    def sums(self, rows: Float[Tensor, "n d"], index: Int[Tensor, " n"]) -> Float[Tensor, "g d"]:
        """Add up `rows` by group; `index` is the group of each."""
        return rows.new_zeros((self.count, rows.shape[1])).index_add_(0, index, rows)


def group_rows(ids: Int[Tensor, " b"]) -> Groups:
    """Number the groups of equal ids; a negative id makes a group of its own."""
    shared = ids >= 0
    index = torch.empty_like(ids)
    values, inverse = torch.unique(ids[shared], return_inverse=True)
    index[shared] = inverse
    alone = int((~shared).sum())
    index[~shared] = torch.arange(len(values), len(values) + alone, device=ids.device)
    count = len(values) + alone
    return Groups(index, torch.bincount(index, minlength=count)[index], count)


def _log_sum_exps(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sweep one: log-sum-exp of the scores of every row (b,) and, over this rank's rows, of every column (B,)."""
    row_lse, column_lse = (e.new_full((len(e),), -torch.inf) for e in (x, y))
    for r in range(0, len(x), TILE_ROWS):
        rows = slice(r, r + TILE_ROWS)
        scaled_x = scale * x[rows]
        for c in range(0, len(y), TILE_COLUMNS):
            columns = slice(c, c + TILE_COLUMNS)
            scores = scaled_x @ y[columns].T  # (r, c)
            row_lse[rows] = torch.logaddexp(row_lse[rows], scores.logsumexp(1))
            column_lse[columns] = torch.logaddexp(column_lse[columns], scores.logsumexp(0))
    return row_lse, column_lse


def _softmax_gradients(
    x: Tensor, y: Tensor, scale: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Sweep two: G y (b, d) and G^T x (B, d), G the sum of the row and the column softmax of the scores."""
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    for r in range(0, len(x), TILE_ROWS):
        rows = slice(r, r + TILE_ROWS)
        scaled_x = scale * x[rows]
        for c in range(0, len(y), TILE_COLUMNS):
            columns = slice(c, c + TILE_COLUMNS)
            scores = scaled_x @ y[columns].T  # (r, c)
            probabilities = (scores - row_lse[rows, None]).exp_()
            probabilities += scores.sub_(column_lse[None, columns]).exp_()
            grad_x[rows].addmm_(probabilities, y[columns])
            grad_y[columns].addmm_(probabilities.T, x[rows])
    return grad_x, grad_y


def _all_reduce_log_sum_exp(lse: Tensor) -> Tensor:
    """Combine the ranks' log-sum-exps of the same columns."""
    if distributed.world_size() == 1:
        return lse
    largest = distributed.all_reduce_max(lse.clone())
    return distributed.all_reduce_sum((lse - largest).exp_()).log_().add_(largest)


def _accuracy(x: Tensor, y: Tensor, group: Tensor, first_row: int) -> Tensor:
    """How many of the first rows have a positive as their best match: (hits, rows) as a tensor."""
    sample = min(len(x), ACCURACY_ROWS)
    best = (x[:sample] @ y.T).argmax(1)
    hits = group[best] == group[first_row : first_row + sample]
    return torch.stack([hits.sum(), torch.full_like(best[0], sample)]).to(x.dtype)


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True).clamp_min_(SMALLEST_NORM)


def _through_normalisation_(gradient: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient with respect to rows whose unit vectors are `unit`, given that of these; in place."""
    along = (gradient * unit).sum(1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1).div_(norms)


@torch.no_grad()
def info_nce_parts(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None,
    gradients: bool,
) -> InfoNCEParts:
    """Loss and gradients of InfoNCE over the rows of all ranks. x, y, ids: this rank's rows, of any length.

    The loss is the global one on every rank. The gradients of x and y are those of this rank's rows; that of
    logit_scale is this rank's share, and the shares of all ranks sum to the whole.
    """
    counts = distributed.row_counts(len(x), x.device)
    total, first_row = sum(counts), sum(counts[: distributed.rank()])
    mine = slice(first_row, first_row + len(x))
    x_norms, y_norms = _norms(x), _norms(y)
    x, y = x / x_norms, y / y_norms
    y_all = distributed.all_gather_rows(y, counts)
    scale = logit_scale.exp()

    if ids is None:
        groups = None
        group = torch.arange(total, device=x.device)
        positive_y = y
    else:
        groups = group_rows(distributed.all_gather_rows(ids, counts))
        group = groups.index
        positive_y = groups.sums(y_all, group)[group[mine]] / groups.size[mine, None]  # mean of y over P(i)

    row_lse, column_lse = _log_sum_exps(x, y_all, scale)
    column_lse = _all_reduce_log_sum_exp(column_lse)
    share = row_lse.sum() / 2 - scale * torch.linalg.vecdot(x, positive_y).sum()
    sums = distributed.all_reduce_sum(torch.cat([share[None], _accuracy(x, y_all, group, first_row)]))
    loss = (sums[0] + column_lse.sum() / 2) / total
    accuracy = sums[1] / sums[2]
    if not gradients:
        return InfoNCEParts(loss, None, None, None, accuracy)

    grad_x, grad_y = _softmax_gradients(x, y_all, scale, row_lse, column_lse)
    grad_x.div_(2).sub_(positive_y).mul_(scale / total)
    if groups is None:
        grad_y.div_(2)[mine].sub_(x)
    else:
        grad_y.div_(2).sub_(groups.sums(x, group[mine])[group] / groups.size[:, None])
    grad_y = distributed.reduce_scatter_rows(grad_y.mul_(scale / total), counts)
    # The loss sees logit_scale through the scores alone: dL/dlogit_scale = sum_ij dL/ds_ij s_ij = sum_i x_i . dL/dx_i.
    grad_logit_scale = torch.linalg.vecdot(x, grad_x).sum()
    _through_normalisation_(grad_x, x, x_norms)
    _through_normalisation_(grad_y, y, y_norms)
    return InfoNCEParts(loss, grad_x, grad_y, grad_logit_scale, accuracy)


class _InfoNCE(torch.autograd.Function):
    """Hands gradients that the forward pass made to autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, logit_scale: Tensor, ids: Tensor | None, gradients: bool):  # type: ignore[override]
        parts = info_nce_parts(x, y, logit_scale, ids, gradients)
        if parts.grad_x is not None and parts.grad_y is not None and parts.grad_logit_scale is not None:
            ctx.save_for_backward(parts.grad_x, parts.grad_y, parts.grad_logit_scale)
        ctx.mark_non_differentiable(parts.accuracy)
        return parts.loss, parts.accuracy

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        grad_x, grad_y, grad_logit_scale = ctx.saved_tensors
        if float(grad_loss) == 1:  # the common case, without a second (B, d) for each
            return grad_x, grad_y, grad_logit_scale, None, None
        return grad_loss * grad_x, grad_loss * grad_y, grad_loss * grad_logit_scale, None, None


def info_nce(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """InfoNCE of x and y, which are normalised here, over the rows of all ranks in O(B*d) memory; and the accuracy.

    The accuracy is the share of rows (the first 256 of each rank) of x whose best match among all y is a positive.
    """
    return _InfoNCE.apply(x, y, logit_scale, ids, torch.is_grad_enabled())  # type: ignore[return-value]
