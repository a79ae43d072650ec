"""Sharded towers beyond the matrix of test_parity: sharded in part, with few rows, "auto", without some gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import ranks
import reference
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training import parallel
from triscale.training.step import ContrastiveStep

LANES = ("image", "text")


class Deep(nn.Module):
    """Two sharded blocks between replicated layers: (m, 6) -> (m, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(5, 5)
        self.blocks = nn.ModuleList([reference.DropoutTower(dropout=0.0) for _ in range(2)])

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.first(rows)
        return self.last(self.blocks[0](rows) + self.blocks[1](rows))


def towers_of() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {lane: Deep().double() for lane in LANES}


def inputs_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator) for lane in LANES}


def whole(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def gradients_over(rank: int, world: int, rows: int, micro_batch: int, shard: bool) -> dict[str, Tensor]:
    towers, loss = towers_of(), InfoNCE().double()
    if shard:
        mesh = init_device_mesh("cpu", (world,))
        for tower in towers.values():
            for block in tower.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
    mine = slice(rows * rank // world, rows * (rank + 1) // world)
    step = ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=1, seed=3)
    step({lane: values[mine] for lane, values in inputs_of(rows).items()})
    return whole(reference.gradients({**towers, "loss": loss}))


def compare(rank: int, world: int) -> dict[str, float]:
    errors = {}
    for rows, micro_batch in ((9, 2), (world * 2 + 1, 1), (world, 4)):
        plain, loss = towers_of(), InfoNCE().double()
        scale = loss.logit_scale.detach().requires_grad_()
        reference.info_nce(*(plain[lane](values) for lane, values in inputs_of(rows).items()), scale).backward()
        assert scale.grad is not None
        expected = {**reference.gradients(plain), "loss.logit_scale": scale.grad}
        for shard in (True, False):
            found = gradients_over(rank, world, rows, micro_batch, shard)
            errors[f"{rows} rows by {micro_batch}, {shard}"] = reference.largest_error(found, expected)
    return errors


@pytest.mark.parametrize("world", [2, 3])
def test_partly_sharded_towers_and_fewer_rows_than_micro_batches_are_exact(world: int) -> None:
    """(2W + 1 rows one at a time: some rank has a micro-batch less, and sharded towers must meet as often.)"""
    for errors in ranks.run_ranks(compare, world):
        assert len(errors) == 6 and max(errors.values()) < 1e-10, errors


def resolve_auto(rank: int, world: int) -> list[dict[str, tuple[int, int]]]:
    plans = []
    for shard in (False, True):
        towers = towers_of()
        if shard:
            for tower in towers.values():
                parallel.shard(tower, list(tower.blocks), distributed.mesh("cpu", 1, 60))  # type: ignore[arg-type]
        step = ContrastiveStep(towers, InfoNCE().double(), budget_bytes=100_000)
        plans.append({lane: tuple(plan) for lane, plan in step.resolve(inputs_of(64)).items()})
        step(inputs_of(64))
    return plans


def test_auto_counts_no_gathered_parameters_as_activations() -> None:
    for bare, sharded in ranks.run_ranks(resolve_auto, 2):
        assert bare == sharded
        assert sum(keep for _, keep in bare.values()) > 0


class Optional(nn.Module):
    """Uses its second layer for rows whose first value is large, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom, self.never = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, rows: Tensor) -> Tensor:
        large = rows[:, 0] > 100
        output = self.always(rows)
        return output if not large.any() else output.index_add(0, large.nonzero()[:, 0], self.seldom(rows[large] / 100))


def reach_some(rank: int, world: int) -> dict[str, float]:
    torch.manual_seed(0)
    towers = {lane: Optional().double() for lane in LANES}
    inputs = inputs_of(8)
    inputs["image"][1, 0] = 200.0  # on rank 0
    mine = slice(4 * rank, 4 * rank + 4)
    loss = InfoNCE().double()
    step = ContrastiveStep(towers, loss, micro_batch=2, keep=0)
    step({lane: rows[mine] for lane, rows in inputs.items()})
    plain = {lane: Optional().double() for lane in LANES}
    for lane in LANES:
        plain[lane].load_state_dict(towers[lane].state_dict())
    reference.info_nce(*(plain[lane](rows) for lane, rows in inputs.items()), loss.logit_scale.detach()).backward()
    assert towers["image"].never.weight.grad is None and towers["text"].seldom.weight.grad is None
    return {"error": reference.largest_error(reference.gradients(towers), reference.gradients(plain))}


def test_a_parameter_that_only_some_ranks_reach_gets_its_gradient_on_all() -> None:
    for found in ranks.run_ranks(reach_some, 2):
        assert found["error"] < 1e-10


def refuse_part(rank: int, world: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    tower = fully_shard(Deep(), mesh=mesh["shards"])
    try:
        ContrastiveStep({"image": tower, "text": Deep()}, InfoNCE(), micro_batch=2, keep=0)(
            {lane: rows.float() for lane, rows in inputs_of(4).items()}
        )
    except UsageError as error:
        return str(error)
    return ""


def test_a_tower_sharded_over_some_processes_alone_is_refused() -> None:
    for message in ranks.run_ranks(refuse_part, 4):
        assert "all processes" in message
