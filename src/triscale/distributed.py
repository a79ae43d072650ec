"""Processes: group, rank, world, and the only collectives of the package. On one process each is the identity.

Tensors that ranks hold in uneven numbers of rows are padded to the largest before they travel, so every backend
(NCCL, gloo) serves. Nothing here needs a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """W, the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: str, timeout_seconds: float = 60.0) -> Iterator[None]:
    """Join torchrun's process group where its environment variables stand; otherwise do nothing.

    Args:
        device: "cuda" uses NCCL on the local rank's card, anything else gloo.
        timeout_seconds: after which a collective that waits for a dead rank raises.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout_seconds))
    try:
        yield
    finally:
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_reduce_sum_coalesced(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over ranks, in place; those of one dtype travel as one."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in same]))
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place; returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_min(tensor: Tensor) -> Tensor:
    """Minimum over ranks, in place; returns `tensor`."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def rows_of(total: int) -> range:
    """This rank's rows of a batch of `total`: B*r//W to B*(r+1)//W."""
    return range(total * rank() // world_size(), total * (rank() + 1) // world_size())


def row_counts(rows: int, device: torch.device | str = "cpu") -> list[int]:
    """The number of rows of every rank, in rank order."""
    if world_size() == 1:
        return [rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    return [int(n) for n in all_reduce_sum(counts).tolist()]


def all_gather_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Concatenate every rank's rows, in rank order. `tensor` is (counts[rank], ...); returns (sum(counts), ...)."""
    if world_size() == 1:
        return tensor
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:n] for rows, n in zip(gathered, counts, strict=True)])


def reduce_scatter_rows(tensor: Tensor, counts: list[int]) -> Tensor:
    """Sum `tensor` (sum(counts), ...) over ranks and return this rank's rows (counts[rank], ...)."""
    if world_size() == 1:
        return tensor
    largest = max(counts)
    padded = tensor.new_zeros((len(counts), largest, *tensor.shape[1:]))
    for part, rows in zip(padded, tensor.split(counts), strict=True):
        part[: len(rows)] = rows
    mine = torch.empty_like(padded[0])
    dist.reduce_scatter(mine, list(padded))
    return mine[: counts[rank()]]


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()
