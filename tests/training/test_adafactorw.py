"""AdaFactorW is its formula, whole and sharded, and takes a quarter of AdamW's memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ranks
import reference
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training import adafactorw, parallel
from triscale.training.adafactorw import AdaFactorW, factored_axes
from triscale.training.optim import OPTIMIZERS, load_optimizer, optimizer_tensors, parameter_groups
from triscale.training.settings import OptimSettings
from triscale.training.step import ContrastiveStep

AXES = {
    (40, 30): (0, 1),
    (30, 40): (0, 1),
    (5, 5): (0, 1),
    (16, 8, 3, 3): (0, 1),
    (12, 1, 3, 3): (0, 3),  # depthwise: channels and columns, for each row of the kernel
    (1, 9, 20): (1, 2),  # position embeddings
    (3, 6, 6, 6): (2, 3),
    (1, 7): None,
    (6, 1, 1): None,
    (7,): None,
    (1,): None,
    (): None,
}


def test_the_two_longest_axes_are_factored() -> None:
    assert {shape: factored_axes(torch.Size(shape)) for shape in AXES} == AXES


def gradients_of(shape: tuple[int, ...], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Of very different sizes by row and by step, some of them zero."""
    rng = torch.Generator().manual_seed(len(shape))
    made = []
    for _ in range(steps):
        gradient = torch.randn(shape, generator=rng, dtype=dtype) * 10 ** torch.randn((), generator=rng).to(dtype)
        if shape and shape[0] > 2:
            gradient[0] = 0.0
            gradient[1] *= 1e-4
        made.append(gradient)
    return made


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", AXES)
def test_it_is_the_formula(shape: tuple[int, ...], dtype: torch.dtype, limit: float) -> None:
    """25 steps; the error is that of the way gone, which weight decay's share must not hide."""
    theta = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    gradients = gradients_of(shape, 25, dtype)
    chosen = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    expected = reference.adafactorw(theta, gradients, axes=AXES[shape], **chosen)
    parameter = nn.Parameter(theta.clone())
    optimizer = AdaFactorW([parameter], **chosen)
    for parameter.grad in gradients:
        optimizer.step()
    found = parameter.detach().double()
    assert float((found - expected).abs().max()) <= limit * max(1.0, float(expected.abs().max()))
    assert float((found - theta.double()).abs().max()) > 1e-5, "it has moved"


def test_a_parameter_alone_and_among_others_moves_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, in one call, and with parameters that have no gradient or begin later."""
    shapes = list(AXES)

    def move(chosen: list[int], chunk: int) -> dict[int, Tensor]:
        monkeypatch.setitem(adafactorw.CHUNK_ELEMENTS, "cpu", chunk)
        parameters = {i: nn.Parameter(torch.ones(shapes[i])) for i in chosen}
        optimizer = AdaFactorW(list(parameters.values()), weight_decay=0.1)
        for step in range(6):
            for i, parameter in parameters.items():
                parameter.grad = gradients_of(shapes[i], 6, torch.float32)[step] if step % 3 <= i % 3 else None
            optimizer.step()
        return {i: p.detach() for i, p in parameters.items()}

    together, in_chunks = move(list(range(len(shapes))), 1 << 24), move(list(range(len(shapes))), 100)
    for i in range(len(shapes)):
        assert torch.equal(together[i], move([i], 1 << 24)[i]) and torch.equal(together[i], in_chunks[i])


def test_no_gradient_at_all_moves_nothing_but_the_decay() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    optimizer = AdaFactorW([parameter], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        parameter.grad = torch.zeros(4, 3)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((4, 3), 0.95**3))


@settings(deadline=None, max_examples=30)
@given(st.floats(min_value=1e-15, max_value=1e15), st.integers(1, 4))
def test_the_step_does_not_depend_on_the_gradients_scale(scale: float, seed: int) -> None:
    """Also where the product of a row's and a column's mean would leave float32."""
    moved = []
    for factor in (1.0, scale):
        parameter = nn.Parameter(torch.zeros(6, 5))
        optimizer = AdaFactorW([parameter], lr=1.0, eps=0.0)
        parameter.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * factor
        optimizer.step()
        moved.append(parameter.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-5)


def test_a_closures_loss_is_given_back_and_wrong_numbers_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))

    def closure() -> float:
        parameter.grad = None
        loss = parameter.square().sum()
        loss.backward()
        return float(loss.detach())

    assert AdaFactorW([parameter]).step(closure) == 6.0
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": float("nan")}):
        with pytest.raises(ValueError, match="betas"):
            AdaFactorW([parameter], **wrong)  # type: ignore[arg-type]


def state_bytes(name: str, shapes: list[tuple[int, ...]]) -> int:
    parameters = [(str(i), nn.Parameter(torch.zeros(shape, device="meta"))) for i, shape in enumerate(shapes)]
    optimizer = OPTIMIZERS[name]([{"params": parameters}], OptimSettings())
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return sum(tensor.nbytes for tensor in optimizer_tensors(optimizer).values())


def test_its_state_is_a_quarter_of_adamws() -> None:
    """A transformer's block; benchmarks/optimizer_state.py measures whole towers."""
    shapes: list[tuple[int, ...]] = [(3072, 1024), (3072,), (1024, 1024), (1024,), (4096, 1024), (1024, 4096)]
    assert state_bytes("adafactorw", shapes) < 0.252 * state_bytes("adamw", shapes)


def test_state_of_another_shape_is_refused() -> None:
    def over(*shape: int) -> torch.optim.Optimizer:
        return AdaFactorW([{"params": [("image.w", nn.Parameter(torch.zeros(shape)))]}])

    optimizer = over(6, 4)
    with pytest.raises(UsageError, match=r"exp_avg_sq_rows\.image\.w.*\(1, 4\)"):
        load_optimizer(optimizer, {"exp_avg_sq_rows.image.w": torch.zeros(1, 4)})
    with pytest.raises(UsageError, match=r"exp_avg\.image\.w.*\(6, 1\)"):
        load_optimizer(optimizer, {"exp_avg.image.w": torch.zeros(6, 1)})


# Sharded ---------------------------------------------------------------------------------------------------------


def move_sharded(rank: int, world: int) -> list[float]:
    """The largest difference to whole parameters, over placements: also uneven, along any axis, and in two copies."""
    meshes: list[tuple[Any, ...]] = [
        (init_device_mesh("cpu", (world,)), [Shard(0)]),
        (init_device_mesh("cpu", (world,)), [Shard(1)]),
        (init_device_mesh("cpu", (world,)), [Replicate()]),
    ]
    if world == 4:
        meshes.append((init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")), [Replicate(), Shard(0)]))
    errors = []
    for mesh, placements in meshes:
        shapes = [shape for shape in AXES if len(shape) > 1 or placements == [Shard(0)] and shape]
        whole = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
        parts = [
            nn.Parameter(distribute_tensor(p.detach().clone(), mesh, placements, src_data_rank=None)) for p in whole
        ]
        over = {
            name: (make([{"params": whole}]), make([{"params": parts}]))
            for name, make in {"adafactorw": AdaFactorW, "lars": _lars}.items()
        }
        for optimizers in over.values():
            for step in range(4):
                for p, part in zip(whole, parts, strict=True):
                    p.grad = gradients_of(tuple(p.shape), 4, torch.float64)[step]
                    part.grad = distribute_tensor(p.grad.clone(), mesh, placements, src_data_rank=None)
                for optimizer in optimizers:
                    optimizer.step()
            errors += [
                float((part.detach().full_tensor() - p).abs().max()) for p, part in zip(whole, parts, strict=True)
            ]
    return errors


def _lars(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return OPTIMIZERS["lars"]([{**group, "weight_decay": 0.1} for group in groups], OptimSettings(learning_rate=0.1))


LANES = ("image", "text")
STEPS = 5


def contrastive_losses(rank: int, world: int, name: str, sharded: bool) -> dict[str, list[float]]:
    """Losses of five steps and the weights after them, with towers whose rows do not divide by the ranks."""
    torch.manual_seed(0)
    towers = {lane: reference.DropoutTower(width=14, dropout=0.0) for lane in LANES}
    loss = InfoNCE()
    if sharded:
        for tower in towers.values():
            parallel.shard(tower, [tower.first], distributed.mesh("cpu", 1, 60))
    groups = parameter_groups({**towers, "loss": loss}, 0.1)
    optimizer = OPTIMIZERS[name](groups, OptimSettings(learning_rate=1e-2))
    step = ContrastiveStep(towers, loss, micro_batch=3, keep=1)
    losses = []
    for number in range(STEPS):
        rng = torch.Generator().manual_seed(number)
        inputs = {lane: torch.randn(16, 6, generator=rng) for lane in LANES}
        mine = slice(16 * rank // world, 16 * (rank + 1) // world)
        losses.append(float(step({lane: rows[mine] for lane, rows in inputs.items()}).loss))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 2:  # what a checkpoint holds, whole, goes back into shards
            kept = {key: _whole(value).clone() for key, value in optimizer_tensors(optimizer).items()}
            optimizer.state.clear()
            load_optimizer(optimizer, kept)
    weights = torch.cat([_whole(p.detach()).flatten() for tower in towers.values() for p in tower.parameters()])
    return {"losses": losses, "weights": weights.tolist()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_ranks(rank: int, world: int) -> tuple[list[float], dict[str, dict[str, list[float]]]]:
    steps = {name: contrastive_losses(rank, world, name, sharded=True) for name in OPTIMIZERS}
    return move_sharded(rank, world), steps


@pytest.fixture(scope="module", params=[2, 4])
def of_ranks(request: pytest.FixtureRequest) -> list[tuple[list[float], dict[str, dict[str, list[float]]]]]:
    return ranks.run_ranks(on_ranks, request.param)


def test_sharded_parameters_move_as_whole_ones(of_ranks: list[Any]) -> None:
    for errors, _ in of_ranks:
        assert len(errors) > 40 and max(errors) < 1e-12


def test_five_steps_with_sharded_towers_have_the_losses_of_one_process(of_ranks: list[Any]) -> None:
    for name in OPTIMIZERS:
        expected = contrastive_losses(0, 1, name, sharded=False)
        for _, results in of_ranks:
            assert results[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            if name in ("sgd", "lars"):
                assert results[name]["weights"] == pytest.approx(expected["weights"], rel=1e-5, abs=1e-6), name
