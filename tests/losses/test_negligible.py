"""Tiles left out of the gradients: which, how much time that saves, and that the error is within its bound."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import reference
from ranks import run_ranks
from triscale.errors import UsageError
from triscale.losses import PAIR_LOSSES, InfoNCE, NTXent, sweeps, tiles
from triscale.losses.contrastive import ContrastiveLoss
from triscale.losses.negligible import TileBounds

ROWS, CLUSTERS, WIDTH = 96, 4, 8


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 12)
    monkeypatch.setattr(tiles, "TILE_COLUMNS", 16)


def make(name: str, skip: bool, scale: float = 100.0, exchange: Any = "auto") -> ContrastiveLoss:
    if name == "info_nce":
        return InfoNCE(logit_scale=scale, skip_negligible=skip, exchange=exchange)
    return NTXent(1 / scale, learn_temperature=True, skip_negligible=skip, exchange=exchange)


def clustered(noise: float, dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
    """Pairs in clusters along axes of their own, cluster after cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(WIDTH, dtype=dtype)[:CLUSTERS].repeat_interleave(rows // CLUSTERS, 0)
    return [centres + noise * torch.randn(rows, WIDTH, dtype=dtype, generator=generator) for _ in range(2)]


def run(loss: ContrastiveLoss, lanes: list[Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, its gradients, and the products' FLOPs."""
    given = [torch.cat(lanes)] if isinstance(loss, NTXent) else lanes
    leaves = [lane.clone().requires_grad_() for lane in given]
    with FlopCounterMode(display=False) as counter:
        value = loss(*leaves)
        value.backward()
    gradients = {f"lane {i}": leaf.grad for i, leaf in enumerate(leaves)}
    gradients |= {name: p.grad for name, p in loss.named_parameters()}
    return value.detach(), gradients, counter.get_total_flops()  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_between_far_clusters_the_second_sweep_makes_no_products(name: str) -> None:
    lanes = clustered(0.05)
    whole, some = (run(make(name, skip), lanes) for skip in (False, True))
    assert torch.equal(some[0], whole[0])  # the loss is the first sweep's
    assert reference.largest_error(some[1], whole[1]) < 1e-6
    # A quarter of the tiles is inside of clusters; NT-Xent's are so for both views of both.
    products = 4 if name == "info_nce" else 3
    assert some[2] / whole[2] == pytest.approx((1 + (products - 1) / CLUSTERS) / products, rel=0.15)


@pytest.mark.parametrize("name", ["info_nce", "nt_xent"])
def test_nothing_is_left_out_where_every_tile_counts(name: str, rng: torch.Generator) -> None:
    lanes = [torch.randn(ROWS, WIDTH, generator=rng) for _ in range(2)]
    whole, some = (run(make(name, skip), lanes) for skip in (False, True))
    assert some[2] == whole[2]
    assert all(torch.equal(some[1][key], whole[1][key]) for key in whole[1])


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("noise", [0.05, 0.2, 0.3])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_no_row_loses_more_than_the_bound(
    eps: float, noise: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """|error of dL/dx_i| <= scale / (2B) * 2 eps, of every row of both lanes, in units of unit rows."""
    lanes = [torch.nn.functional.normalize(lane) for lane in clustered(noise, torch.float64)]
    _, whole, flops = run(make("info_nce", False, scale).double(), lanes)
    monkeypatch.setattr(sweeps, "TileBounds", lambda own, ranks, tile, _: TileBounds(own, ranks, tile, eps))
    _, some, fewer = run(make("info_nce", True, scale).double(), lanes)
    for lane in ("lane 0", "lane 1"):
        assert (some[lane] - whole[lane]).norm(dim=1).max() <= scale / ROWS * eps
    if noise == 0.05 and scale == 100.0:
        assert fewer < flops


COUNTS = [40, 56]


def both_ways(rank: int, world: int) -> dict[str, tuple[list[Tensor], int]]:
    """This rank's gradients and FLOPs, with and without skipping, by loss and exchange."""
    tiles.TILE_ROWS, tiles.TILE_COLUMNS = 12, 16
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    lanes = [lane[mine] for lane in clustered(0.05)]
    results = {}
    for name in ("info_nce", "nt_xent"):
        for exchange in ("gather", "blocks"):
            for skip in (False, True):
                _, gradients, flops = run(make(name, skip, exchange=exchange), lanes)
                results[f"{name} {exchange} {skip}"] = ([gradients[key] for key in sorted(gradients)], flops)
    return results


def test_over_ranks_the_same_is_left_out_for_both_sides_of_a_tile() -> None:
    for result in run_ranks(both_ways, len(COUNTS)):
        for case in ("info_nce gather", "info_nce blocks", "nt_xent gather", "nt_xent blocks"):
            (whole, flops), (some, fewer) = result[f"{case} False"], result[f"{case} True"]
            errors = reference.largest_error(dict(enumerate(some)), dict(enumerate(whole)))  # type: ignore[arg-type]
            assert errors < 1e-6, case
            assert fewer < 0.7 * flops, case


def test_the_sigmoid_loss_refuses_to_leave_tiles_out() -> None:
    make_loss = partial(PAIR_LOSSES["sigmoid"], 64, tiled=True)
    assert make_loss(skip_negligible=False).takes_local_rows
    with pytest.raises(UsageError, match="one sweep"):
        make_loss(skip_negligible=True)
