"""A lane of the exact step: one tower with its inputs, embedded in two passes under replayed random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from triscale.randomness import derive_seed
from triscale.training.memory import LanePlan

Rows = Any
"""A lane's inputs: anything with len() and [a:b], such as a tensor, an array, a memory map, a view that decodes."""
COMPARED_COLUMNS = 8
"""So many values of each embedding are kept to compare the second pass with the first."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's default generators seeded, and put them back afterwards."""
    on_host = device.type in ("cpu", "meta")
    with torch.random.fork_rng([] if on_host else [device], device_type="cuda" if on_host else device.type):
        torch.manual_seed(seed)
        yield


def split_evenly(rows: int, parts: int) -> list[slice]:
    """`parts` consecutive slices of `rows` rows whose sizes differ by one at most; empty ones are left out."""
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def device_of(tower: nn.Module) -> torch.device:
    """Where a tower's parameters are; the CPU if it has none."""
    parameter = next(tower.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


class Lane:
    """One tower with its inputs, its partition and its embeddings, for the length of one step.

    Args:
        name: of the lane.
        tower: rows -> (m, d).
        inputs: this rank's b rows.
        first_row: place of the first of them in the contrastive batch.
        seed: words that seed the tower's random numbers, together with lane and row.
        autocast_dtype: arithmetic of the tower; None: as it is.
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        inputs: Rows,
        *,
        first_row: int,
        seed: tuple[int, int],
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.name, self.tower, self.inputs, self.first_row = name, tower, inputs, first_row
        self.seed, self.autocast_dtype = seed, autocast_dtype
        self.device = device_of(tower)
        self.trainable = any(p.requires_grad for p in tower.parameters())
        self.parts: list[slice] = []
        self.kept: dict[int, Tensor] = {}
        self.embeddings: Tensor | None = None
        self.seen = torch.empty(0)
        self.replay_error = 0.0

    def embed(self, rows: slice) -> Tensor:
        """Tower outputs (m, d) of `rows`, in float32 or better, under the random numbers that are theirs."""
        inputs = self.inputs[rows]
        inputs = inputs if isinstance(inputs, Tensor) else torch.as_tensor(inputs)
        seed = derive_seed("tower", *self.seed, self.name, self.first_row + rows.start)
        dtype = self.autocast_dtype
        with seeded(seed, self.device), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            output = self.tower(inputs.to(self.device, non_blocking=True))
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def first_pass(self, plan: LanePlan, largest_rows: int) -> None:
        """Embed all rows, the last `plan.keep` micro-batches with a graph."""
        self.parts = split_evenly(len(self.inputs), math.ceil(largest_rows / plan.micro_batch))
        first_kept = len(self.parts) - plan.keep if self.trainable else len(self.parts)
        for index, rows in enumerate(self.parts):
            with torch.set_grad_enabled(index >= first_kept):
                output = self.embed(rows)
            if index >= first_kept:
                self.kept[index] = output
            if self.embeddings is None:
                self.embeddings = torch.empty(
                    (len(self.inputs), *output.shape[1:]), dtype=output.dtype, device=output.device
                )
            self.embeddings[rows] = output.detach()

    def take_embeddings(self) -> Tensor:
        """Hand over the embeddings (b, d) of the first pass; a few columns stay, to compare the second with."""
        assert self.embeddings is not None
        embeddings, self.embeddings = self.embeddings, None
        self.seen = embeddings[:, :COMPARED_COLUMNS].clone()
        return embeddings

    def second_pass(self, gradient: Tensor) -> None:
        """Send the gradient (b, d) of the embeddings into the parameters, last micro-batch first."""
        if not self.trainable:
            return
        replayed = len(self.kept) < len(self.parts)
        buffers = [(b, b.clone()) for b in self.tower.buffers()] if replayed else []
        for index in reversed(range(len(self.parts))):
            rows = self.parts[index]
            output = self.kept.pop(index, None)
            if output is None:
                with torch.enable_grad():
                    output = self.embed(rows)
                difference = (output.detach()[:, :COMPARED_COLUMNS] - self.seen[rows]).abs().max()
                self.replay_error = max(self.replay_error, float(difference))
            torch.autograd.backward(output, gradient[rows])
        put_back(buffers)


def put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Give each buffer the value beside it, in place."""
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
