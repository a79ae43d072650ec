"""Time and memory of the losses, forward and backward, both forms of ours beside dense formulas and peers.

Inputs are raw tower outputs in bfloat16, normalised by everyone; gradients come back in bfloat16 and count as memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu_sections.cases import Bench, Case, Contestant, Found, Section, heat, once
from gpu_sections.timed import timed_table
from triscale.bench import peers
from triscale.bench.measure import Call
from triscale.bench.table import Row
from triscale.losses import InfoNCE, NTXent, Sigmoid, launch
from triscale.training.memory import GIB

SCALE = 1 / 0.07
LARGE_SCALE = 100.0
NOISE = 0.5
"""Of the captions of "aligned" pairs, as a share of the image's embedding: cosines of 0.9, as late in a training."""
DIFFERENT_PRODUCTS = ("bf16", "fp16", "tf32", "float32")
PRODUCTS = {"info_nce": 4, "sigmoid": 3, "nt_xent": 3}
"""Products of 2 * rows^2 * d FLOPs without which a loss and its gradients cannot be had in O(B*d) memory."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the work is."""

    batch: int
    width: int
    small: int
    """Batch of what is slow or holds float32 scores."""
    largest: int
    rounds: int
    slow_rounds: int


FULL = Sizes(batch=65_536, width=768, small=16_384, largest=1_048_576, rounds=15, slow_rounds=3)
TOY = Sizes(batch=48, width=16, small=32, largest=96, rounds=2, slow_rounds=1)


def _random(rows: int, width: int, bench: Bench, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(bench.device).manual_seed(seed)
    return torch.randn(rows, width, device=bench.device, generator=generator, dtype=dtype).requires_grad_()


def _pairs(rows: int, width: int, bench: Bench, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [_random(rows, width, bench, dtype, seed) for seed in (0, 1)]


def _aligned(rows: int, width: int, bench: Bench) -> list[Tensor]:
    x, noise = _pairs(rows, width, bench)
    return [x, (x + NOISE * noise).detach().requires_grad_()]


Make = Callable[[], nn.Module]


class Loss:
    """A loss on inputs that it shares with others; what it computed last is kept for its row."""

    def __init__(self, make: Make, inputs: Sequence[Tensor], form: launch.Form | None = None) -> None:
        self.make, self.inputs = make, inputs
        self.form: launch.Form | None = form
        self.value = torch.zeros(())

    def prepare(self) -> Call:
        """Forward and backward; gradients are dropped before and after."""
        module = self.make().to(self.inputs[0].device)

        def clear() -> None:
            for tensor in (*module.parameters(), *self.inputs):
                tensor.grad = None

        def run() -> None:
            if self.form is None:
                value = module(*self.inputs)
            else:
                with launch.using(self.form):
                    value = module(*self.inputs)
            value.backward()
            self.value = value.detach()

        return Call(run=run, before=clear, after=clear)

    def details(self) -> dict[str, Any]:
        """The loss itself, so that a reader sees that all computed the same."""
        return {"loss": float(self.value), "ours": self.form is not None}


class Autocast(nn.Module):
    """A dense loss as a trainer runs it: products in bfloat16, what follows in float32."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *inputs: Tensor) -> Tensor:
        """The loss of tower outputs."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return self.loss(*inputs)


class CrossEntropy(nn.Module):
    """`peers.symmetric_cross_entropy` with a temperature of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALE)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of tower outputs (B, d)."""
        return peers.symmetric_cross_entropy(x, y, self.logit_scale)


def _contestants(
    named: dict[str, Loss], task: str, rows: int, width: int, others: dict[str, Loss] | None = None
) -> list[Contestant]:
    flops = PRODUCTS[task] * 2.0 * rows**2 * width
    return [
        Contestant(name=name, prepare=loss.prepare, floor_flops=lambda: flops, details=loss.details)
        for name, loss in (named | (others or {})).items()
    ]


def _forms(make: Make, inputs: Sequence[Tensor]) -> dict[str, Loss]:
    return {f"ours, {form}": Loss(make, inputs, form) for form in launch.FORMS}


OURS = f"ours, {launch.FORMS[0]}"


def _info_nce(bench: Bench, sizes: Sizes) -> Found:
    inputs = _pairs(sizes.batch, sizes.width, bench)
    ours = _forms(partial(InfoNCE, logit_scale=SCALE), inputs)
    dense = {
        "dense, all in bfloat16": Loss(CrossEntropy, inputs),
        "dense, autocast": Loss(lambda: Autocast(CrossEntropy()), inputs),
    }
    contestants = _contestants(ours, "info_nce", sizes.batch, sizes.width, dense)
    return heat(bench, "info_nce", sizes.batch, contestants, rounds=sizes.rounds, ours=OURS)


def _info_nce_peers(bench: Bench, sizes: Sizes) -> Found:
    found = Found()
    for batch in (sizes.batch, sizes.small):
        inputs = _pairs(batch, sizes.width, bench)
        named = _forms(partial(InfoNCE, logit_scale=SCALE), inputs)
        if "inf_cl" in bench.peers and bench.cuda:
            named["inf_cl"] = Loss(lambda: peers.InfCL(SCALE), inputs)
        if "open_clip" in bench.peers:
            named["open_clip, autocast"] = Loss(lambda: Autocast(peers.ClipLoss(SCALE)), inputs)
        contestants = _contestants(named, "info_nce", batch, sizes.width)
        found.add(heat(bench, "info_nce", batch, contestants, rounds=sizes.slow_rounds, ours=OURS))
    return found


def _largest(form: launch.Form, bench: Bench, sizes: Sizes) -> Found:
    """One call at the largest batch; the kernels are compiled by the other cases."""
    inputs = _pairs(sizes.largest, sizes.width, bench)
    loss = {f"ours, {form}": Loss(partial(InfoNCE, logit_scale=SCALE), inputs, form)}
    (contestant,) = _contestants(loss, "info_nce", sizes.largest, sizes.width)
    return once(bench, "info_nce", sizes.largest, contestant)


def _sigmoid(bench: Bench, sizes: Sizes) -> Found:
    inputs, bias = _pairs(sizes.batch, sizes.width, bench), -math.log(sizes.batch - 1)
    named = _forms(partial(Sigmoid, batch_size=sizes.batch, logit_scale=10.0), inputs)
    if "siglip_kernel" in bench.peers and bench.cuda:
        for backend in ("auto", "chunked_bf16_fp8", "reference"):
            make = partial(peers.SiglipKernel, 10.0, bias, backend)
            named[f"siglip_kernel, {backend}"] = Loss(make, inputs)
    if "open_clip" in bench.peers:
        named["open_clip, autocast"] = Loss(lambda: Autocast(peers.SigLipLoss(10.0, bias)), inputs)
    contestants = _contestants(named, "sigmoid", sizes.batch, sizes.width)
    return heat(bench, "sigmoid", sizes.batch, contestants, rounds=sizes.rounds, ours=OURS)


def _nt_xent(bench: Bench, sizes: Sizes) -> Found:
    inputs = [_random(sizes.batch, sizes.width, bench, torch.bfloat16, 0)]
    named = _forms(partial(NTXent, 1 / SCALE), inputs)
    contestants = _contestants(named, "nt_xent", sizes.batch, sizes.width)
    return heat(bench, "nt_xent", sizes.batch // 2, contestants, rounds=sizes.rounds, ours=OURS)


def _products(bench: Bench, sizes: Sizes) -> Found:
    """Rows in float32, as a step hands them over; every arithmetic of the products."""
    inputs = _pairs(sizes.small, sizes.width, bench, torch.float32)
    named = {
        f"{products} products, {form}": Loss(partial(InfoNCE, logit_scale=SCALE, products=products), inputs, form)
        for products in DIFFERENT_PRODUCTS
        for form in launch.FORMS
    }
    named["dense, float32"] = Loss(partial(InfoNCE, tiled=False, logit_scale=SCALE), inputs)
    contestants = _contestants(named, "info_nce", sizes.small, sizes.width)
    ours = f"{DIFFERENT_PRODUCTS[0]} products, {launch.FORMS[0]}"
    return heat(bench, "info_nce of float32 rows", sizes.small, contestants, rounds=sizes.slow_rounds, ours=ours)


def _negligible(bench: Bench, sizes: Sizes) -> Found:
    inputs = _aligned(sizes.batch, sizes.width, bench)
    named = {
        f"{'skipping' if skip else 'all tiles'}, {form}": Loss(
            partial(InfoNCE, logit_scale=LARGE_SCALE, skip_negligible=skip), inputs, form
        )
        for form in launch.FORMS
        for skip in (False, True)
    }
    contestants = _contestants(named, "info_nce", sizes.batch, sizes.width)
    ours = f"all tiles, {launch.FORMS[0]}"
    return heat(bench, "info_nce, aligned pairs, scale 100", sizes.batch, contestants, rounds=sizes.rounds, ours=ours)


def cases(bench: Bench) -> list[Case]:
    """Losses at B=65,536 and width 768, one call at B=1,048,576, peers, and what options give."""
    sizes = TOY if bench.toy else FULL
    b = f"B={sizes.batch:,}"
    listed: list[tuple[str, int, float, Callable[[], Found]]] = [
        (f"InfoNCE, {b}", 1, 25, partial(_info_nce, bench, sizes)),
        (f"Sigmoid, {b}", 1, 30, partial(_sigmoid, bench, sizes)),
        (f"InfoNCE, {b}, peers", 1, 30, partial(_info_nce_peers, bench, sizes)),
        (f"InfoNCE of pairs that fit, {b}", 2, 10, partial(_negligible, bench, sizes)),
        (f"NT-Xent, {b} rows", 3, 20, partial(_nt_xent, bench, sizes)),
        (f"InfoNCE by arithmetic of the products, B={sizes.small:,}", 3, 30, partial(_products, bench, sizes)),
    ]
    for place, form in enumerate(launch.FORMS):
        name = f"InfoNCE, B={sizes.largest:,}, {form}"
        listed.append((name, 1 + 2 * (place > 0), 25, partial(_largest, form, bench, sizes)))
    return [Case(name=name, importance=p, estimate_seconds=s, run=run) for name, p, s, run in listed]


def lines(rows: list[Row]) -> list[str]:
    """The faster of our forms at every batch, and how many times faster it is than others."""
    said = []
    for task, batch in dict.fromkeys((row.task, row.batch) for row in rows):
        of = [row for row in rows if (row.task, row.batch) == (task, batch)]
        ours = [row for row in of if row.details["ours"]]
        if not ours:
            continue
        best = min(ours, key=lambda row: row.seconds.median)
        others = [f"{r.seconds.median / best.seconds.median:.2f} x as fast as {r.method}" for r in of if r not in ours]
        memory = "" if best.peak_bytes is None else f" and {best.peak_bytes / GIB:.2f} GiB"
        took = f"{1000 * best.seconds.median:,.1f} ms{memory}, {best.floor_share:.0%} of the floor"
        said.append("; ".join([f"{task}, B={batch:,}: {best.method}: {took}", *others]))
    return said


LOSS = Section(cases=cases, table=partial(timed_table, task="loss"), lines=lines)
