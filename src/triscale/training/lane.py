"""A lane of the exact step: one tower with its inputs, embedded in two passes under replayed random numbers."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from triscale import distributed
from triscale.randomness import derive_seed
from triscale.training import compilation, parallel, staging

Rows = Any
"""A lane's inputs: anything with len() and [a:b], such as a tensor, an array, a memory map, a view that decodes."""
COMPARED_COLUMNS = 8
"""So many values of each embedding are kept to compare the second pass with the first."""


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Run with torch's default generators seeded, and put them back afterwards."""
    if device.type not in ("cpu", "meta"):
        with torch.random.fork_rng([device], device_type=device.type):
            torch.manual_seed(seed)
            yield
        return
    # torch.manual_seed would format a stack trace for every kind of device that is not in use: 0.5 ms each time.
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def split_evenly(rows: int, parts: int) -> list[slice]:
    """`parts` consecutive slices of `rows` rows whose sizes differ by one at most; empty ones are left out."""
    bounds = [rows * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]


def device_of(tower: nn.Module) -> torch.device:
    """Where a tower's parameters are used; the CPU if it has none."""
    parameter = next(tower.parameters(), None)
    return torch.device("cpu") if parameter is None else parallel.compute_device(parameter)


def is_trainable(tower: nn.Module) -> bool:
    """Whether any parameter is; a tower without one is frozen."""
    return any(parameter.requires_grad for parameter in tower.parameters())


@contextmanager
def evaluation_mode(tower: nn.Module) -> Iterator[None]:
    """Run with every module in evaluation mode; those that were training are so again afterwards."""
    training = [module for module in tower.modules() if module.training]
    tower.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Lane:
    """One tower with its inputs, its partition and its embeddings, for the length of one step.

    A tower without a trainable parameter is frozen: it runs in evaluation mode, once, and nothing is kept.

    Args:
        name: of the lane.
        tower: rows -> (m, d).
        inputs: this rank's b rows.
        parts: its micro-batches, consecutive slices of the rows.
        keep: how many of the last ones keep their activations.
        first_row: place of the first row in the contrastive batch.
        seed: words that seed the tower's random numbers, together with lane and row.
        autocast_dtype: arithmetic of the tower; None: as it is.
        reduce: when a sharded tower reduces its gradients over ranks, with every micro-batch or "once".
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        inputs: Rows,
        *,
        parts: Sequence[slice],
        keep: int,
        first_row: int,
        seed: tuple[int, int],
        autocast_dtype: torch.dtype | None,
        reduce: Literal["every", "once"],
    ) -> None:
        self.name, self.tower, self.inputs, self.parts, self.first_row = name, tower, inputs, parts, first_row
        self.seed, self.autocast_dtype, self.reduce = seed, autocast_dtype, reduce
        self.device = device_of(tower)
        self.trainable = is_trainable(tower)
        self.sharded = parallel.is_sharded(tower)
        self.compiled = compilation.is_compiled(tower)
        if self.device.type == "cuda":
            compilation.refuse_cuda_graphs(tower)
        self.first_kept = max(0, len(parts) - keep) if self.trainable else len(parts)
        self.entered = False  # whether anything went through the tower
        self.kept: list[Tensor] = []
        self.embeddings: Tensor | None = None
        self.seen = torch.empty(0)
        self.difference = torch.zeros((), device=self.device)

    def embed(self, inputs: Tensor, rows: slice) -> Tensor:
        """Tower outputs (m, d) of `inputs`, in float32 or better, under the random numbers of `rows`."""
        seed = derive_seed("tower", *self.seed, self.name, self.first_row + rows.start)
        dtype, self.entered = self.autocast_dtype, True
        with seeded(seed, self.device), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            output = self.tower(inputs)
        return output.to(torch.promote_types(output.dtype, torch.float32))

    def read(self, rows: slice) -> Tensor:
        """The inputs of `rows`, where the tower is."""
        return self._tensor(rows).to(self.device, non_blocking=True)

    def _tensor(self, rows: slice) -> Tensor:
        """The inputs of `rows`, where they are."""
        inputs = self.inputs[rows]
        if isinstance(inputs, np.ndarray) and not inputs.flags.writeable:
            inputs = np.array(inputs)  # such as a file mapped for reading: every tensor may be written to
        return inputs if isinstance(inputs, Tensor) else torch.as_tensor(inputs)

    def _read_ahead(self, order: Sequence[slice]) -> Generator[Tensor, None, None]:
        """The inputs of each of `order`; each is read and moved while the one before it goes through the tower.

        To be closed by whoever leaves it early: then no thread is left, no copy under way and no buffer held.
        """
        if len(order) < 2 or (isinstance(self.inputs, Tensor) and self.inputs.device == self.device):
            yield from map(self.read, order)
        elif self.device.type == "cuda":
            yield from staging.staged(order, self._tensor, self.device)
        else:
            yield from staging.one_ahead(order, self.read, lambda inputs: inputs)

    def first_pass(self) -> None:
        """Embed all rows, the last `keep` micro-batches with a graph."""
        mode = nullcontext() if self.trainable else evaluation_mode(self.tower)
        with mode, closing(self._read_ahead(self.parts)) as ahead:
            for index, (rows, inputs) in enumerate(zip(self.parts, ahead, strict=True)):
                kept = index >= self.first_kept
                # A compiled tower runs the code of the second pass here, too, whatever it keeps for nothing.
                with torch.set_grad_enabled(kept or (self.compiled and self.trainable)):
                    output = self.embed(inputs, rows)
                if kept:
                    self.kept.append(output)
                if self.embeddings is None:
                    self.embeddings = output.new_empty((len(self.inputs), *output.shape[1:]))
                self.embeddings[rows] = output.detach()
                del output  # with its graph, before the next one is made

    def take_embeddings(self) -> Tensor:
        """Hand over the embeddings (b, d) of the first pass; a few columns stay, to compare the second with."""
        assert self.embeddings is not None
        embeddings, self.embeddings = self.embeddings, None
        self.seen = embeddings[:, :COMPARED_COLUMNS].clone()
        return embeddings

    def second_pass(self, gradient: Tensor) -> None:
        """Send the gradient (b, d) of the embeddings into the parameters, last micro-batch first.

        Whatever is computed again, here or by a tower that rematerialises, counts in no buffer a second time.
        """
        if not self.trainable:
            return
        buffers = [(b, b.clone()) for b in self.tower.buffers()]
        if self.sharded:
            gradient = gradient.mul_(distributed.world_size())
        with closing(self._read_ahead(self.parts[: self.first_kept][::-1])) as ahead:
            for index in reversed(range(len(self.parts))):
                rows = self.parts[index]
                output = self.kept.pop() if self.kept else self._embed_again(next(ahead), rows)
                if self.sharded:
                    parallel.reduce_with_next_backward(self.tower, self.reduce == "every" or index == 0, index == 0)
                torch.autograd.backward(output, gradient[rows])
                del output  # before the next one is made
        put_back(buffers)

    def abandon(self, again: bool) -> None:
        """Let go of what a failed step has made; `again`: such that another attempt may follow."""
        self.kept.clear()  # now, however long the exception's traceback lives
        if self.sharded and again and self.entered:
            parallel.reset_after_failure(self.tower)

    def _embed_again(self, inputs: Tensor, rows: slice) -> Tensor:
        with torch.enable_grad():
            output = self.embed(inputs, rows)
        difference = (output.detach()[:, :COMPARED_COLUMNS] - self.seen[rows]).abs().max()
        # In place: a number kept of every micro-batch would lie between the activations and split up the host's heap.
        self.difference.copy_(torch.maximum(self.difference, difference))
        return output

    @property
    def replay_error(self) -> float:
        """The largest difference between an embedding of the first pass and that of the second."""
        return float(self.difference)


def put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    """Give each buffer the value beside it, in place."""
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
