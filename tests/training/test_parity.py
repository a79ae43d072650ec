"""The whole matrix: every loss, form, way through the towers, number of processes and sharding gives one gradient.

Held against *direct*: the same partition and seeds, every micro-batch in one autograd graph, the literal loss of
`reference`, plain backward on one process. Dropout and stochastic depth are on; temperature and bias count.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ranks
import reference
from triscale import distributed
from triscale.losses import InfoNCE, NTXent, Sigmoid
from triscale.losses.contrastive import ContrastiveLoss
from triscale.randomness import derive_seed
from triscale.training import parallel
from triscale.training.lane import split_evenly
from triscale.training.remat import blocks_of, rematerialise
from triscale.training.step import ContrastiveStep

SEED, STEPS, SAMPLES = 7, 3, 19
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


class Block(nn.Module):
    """A residual branch with everything that rematerialisation must repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.dropout(self.narrow(nn.functional.gelu(self.wide(self.norm(x)))))
        return x + branch * (torch.rand(len(x), 1, dtype=x.dtype) > 0.3)  # stochastic depth


class Tower(nn.Module):
    """(m, 6) -> (m, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(6, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(rows)))


LOSSES: dict[str, Any] = {
    "info_nce": lambda **options: InfoNCE(logit_scale=20.0, **options),
    "sigmoid": lambda **options: Sigmoid(batch_size=SAMPLES, **options),
    "nt_xent": lambda **options: NTXent(0.2, learn_temperature=True, **options),
}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {"tiled": False},
    "tiled": {"tiled": True},
    "tiled in blocks": {"tiled": True, "exchange": "blocks"},
}
MODES: dict[str, tuple[int, int, str]] = {  # micro-batch, keep, rematerialisation
    "one micro-batch": (64, 1, "none"),
    "micro-batched": (3, 0, "none"),
    "partly kept": (3, 1, "none"),
    "kept": (3, 99, "none"),
    "block": (3, 0, "block"),
    "block, kept": (3, 99, "block"),
    "selective": (3, 0, "selective"),
    "selective, partly kept": (3, 1, "selective"),
}


def cells() -> list[tuple[str, str, str, bool, torch.dtype]]:
    """Loss, form, mode, sharded or not, dtype."""
    cells = list(itertools.product(LOSSES, ("dense", "tiled"), MODES, (False, True), (torch.float64,)))
    cells += list(itertools.product(LOSSES, ("tiled in blocks",), ("micro-batched",), (False, True), LIMITS))
    float32_modes = ("micro-batched", "partly kept", "selective")
    cells += list(itertools.product(LOSSES, ("dense", "tiled"), float32_modes, (False, True), (torch.float32,)))
    return cells


def lanes_of(loss: str) -> tuple[str, ...]:
    return ("image",) if loss == "nt_xent" else ("image", "text")


def towers_of(loss: str, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {lane: Tower().to(dtype).train() for lane in lanes_of(loss)}


def rows_of_ranks(loss: str, world: int, dtype: torch.dtype) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
    """Every rank's inputs of each lane, and its ids. NT-Xent's lane has a rank's first views, then its second ones."""
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, SAMPLES, 6, dtype=torch.float64, generator=generator).to(dtype)
    ids = torch.randint(-2, SAMPLES // 2, (SAMPLES,), generator=generator)
    slices = [slice(SAMPLES * r // world, SAMPLES * (r + 1) // world) for r in range(world)]
    if loss == "nt_xent":
        lanes = {"image": [torch.cat([first[s], second[s]]) for s in slices]}
    else:
        lanes = {"image": [first[s] for s in slices], "text": [second[s] for s in slices]}
    return lanes, [ids[s] for s in slices]


@cache
def direct(loss: str, dtype: torch.dtype, world: int, micro_batch: int, autocast: bool = False) -> dict[str, Tensor]:
    """Gradients of plain autograd over one graph."""
    towers = towers_of(loss, dtype)
    lanes, ids = rows_of_ranks(loss, world, dtype)
    embeddings = []
    for lane, by_rank in lanes.items():
        outputs: list[list[Tensor]] = []
        position = 0
        parts = math.ceil(max(map(len, by_rank)) / micro_batch)
        for rows in by_rank:
            outputs.append([])
            for part in split_evenly(len(rows), parts):
                torch.manual_seed(derive_seed("tower", SEED, STEPS, lane, position + part.start))
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    outputs[-1].append(towers[lane](rows[part]))
            position += len(rows)
        by_rank = [torch.cat(parts).to(dtype) for parts in outputs]
        views = 2 if loss == "nt_xent" else 1
        embeddings.append(torch.cat([rows.chunk(views)[view] for view in range(views) for rows in by_rank]))
    module = LOSSES[loss]().to(dtype)
    parameters = dict(module.named_parameters())
    reference_of = {"info_nce": reference.info_nce, "sigmoid": reference.sigmoid, "nt_xent": reference.nt_xent}
    reference_of[loss](*embeddings, **parameters, ids=torch.cat(ids)).backward()
    return reference.gradients({**towers, "loss": module})


def of_step(
    loss: str,
    form: str,
    mode: str,
    sharded: bool,
    dtype: torch.dtype,
    rank: int,
    world: int,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Gradients of ContrastiveStep on this rank, gathered whole."""
    micro_batch, keep, remat = MODES[mode]
    towers = towers_of(loss, dtype)
    for tower in towers.values():
        rematerialise(tower, remat)
        if sharded:
            parallel.shard(tower, blocks_of(tower), distributed.mesh("cpu", 1, 60))
    module: ContrastiveLoss = LOSSES[loss](**FORMS[form]).to(dtype)
    lanes, ids = rows_of_ranks(loss, world, dtype)
    step = ContrastiveStep(
        towers,
        module,
        micro_batch=micro_batch,
        keep=keep,
        seed=SEED,
        autocast_dtype=autocast_dtype,
        reduce="once" if mode == "partly kept" else "every",
    )
    step.load_state_dict({"steps": STEPS})
    step({lane: by_rank[rank] for lane, by_rank in lanes.items()}, ids[rank])
    found = reference.gradients({**towers, "loss": module})
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def matrix(rank: int, world: int) -> dict[str, tuple[float, float]]:
    """Error and limit of every cell on this rank."""
    errors = {}
    for loss, form, mode, sharded, dtype in cells():
        expected = direct(loss, dtype, world, MODES[mode][0])
        error = reference.largest_error(of_step(loss, form, mode, sharded, dtype, rank, world), expected)
        errors[f"{loss}, {form}, {mode}, {'FSDP2' if sharded else 'replicated'}, {dtype}"] = (error, LIMITS[dtype])
    return errors


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_cell_gives_the_gradient_of_plain_autograd(world: int) -> None:
    for errors in ranks.run_ranks(matrix, world):
        assert len(errors) == len(cells()) > 100
        wrong = {cell: error for cell, (error, limit) in errors.items() if not error < limit}
        assert not wrong


def distance(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|g - g*| over all parameters together."""
    return math.sqrt(sum(float((gradients[name].double() - g.double()).pow(2).sum()) for name, g in exact.items()))


def bfloat16_ratios(rank: int, world: int) -> dict[str, float]:
    """How far the step's bfloat16 gradient is from float32's, as a multiple of how far direct's is."""
    ratios = {}
    for loss, mode, sharded in itertools.product(LOSSES, MODES, (False, True)):
        exact, in_bfloat16 = (
            direct(loss, torch.float32, world, MODES[mode][0], autocast) for autocast in (False, True)
        )
        yardstick = distance(in_bfloat16, exact)
        found = of_step(loss, "tiled", mode, sharded, torch.float32, rank, world, torch.bfloat16)
        ratios[f"{loss}, {mode}, {sharded}"] = distance(found, exact) / yardstick
    return ratios


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_is_no_further_from_float32_than_direct_is(world: int) -> None:
    for ratios in ranks.run_ranks(bfloat16_ratios, world):
        assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1.1} == {}
