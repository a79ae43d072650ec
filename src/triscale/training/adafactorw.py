"""AdaFactorW: AdamW in about a quarter of its memory, the optimizer that BASIC trains with.

    M = b1 M + (1 - b1) G                       kept in bfloat16
    R = b2 R + (1 - b2) mean of G^2 over columns,  C = the same over rows,  V = R C / mean(R)
    theta -= lr (M / (1 - b1^t) / (sqrt(V / (1 - b2^t)) + eps) + wd theta)

after t steps. Sources: Pham et al., arXiv 2111.10050, on the optimizer; the factors are those of Adafactor (Shazeer and
Stern, arXiv 1804.04235, section 3), momentum and bias corrections Adam's, weight decay that of AdamW. Of Adafactor it
has neither clipping of the update, nor steps relative to the parameter, nor a schedule for b2.

What the paper leaves open, and what is done here:

- A tensor of more than two axes is a stack of matrices over its two longest axes, each with R and C of its own, as in
  Adafactor's published code; so a kernel (out, in, 3, 3) has R (out, 1, 3, 3) and C (1, in, 3, 3). With fewer than two
  axes longer than 1 there is nothing to factor, and V is kept whole.
- M enters the step as it is computed, in float32 or better, and is rounded to bfloat16 (to nearest) for the next one.
- eps stands where AdamW has it. A row or column without any gradient has V = 0, M = 0 and does not move.
"""

# torch's functions over lists of tensors, torch._foreach_*, have no public names.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from triscale.training.parallel import local_part, shard_axis, shard_like, sum_over_shards

CHUNK_ELEMENTS = {"cpu": 1 << 17}
"""Numbers of parameters that are updated at once, by kind of device: for each a step holds two more for a moment. On
the CPU they should stay in its cache."""
OTHER_CHUNK_ELEMENTS = 1 << 24


def factored_axes(shape: torch.Size) -> tuple[int, int] | None:
    """The two longest axes, ascending; None where fewer than two are longer than 1. Of equal ones the last count."""
    longest = sorted(range(len(shape)), key=lambda axis: shape[axis])[-2:]
    if len(longest) < 2 or shape[longest[0]] < 2:
        return None
    return min(longest), max(longest)


def state_shape(kind: str, shape: torch.Size) -> torch.Size:
    """The shape of R, C and whatever else is kept of a parameter of this shape: its own but for averaged axes."""
    axes = factored_axes(shape)
    if axes is None or kind not in ("exp_avg_sq_rows", "exp_avg_sq_columns"):
        return shape
    averaged = axes[1] if kind == "exp_avg_sq_rows" else axes[0]
    return torch.Size(1 if axis == averaged else length for axis, length in enumerate(shape))


class AdaFactorW(torch.optim.Optimizer):
    """AdaFactorW (see the module) over parameters that may be sharded by FSDP2: then the step is a collective.

    State by parameter: `exp_avg` (M) in bfloat16; `exp_avg_sq_rows` (R) and `exp_avg_sq_columns` (C), whose averaged
    axis has length 1, or `exp_avg_sq` (V) in the parameter's dtype, float32 at least; `step`.

    Args:
        params: as torch's optimizers take them.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root of V.
        weight_decay: wd; decoupled, multiplied by the learning rate as in AdamW.

    Raises:
        ValueError: a number outside of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"lr {lr}, eps {eps}, weight_decay {weight_decay} from 0 on; betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict`, which casts to the parameter's dtype: of bfloat16 numbers nothing is lost."""
        super().__setstate__(state)
        for kept in self.state.values():
            kept["exp_avg"] = kept["exp_avg"].to(torch.bfloat16)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        for parameter in (p for parameters in with_gradient for p in parameters):
            if not self.state[parameter]:
                self.state[parameter] = _initial_state(parameter)
        self._average_squares(with_gradient)
        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            for chunk in _chunks(parameters):
                self._update(group, chunk)
        return loss

    def _average_squares(self, with_gradient: list[list[Tensor]]) -> None:
        """The second moments of all parameters: R and C, or V."""
        sums: list[tuple[Tensor, Tensor]] = []  # those along an axis that is divided over ranks
        updates: list[tuple[Tensor, Tensor, float]] = []  # average, sum of squares, its weight
        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            beta2 = group["betas"][1]
            for p in parameters:
                state, gradient = self.state[p], local_part(p.grad)  # type: ignore[arg-type]
                axes = factored_axes(p.shape)
                if axes is None:
                    average = local_part(state["exp_avg_sq"])
                    average.mul_(beta2).addcmul_(gradient, gradient.to(average.dtype), value=1 - beta2)
                    continue
                gradient = gradient.to(_dtype(p))
                squares = gradient * gradient
                for kind, axis in (("exp_avg_sq_rows", axes[1]), ("exp_avg_sq_columns", axes[0])):
                    total = squares.sum(axis, keepdim=True)
                    if axis == shard_axis(p):
                        sums.append((p, total))
                    updates.append((local_part(state[kind]).mul_(beta2), total, (1 - beta2) / p.shape[axis]))
        sum_over_shards(sums)
        if updates:
            averages, totals, weights = map(list, zip(*updates, strict=True))
            torch._foreach_mul_(totals, weights)
            torch._foreach_add_(averages, totals)

    def _update(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """M and the parameters themselves."""
        states = [self.state[p] for p in parameters]
        torch._foreach_add_([state["step"] for state in states], torch.tensor(1.0), alpha=1.0)
        steps = [state["step"].item() for state in states]
        beta1, beta2 = group["betas"]
        values = [local_part(p) for p in parameters]
        averages = [local_part(state["exp_avg"]) for state in states]
        first = [average.to(_dtype(p)) for average, p in zip(averages, parameters, strict=True)]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, [local_part(p.grad) for p in parameters], alpha=1 - beta1)  # type: ignore[arg-type]
        torch._foreach_copy_(averages, first)
        roots = self._roots(parameters, [1 - beta2**step for step in steps])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(values, first, roots, [-group["lr"] / (1 - beta1**step) for step in steps])

    def _roots(self, parameters: list[Tensor], corrections: list[float]) -> list[Tensor]:
        """sqrt(V / correction) of every parameter.

        As sqrt(R / mean(R)) sqrt(C / correction): R C itself would underflow where gradients are small.
        """
        rows, columns, means, whole = [], [], [], []
        for p, correction in zip(parameters, corrections, strict=True):
            state, axes = self.state[p], factored_axes(p.shape)
            if axes is None:
                whole.append(local_part(state["exp_avg_sq"]) / correction)
                continue
            rows.append(local_part(state["exp_avg_sq_rows"]))
            columns.append(local_part(state["exp_avg_sq_columns"]) / correction)
            # mean(R) = mean(C), the mean of all squares: taken where every rank has all of it.
            mean = rows[-1].mean(axes[0], keepdim=True)
            if shard_axis(p) == axes[0]:
                mean = local_part(state["exp_avg_sq_columns"]).mean(axes[1], keepdim=True)
            means.append(mean.clamp_min_(torch.finfo(mean.dtype).tiny))
        factored: list[Tensor] = []
        if rows:
            shares = torch._foreach_div(rows, means)
            torch._foreach_sqrt_(shares)
            torch._foreach_sqrt_(columns)
            factored = list(torch._foreach_mul(shares, columns))
        if whole:
            torch._foreach_sqrt_(whole)
        remaining = iter(factored), iter(whole)
        return [next(remaining[factored_axes(p.shape) is None]) for p in parameters]


def _initial_state(parameter: Tensor) -> dict[str, Tensor]:
    """Zeros, divided over ranks as the parameter is."""
    state = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16)}
    axes, dtype = factored_axes(parameter.shape), _dtype(parameter)
    if axes is None:
        return {**state, "exp_avg_sq": torch.zeros_like(parameter, dtype=dtype)}
    for kind in ("exp_avg_sq_rows", "exp_avg_sq_columns"):
        whole = torch.zeros(state_shape(kind, parameter.shape), dtype=dtype, device=parameter.device)
        state[kind] = shard_like(whole, parameter)
    return state


def _dtype(parameter: Tensor) -> torch.dtype:
    """What is computed in: the parameter's dtype, float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """The parameters in turns of at most so many numbers as the device updates at once, or of one that has more."""
    chunk, elements = [], 0
    for parameter in parameters:
        limit = CHUNK_ELEMENTS.get(parameter.device.type, OTHER_CHUNK_ELEMENTS)
        if chunk and elements + parameter.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(parameter)
        elements += parameter.numel()
    if chunk:
        yield chunk
