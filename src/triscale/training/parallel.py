"""Towers whose parameters are sharded over ranks by FSDP2, and how all gradients become the sum over ranks.

The gradient of the whole contrastive batch is the *sum* over ranks of what each rank's rows give. A bare tower's
gradients are summed by one all-reduce after the last micro-batch. FSDP2 reduces by itself, with every micro-batch or
once, and takes the *mean* over all ranks, those that hold copies included: so what goes back into a sharded tower is
multiplied by the number of ranks beforehand. (FSDP2's own `set_gradient_divide_factor` acts on each module alone and
fails on gloo.)

Where several groups of ranks each hold a whole tower (HSDP), gradients are summed within a group as above, and over the
groups, whose links are slower, once a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm

from triscale import distributed
from triscale.errors import RunError, UsageError


def shard(
    tower: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    gathered_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> nn.Module:
    """Shard a tower's parameters over ranks by FSDP2: each of `blocks` by itself, the rest together. In place.

    A block's parameters are gathered when it is used and dropped afterwards, so that a rank holds 1/W of the tower
    (in W/R ranks' groups: R/W) and one block. Parameters and buffers move to the mesh's device block by block. To be
    called last: after rematerialisation and compilation, before the optimizer is made.

    Args:
        tower: bare, with the same weights on every rank.
        blocks: its repeated parts, as `remat.blocks_of` gives them.
        mesh: all ranks, see `distributed.mesh`.
        gathered_dtype: what parameters travel and are used in; shards and sums of gradients stay in float32.
        offload: keep shards, their gradients and so the optimizer's state in the host's memory (CUDA).
    """
    precision = MixedPrecisionPolicy(gathered_dtype, None if gathered_dtype is None else torch.float32)
    for module in (*blocks, tower):
        policy = CPUOffloadPolicy() if offload else OffloadPolicy()
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=policy)
    return tower


def group_size(processes: int, replicas: int) -> int:
    """The processes among which a tower is divided, where `replicas` groups of them hold all of it.

    Raises:
        UsageError: not two or more in each.
    """
    if replicas > 1 and (processes % replicas or processes == replicas):
        raise UsageError(
            f"--parallel.replicas {replicas} must divide the {processes} processes into groups of two or more"
        )
    return processes // replicas


def compute_device(parameter: Tensor) -> torch.device:
    """Where a parameter is used: its own device, or for one whose shards are kept on the host, the mesh's."""
    if isinstance(parameter, DTensor) and parameter.device.type != parameter.device_mesh.device_type:
        return torch.device(parameter.device_mesh.device_type, torch.accelerator.current_device_index())
    return parameter.device


def is_sharded(tower: nn.Module) -> bool:
    """Whether any parameter is sharded.

    Raises:
        UsageError: they are sharded over some of the ranks alone.
    """
    sharded = [p for p in tower.parameters() if isinstance(p, DTensor)]
    if any(p.device_mesh.size() != distributed.world_size() for p in sharded):
        raise UsageError("a sharded tower's device mesh must hold all processes: its gradient is the sum over all")
    return bool(sharded)


def reduce_with_next_backward(tower: nn.Module, now: bool, last: bool) -> None:
    """How a sharded tower treats its gradients in the next backward pass.

    Args:
        now: they are reduced, or gathered for a later pass.
        last: the last pass of the step; groups of ranks that hold copies add theirs up.
    """
    for module in _outermost(tower):
        module.set_requires_gradient_sync(now)
        module.set_requires_all_reduce(last)
        module.set_is_last_backward(now)


def drop_gathered(tower: nn.Module) -> None:
    """Let go of parameters that a sharded tower gathered for a forward pass.

    To be called before parameters change otherwise than by an optimizer: what was gathered would be used once more.
    """
    for module in tower.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def reset_after_failure(tower: nn.Module) -> None:
    """Make a sharded tower usable again after a pass through it raised on all ranks; gradients under way are lost.

    Raises:
        RunError: this release of torch cannot.
    """
    for module in _outermost(tower):
        reset = getattr(module, "reset_iter_state", None)
        if reset is None:
            raise RunError("a sharded tower cannot be tried again in this release of torch: lower --batch.micro")
        reset()


def _outermost(module: nn.Module) -> list[FSDPModule]:
    """The sharded modules that stand in no other; what is set on them reaches those inside."""
    if isinstance(module, FSDPModule):
        return [module]
    return [found for child in module.children() for found in _outermost(child)]


def sum_over_ranks(towers: Iterable[nn.Module], others: Iterable[nn.Parameter]) -> None:
    """Make every replicated parameter's `.grad` the sum over ranks, in one all-reduce; sharded ones are so already.

    A parameter that no row of a rank reached counts as zero there; one that no rank's rows reached keeps None.

    Args:
        towers: whose backward passes are done.
        others: more parameters, such as the loss's.
    """
    world = distributed.world_size()
    if world == 1:
        return
    replicated: dict[int, nn.Parameter] = {id(p): p for p in others if p.requires_grad}
    for tower in towers:
        mine = [p for p in tower.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if is_sharded(tower):
            for parameter in mine:  # what went back was multiplied by the number of ranks
                if parameter.grad is not None:
                    parameter.grad /= world
        replicated.update((id(p), p) for p in mine)
    parameters = list(replicated.values())
    if not parameters:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    gradients: list[Tensor] = []
    for parameter, anywhere in zip(parameters, distributed.all_reduce_max(reached).tolist(), strict=True):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    distributed.all_reduce_sum_coalesced(gradients)


def average_statistics(towers: Iterable[nn.Module]) -> None:
    """Average the running statistics of BatchNorm over ranks; each rank's own differ, and one rank saves them."""
    if distributed.world_size() == 1:
        return
    statistics = [
        buffer
        for tower in towers
        for module in tower.modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer in module.buffers()
        if buffer.is_floating_point()
    ]
    distributed.all_reduce_sum_coalesced(statistics)
    for buffer in statistics:
        buffer /= distributed.world_size()


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be sharded; what is written to it is written to the tensor.

    To be called without gradients.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: DTensor) -> int:
    """How many ranks hold each part of a sharded tensor."""
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return math.prod(size for placement, size in sizes if not isinstance(placement, Shard))


def shard_axis(tensor: Tensor) -> int | None:
    """The axis along which a tensor is divided over ranks; None: every rank holds all of it.

    Raises:
        UsageError: it is divided along more than one.
    """
    if not isinstance(tensor, DTensor):
        return None
    axes = {placement.dim for placement in tensor.placements if isinstance(placement, Shard)}
    if len(axes) > 1:
        raise UsageError("a parameter may be sharded along one of its axes only")
    return next(iter(axes), None)


def sum_over_shards(sums: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Complete what every rank has summed over its own part of each parameter. In place, one collective for all.

    Args:
        sums: parameters, and the sums over this rank's part of them; those of a parameter that is not sharded are
            complete and stay as they are. The same parameters in the same order on every rank.
    """
    sharded = [(p, part) for p, part in sums if isinstance(p, DTensor) and shard_axis(p) is not None]
    totals = [part.to(compute_device(parameter)) for parameter, part in sharded]
    distributed.all_reduce_sum_coalesced(totals)
    for (parameter, part), total in zip(sharded, totals, strict=True):
        part.copy_(total / copies(parameter))  # each was counted once for every copy (HSDP)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, divided over ranks as `parameter` is, along the axes that it shares.

    An axis of another length than the parameter's, such as the one that a mean was taken over, is not divided.
    """
    if not isinstance(parameter, DTensor) or not tensor.ndim:
        return tensor
    placements = [
        placement
        if isinstance(placement, Shard) and tensor.shape[placement.dim] == parameter.shape[placement.dim]
        else Replicate()
        for placement in parameter.placements
    ]
    # Every rank has the whole: nothing need travel.
    divided = distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, placements, src_data_rank=None)
    part = local_part(divided)
    if part.untyped_storage().nbytes() == part.nbytes:
        return divided
    # Rows of a tensor are a view of it, which would keep the whole.
    return DTensor.from_local(
        part.clone(), divided.device_mesh, placements, run_check=False, shape=divided.shape, stride=divided.stride()
    )


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The L2 norm of all gradients together, shards of other ranks included: a scalar where the first is used."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if not isinstance(gradient, DTensor)])
    sharded = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    if not sharded:
        return norm
    device = compute_device(sharded[0])
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for count in sorted({copies(gradient) for gradient in sharded}):
        parts = [local_part(gradient) for gradient in sharded if copies(gradient) == count]
        squares += nn.utils.get_total_norm(parts).to(device).double().square() / count
    total = distributed.all_reduce_sum(squares) + norm.to(device).double().square()
    return total.sqrt().to(torch.promote_types(norm.dtype, torch.float32))
