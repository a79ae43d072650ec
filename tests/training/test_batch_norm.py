"""BatchNorm over ranks against torch's own on the rows of all ranks in one process, alone and through the step."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

import ranks
import reference
from triscale import distributed
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training.batch_norm import SynchronisedBatchNorm, synchronise_batch_norm
from triscale.training.remat import rematerialise
from triscale.training.step import ContrastiveStep

ROWS, CHANNELS, LANES = 23, 4, ("image", "text")


def layers() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layers in float64, and the shape of one row of their inputs."""
    torch.manual_seed(0)
    kinds: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "vectors": (nn.BatchNorm1d(CHANNELS), (CHANNELS,)),
        "sequences": (nn.BatchNorm1d(CHANNELS, affine=False), (CHANNELS, 3)),
        "images": (nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3), (CHANNELS, 2, 3)),
        "mean of all": (nn.BatchNorm2d(CHANNELS, momentum=None), (CHANNELS, 2, 2)),
        "no running": (nn.BatchNorm2d(CHANNELS, track_running_stats=False), (CHANNELS, 2, 2)),
        "timm": (BatchNormAct2d(CHANNELS, act_layer=nn.SiLU), (CHANNELS, 2, 2)),
    }
    for layer, _ in kinds.values():
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    return {name: (layer.double(), shape) for name, (layer, shape) in kinds.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm().clamp(min=1e-30))


def compare_layers(rank: int, world: int) -> dict[str, float]:
    """Two training steps and an evaluation of every layer, this rank's rows against all rows at once. Errors are
    in units of what is allowed."""
    errors = {}
    mine = slice(ROWS * rank // world, ROWS * (rank + 1) // world)
    for (name, (plain, shape)), offset in itertools.product(layers().items(), (0.0, 1e6)):
        numbers = torch.Generator().manual_seed(1)
        x, weights = torch.randn(2, ROWS, *shape, dtype=torch.float64, generator=numbers)
        x = x + offset
        ours = synchronise_batch_norm(copy.deepcopy(plain))
        assert isinstance(ours, SynchronisedBatchNorm) and list(ours.state_dict()) == list(plain.state_dict())
        for _ in range(2):
            whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
            for layer, rows, weight in ((plain, whole, weights), (ours, part, weights[mine])):
                layer.zero_grad()
                output = layer(rows)
                (output.pow(2) * weight).sum().backward()
            assert whole.grad is not None and part.grad is not None
            # The reference's own digits end where the offset leaves them.
            limit = 1e-10 if offset == 0 else 1e-6
            errors[f"{name} {offset} dx"] = relative(part.grad, whole.grad[mine]) / limit
            for parameter, other in zip(ours.parameters(), plain.parameters(), strict=True):
                assert parameter.grad is not None and other.grad is not None
                total = distributed.all_reduce_sum(parameter.grad.clone())
                errors[f"{name} {offset} dw"] = relative(total, other.grad) / limit
            for (key, buffer), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
                errors[f"{name} {offset} {key}"] = relative(buffer.double(), other.double()) / 1e-10
        if name != "no running":  # its evaluation takes the statistics of the rows at hand
            found, expected = ours.eval()(x[mine]), plain.eval()(x)[mine]
            errors[f"{name} {offset} eval"] = relative(found, expected) / 1e-10
    return errors


def parts_of(bounds: list[int], micro_batch: int) -> list[list[slice]]:
    """By micro-batch, the rows of every rank: as many micro-batches on each, sizes that differ by one at most."""
    rows = [b - a for a, b in itertools.pairwise(bounds)]
    parts = -(-max(rows) // micro_batch)
    return [
        [slice(a + n * j // parts, a + n * (j + 1) // parts) for a, n in zip(bounds, rows, strict=False)]
        for j in range(parts)
    ]


def one_process(
    towers: dict[str, nn.Module], inputs: dict[str, Tensor], bounds: list[int], micro_batch: dict[str, int]
) -> dict[str, Tensor]:
    """Plain autograd: micro-batch j of all ranks goes through torch's BatchNorm at once."""
    embeddings = []
    for lane in LANES:
        outputs: dict[int, Tensor] = {}
        for slices in parts_of(bounds, micro_batch[lane]):
            output = towers[lane](torch.cat([inputs[lane][s] for s in slices]))
            for s, rows in zip(slices, output.split([s.stop - s.start for s in slices]), strict=True):
                outputs[s.start] = rows
        embeddings.append(torch.cat([outputs[start] for start in sorted(outputs)]))
    scale = InfoNCE().double().logit_scale.detach().clone().requires_grad_()
    reference.info_nce(*embeddings, scale).backward()
    assert scale.grad is not None
    return {**reference.gradients(towers), "loss.logit_scale": scale.grad}


def towers_of() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {lane: reference.BatchNormTower().double().train() for lane in LANES}


def compare_steps(rank: int, world: int) -> dict[str, float]:
    """The step with every keep, and on two processes every rematerialisation, against one process."""
    errors = {}
    numbers = torch.Generator().manual_seed(2)
    inputs = {lane: torch.randn(ROWS, 6, dtype=torch.float64, generator=numbers) for lane in LANES}
    bounds, micro_batch = [ROWS * r // world for r in range(world + 1)], {"image": 3, "text": 5}
    mine = slice(bounds[rank], bounds[rank + 1])
    plain = towers_of()
    expected = one_process(plain, inputs, bounds, micro_batch)
    for keep, mode in itertools.product((0, 1, 99), ("none", "block", "selective") if world == 2 else ("none",)):
        towers = {lane: synchronise_batch_norm(tower) for lane, tower in towers_of().items()}
        for tower in towers.values():
            rematerialise(tower, mode, [tower.get_submodule("net")])
        loss = InfoNCE().double()
        step = ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=keep, batch_norm="per_micro_batch")
        step({lane: rows[mine] for lane, rows in inputs.items()})
        name = f"keep={keep} {mode}"
        errors[name] = reference.largest_error(reference.gradients({**towers, "loss": loss}), expected) / 1e-10
        for lane in LANES:
            for (key, found), other in zip(towers[lane].named_buffers(), plain[lane].buffers(), strict=True):
                errors[f"{name} {lane} {key}"] = relative(found.double(), other.double()) / 1e-10
    return errors


def bfloat16_faults(rank: int, world: int) -> list[str]:
    """What is wrong with bfloat16 rows: their statistics are float32's, their results bfloat16."""
    counts = [5 + r for r in range(world)]
    x = torch.randn(counts[rank], 3, 4, 4, generator=torch.Generator().manual_seed(rank)).bfloat16()
    ours, plain = SynchronisedBatchNorm(nn.BatchNorm2d(3)), nn.BatchNorm2d(3)
    output, expected = ours(x), plain(distributed.all_gather_rows(x.float(), counts))
    here = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    right = {
        "result type": output.dtype == torch.bfloat16,
        "result": torch.allclose(output.float(), expected[here], rtol=0.01, atol=0.01),
        "mean": torch.allclose(ours.get_buffer("running_mean"), plain.get_buffer("running_mean"), atol=1e-6),
        "variance": torch.allclose(ours.get_buffer("running_var"), plain.get_buffer("running_var"), atol=1e-6),
    }
    return [name for name, fine in right.items() if not fine]


def compare_on_rank(rank: int, world: int) -> dict[str, object]:
    return {
        "layers": compare_layers(rank, world),
        "steps": compare_steps(rank, world) if world < 4 else {},
        "bfloat16": bfloat16_faults(rank, world),
    }


@pytest.mark.parametrize("world", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_w_processes_are_torchs_batch_norm_on_the_rows_of_all(world: int) -> None:
    """In float64, uneven rows: each kind of layer, also around a mean of a million, with its weights, rows' gradients,
    running statistics and evaluation; and through the step, where micro-batch j of all ranks is one batch."""
    by_rank = [compare_on_rank(0, 1)] if world == 1 else ranks.run_ranks(compare_on_rank, world)
    for found in by_rank:
        assert len(found["layers"]) > 50
        assert len(found["steps"]) == {1: 21, 2: 63, 3: 21, 4: 0}[world]
        for name, error in {**found["layers"], **found["steps"]}.items():
            assert error < 1, name
        assert not found["bfloat16"]


def test_a_tower_with_a_batch_norm_of_its_own_making_is_refused_in_one_line() -> None:
    class Scaled(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(UsageError, match="Scaled") as caught:
        synchronise_batch_norm(nn.Sequential(Scaled(3)))
    assert "\n" not in str(caught.value)
