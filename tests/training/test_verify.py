"""`verify` tells an exact step from a wrong one."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import reference
from triscale.losses import InfoNCE, NTXent, Sigmoid
from triscale.losses.contrastive import ContrastiveLoss
from triscale.training.remat import rematerialise
from triscale.training.verify import relative_errors, verify

LANES = ("image", "text")


def inputs_of(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator) for lane in LANES}


@pytest.mark.parametrize("kind", [reference.DropoutTower, reference.BatchNormTower])
def test_the_step_is_exact_in_float64_with_dropout_and_stochastic_depth(kind: type[torch.nn.Module]) -> None:
    towers = {lane: kind() for lane in LANES}
    errors = verify(
        towers,
        InfoNCE(),
        inputs_of(23),
        torch.arange(23) // 2,
        micro_batch={"image": 4, "text": 6},
        batch_norm="per_micro_batch",
        seed=3,
    )
    assert "loss.logit_scale" in errors and len(errors) > 10
    assert max(errors.values()) < 1e-10
    assert all(parameter.grad is None for tower in towers.values() for parameter in tower.parameters())


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize(
    "loss", [InfoNCE(), InfoNCE(tiled=False), Sigmoid(batch_size=23), NTXent(learn_temperature=True)]
)
def test_every_loss_is_held_against_its_dense_form_and_rematerialised_towers_against_bare_ones(
    loss: ContrastiveLoss, mode: str
) -> None:
    lanes = LANES[:1] if isinstance(loss, NTXent) else LANES
    towers = {lane: torch.nn.Sequential(torch.nn.Linear(6, 6), reference.DropoutTower()) for lane in lanes}
    form = loss.takes_local_rows

    def prepare(towers: Mapping[str, torch.nn.Module]) -> None:
        for tower in towers.values():
            rematerialise(tower, mode)

    inputs = {lane: rows for lane, rows in inputs_of(22).items() if lane in lanes}
    errors = verify(
        towers,
        loss,
        inputs,
        torch.arange(22 // loss.views) // 2,
        micro_batch=dict.fromkeys(lanes, 4),
        batch_norm="refuse",
        seed=3,
        prepare=prepare,
    )
    assert {f"loss.{name}" for name, _ in loss.named_parameters()} < set(errors)
    assert max(errors.values()) < 1e-10
    assert loss.takes_local_rows == form


def test_a_tower_with_random_numbers_of_its_own_is_found_out() -> None:
    class Private(reference.DropoutTower):
        def forward(self, rows: Tensor) -> Tensor:
            noise = torch.rand(rows.shape, dtype=rows.dtype, generator=_private)
            return super().forward(rows + noise)

    _private = torch.Generator().manual_seed(0)
    errors = verify(
        {"image": Private(), "text": reference.DropoutTower()},
        InfoNCE(),
        inputs_of(12),
        None,
        micro_batch={"image": 4, "text": 4},
        batch_norm="refuse",
        seed=3,
    )
    assert max(errors.values()) > 1e-3


def test_the_error_of_a_truly_zero_gradient_is_measured_against_the_whole() -> None:
    direct = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2)}
    errors = relative_errors({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([0.0, 1e-4])}, direct)
    assert errors["a"] == pytest.approx(0.1)
    assert errors["b"] == pytest.approx(1e-4 / (1e-3 * 5.0), rel=1e-5)
    with pytest.raises(ValueError, match="different parameters"):
        relative_errors({"a": direct["a"]}, direct)
