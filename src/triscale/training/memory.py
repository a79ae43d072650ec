"""Bytes of activations, the memory that may be used for them, and what "auto" makes of the two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

GIB = 2**30
PROBE_ROWS = 8
LARGEST_AUTO_MICRO_BATCH = {"cpu": 64}  # beyond the caches a larger one gains nothing on a CPU
LARGEST_AUTO_MICRO_BATCH_ELSEWHERE = 1024


class SavedActivations:
    """Counts the bytes that autograd saves while the context is open: each storage once, `excluded` left out.

    Works on any device, the meta device included.
    """

    def __init__(self, excluded: list[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Bytes of the distinct storages saved so far."""
        return sum(storage.nbytes() for storage in self._storages.values())

    def __enter__(self) -> SavedActivations:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)


def activation_bytes(tower: nn.Module, embed: Callable[[], Tensor], inputs: Tensor) -> int:
    """Bytes that one call of `embed`, which sends `inputs` through `tower`, keeps for its backward pass.

    Parameters, buffers and the inputs themselves are not activations and left out.
    """
    with torch.enable_grad(), SavedActivations([*tower.parameters(), *tower.buffers(), inputs]) as saved:
        output = embed()
        total = saved.bytes
    del output
    return total


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


class LanePlan(NamedTuple):
    """How a lane goes through its tower: `micro_batch` samples at once, the last `keep` micro-batches kept."""

    micro_batch: int
    keep: int


def auto_micro_batch(bytes_per_row: float, rows: int, budget_bytes: int, device_type: str) -> int:
    """The largest power of two that is useful on the device and takes at most a quarter of the budget."""
    largest = LARGEST_AUTO_MICRO_BATCH.get(device_type, LARGEST_AUTO_MICRO_BATCH_ELSEWHERE)
    micro_batch = 1
    while micro_batch * 2 <= min(rows, largest) and 2 * micro_batch * bytes_per_row <= budget_bytes / 4:
        micro_batch *= 2
    return micro_batch


def auto_keep(bytes_per_micro_batch: float, micro_batches: int, budget_bytes: float) -> int:
    """How many micro-batches fit the budget beside the one at work, which needs gradients of its activations too."""
    if bytes_per_micro_batch == 0:
        return micro_batches
    fitting = int(budget_bytes // bytes_per_micro_batch) - 2
    return max(0, min(micro_batches, fitting))
