"""Which parameters decay, what the schedule says, what clipping does, and the optimizer's state by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.training.optim import (
    adamw,
    clip_gradients,
    learning_rate,
    load_optimizer,
    optimizer_tensors,
    parameter_groups,
)


class Tower(nn.Module):
    """A filter, a norm, a matrix with bias, a frozen matrix, and a position embedding that it exempts from decay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.frozen = nn.Linear(4, 5, bias=False).requires_grad_(False)
        self.positions = nn.Parameter(torch.zeros(7, 4))

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def wrapped() -> dict[str, nn.Module]:
    """The tower stands inside another module, as a timm model stands inside an image tower."""
    return {"image": nn.Sequential(Tower()), "loss": Loss()}


def names_of(group: dict[str, list[tuple[str, Tensor]]]) -> set[str]:
    return {name for name, _ in group["params"]}


def test_matrices_and_filters_decay_and_vectors_positions_and_temperature_do_not() -> None:
    decayed, plain = parameter_groups(wrapped(), weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert names_of(decayed) == {"image.0.stem.weight", "image.0.head.weight"}
    vectors = {"stem.bias", "norm.weight", "norm.bias", "head.bias", "positions"}
    assert names_of(plain) == {f"image.0.{name}" for name in vectors} | {"loss.logit_scale"}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    modules = wrapped()
    modules["text"] = modules["image"]  # shared towers
    grouped = [p for group in parameter_groups(modules, 0.1) for _, p in group["params"]]
    trainable = {p for module in modules.values() for p in module.parameters() if p.requires_grad}
    assert len(grouped) == len(trainable) and set(grouped) == trainable


def test_a_wholly_frozen_model_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        parameter_groups({"image": nn.Linear(2, 2).requires_grad_(False)}, 0.1)


def test_the_rate_warms_up_linearly_to_its_peak_and_falls_as_a_cosine_to_zero() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, total_steps=104) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)  # half of the cosine
    assert rates[29] == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rates[104] == pytest.approx(0.0, abs=1e-15) and rates[103] > 0.0
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("total_steps", [1, 3, 4])
def test_a_run_shorter_than_its_warmup_has_a_rate_for_every_step(total_steps: int) -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, total_steps=total_steps) for step in range(total_steps)]
    assert rates == [0.25 * (step + 1) for step in range(total_steps)]


def test_clipping_scales_all_gradients_by_the_norm_they_have_together(rng: torch.Generator) -> None:
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(4))]
    gradients = [torch.randn(p.shape, generator=rng) for p in parameters[:2]]
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    true_norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))

    assert float(clip_gradients(parameters, 0.0)) == pytest.approx(true_norm)
    assert float(clip_gradients(parameters, 10 * true_norm)) == pytest.approx(true_norm)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        assert torch.equal(parameter.grad, gradient), "nothing may change that is not too large"

    assert float(clip_gradients(parameters, true_norm / 4)) == pytest.approx(true_norm)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        torch.testing.assert_close(parameter.grad, gradient / 4)
    assert parameters[2].grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_norm_of_a_gradient_that_is_not_finite_is_not_finite(value: float) -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.0, value, 1.0])
    assert not math.isfinite(clip_gradients([parameter], 1.0))


def optimizer_over(modules: dict[str, nn.Module]) -> torch.optim.AdamW:
    return adamw(parameter_groups(modules, 0.1), learning_rate=0.1, beta1=0.9, beta2=0.98, epsilon=1e-8)


def take_step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=rng)
    optimizer.step()


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    modules = wrapped()
    optimizer = optimizer_over(modules)
    take_step(optimizer, seed=1)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
    assert {"exp_avg.image.0.head.weight", "exp_avg_sq.loss.logit_scale", "step.image.0.positions"} <= tensors.keys()
    weights = {key: {k: v.clone() for k, v in m.state_dict().items()} for key, m in modules.items()}
    take_step(optimizer, seed=2)

    others = wrapped()
    for key, module in others.items():
        module.load_state_dict(weights[key])
    restored = optimizer_over(others)
    load_optimizer(restored, tensors)
    take_step(restored, seed=2)
    for key, module in modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(value, others[key].state_dict()[name]), f"{key}.{name}"


def test_parameters_without_state_keep_none() -> None:
    modules = wrapped()
    fresh = optimizer_over(modules)
    assert optimizer_tensors(fresh) == {}
    load_optimizer(fresh, {})
    take_step(fresh, seed=1)


def test_optimizer_state_of_another_model_is_refused() -> None:
    optimizer = optimizer_over(wrapped())
    with pytest.raises(UsageError, match=r"exp_avg\.image\.9\.weight"):
        load_optimizer(optimizer, {"exp_avg.image.9.weight": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match=r"\(5, 9\).*\(5, 4\)"):
        load_optimizer(optimizer, {"exp_avg.image.0.head.weight": torch.zeros(5, 9)})
