"""Bytes of activations, and the memory that may be used for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triscale.training import parallel

GIB = 2**30
PROBE_ROWS = 8


class SavedActivations:
    """Counts the bytes that are kept for backward passes while the context is open: each storage once.

    What autograd saves comes here by itself; what rematerialisation keeps is told to `note_kept`. Works on any device,
    the meta device included.

    Args:
        excluded: tensors that are there anyway: parameters, buffers, inputs.
    """

    _open: ClassVar[list[SavedActivations]] = []

    def __init__(self, excluded: Sequence[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.add(tensor)
        return tensor

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, if it is not counted yet."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages saved so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        self._open.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.remove(self)
        self._hooks.__exit__(*exception)


def note_kept(tensor: Tensor) -> None:
    """Count a tensor that is kept for a backward pass without autograd's knowledge; nothing where nobody counts."""
    for counting in SavedActivations._open:
        counting.add(tensor)


class _FusedAttention(TorchFunctionMode):
    """On the meta device, attention as devices do it: torch writes it out there and would save its scores."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or not args[0].is_meta or kwargs.get("enable_gqa"):
            return function(*args, **kwargs)
        call = inspect.signature(_attention_arguments).bind(*args, **kwargs)
        call.apply_defaults()
        query, key, value, mask, dropout, causal, scale, _ = call.args
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mask = None if mask is None else mask.to(query.dtype)
        return fused(query, key, value, dropout, causal, attn_mask=mask, scale=scale)[0]


def _attention_arguments(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> None:
    """The signature of F.scaled_dot_product_attention, which is a builtin and has none."""


def activation_bytes(tower: nn.Module, embed: Callable[[], Tensor], inputs: Tensor) -> int:
    """Bytes that one call of `embed`, which sends `inputs` through `tower`, keeps for its backward pass.

    Parameters, buffers and the inputs themselves are not activations and left out.
    """
    excluded = [*tower.parameters(), *tower.buffers(), inputs]
    with torch.enable_grad(), _FusedAttention(), SavedActivations(excluded) as saved:
        output = embed()
        parallel.drop_gathered(tower)  # parameters that were gathered for this pass are no activations either
        total = saved.bytes
    del output
    return total


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds for tensors, sharded or not: of their distinct storages, with what pads them."""
    storages = [parallel.local_part(tensor.detach()).untyped_storage() for tensor in tensors]
    return sum(storage.nbytes() for storage in {storage._cdata: storage for storage in storages}.values())


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a card or on the host, whose allocator has no exception of its own."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _cgroup_headroom() -> int | None:
    """Bytes left to this process's memory control group, None where it has no limit."""
    folder = Path("/sys/fs/cgroup")
    for limit, usage in (
        (folder / "memory.max", folder / "memory.current"),
        (folder / "memory/memory.limit_in_bytes", folder / "memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int(limit.read_text()) - int(usage.read_text()))
        except (OSError, ValueError):  # no such version of control groups, or "max"
            continue
    return None


def default_budget_bytes(device: torch.device) -> int:
    """What activations may take: 90 % of free CUDA memory; elsewhere half of what the host and its limits leave."""
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    import psutil  # here, so that the step imports with torch, numpy and timm alone

    available = psutil.virtual_memory().available
    headroom = _cgroup_headroom()
    return (available if headroom is None else min(available, headroom)) // 2
