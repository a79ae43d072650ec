"""The exact large-batch step: the gradient of the whole contrastive batch in the memory of a micro-batch.

1. Embed every lane micro-batch by micro-batch, all but the last `keep` without a graph.
2. Compute the loss and its gradient with respect to all embeddings and the temperature, over all ranks.
3. Go back in reverse: kept micro-batches at once; the others are embedded again, with the same random numbers, and
   their gradients flow from the embeddings into the parameters. Buffers are put back, so each counts a sample once.
4. Sum the gradients over ranks in one all-reduce.

Activations in memory: those of keep + 1 micro-batches, whatever B; beside them the embeddings, then their gradients.
Cost: one forward pass more for what is not kept, at most 4/3 of a plain step. The result is the gradient of the plain
step on the whole batch, exactly.

Source: the two passes are GradCache's (Gao et al., arXiv 2101.06983) and BASIC's (Pham et al., arXiv 2111.10050).

Shape suffixes: B pairs over all ranks, b of this rank, m of a micro-batch, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from triscale import distributed
from triscale.errors import UsageError
from triscale.training import memory
from triscale.training.lane import Lane, Rows, device_of, put_back
from triscale.training.memory import LanePlan

Size = int | Literal["auto"]
PerLane = Size | Mapping[str, Size]


@dataclass(frozen=True)
class StepOutput:
    """What a step gives besides gradients."""

    loss: Tensor
    """The global loss, on every rank; where it is not finite, no gradient was made."""
    metrics: dict[str, float]
    """The loss's own (in-batch accuracy, logit scale), and `replay_error`: the largest difference between an
    embedding of the first pass and the same one of the second. Zero unless the tower is not a function of its inputs,
    parameters and torch's random numbers."""


class ContrastiveStep:
    """Fills every `.grad` with the exact gradient of a contrastive loss over the whole batch of all ranks.

    Args:
        towers: lane name -> module `(m, ...) -> (m, d)`, not normalised; bare (no DistributedDataParallel).
        loss: module or callable of one (b, d) tensor per lane, in the towers' order, and `ids=`. One with
            `takes_local_rows` sees this rank's rows and reduces over ranks itself; any other sees all ranks' rows.
        micro_batch: samples that go through a tower at once; an int, "auto", or one per lane.
        keep: micro-batches that keep their activations and so need no second pass; an int, "auto", or one per lane.
        seed: of the towers' random numbers (dropout, stochastic depth), with step, lane and position.
        batch_norm: "refuse" towers with BatchNorm under more than one micro-batch, or take the statistics of each
            micro-batch ("per_micro_batch").
        autocast_dtype: arithmetic of the towers (None: as they are); loss and embeddings are float32 or better.
        budget_bytes: memory that "auto" may use for activations; None: `memory.default_budget_bytes`.

    Example:
        >>> step = ContrastiveStep({"image": f, "text": g}, losses.InfoNCE(), micro_batch=64, keep="auto")
        >>> out = step({"image": images, "text": tokens}, ids=None)
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        loss: Callable[..., Tensor],
        *,
        micro_batch: PerLane = "auto",
        keep: PerLane = "auto",
        seed: int = 0,
        batch_norm: Literal["refuse", "per_micro_batch"] = "refuse",
        autocast_dtype: torch.dtype | None = None,
        budget_bytes: int | None = None,
    ) -> None:
        self.towers, self.loss, self.seed, self.steps = dict(towers), loss, seed, 0
        self.batch_norm, self.autocast_dtype, self.budget_bytes = batch_norm, autocast_dtype, budget_bytes
        self.plans: dict[str, LanePlan] = {}
        self._micro_batch = _per_lane("micro_batch", micro_batch, self.towers, smallest=1)
        self._keep = _per_lane("keep", keep, self.towers, smallest=0)
        for name, tower in self.towers.items():
            if isinstance(tower, DistributedDataParallel):
                raise UsageError(
                    f"tower '{name}' is wrapped in DistributedDataParallel: pass the bare module, "
                    "the step reduces gradients over processes itself"
                )

    def __call__(self, inputs: Mapping[str, Rows], ids: Tensor | None = None) -> StepOutput:
        """Fill every `.grad` (which must be None) with the gradient of the loss over all ranks' rows.

        Args:
            inputs: lane name -> this rank's b rows.
            ids: (b,) integers; rows with an equal id are positives of each other. Handed to the loss if given.

        Raises:
            UsageError: lanes or rows do not match the towers, or a tower cannot be split into micro-batches.
        """
        counts = self._check(inputs)
        if not self.plans:
            self.plans = self.resolve(inputs)
        self._refuse_batch_norm(max(counts))
        first_row = sum(counts[: distributed.rank()])
        buffers = [(b, b.clone()) for tower in self.towers.values() for b in tower.buffers()]
        lanes = [self._lane(name, inputs, first_row) for name in self.towers]
        for lane in lanes:
            lane.first_pass(self.plans[lane.name], max(counts))

        loss, gradients = self._loss_and_gradients([lane.take_embeddings() for lane in lanes], ids, counts)
        metrics = {name: float(value) for name, value in getattr(self.loss, "metrics", {}).items()}
        if math.isfinite(loss):
            for lane in reversed(lanes):
                lane.second_pass(gradients.pop())
            self._reduce()
            metrics["replay_error"] = max(lane.replay_error for lane in lanes)
        else:
            put_back(buffers)
            for parameter in self._parameters():
                parameter.grad = None
        self.steps += 1
        return StepOutput(loss, metrics)

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken: with the seed, all that the random numbers depend on."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after `state["steps"]` steps."""
        self.steps = state["steps"]

    def resolve(self, inputs: Mapping[str, Rows], rows: int | None = None) -> dict[str, LanePlan]:
        """Micro-batch and keep of every lane, "auto" replaced by what fits the budget, agreed over ranks (minimum).

        Measures the activations of a few rows of `inputs`; neither the towers nor the random numbers change by it.

        Args:
            inputs: as a step takes them; a few rows are enough.
            rows: b, this rank's rows of the batches to come; None: those of `inputs`.
        """
        counts = self._check(inputs)
        if rows is not None:
            counts = distributed.row_counts(rows, device_of(next(iter(self.towers.values()))))
        rows = max(counts)
        budget = self.budget_bytes
        plans = {}
        for name, tower in self.towers.items():
            micro_batch, keep = self._micro_batch[name], self._keep[name]
            if micro_batch == "auto" or keep == "auto":
                lane = self._lane(name, inputs, first_row=0)
                budget = memory.default_budget_bytes(lane.device) if budget is None else budget
                bytes_per_row = self._activation_bytes_per_row(lane)
                if micro_batch == "auto":
                    micro_batch = memory.auto_micro_batch(bytes_per_row, rows, budget, lane.device.type)
                if keep == "auto":
                    keep = memory.auto_keep(bytes_per_row * micro_batch, math.ceil(rows / micro_batch), budget)
                    budget -= int(keep * micro_batch * bytes_per_row)
            agreed = distributed.all_reduce_min(torch.tensor([micro_batch, keep], device=device_of(tower)))
            plans[name] = LanePlan(*(int(n) for n in agreed))
        return plans

    def _lane(self, name: str, inputs: Mapping[str, Rows], first_row: int) -> Lane:
        return Lane(
            name,
            self.towers[name],
            inputs[name],
            first_row=first_row,
            seed=(self.seed, self.steps),
            autocast_dtype=self.autocast_dtype,
        )

    def _activation_bytes_per_row(self, lane: Lane) -> float:
        if not lane.trainable:
            return 0.0
        rows = slice(0, min(memory.PROBE_ROWS, len(lane.inputs)))
        buffers = [(b, b.clone()) for b in lane.tower.buffers()]
        probe = torch.as_tensor(lane.inputs[rows]).to(lane.device)
        lane.inputs = probe
        total = memory.activation_bytes(lane.tower, lambda: lane.embed(rows), probe)
        put_back(buffers)
        return total / len(probe)

    def _check(self, inputs: Mapping[str, Rows]) -> list[int]:
        """The rows of every rank; refuses inputs that do not match the towers."""
        if any(parameter.grad is not None for parameter in self._parameters()):
            raise UsageError("every .grad must be None before a step: call optimizer.zero_grad(set_to_none=True)")
        if set(inputs) != set(self.towers):
            raise UsageError(f"the step has the lanes {sorted(self.towers)}, its inputs are {sorted(inputs)}")
        rows = {name: len(value) for name, value in inputs.items()}
        if len(set(rows.values())) != 1:
            raise UsageError(f"every lane needs the same number of rows, got {rows}")
        device = device_of(next(iter(self.towers.values())))
        counts = distributed.row_counts(next(iter(rows.values())), device)
        if min(counts) == 0:
            raise UsageError(f"every rank needs at least one row, got {counts}: use a larger batch or fewer processes")
        return counts

    def _refuse_batch_norm(self, rows: int) -> None:
        if self.batch_norm != "refuse":
            return
        for name, tower in self.towers.items():
            layers = any(isinstance(module, _BatchNorm) and module.training for module in tower.modules())
            if layers and rows * distributed.world_size() > self.plans[name].micro_batch:
                raise UsageError(
                    f"tower '{name}' has BatchNorm, whose statistics would be those of a micro-batch: set "
                    'batch_norm="per_micro_batch" if that is meant, or use a tower without it'
                )

    def _parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter of the towers and the loss, once, in one order on all ranks."""
        modules = [*self.towers.values(), *([self.loss] if isinstance(self.loss, nn.Module) else [])]
        return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())

    def _loss_and_gradients(
        self, embeddings: list[Tensor], ids: Tensor | None, counts: list[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The global loss, and its gradient with respect to this rank's embeddings (b, d) of every lane."""
        arguments = {} if ids is None else {"ids": ids.to(embeddings[0].device)}
        local = getattr(self.loss, "takes_local_rows", False)
        if not local:
            embeddings = [distributed.all_gather_rows(e, counts) for e in embeddings]
            arguments = {name: distributed.all_gather_rows(value, counts) for name, value in arguments.items()}
        leaves = [e.detach().requires_grad_() for e in embeddings]
        with torch.enable_grad():
            loss = self.loss(*leaves, **arguments)
        loss.backward()
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        if not local:
            first = sum(counts[: distributed.rank()])
            gradients = [g[first : first + counts[distributed.rank()]] for g in gradients]
            for parameter in self.loss.parameters() if isinstance(self.loss, nn.Module) else ():
                if parameter.grad is not None:  # every rank computed the whole; their sum must be the whole
                    parameter.grad /= distributed.world_size()
        return loss.detach(), gradients

    def _reduce(self) -> None:
        """Sum gradients over ranks in one all-reduce, and average BatchNorm's running statistics, which differ."""
        if distributed.world_size() == 1:
            return
        distributed.all_reduce_sum_coalesced([p.grad for p in self._parameters() if p.grad is not None])
        statistics = [
            buffer
            for tower in self.towers.values()
            for module in tower.modules()
            if isinstance(module, _BatchNorm) and module.training
            for buffer in module.buffers()
            if buffer.is_floating_point()
        ]
        distributed.all_reduce_sum_coalesced(statistics)
        for buffer in statistics:
            buffer /= distributed.world_size()


def _per_lane(what: str, value: PerLane, lanes: Mapping[str, Any], smallest: int) -> dict[str, Size]:
    """`value` of every lane; refuses unknown lanes and numbers below `smallest`."""
    values: dict[str, Size] = {}
    if isinstance(value, Mapping):
        values.update(value)
    else:
        values.update((name, value) for name in lanes)
    if set(values) != set(lanes):
        raise UsageError(f"{what} names the lanes {sorted(values)}, the step has {sorted(lanes)}")
    for name, number in values.items():
        if number != "auto" and (not isinstance(number, int) or number < smallest):
            raise UsageError(f"{what} of lane '{name}' is {number!r}: it must be 'auto' or at least {smallest}")
    return values
