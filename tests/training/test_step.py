"""The exact step against plain autograd, on one process and on several. The central test of this package."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import reference
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.randomness import derive_seed
from triscale.training.step import ContrastiveStep

LANES = ("image", "text")
SEED, STEPS = 7, 3


def towers_of(kind: type[nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {lane: kind().to(dtype).train() for lane in LANES}


def inputs_of(rows: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator).to(dtype) for lane in LANES}
    return values, torch.randint(-2, rows // 2, (rows,), generator=generator)


def partition(bounds: list[int], micro_batch: int) -> list[tuple[int, int]]:
    """The micro-batches of all ranks: as many on each, sizes that differ by one at most."""
    rows = [b - a for a, b in itertools.pairwise(bounds)]
    parts = -(-max(rows) // micro_batch)
    return [
        (a + n * i // parts, a + n * (i + 1) // parts) for a, n in zip(bounds, rows, strict=False) for i in range(parts)
    ]


def plain_autograd(
    towers: dict[str, nn.Module],
    logit_scale: Tensor,
    inputs: dict[str, Tensor],
    ids: Tensor | None,
    bounds: list[int],
    micro_batch: dict[str, int],
) -> dict[str, Tensor]:
    """Direct: every micro-batch in one graph, seeded as the contract says, then the literal loss and backward()."""
    embeddings = []
    for lane in LANES:
        outputs = []
        for a, b in partition(bounds, micro_batch[lane]):
            if a < b:
                torch.manual_seed(derive_seed("tower", SEED, STEPS, lane, a))
                outputs.append(towers[lane](inputs[lane][a:b]))
        embeddings.append(torch.cat(outputs))
    scale = logit_scale.detach().clone().requires_grad_()
    reference.info_nce(*embeddings, scale, ids).backward()
    assert scale.grad is not None
    return {**reference.gradients(towers), "loss.logit_scale": scale.grad}


def step_gradients(
    towers: dict[str, nn.Module], loss: nn.Module, inputs: dict[str, Tensor], ids: Tensor | None, **options: Any
) -> tuple[dict[str, Tensor], float]:
    step = ContrastiveStep(towers, loss, seed=SEED, **options)
    step.load_state_dict({"steps": STEPS})
    out = step(inputs, ids)
    assert step.state_dict() == {"steps": STEPS + 1}
    return reference.gradients({**towers, "loss": loss}), float(out.loss)


def uneven_bounds(rows: int, world: int) -> list[int]:
    return [rows * r // world for r in range(world + 1)]


def compare_on_rank(rank: int, world: int) -> dict[str, float]:
    """Every combination on this rank; the largest error of each, and the spread of the loss over ranks."""
    errors = {}
    kinds = {"dropout": reference.DropoutTower, "batch_norm": reference.BatchNormTower}
    for (kind, tower), tiled, with_ids, keep, dtype in itertools.product(
        kinds.items(), (True, False), (True, False), (0, 1, 99, {"image": 2, "text": 0}), (torch.float64, torch.float32)
    ):
        if dtype == torch.float32 and (kind == "batch_norm" or keep == 99):
            continue
        bounds = uneven_bounds(23, world)
        inputs, ids = inputs_of(23, dtype)
        mine = slice(bounds[rank], bounds[rank + 1])
        micro_batch = {"image": 3, "text": 5}
        logit_scale = InfoNCE().to(dtype).logit_scale
        expected = plain_autograd(
            towers_of(tower, dtype), logit_scale, inputs, ids if with_ids else None, bounds, micro_batch
        )
        found, value = step_gradients(
            towers_of(tower, dtype),
            InfoNCE(tiled).to(dtype),
            {lane: rows[mine] for lane, rows in inputs.items()},
            ids[mine] if with_ids else None,
            micro_batch=micro_batch,
            keep=keep,
            batch_norm="per_micro_batch",
        )
        name = f"{kind} tiled={tiled} ids={with_ids} keep={keep} {str(dtype)[6:]}"
        errors[name] = reference.largest_error(found, expected)
        errors[f"{name} loss"] = value
    return errors


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_equal_plain_autograd_on_w_processes_with_uneven_rows(world: int) -> None:
    """{dropout, BatchNorm} x {tiled, dense} x {ids, none} x keep x precision, towers and temperature."""
    by_rank = ranks.run_ranks(compare_on_rank, world)
    for errors in by_rank:
        assert len(errors) > 50
        for name, error in errors.items():
            if name.endswith("loss"):
                assert error == pytest.approx(by_rank[0][name], abs=1e-6), "ranks disagree about the global loss"
            else:
                assert error < (1e-10 if "float64" in name else 1e-5), name


@pytest.mark.parametrize("micro_batch", [1, 4, 23, 64])
def test_the_gradient_does_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    inputs, ids = inputs_of(23, torch.float64)
    towers = {lane: reference.DropoutTower(dropout=0.0).double() for lane in LANES}
    expected = plain_autograd(towers, InfoNCE().double().logit_scale, inputs, ids, [0, 23], dict.fromkeys(LANES, 23))
    for tower in towers.values():
        tower.zero_grad(set_to_none=True)
    found, _ = step_gradients(towers, InfoNCE().double(), inputs, ids, micro_batch=micro_batch, keep=1)
    assert reference.largest_error(found, expected) < 1e-10


def test_any_callable_is_a_loss() -> None:
    inputs, _ = inputs_of(11, torch.float64)
    towers = towers_of(reference.DropoutTower, torch.float64)
    step = ContrastiveStep(towers, lambda x, y: (x - y).pow(2).mean(), micro_batch=4, keep=0, seed=SEED)
    step(inputs)
    found = reference.gradients(towers)
    direct = towers_of(reference.DropoutTower, torch.float64)
    outputs = []
    for lane in LANES:
        parts = []
        for a, b in partition([0, 11], 4):
            torch.manual_seed(derive_seed("tower", SEED, 0, lane, a))
            parts.append(direct[lane](inputs[lane][a:b]))
        outputs.append(torch.cat(parts))
    (outputs[0] - outputs[1]).pow(2).mean().backward()
    assert reference.largest_error(found, reference.gradients(direct)) < 1e-10


@pytest.mark.parametrize("keep", [0, 1, 99])
def test_buffers_count_each_micro_batch_once(keep: int) -> None:
    """BatchNorm's counter and statistics after a step are those of one forward pass over the micro-batches."""
    inputs, _ = inputs_of(12, torch.float64)
    towers, plain = (towers_of(reference.BatchNormTower, torch.float64) for _ in range(2))
    step_gradients(towers, InfoNCE().double(), inputs, None, micro_batch=4, keep=keep, batch_norm="per_micro_batch")
    for lane in LANES:
        for a, b in partition([0, 12], 4):
            plain[lane](inputs[lane][a:b])
        for found, expected in zip(towers[lane].buffers(), plain[lane].buffers(), strict=True):
            assert torch.equal(found, expected)


def test_the_default_generators_are_put_back() -> None:
    inputs, _ = inputs_of(12, torch.float64)
    towers = towers_of(reference.DropoutTower, torch.float64)
    before = torch.get_rng_state()
    step_gradients(towers, InfoNCE().double(), inputs, None, micro_batch="auto", keep="auto")
    assert torch.equal(torch.get_rng_state(), before)


def test_random_numbers_change_with_the_step_and_the_lane() -> None:
    inputs = {lane: torch.ones(8, 6) for lane in LANES}
    torch.manual_seed(0)
    tower = reference.DropoutTower(dropout=0.5)
    seen: list[Tensor] = []

    def record(x: Tensor, y: Tensor) -> Tensor:
        seen.extend([x.detach(), y.detach()])
        return (x * y).sum()

    step = ContrastiveStep({"image": tower, "text": tower}, record, micro_batch=8, keep=0)
    for _ in range(2):
        step(inputs)
        tower.zero_grad(set_to_none=True)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))


def test_a_frozen_tower_goes_through_once_and_gets_no_gradient() -> None:
    inputs, _ = inputs_of(12, torch.float64)
    towers = towers_of(reference.DropoutTower, torch.float64)
    towers["image"].requires_grad_(False)
    calls = {lane: 0 for lane in LANES}
    for lane in LANES:
        towers[lane].register_forward_hook(lambda *_, lane=lane: calls.update({lane: calls[lane] + 1}))
    step_gradients(towers, InfoNCE().double(), inputs, None, micro_batch=4, keep=0)
    assert calls == {"image": 3, "text": 6}
    assert all(p.grad is None for p in towers["image"].parameters())
    assert all(p.grad is not None for p in towers["text"].parameters())


def test_a_frozen_tower_runs_in_evaluation_mode_and_stays_in_training_mode() -> None:
    """No dropout, no new BatchNorm statistics; and BatchNorm is refused only where it trains."""
    inputs, _ = inputs_of(12, torch.float64)
    towers = {"image": reference.BatchNormTower().double(), "text": reference.DropoutTower(dropout=0.9).double()}
    towers["image"].requires_grad_(False)
    seen: list[Tensor] = []
    towers["image"].register_forward_hook(lambda *results: seen.append(results[-1]))
    before = [b.clone() for b in towers["image"].buffers()]
    step = ContrastiveStep(towers, InfoNCE().double(), micro_batch=4, keep=0)
    step(inputs)
    assert all(torch.equal(a, b) for a, b in zip(towers["image"].buffers(), before, strict=True))
    assert all(module.training for module in towers["image"].modules())
    towers["image"].eval()
    assert torch.equal(torch.cat(seen), towers["image"](inputs["image"]))


def test_what_is_kept_is_not_embedded_again() -> None:
    inputs, _ = inputs_of(12, torch.float64)
    towers = towers_of(reference.DropoutTower, torch.float64)
    calls: list[int] = []
    towers["image"].register_forward_hook(lambda *_: calls.append(1))
    step_gradients(towers, InfoNCE().double(), inputs, None, micro_batch=3, keep={"image": 3, "text": 0})
    assert len(calls) == 4 + 1


def test_a_tower_that_does_not_repeat_itself_is_seen() -> None:
    class Counting(reference.BatchNormTower):
        calls = 0

        def forward(self, rows: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(rows) * self.calls

    inputs, _ = inputs_of(12, torch.float64)
    towers = {"image": Counting().double(), "text": reference.DropoutTower().double()}
    step = ContrastiveStep(towers, InfoNCE().double(), micro_batch=4, keep=0, batch_norm="per_micro_batch")
    assert step(inputs).metrics["replay_error"] > 0.1


def test_a_non_finite_loss_leaves_no_gradient_and_no_statistics() -> None:
    inputs, _ = inputs_of(12, torch.float32)
    inputs["image"][5] = torch.nan
    towers = towers_of(reference.BatchNormTower, torch.float32)
    before = {lane: [b.clone() for b in tower.buffers()] for lane, tower in towers.items()}
    step = ContrastiveStep(towers, loss := InfoNCE(), micro_batch=4, keep=1, batch_norm="per_micro_batch")
    out = step(inputs)
    assert not out.loss.isfinite()
    assert all(p.grad is None for m in (*towers.values(), loss) for p in m.parameters())
    for lane, tower in towers.items():
        assert all(torch.equal(a, b) for a, b in zip(tower.buffers(), before[lane], strict=True))


def test_batch_norm_is_refused_under_more_than_one_micro_batch() -> None:
    inputs, _ = inputs_of(12, torch.float32)
    towers = towers_of(reference.BatchNormTower, torch.float32)
    with pytest.raises(UsageError, match="per_micro_batch"):
        ContrastiveStep(towers, InfoNCE(), micro_batch=4, keep=0)(inputs)
    ContrastiveStep(towers, InfoNCE(), micro_batch=12, keep=0)(inputs)


def test_auto_keeps_all_in_a_large_budget_and_nothing_in_a_small_one() -> None:
    inputs, _ = inputs_of(256, torch.float32)
    for budget, keep in ((2**30, 4), (1, 0)):
        step = ContrastiveStep(towers_of(reference.DropoutTower, torch.float32), InfoNCE(), budget_bytes=budget)
        plans = step.resolve(inputs)
        assert {plan.keep for plan in plans.values()} == {keep}
        assert {plan.micro_batch for plan in plans.values()} == {64 if keep else 1}


def test_mistakes_are_refused_in_one_line() -> None:
    towers = towers_of(reference.DropoutTower, torch.float32)
    inputs, _ = inputs_of(12, torch.float32)
    step = ContrastiveStep(towers, InfoNCE(), micro_batch=4, keep=0)
    for wrong, message in (
        ({"image": inputs["image"]}, "lanes"),
        ({**inputs, "text": inputs["text"][:5]}, "same number of rows"),
        ({lane: rows[:0] for lane, rows in inputs.items()}, "at least one row"),
    ):
        with pytest.raises(UsageError, match=message):
            step(wrong)
    step(inputs)
    with pytest.raises(UsageError, match="zero_grad"):
        step(inputs)
    for options in ({"micro_batch": 0}, {"keep": -1}, {"micro_batch": {"image": 4}}):
        with pytest.raises(UsageError):
            ContrastiveStep(towers, InfoNCE(), **options)


def refuse_ddp(rank: int, world: int) -> str:
    wrapped = nn.parallel.DistributedDataParallel(reference.DropoutTower())
    try:
        ContrastiveStep({"image": wrapped}, InfoNCE())
    except UsageError as error:
        return str(error)
    return ""


def test_a_tower_wrapped_in_ddp_is_refused() -> None:
    (message,) = ranks.run_ranks(refuse_ddp, 1)
    assert "DistributedDataParallel" in message and "\n" not in message
