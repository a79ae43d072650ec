"""Every tiled loss over real processes with uneven rows: the numbers of one process that holds all rows."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from ranks import run_ranks
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE, NTXent, Sigmoid, positives, tiles
from triscale.losses.contrastive import ContrastiveLoss

COUNTS = {1: [13], 2: [9, 4], 3: [3, 1, 9], 4: [2, 7, 1, 3]}
IDS = {
    "none": None,
    "some": torch.arange(13) * 5 % 7 - 1,  # groups that span ranks, and negative ids
    "one": torch.zeros(13).long(),
}
LITERAL = {"info_nce": reference.info_nce, "sigmoid": reference.sigmoid, "nt_xent": reference.nt_xent}
DTYPES = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 1e-5)}
MATRIX = list(itertools.product(LITERAL, ["gather", "blocks"], IDS, DTYPES, [20.0, 200.0]))


def make(name: str, exchange: Any, scale: float) -> ContrastiveLoss:
    if name == "info_nce":
        return InfoNCE(logit_scale=scale, exchange=exchange)
    if name == "sigmoid":
        return Sigmoid(batch_size=13, logit_scale=scale, exchange=exchange)
    return NTXent(1 / scale, learn_temperature=True, exchange=exchange)


def whole(dtype: torch.dtype) -> list[Tensor]:
    """All ranks' rows of both lanes; for NT-Xent, both views."""
    return list(torch.randn(2, 13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype))


def every_case(rank: int, world: int) -> dict[str, Any]:
    """Loss, gradients of this rank's rows and shares of the parameters' gradients, for each case of the matrix."""
    tiles.TILE_ROWS, tiles.TILE_COLUMNS = 2, 3
    positives.GROUPS_AT_ONCE = 2
    first = sum(COUNTS[world][:rank])
    mine = slice(first, first + COUNTS[world][rank])
    results = {}
    for name, exchange, ids, dtype, scale in MATRIX:
        rows = [lane[mine] for lane in whole(DTYPES[dtype][0])]
        lanes = [e.clone().requires_grad_() for e in ([torch.cat(rows)] if name == "nt_xent" else rows)]
        loss = make(name, exchange, scale).to(DTYPES[dtype][0])
        of_all = IDS[ids]
        value = loss(*lanes, ids=None if of_all is None else of_all[mine])
        value.backward()
        results[f"{name} {exchange} {ids} {dtype} {scale}"] = {
            "loss": value.detach(),
            "lanes": [lane.grad for lane in lanes],
            "parameters": {n: p.grad for n, p in loss.named_parameters()},
            "accuracy": loss.metrics["accuracy"],
        }
    return results


def expected_of(name: str, ids: str, dtype: str, scale: float) -> tuple[float, dict[str, Tensor]]:
    """The literal form in float64 on one process. NT-Xent's gradient comes as its two views."""
    lanes = [lane.double().requires_grad_() for lane in whole(DTYPES[dtype][0])]
    parameters = {n: p.detach().double().requires_grad_() for n, p in make(name, "gather", scale).named_parameters()}
    if dtype == "float64":
        parameters = {
            n: p.detach().requires_grad_() for n, p in make(name, "gather", scale).double().named_parameters()
        }
    arguments = [torch.cat(lanes)] if name == "nt_xent" else lanes
    value = LITERAL[name](*arguments, *parameters.values(), IDS[ids])
    value.backward()
    gradients = {f"lane {i}": lane.grad for i, lane in enumerate(lanes)}
    return float(value.detach()), {**gradients, **{n: p.grad for n, p in parameters.items()}}  # type: ignore[dict-item]


def together(name: str, results: list[dict[str, Any]], counts: list[int]) -> dict[str, Tensor]:
    """The ranks' gradients as one: rows concatenated, parameters' shares summed."""
    lanes = [result["lanes"] for result in results]
    if name == "nt_xent":
        lanes = [gradients[0].split(count) for gradients, count in zip(lanes, counts, strict=True)]
    joined = {f"lane {i}": torch.cat(parts) for i, parts in enumerate(zip(*lanes, strict=True))}
    shares = [result["parameters"] for result in results]
    return {**joined, **{n: torch.stack([share[n] for share in shares]).sum(0) for n in shares[0]}}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_have_the_loss_and_gradients_of_one_process(world: int) -> None:
    """{loss} x {gather, blocks} x {ids} x {float64, float32} x {one exponential, two}."""
    ranks = run_ranks(every_case, world)
    for name, exchange, ids, dtype, scale in MATRIX:
        case = f"{name} {exchange} {ids} {dtype} {scale}"
        results = [rank[case] for rank in ranks]
        value, gradients = expected_of(name, ids, dtype, scale)
        limit = DTYPES[dtype][1]
        assert len({float(result["loss"]) for result in results}) == 1, case  # bit by bit
        assert len({float(result["accuracy"]) for result in results}) == 1, case
        assert float(results[0]["loss"]) == pytest.approx(value, rel=10 * limit, abs=limit), case
        error = reference.largest_error(together(name, results, COUNTS[world]), gradients)
        assert error < limit * (3 if scale > 100 else 1), f"{case}: {error}"


def empty_rank(rank: int, world: int) -> list[str]:
    """What each loss says where rank 1 has no row; no rank may be left waiting."""
    lines = []
    for exchange in ("gather", "blocks"):
        for name in LITERAL:
            rows = torch.ones((0 if rank == 1 else 2), 4)
            try:
                make(name, exchange, 10.0)(*([rows] if name == "nt_xent" else [rows, rows]))
            except UsageError as error:
                lines.append(str(error))
    distributed.barrier()
    return lines


def test_an_empty_rank_is_refused_on_every_rank() -> None:
    for lines in run_ranks(empty_rank, 2):
        assert len(lines) == 6
        assert all("at least one row on every process" in line and "[2, 0]" in line for line in lines)
