"""When a pass of a step fails on some rank, all ranks learn of it; after an out-of-memory all may try again."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from triscale import distributed
from triscale.errors import LostProcess, RunError
from triscale.training.memory import is_out_of_memory

_DONE, _OUT_OF_MEMORY, _FAILED = range(3)


class OutOfMemory(Exception):
    """Memory ran out on some rank; what the pass made so far is to be dropped on all."""


@contextmanager
def agreed(device: torch.device) -> Iterator[None]:
    """Around a pass: all ranks go on after it, or none does.

    For a pass in which ranks do not talk to each other. In one that does (sharded towers, synchronised BatchNorm)
    ranks agree where the pass fails on all of them, and otherwise lose each other within the collectives' timeout.

    Args:
        device: where collectives take their tensors from.

    Raises:
        OutOfMemory: memory ran out on some rank, and nothing else went wrong on any.
        RunError: another rank failed. Whatever else the pass raises comes through on the rank that raised it.
    """
    failure: Exception | None = None
    try:
        yield
    except LostProcess:
        raise
    except Exception as error:
        failure = error
    outcome = _DONE if failure is None else _OUT_OF_MEMORY if is_out_of_memory(failure) else _FAILED
    worst = int(distributed.all_reduce_max(torch.tensor(outcome, device=device)))
    if worst == _FAILED:
        if failure is not None and outcome == _FAILED:
            raise failure
        raise RunError("another process failed in this step; its message says why")
    if worst == _OUT_OF_MEMORY:
        if failure is not None:
            traceback.clear_frames(failure.__traceback__)  # they hold activations, which the next attempt needs freed
        raise OutOfMemory


@contextmanager
def in_collectives(what: str) -> Iterator[None]:
    """Around work that other ranks are part of: if memory runs out there, they cannot be asked to do it again."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(
                f"process {distributed.rank()} ran out of memory in {what}: lower --batch.size, or use more processes"
            ) from error
        raise
