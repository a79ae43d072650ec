"""The batches of a run: made ahead and held in the host's memory where they fit, else read again in each pass."""

from __future__ import annotations

import math
import os
from collections.abc import Generator

import torch

from triscale import distributed
from triscale.config import RunConfig
from triscale.data.loader import batches, rows_in_flight
from triscale.data.rows import Batch, BatchReader, StreamedBatch
from triscale.training.memory import GIB, default_budget_bytes


def open_batches(
    config: RunConfig, reader: BatchReader, device: torch.device, start_step: int
) -> tuple[Generator[Batch | StreamedBatch, None, None], str]:
    """This rank's rows of the batches after `start_step`, and a line that says whether they are held.

    Workers begin at the call. Ranks agree on whether batches are held; it changes no number, so a resume may decide
    otherwise.
    """
    size, workers, world = config.batch.size, config.data.workers, distributed.world_size()
    needed = rows_in_flight(math.ceil(size / world), workers) * 3 * config.data.image_size**2
    budget = config.memory.host_gib * GIB
    if not budget:
        # Where the towers are on the host too, their activations may take the other half of what is available.
        budget = default_budget_bytes(torch.device("cpu")) / (1 if device.type == "cuda" else 2)
    budget /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    fits = torch.tensor(int(needed <= budget), device=device if device.type == "cuda" else "cpu")
    held = bool(distributed.all_reduce_min(fits))
    rows = batches(
        reader,
        start=start_step * size,
        batch_size=size,
        rank=distributed.rank(),
        world=world,
        workers=workers,
        last=config.train.steps * size,
        held=held,
    )
    sizes = f"{needed / GIB:.3g} of {budget / GIB:.3g} GiB a process"
    if held:
        return rows, f"images of whole batches are held: {sizes}"
    return rows, f"images are read again in each pass: those of whole batches would take {sizes}"
