"""What the exact step stands beside: the plain step at the largest batch that fits, and open_clip's accumulation."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_sections.cases import Bench, Contestant, Found, heat
from gpu_sections.workload import Sizes, Towers
from triscale.bench import peers
from triscale.bench.measure import Call
from triscale.config import LANES


def autocast(bench: Bench) -> torch.autocast:
    """The arithmetic of all towers here."""
    return torch.autocast(bench.device.type, torch.bfloat16)


def plain_step(of: Towers, loss: nn.Module, batch: int, bench: Bench) -> Call:
    """Both towers over the whole batch at once, the loss, and back: open_clip's loop without accumulation."""
    inputs = of.on_device(batch)

    def run() -> None:
        with autocast(bench):
            value = loss(*(of.modules[lane](inputs[lane]) for lane in LANES))
        value.backward()

    return Call(run=run, before=partial(_clear, of, loss), after=partial(_clear, of, loss))


def _clear(of: Towers, loss: nn.Module) -> None:
    for module in (*of.modules.values(), loss):
        module.zero_grad(set_to_none=True)


class Accumulation:
    """open_clip's `--accum-freq`, as its train_one_epoch has it, over the first few micro-batches of each pass."""

    def __init__(self, of: Towers, loss: nn.Module, batch: int, sizes: Sizes, bench: Bench) -> None:
        self.of, self.loss, self.bench = of, loss, bench
        self.micro_batch, self.count = sizes.micro_batch, batch // sizes.micro_batch
        self.sampled = min(sizes.sampled, self.count)

    def _features(self, lane: str, rows: Tensor) -> Tensor:
        return F.normalize(self.of.modules[lane](rows), dim=-1)

    def call(self) -> Call:
        """`sampled` micro-batches embedded without graphs, and as many again with the loss of the whole batch each."""
        parts = {lane: rows.split(self.micro_batch) for lane, rows in self.of.on_device(self._rows).items()}
        cached = {lane: self._cached(lane, part[0]) for lane, part in parts.items()}

        def run() -> None:
            for j in range(self.sampled):
                with torch.no_grad(), autocast(self.bench):
                    for lane in LANES:
                        self._features(lane, parts[lane][j])
            for j in range(self.sampled):
                with autocast(self.bench):
                    whole = [
                        torch.cat([*cached[lane][:j], self._features(lane, parts[lane][j]), *cached[lane][j + 1 :]])
                        for lane in LANES
                    ]
                    value = self.loss(*whole)
                value.backward()

        return Call(run=run, before=partial(_clear, self.of, self.loss), after=partial(_clear, self.of, self.loss))

    @property
    def _rows(self) -> int:
        return self.sampled * self.micro_batch

    def _cached(self, lane: str, rows: Tensor) -> list[Tensor]:
        """Features of all micro-batches, random, in the form that the tower gives."""
        with torch.no_grad(), autocast(self.bench):
            like = self._features(lane, rows[:1])
            return [F.normalize(torch.randn_like(like.expand(len(rows), -1)), dim=-1) for _ in range(self.count)]


def plain_at_the_largest(of: Towers, loss: nn.Module, name: str, sizes: Sizes, bench: Bench) -> Found:
    """The plain step at the largest batch that fits."""
    found = Found()
    for batch in sizes.plain:
        contestant = Contestant(
            name=name,
            prepare=partial(plain_step, of, loss, batch, bench),
            floor_flops=partial(of.flops, 3, batch),
        )
        tried = heat(bench, of.name, batch, [contestant], rounds=3)
        found.add(tried)
        if tried.rows:
            break
    return found


def _accumulation(of: Towers, loss: nn.Module, name: str, sizes: Sizes, bench: Bench) -> Found:
    """Accumulation at the large batch, or at the largest below it that fits; samples/s are those of the whole."""
    found, batch = Found(), sizes.batch
    while batch >= sizes.medium:
        work = Accumulation(of, loss, batch, sizes, bench)
        rows = work.sampled * work.micro_batch
        label = f"{name}: {work.sampled} of {work.count} micro-batches"
        contestant = Contestant(name=label, prepare=work.call, floor_flops=partial(of.flops, 4, rows))
        tried = heat(bench, of.name, batch, [contestant], rounds=2)
        tried.rows = [replace(row, samples_per_second=rows / row.seconds.median) for row in tried.rows]
        found.add(tried)
        if tried.rows:
            break
        batch //= 2
    return found


class Symmetric(nn.Module):
    """`peers.symmetric_cross_entropy` with a temperature of its own: the dense loss of those without open_clip."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of embeddings or features (B, d)."""
        return peers.symmetric_cross_entropy(x, y, self.logit_scale)


def others(of: Towers, loss: nn.Module, whose: str, sizes: Sizes, bench: Bench) -> Found:
    """Plain step and accumulation."""
    found = plain_at_the_largest(of, loss.to(bench.device), f"plain step{whose}", sizes, bench)
    found.add(_accumulation(of, loss, f"accumulation{whose}", sizes, bench))
    return found
