"""Rematerialisation: a tower's blocks keep less for the backward pass and compute the rest again in it. Exact.

What a block keeps, and what its backward pass costs beside the gradients:

    none        all that autograd saves                                    nothing
    block       its inputs                                                 one forward pass of the block
    selective   its inputs and the results of its products                 norms, activations, sums, dropout

"selective" is BASIC's choice (Pham et al., arXiv 2111.10050, on rematerialisation: results of products are expensive
and kept, those of elementwise operations are cheap and computed again) and the idea of Megatron's selective
recomputation (Korthikanti et al., arXiv 2205.05198, section 5). Products are matrix products, convolutions and fused
attention; attention that a tower writes out keeps its scores too, which are a product.

What is computed again runs under the random numbers and the autocast of the first time, so that dropout and
stochastic depth repeat. Buffers are not put back here: `ContrastiveStep` does so, and BatchNorm counts a micro-batch
once; in any other loop its running statistics count it twice.

Either way a transformer's block costs about three milliseconds more on the host, whatever the size of the micro-batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triscale.errors import UsageError
from triscale.training import memory
from triscale.training.settings import REMAT_MODES

_PRODUCT_NAMES = (
    # matrix products; linear layers and matmul come down to these
    "mm",
    "addmm",
    "_addmm_activation",
    "bmm",
    "baddbmm",
    "addbmm",
    "mv",
    "addmv",
    "linear",  # a primitive on some backends
    "mkldnn_linear",
    "_scaled_mm",
    "_grouped_mm",
    # convolutions
    "convolution",
    "convolution_overrideable",
    "cudnn_convolution",
    "miopen_convolution",
    "mkldnn_convolution",
    "_mps_convolution",
    # fused attention
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
)


def _overloads(name: str) -> list[torch._ops.OpOverload]:
    """The overloads of an operation, those for another result type included, that write into nothing given."""
    packet = getattr(torch.ops.aten, name, None)  # not every release has every operation
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return [overload for overload in overloads if not overload._schema.is_mutable]


PRODUCTS = frozenset(overload for name in _PRODUCT_NAMES for overload in _overloads(name))
"""Operations whose results "selective" keeps."""

# Where torch can, what selective blocks keep passes the hooks that surround them, as all that autograd saves does.
_HOOKED: dict[str, Any] = (
    {"respect_saved_tensors_hooks": True}
    if "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters
    else {}
)


def rematerialise(tower: nn.Module, mode: str, blocks: Iterable[nn.Module] | None = None) -> nn.Module:
    """Make each of a tower's blocks compute again in the backward pass what it does not keep. In place.

    Names of parameters and of the state dict stay as they are, and a deep copy rematerialises its own blocks. To be
    called before compilation and sharding. In "selective" blocks, modules with an attribute `inplace` stop working in
    place, or they would write over what is kept.

    Args:
        tower: any module.
        mode: "none", "block" or "selective".
        blocks: modules of the tower; None: `blocks_of(tower)`.

    Returns:
        The tower.

    Raises:
        UsageError: another mode, no blocks, blocks that are not the tower's, or one that rematerialises already.
    """
    if mode not in REMAT_MODES:
        raise UsageError(f"rematerialisation is {mode!r}; it must be one of {', '.join(REMAT_MODES)}")
    if mode == "none":
        return tower
    chosen = blocks_of(tower) if blocks is None else list(dict.fromkeys(blocks))
    if not chosen:
        raise UsageError(f"{type(tower).__name__} has no repeated blocks to rematerialise: pass blocks=, its parts")
    for block in chosen:
        if block not in tower.modules():
            raise UsageError(f"a {type(block).__name__} to rematerialise is no part of the tower: pass blocks= of it")
        if "forward" in vars(block):
            raise UsageError(
                f"a {type(block).__name__} has a forward pass of its own, as one that rematerialises already has: "
                "pass blocks= without it"
            )
    for block in chosen:
        for module in block.modules() if mode == "selective" else ():
            if vars(module).get("inplace") is True:
                vars(module)["inplace"] = False
        # A partial of the module, not a closure: a deep copy's then holds the copy.
        block.forward = functools.partial(_rematerialised, block, mode == "selective")
    return tower


def mode_of(module: nn.Module) -> str:
    """The mode in which `rematerialise` was given this module as a block; "none" if it was not."""
    forward = vars(module).get("forward")
    if not isinstance(forward, functools.partial) or forward.func is not _rematerialised:
        return "none"
    return "selective" if forward.args[1] else "block"


def _rematerialised(block: nn.Module, selective: bool, *args: Any, **kwargs: Any) -> Any:
    """The block's forward pass; where a gradient is asked for, it keeps only what its mode says."""
    plain = type(block).forward
    if not torch.is_grad_enabled():
        return plain(block, *args, **kwargs)
    names, positional = tuple(kwargs), len(args)

    def run(*values: Any) -> Any:
        return plain(block, *values[:positional], **dict(zip(names, values[positional:], strict=True)))

    # By position, because checkpoint looks there for the devices whose random numbers it must repeat.
    values = (*args, *kwargs.values())
    versions = [(value, value._version) for value in values if isinstance(value, Tensor)]
    if selective:
        # A cached cast would be an operation less for the second use of a shared weight; a block repeats on its own.
        with _without_autocast_cache():
            output = checkpoint(run, *values, use_reentrant=False, context_fn=_keep_products, **_HOOKED)
    else:
        output = checkpoint(run, *values, use_reentrant=False)
    if any(value._version != version for value, version in versions):
        raise UsageError(f"a {type(block).__name__} changes its own input in place: it cannot be rematerialised")
    return output


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _keep_products() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return create_selective_checkpoint_contexts(_Policy())


class _Policy:
    """Says of every operation in one pass through a block whether its result is kept."""

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """Keep results of products; refuse what then writes into one of them, which could not be repeated."""
        if operation in PRODUCTS:
            outputs = context.op_output if isinstance(context.op_output, tuple) else (context.op_output,)
            for output in outputs:
                if isinstance(output, Tensor):
                    self._kept.add(output.untyped_storage()._cdata)
                    memory.note_kept(output)
            return CheckpointPolicy.MUST_SAVE
        if isinstance(operation, torch._ops.OpOverload) and operation._schema.is_mutable:
            for written in _written(operation, args, kwargs):
                if written.untyped_storage()._cdata in self._kept:
                    raise UsageError(
                        f"a block writes over the result of a product ({operation}): do so out of place, or use "
                        'rematerialisation "block"'
                    )
        return CheckpointPolicy.PREFER_RECOMPUTE


def _written(operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call of `operation` writes into."""
    for place, argument in enumerate(operation._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        if argument.is_write and isinstance(value, Tensor):
            yield value


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The innermost repeated blocks of a tower, in its order, each once: what to rematerialise or to shard.

    They are those members of a `nn.ModuleList` or `nn.Sequential` that hold parameters in children of their own, such
    as a transformer's layers. A member that keeps most of its parameters in such members itself, such as a stage of a
    convolutional network, stands for these.
    """
    found: dict[nn.Module, None] = {}
    for container in tower.modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for member in container.children():
                if _has_parameters_in_children(member):
                    found[member] = None
    inner = {block: [other for other in block.modules() if other is not block and other in found] for block in found}
    stages = {block for block in found if 2 * _parameters_in(inner[block]) > _parameters_in([block])}
    within = {other for block in found if block not in stages for other in inner[block]}
    return [block for block in found if block not in stages and block not in within]


def _has_parameters_in_children(module: nn.Module) -> bool:
    """Whether it does more than one layer does. (timm's BatchNorm has children, dropout and activation, but is one.)"""
    return any(next(child.parameters(), None) is not None for child in module.children())


def _parameters_in(modules: Iterable[nn.Module]) -> int:
    """The number of values in the parameters of all `modules`, each parameter once."""
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())
