"""Real processes for tests: W gloo ranks on this machine, and what each of them returns."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank: int, function: Callable[..., Any], world: int, folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    result = function(rank, world, *arguments)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Sharded towers keep the group, and so gloo's threads, alive. One that lets go of a tensor while Python takes
    # itself down aborts the process (pytorch#179291), so the process ends without that.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """`function(rank, world, *arguments)` in `world` fresh processes that share a gloo group; the results by rank.

    `function` must stand at the top of a module. A rank that raises fails the test with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (function, world, folder, arguments), nprocs=world)  # type: ignore[attr-defined]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(world)]
