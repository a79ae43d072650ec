"""The moving average is the formula, leaves training as it was, and goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ranks
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training import parallel
from triscale.training.checkpoint import module_tensors
from triscale.training.ema import WeightAverage


def make(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    tower = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 4, bias=False))
    tower[3].requires_grad_(False)
    return {"image": tower, "loss": InfoNCE()}


@torch.no_grad()
def train(modules: dict[str, nn.Module], step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=rng)
    for module in modules["image"].modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.add_(1.0)


def test_it_is_the_formula_with_its_warm_up() -> None:
    modules = make()
    average = WeightAverage(modules, decay=0.6)
    expected = {name: tensor.double() for name, tensor in module_tensors(modules).items()}
    for step in range(20):
        train(modules, step)
        average.update()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, tensor in module_tensors(modules).items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor.double()
    found, now = average.tensors(), module_tensors(modules)
    assert int(found.pop("updates")) == 20 and found.keys() == now.keys()
    for name, tensor in found.items():
        statistics = name.startswith("image.1.") and name.split(".")[2] not in ("weight", "bias")
        if statistics or name == "image.3.weight":
            assert torch.equal(tensor, now[name]), "statistics and frozen parameters are the model's own"
        else:
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)
            assert not torch.equal(tensor, now[name])


def test_within_the_context_the_model_is_the_average_and_afterwards_bitwise_what_it_was() -> None:
    modules = make()
    average = WeightAverage(modules, decay=0.9)
    train(modules, 0)
    average.update()
    before = {name: tensor.clone() for name, tensor in module_tensors(modules).items()}
    with pytest.raises(KeyError), average.applied():
        for name, tensor in average.tensors().items():
            assert name == "updates" or torch.equal(module_tensors(modules)[name], tensor)
        assert not torch.equal(modules["image"][0].weight, before["image.0.weight"])
        raise KeyError
    assert all(torch.equal(tensor, before[name]) for name, tensor in module_tensors(modules).items())


def test_it_goes_on_bit_for_bit_from_a_file(tmp_path: Path) -> None:
    modules = make()
    average = WeightAverage(modules, decay=0.99)
    for step in range(6):
        if step == 3:
            tensors = {name: tensor.clone() for name, tensor in average.tensors().items()}
            save_file(tensors, tmp_path / "average")
            average = WeightAverage(modules, decay=0.99)
            average.load(load_file(tmp_path / "average"))
        train(modules, step)
        average.update()
    others = make()
    undisturbed = WeightAverage(others, decay=0.99)
    for step in range(6):
        train(others, step)
        undisturbed.update()
    for name, tensor in undisturbed.tensors().items():
        assert torch.equal(tensor, average.tensors()[name]), name


def test_parameters_under_two_names_have_one_average() -> None:
    first = nn.Linear(3, 3, bias=False)
    tied = nn.ModuleDict({"a": first, "b": nn.Linear(3, 3, bias=False)})
    tied["b"].weight = first.weight
    average = WeightAverage({"text": tied}, decay=0.5)
    with torch.no_grad():
        first.weight.add_(1.0)
    average.update()
    found = average.tensors()
    assert torch.equal(found["text.a.weight"], found["text.b.weight"])
    assert not torch.equal(found["text.b.weight"], first.weight)


def test_an_average_that_does_not_fit_is_refused() -> None:
    average = WeightAverage(make(), decay=0.5)
    good = average.tensors()
    for name, wrong in (("image.0.weight", torch.zeros(2, 2)), ("image.0.weight", None), ("updates", None)):
        tensors = {key: tensor for key, tensor in {**good, name: wrong}.items() if tensor is not None}
        with pytest.raises(UsageError, match="average"):
            average.load(tensors)
    for decay in (0.0, 1.0):
        with pytest.raises(ValueError, match="decay"):
            WeightAverage(make(), decay)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, parallel.DTensor) else tensor


def average_of(world: int) -> dict[str, Tensor]:
    """Of weights that follow a rule which knows no ranks: towards their signs."""
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7))
    if world > 1:
        parallel.shard(tower, [], distributed.mesh("cpu", 1, 60))
    average = WeightAverage({"image": tower}, decay=0.9)
    for step in range(4):
        with torch.no_grad():
            for parameter in tower.parameters():
                local = parallel.local_part(parameter)
                local += local.sign() * (step + 1)
        average.update()
        if step == 1:
            tensors = {name: whole(tensor).clone() for name, tensor in average.tensors().items()}
            average = WeightAverage({"image": tower}, decay=0.9)
            average.load(tensors)
    return {name: whole(tensor).clone() for name, tensor in average.tensors().items()}


def averaged_on(rank: int, world: int) -> dict[str, Tensor]:
    return average_of(world)


def test_the_average_of_sharded_weights_is_that_of_whole_ones() -> None:
    expected = average_of(1)
    for found in ranks.run_ranks(averaged_on, 2):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
