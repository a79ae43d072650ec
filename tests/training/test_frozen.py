"""Towers of which a part is frozen: the gradient of the rest is exact, and what is frozen stays bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ranks
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training import parallel
from triscale.training.compilation import compile_tower
from triscale.training.ema import WeightAverage
from triscale.training.frozen import freeze, is_frozen
from triscale.training.lane import evaluation_mode
from triscale.training.optim import parameter_groups
from triscale.training.remat import rematerialise
from triscale.training.step import ContrastiveStep
from triscale.training.verify import direct_gradients, named_gradients, relative_errors

LANES, ROWS = ("image", "text"), 23


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


class Tower(nn.Module):
    """(m, 6) -> (m, 5), with dropout and BatchNorm in what is frozen and in what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), Branch())
        self.head = nn.Sequential(Branch(), nn.Linear(8, 5))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.backbone(rows))


def make_towers(kind: type[nn.Module] = Tower) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    towers = {lane: kind().double() for lane in LANES}
    for tower in towers.values():  # statistics that differ from a fresh module's
        for buffer in tower.buffers():
            buffer.copy_(buffer + torch.rand(buffer.shape) if buffer.is_floating_point() else buffer)
    return towers


def make_inputs(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator) for lane in LANES}


@pytest.mark.parametrize("keep", [0, 1, 9])
@pytest.mark.parametrize("parts", [("image.backbone",), ("image.backbone", "text.head"), ("image", "text.backbone.1")])
def test_the_step_is_exact_for_what_is_left_to_train(parts: tuple[str, ...], keep: int) -> None:
    towers, loss, inputs = make_towers(), InfoNCE().double(), make_inputs()
    freeze(towers, parts)
    plain, plain_loss = copy.deepcopy((towers, loss))
    direct = direct_gradients(plain, plain_loss, inputs, None, dict.fromkeys(LANES, 6), seed=5)
    before = {name: tensor.clone() for name, tensor in nn.ModuleDict(towers).state_dict().items()}
    step = ContrastiveStep(towers, loss, micro_batch=6, keep=keep, seed=5, batch_norm="per_micro_batch")
    step(inputs)
    assert max(relative_errors(named_gradients(towers, loss), direct).values()) < 1e-10
    for name, tensor in nn.ModuleDict(towers).state_dict().items():
        if name.startswith(parts):
            assert torch.equal(tensor, before[name]), f"{name} is frozen and has changed"
    assert all(p.grad is None for part in parts for p in nn.ModuleDict(towers).get_submodule(part).parameters())


def test_what_is_frozen_is_as_in_evaluation_whatever_the_step_does_with_the_rest() -> None:
    towers, inputs = make_towers(), make_inputs()
    freeze(towers, ["image.backbone"])
    backbone = towers["image"].get_submodule("backbone")
    assert is_frozen(backbone) and not is_frozen(towers["image"])
    ContrastiveStep(towers, InfoNCE().double(), micro_batch=6, batch_norm="per_micro_batch")(inputs)
    with evaluation_mode(towers["image"]):
        assert not any(module.training for module in towers["image"].modules())
    assert is_frozen(backbone), "evaluation has put it into training mode"
    assert towers["image"].get_submodule("head").training


def test_frozen_parts_do_without_optimizer_average_and_layers() -> None:
    towers = make_towers()
    freeze(towers, ["image.backbone", "text"])
    names = [name for group in parameter_groups(towers, 0.1) for name, _ in group["params"]]
    assert names and all(name.startswith("image.head") for name in names)
    average = WeightAverage(towers, 0.5)
    with torch.no_grad():
        for parameter in towers["image"].get_submodule("head").parameters():
            parameter += 1
    average.update()
    tensors = average.tensors()
    assert torch.equal(tensors["text.head.1.weight"], towers["text"].get_parameter("head.1.weight"))
    assert not torch.equal(tensors["image.head.1.weight"], towers["image"].get_parameter("head.1.weight"))


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_a_partly_frozen_tower_may_rematerialise(mode: str) -> None:
    towers, loss, inputs = make_towers(), InfoNCE().double(), make_inputs()
    freeze(towers, ["image.backbone"])
    plain, plain_loss = copy.deepcopy((towers, loss))
    image = towers["image"]
    rematerialise(image, mode, [image.get_submodule("backbone.1"), image.get_submodule("head.0")])
    direct = direct_gradients(plain, plain_loss, inputs, None, dict.fromkeys(LANES, 6), seed=5)
    ContrastiveStep(towers, loss, micro_batch=6, keep=1, seed=5, batch_norm="per_micro_batch")(inputs)
    assert max(relative_errors(named_gradients(towers, loss), direct).values()) < 1e-10


@pytest.mark.slow
def test_a_partly_frozen_tower_may_be_compiled() -> None:
    towers, loss, inputs = make_towers(), InfoNCE().double(), make_inputs()
    freeze(towers, ["image.backbone"])
    for module in towers["image"].modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    plain, plain_loss = copy.deepcopy((towers, loss))
    image = towers["image"]
    compile_tower(image, "default", [image.get_submodule("backbone.1"), image.get_submodule("head.0")])
    direct = direct_gradients(plain, plain_loss, inputs, None, dict.fromkeys(LANES, 6), seed=5)
    ContrastiveStep(towers, loss, micro_batch=6, keep=1, seed=5, batch_norm="per_micro_batch")(inputs)
    assert max(relative_errors(named_gradients(towers, loss), direct).values()) < 1e-10


def gradients_of_rank(rank: int, world: int, sharded: bool, parts: list[str]) -> dict[str, Tensor]:
    towers = make_towers(reference_tower)
    freeze(towers, parts)
    if sharded:
        for tower in towers.values():
            parallel.shard(tower, [], distributed.mesh("cpu", 1, 60.0))
    loss, inputs = InfoNCE().double(), make_inputs()
    rows = distributed.rows_of(ROWS)
    mine = {lane: value[rows.start : rows.stop] for lane, value in inputs.items()}
    ContrastiveStep(towers, loss, micro_batch=4, keep=1, seed=5)(mine)
    return {
        f"{lane}.{name}": distributed.gather_shards(parameter.grad)
        for lane, tower in towers.items()
        for name, parameter in tower.named_parameters()
        if parameter.grad is not None
    }


def reference_tower() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_have_the_gradient_of_one_bare_and_sharded(sharded: bool) -> None:
    parts = ["image.0", "image.2", "text.4"]
    towers, loss = make_towers(reference_tower), InfoNCE().double()  # type: ignore[arg-type]
    freeze(towers, parts)
    ContrastiveStep(towers, loss, micro_batch=ROWS, seed=5)(make_inputs())
    alone = {name: g for name, g in named_gradients(towers, loss).items() if name != "loss.logit_scale"}
    for found in ranks.run_ranks(gradients_of_rank, 2, sharded, parts):
        assert found.keys() == alone.keys()
        assert max(relative_errors(found, alone).values()) < 1e-10


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["picture"], "no part 'picture'"),
        (["image.backbones"], "did you mean 'image.backbone'"),
        (["image.head.1.weight"], "no part 'image.head.1.weight'"),
        (["image", "text"], "nothing of image and text is left to train"),
    ],
)
def test_what_cannot_be_frozen_is_refused_in_a_line(parts: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        freeze(make_towers(), parts)
    assert "\n" not in str(refused.value)
