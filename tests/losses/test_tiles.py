"""What tiles promise: no B x B, the counts of products, one exponential where it serves, memory in O(B d)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from triscale.losses import InfoNCE, NTXent, Sigmoid, positives, sweeps, tiles
from triscale.losses.columns import RankRows
from triscale.losses.contrastive import ContrastiveLoss

LOSSES = {
    "info_nce": (lambda exchange: InfoNCE(exchange=exchange), 4, 1),
    "sigmoid": (lambda exchange: Sigmoid(batch_size=100, exchange=exchange), 3, 1),
    "nt_xent": (lambda exchange: NTXent(exchange=exchange), 3, 1),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ROWS", 24)
    monkeypatch.setattr(tiles, "TILE_COLUMNS", 40)
    monkeypatch.setattr(tiles, "ACCURACY_ROWS", 30)


def inputs(loss: ContrastiveLoss, rows: int, width: int, rng: torch.Generator) -> list[Tensor]:
    return [torch.randn(rows, width, generator=rng).requires_grad_() for _ in range(3 - loss.views)]


@pytest.mark.parametrize("exchange", ["gather", "blocks"])
@pytest.mark.parametrize("with_ids", [False, True], ids=["no ids", "ids"])
@pytest.mark.parametrize(("make", "products", "without_gradients"), LOSSES.values(), ids=LOSSES)
def test_each_loss_takes_the_products_that_it_claims(
    make, products: int, without_gradients: int, with_ids: bool, exchange: str, rng: torch.Generator
) -> None:
    """InfoNCE four of 2*B*B*d FLOPs, Sigmoid and NT-Xent three, and one where no gradient is wanted; nothing else."""
    loss, rows, width = make(exchange), 100, 8
    lanes = inputs(loss, rows, width, rng)
    ids = torch.arange(rows // loss.views) % 17 if with_ids else None
    for gradients, count in ((True, products), (False, without_gradients)):
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(gradients):
            value = loss(*lanes, ids=ids)
            if gradients:
                value.backward()
        assert counter.get_total_flops() == count * 2 * rows * rows * width


@pytest.mark.parametrize("make", [values[0] for values in LOSSES.values()], ids=LOSSES)
def test_no_tensor_of_all_scores_is_made(make, rng: torch.Generator) -> None:
    """A dispatch mode sees every tensor that any operation returns: none is larger than the inputs and a tile."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    loss = make("gather")
    lanes = inputs(loss, 512, 8, rng)
    with Watch():
        loss(*lanes, ids=torch.arange(512 // loss.views) // 2).backward()
    assert largest <= 512 * 8


@pytest.mark.parametrize(("scale", "fast"), [(14.0, True), (100.0, True), (1e4, False)])
def test_one_exponential_serves_rows_and_columns_up_to_the_scale_that_training_reaches(
    scale: float, fast: bool, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts = []
    original = sweeps.exponent_shift

    def watched(*arguments):
        shifts.append(original(*arguments))
        return shifts[-1]

    monkeypatch.setattr(sweeps, "exponent_shift", watched)
    x = torch.randn(100, 16, generator=rng)
    y = x + 0.5 * torch.randn(100, 16, generator=rng)  # aligned pairs, as trained
    InfoNCE(logit_scale=scale)(x.requires_grad_(), y).backward()
    assert len(shifts) == 2 * math.ceil(100 / 24) * math.ceil(100 / 40)
    assert all((shift is not None) == fast for shift in shifts)


@given(
    highest=st.floats(-2000, 2000),
    gap=st.floats(0, 3000),
    rows=st.sampled_from([1, 100, 2**14, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_shift_neither_overflows_nor_loses_what_counts(
    highest: float, gap: float, rows: int, dtype: torch.dtype
) -> None:
    """Whatever the shift loses is at most eps / rows of a sum of 2**lowest, and of a probability."""
    lowest = highest - gap
    shift = tiles.exponent_shift(highest, lowest, dtype, rows)
    info = torch.finfo(dtype)
    log_tiny, log_lost = math.log2(info.tiny), math.log2(info.eps) - math.log2(rows)
    if shift is None:
        assert gap > 2 * (log_lost - log_tiny) - 1
        return
    assert shift == round(shift)
    assert highest - shift + math.log2(rows) < math.log2(info.max)  # sums of 2**(t - shift)
    assert shift - lowest < math.log2(info.max)  # 2**(shift - lse)
    assert shift + log_tiny - lowest <= log_lost + 1  # the largest 2**(t - shift) lost, as part of the smallest sum
    assert highest - shift + log_tiny <= log_lost + 1  # the largest 2**(t - lse) where 2**(shift - lse) is lost


@given(ids=st.lists(st.integers(-2, 12), min_size=1, max_size=40), views=st.sampled_from([1, 2]))
def test_group_sums_are_those_of_the_positives_one_by_one(ids: list[int], views: int) -> None:
    """Groups over several rounds of the all-reduce; a negative id alone; two views without the row itself."""
    rows = torch.randn(len(ids) * views, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(len(ids)))
    ranks = RankRows([len(rows)], 0)
    before = positives.GROUPS_AT_ONCE, positives.ROWS_AT_ONCE
    try:
        positives.GROUPS_AT_ONCE, positives.ROWS_AT_ONCE = 3, 5
        groups = positives.group_rows(torch.tensor(ids), ranks, rows.device, views)
        sums = positives.PositiveSums(rows, groups, without_self=views == 2)
    finally:
        positives.GROUPS_AT_ONCE, positives.ROWS_AT_ONCE = before
    for i in range(len(rows)):
        of_i = i % len(ids)
        members = [
            j for j in range(len(rows)) if j % len(ids) == of_i or (ids[of_i] >= 0 and ids[of_i] == ids[j % len(ids)])
        ]
        assert int(groups.sizes[i]) == len(members)
        expected = rows[[j for j in members if j != i or views == 1]].sum(0)
        torch.testing.assert_close(sums.tile(slice(i, i + 1))[0], expected)
