"""The losses of `dense` in tiles: O(B*d) memory at any batch, over all processes, gradients made in the forward pass.

How InfoNCE goes, on a rank with b of the B rows of x and of y:

1. x and y are normalised, and rounded to the precision of the products where kernels run: (b, d) each. y of all ranks
   is had as columns, gathered or block by block (`columns`).
2. Sweep one computes each tile of scores and folds it into the log-sum-exp of its rows (all columns pass by) and of
   its columns (all-reduced over ranks afterwards).
3. Sweep two computes each tile again, turns it into G = softmax over rows + softmax over columns, and adds G y to dx
   and G^T x to dy. Together four products of 2*b*B*d FLOPs, each tile serving both directions.
4. dy goes to the ranks that own the rows. The memory of normalised y ends as dy: beyond the inputs there are three
   (b, d) tensors at one process and with `blocks`, two of which are the result.

Sigmoid needs no log-sum-exp, so its loss and gradients take one sweep and three products. NT-Xent has z on both sides:
its scores are symmetric, a column's log-sum-exp is that of the row of the same number, and with these gathered
dz = (P + P^T) z needs neither a product with the transposed tile nor a reduction: two sweeps, three products.

Positives enter linearly, so tiles never see ids: they are a matter of group sums, O(B*d) (`positives`).

Shape suffixes: B rows over all ranks, b of this rank, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triscale import distributed
from triscale.losses import cuda_sweeps, launch, sweeps
from triscale.losses.columns import Exchange, RankRows, columns, rank_rows
from triscale.losses.positives import Groups, PositiveSums, group_rows
from triscale.losses.tiles import (
    BestMatch,
    Products,
    precise_dtype,
    precise_sum,
    row_tiles,
    to_raw_rows_,
    unit_rows,
)


class Options(NamedTuple):
    """How a tiled loss goes about it; see `ContrastiveLoss`."""

    exchange: Exchange = "auto"
    products: Products = "inputs"
    skip_negligible: bool = False


DEFAULTS = Options()


class Parts(NamedTuple):
    """What one forward pass gives."""

    loss: Float[Tensor, ""]
    """Over all ranks' rows, the same on every rank."""
    accuracy: Float[Tensor, ""]
    """The share of rows (the first few of each rank) whose best match is a positive."""
    gradients: tuple[Tensor, ...]
    """Of each input, () if not wanted. Of rows: this rank's. Of a parameter: this rank's share; all add up."""


class _Way:
    """With what the sweeps over some rows are made: kernels where they serve, torch's operations elsewhere."""

    def __init__(self, rows: Tensor, options: Options) -> None:
        self.options = options
        kernels = launch.available(rows)
        self.sweeps = cuda_sweeps if kernels else sweeps
        self.operands, self._tf32 = (
            launch.operands(rows, options.products) if kernels else (precise_dtype(rows.dtype), False)
        )

    def scores(
        self,
        x: Float[Tensor, "b d"],
        y: Float[Tensor, "b d"],
        ranks: RankRows,
        scale: float,
        without_self: bool = False,
    ) -> sweeps.Scores:
        """Of unit rows x against all ranks' y; the memory of `y` is taken over where it is precise enough."""
        held = columns(self.options.exchange, y, ranks)
        return sweeps.Scores(x, held, ranks, scale, without_self, self._tf32, self.options.skip_negligible)


def _score_positives(x: Tensor, positives: PositiveSums, weights: Tensor, start_of_gradient: Tensor | None) -> Tensor:
    """sum_i w_i x_i . (sum over P(i)); -w_i times that sum becomes row i of `start_of_gradient`, if given."""
    total = precise_sum(x[:0])
    for rows in row_tiles(x):
        weighted = positives.tile(rows) * weights[rows, None]
        total += precise_sum((x[rows] * weighted).sum(1))
        if start_of_gradient is not None:
            torch.neg(weighted, out=start_of_gradient[rows])
    return total


def _subtract_positives_(gradient: Tensor, positives: PositiveSums, weights: Tensor) -> None:
    """Take w_i * (sum over P(i)) off every row i of `gradient`."""
    for rows in row_tiles(gradient):
        gradient[rows].addcmul_(positives.tile(rows), weights[rows, None], value=-1)


def _reduced(
    share: Tensor, dtype: torch.dtype, best: BestMatch, groups: Groups, ranks: RankRows
) -> tuple[Tensor, Tensor]:
    """A loss from every rank's share of it, and the accuracy, in one all-reduce."""
    mine = groups.by_row[ranks.first : ranks.first + best.rows]
    hits = (groups.by_row[best.column] == mine).sum()
    sums = torch.stack([share, hits.to(share.dtype), torch.full_like(share, best.rows)])
    loss, hits, rows = distributed.all_reduce_sum(sums).to(dtype)
    return loss, hits / rows


@torch.no_grad()
def _info_nce(
    gradients: bool, x: Tensor, y: Tensor, logit_scale: Tensor, *, ids: Tensor | None, options: Options
) -> Parts:
    ranks, scale, way = rank_rows(len(x), x.device), math.exp(logit_scale.item()), _Way(x, options)
    groups = group_rows(ids, ranks, x.device)
    (unit_x, x_norms), (unit_y, y_norms) = unit_rows(x, way.operands), unit_rows(y, way.operands)
    weights = 2.0 / groups.sizes.to(x_norms.dtype)  # of positives in both directions together
    grad_x = torch.empty_like(unit_x, dtype=x_norms.dtype) if gradients else None
    positive_scores = scale * _score_positives(unit_x, PositiveSums(unit_y, groups), weights, grad_x)

    scores, best = way.scores(unit_x, unit_y, ranks, scale), BestMatch(unit_x)
    del unit_y
    lse = way.sweeps.log_sum_exps(scores, best, by_column=True)
    assert lse.columns is not None
    share = math.log(2) * precise_sum(lse.rows + lse.columns[ranks.mine]) - positive_scores
    loss, accuracy = _reduced(share / (2 * ranks.total), x_norms.dtype, best, groups, ranks)
    if grad_x is None:
        return Parts(loss, accuracy, ())

    way.sweeps.softmax_gradients(scores, lse, grad_x, by_column=True)
    grad_y = scores.columns.gradient()
    _subtract_positives_(grad_y, PositiveSums(unit_x, groups), weights)
    factor = scale / (2 * ranks.total)
    # The loss sees logit_scale through the scores alone: dL/dlogit_scale = sum_ij dL/ds_ij s_ij = sum_i x_i . dL/dx_i.
    grad_scale = to_raw_rows_(grad_x, x, x_norms, factor)
    to_raw_rows_(grad_y, y, y_norms, factor)
    return Parts(loss, accuracy, (grad_x, grad_y, grad_scale))


@torch.no_grad()
def _sigmoid(
    gradients: bool,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    ids: Tensor | None,
    options: Options,
) -> Parts:
    ranks, scale, way = rank_rows(len(x), x.device), math.exp(logit_scale.item()), _Way(x, options)
    groups, bias = group_rows(ids, ranks, x.device), logit_bias.item()
    (unit_x, x_norms), (unit_y, y_norms) = unit_rows(x, way.operands), unit_rows(y, way.operands)
    weights = x_norms.new_ones(len(x))
    grad_x = torch.empty_like(unit_x, dtype=x_norms.dtype) if gradients else None
    positive_pairs = int(groups.sizes.sum())
    # softplus(-l) = softplus(l) - l, so that every pair counts as a negative and the positives' logits come off.
    positive_logits = scale * _score_positives(unit_x, PositiveSums(unit_y, groups), weights, grad_x)
    positive_logits += bias * positive_pairs

    scores, best = way.scores(unit_x, unit_y, ranks, scale), BestMatch(unit_x)
    del unit_y
    sum_of_softplus, sum_of_g = way.sweeps.sigmoid_sweep(scores, bias, best, grad_x)
    loss, accuracy = _reduced((sum_of_softplus - positive_logits) / ranks.total, x_norms.dtype, best, groups, ranks)
    if grad_x is None:
        return Parts(loss, accuracy, ())

    grad_y = scores.columns.gradient()
    _subtract_positives_(grad_y, PositiveSums(unit_x, groups), weights)
    grad_scale = to_raw_rows_(grad_x, x, x_norms, scale / ranks.total)  # as in InfoNCE
    to_raw_rows_(grad_y, y, y_norms, scale / ranks.total)
    return Parts(loss, accuracy, (grad_x, grad_y, grad_scale, (sum_of_g - positive_pairs) / ranks.total))


@torch.no_grad()
def _nt_xent(gradients: bool, z: Tensor, logit_scale: Tensor, *, ids: Tensor | None, options: Options) -> Parts:
    ranks, scale, way = rank_rows(len(z), z.device), math.exp(logit_scale.item()), _Way(z, options)
    groups = group_rows(ids, ranks, z.device, views=2)
    unit, norms = unit_rows(z, way.operands)
    weights = 2.0 / (groups.sizes - 1).to(norms.dtype)  # i as the row and i as the column
    grad_z = torch.empty_like(unit, dtype=norms.dtype) if gradients else None
    positive_scores = scale * _score_positives(unit, PositiveSums(unit, groups, without_self=True), weights, grad_z)

    scores, best = way.scores(unit, unit, ranks, scale, without_self=True), BestMatch(unit)
    lse = way.sweeps.log_sum_exps(scores, best, by_column=False)
    share = math.log(2) * precise_sum(lse.rows) - positive_scores / 2
    loss, accuracy = _reduced(share / ranks.total, norms.dtype, best, groups, ranks)
    if grad_z is None:
        return Parts(loss, accuracy, ())

    lse = lse._replace(columns=distributed.all_gather_rows(lse.rows, ranks.counts))
    way.sweeps.softmax_gradients(scores, lse, grad_z, by_column=False)
    grad_scale = to_raw_rows_(grad_z, z, norms, scale / ranks.total) / 2  # each score was counted from both its rows
    return Parts(loss, accuracy, (grad_z, grad_scale))


class _MadeInForward(torch.autograd.Function):
    """Hands gradients that the forward pass made to autograd, scaled by the one that comes in."""

    @staticmethod
    def forward(ctx, parts: Callable[..., Parts], gradients: bool, *inputs: Tensor):  # type: ignore[override]
        loss, accuracy, made = parts(gradients, *inputs)
        ctx.save_for_backward(*(g.to(e.dtype) for g, e in zip(made, inputs, strict=gradients)))
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor):  # type: ignore[override]
        made = ctx.saved_tensors
        if float(grad_loss) != 1:  # the common case needs no second (b, d) for each
            made = tuple(g * grad_loss.to(g.dtype) for g in made)
        return None, None, *made


def _apply(parts: Callable[..., Parts], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _MadeInForward.apply(parts, gradients, *inputs)  # type: ignore[return-value]


def info_nce(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
    options: Options = DEFAULTS,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`dense.info_nce` over the rows of all ranks, of which x, y and ids are this rank's; loss and accuracy.

    Raises:
        UsageError: on every rank, if one of them has no row.
    """
    return _apply(partial(_info_nce, ids=ids, options=options), x, y, logit_scale)


def sigmoid(
    x: Float[Tensor, "b d"],
    y: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
    options: Options = DEFAULTS,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`dense.sigmoid` over the rows of all ranks; as `info_nce` otherwise."""
    return _apply(partial(_sigmoid, ids=ids, options=options), x, y, logit_scale, logit_bias)


def nt_xent(
    z: Float[Tensor, "n d"],
    logit_scale: Float[Tensor, ""],
    ids: Int[Tensor, " b"] | None = None,
    options: Options = DEFAULTS,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`dense.nt_xent` over the rows of all ranks, each with both views of its images; as `info_nce` otherwise."""
    return _apply(partial(_nt_xent, ids=ids, options=options), z, logit_scale)
