"""`triscale bench loss`: forward and backward of each loss, tiled, dense and by peers, against the batch B."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triscale import losses
from triscale.bench import measure, peers
from triscale.bench.measure import Call, MethodFailed, Spread
from triscale.bench.table import LeftOut, Report, Row, make_row
from triscale.training.memory import GIB, default_budget_bytes

WARM_UP_BATCH = 16
HELD_AT_ONCE = 8
"""Matrices of all scores that methods which hold them take in forward and backward: 5 to 10 were measured."""
OURS = "tiled"
"""The form that others are compared with."""


class Method(NamedTuple):
    """One way to compute a loss."""

    make: Callable[[int, float], nn.Module]
    """From the batch and the factor on the cosines."""
    holds_scores: bool = True
    """Whether it holds all scores at once."""


class Loss(NamedTuple):
    """A loss, all ways to compute it, and its least arithmetic."""

    methods: dict[str, Method]
    views: int
    """Rows of a sample in one tensor: 1 (image and text are two tensors) or 2 (two views, in one)."""
    products: int
    """Products of 2 * rows^2 * d FLOPs that it takes without holding the scores."""


def _siglip(batch: int, scale: float) -> nn.Module:
    return peers.SigLipLoss(scale, bias=-math.log(max(batch, 2) - 1))  # log(p / (1 - p)) of p = 1/B, as ours starts


LOSSES: dict[str, Loss] = {
    "info_nce": Loss(
        {
            "tiled": Method(lambda batch, scale: losses.InfoNCE(logit_scale=scale), False),
            "dense": Method(lambda batch, scale: losses.InfoNCE(tiled=False, logit_scale=scale)),
            "open_clip": Method(lambda batch, scale: peers.ClipLoss(scale)),
        },
        views=1,
        products=4,
    ),
    "sigmoid": Loss(
        {
            "tiled": Method(lambda batch, scale: losses.Sigmoid(batch_size=batch, logit_scale=scale), False),
            "dense": Method(lambda batch, scale: losses.Sigmoid(tiled=False, batch_size=batch, logit_scale=scale)),
            "open_clip": Method(_siglip),
        },
        views=1,
        products=3,
    ),
    "nt_xent": Loss(
        {
            "tiled": Method(lambda batch, scale: losses.NTXent(1 / scale), False),
            "dense": Method(lambda batch, scale: losses.NTXent(1 / scale, tiled=False)),
            "lightly": Method(lambda batch, scale: peers.NTXentLoss(scale)),
        },
        views=2,
        products=3,
    ),
}
"""Name to loss. A method that is no form of ours is named after the peer's module."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all rows of a table share."""

    width: int
    scale: float
    device: str
    dtype: str
    threads: int
    reuse_buffers: bool

    def bytes_of_scores(self, rows: int) -> int:
        """Bytes of the matrix of all scores of so many rows."""
        return rows * rows * getattr(torch, self.dtype).itemsize


class Cases:
    """All methods of one loss at one batch, over the same random embeddings."""

    def __init__(self, loss: str, batch: int, settings: Settings) -> None:
        self.loss, self.batch, self.scale = LOSSES[loss], batch, settings.scale
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        generator = torch.Generator().manual_seed(0)
        shape = (self.loss.views * batch, settings.width)
        self.inputs = [
            torch.randn(shape, generator=generator).to(self.device, self.dtype).requires_grad_()
            for _ in range(3 - self.loss.views)
        ]
        self.values: dict[str, float] = {}
        """By method, the loss that it computed last."""

    def call(self, method: str) -> Call:
        """Forward and backward by one method."""
        module = self.loss.methods[method].make(self.batch, self.scale).to(self.device)
        if self.dtype == torch.float64:
            module.to(self.dtype)

        def before() -> None:
            for tensor in (*module.parameters(), *self.inputs):
                tensor.grad = None

        def run() -> None:
            value: Tensor = module(*self.inputs)
            value.backward()
            self.values[method] = float(value.detach())

        return Call(run=run, before=before)


def peak(job: Mapping[str, Any]) -> int | None:
    """Peak memory of one call in bytes, in this process, which has measured nothing before."""
    settings = Settings(**job["settings"])
    measure.set_up(settings.threads, settings.reuse_buffers)
    Cases(job["loss"], WARM_UP_BATCH, settings).call(job["method"]).run()
    call = Cases(job["loss"], job["batch"], settings).call(job["method"])
    return measure.peak_bytes(call, torch.device(settings.device))


def chosen_methods(loss: str, forms: Sequence[str], with_peers: bool) -> list[str]:
    """The methods of a loss that are asked for and can be had."""
    return [
        name
        for name in LOSSES[loss].methods
        if name in forms or (with_peers and name in peers.PACKAGES and peers.installed(name))
    ]


def too_large(loss: str, method: str, batch: int, settings: Settings) -> str:
    """Why a method is not tried at this batch: its scores would not fit; "" if they do."""
    if not LOSSES[loss].methods[method].holds_scores:
        return ""
    needed = HELD_AT_ONCE * settings.bytes_of_scores(LOSSES[loss].views * batch)
    budget = default_budget_bytes(torch.device(settings.device))
    if needed <= budget:
        return ""
    return (
        f"{HELD_AT_ONCE} matrices of all scores would take {needed / GIB:.1f} GiB; the budget is "
        f"{budget / GIB:.1f} GiB, half of what is available (CUDA: 90 %)"
    )


def run(
    names: Sequence[str],
    batches: Sequence[int],
    forms: Sequence[str],
    *,
    with_peers: bool,
    rounds: int,
    settings: Settings,
    command: str,
    say: Callable[[str], None],
) -> Report:
    """Measure every loss at every batch."""
    device = torch.device(settings.device)
    product, product_flops = measure.product(getattr(torch, settings.dtype), device)
    product_seconds: list[float] = []
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for name in names:
        methods = chosen_methods(name, forms, with_peers)
        for batch in batches:
            say(f"{name}, B={batch:,}: memory of {', '.join(methods)}; then {rounds} rounds of time")
            peaks, failures = _peaks(name, batch, methods, settings)
            left_out += [LeftOut(task=name, method=m, batch=batch, reason=why) for m, why in failures.items()]
            cases = Cases(name, batch, settings)
            calls = {method: cases.call(method) for method in peaks}
            seconds = measure.time_in_turns({**calls, "product": product}, rounds, device)
            product_seconds += seconds["product"]
            loss = LOSSES[name]
            for method, peak_bytes in peaks.items():
                row = make_row(
                    name,
                    method,
                    batch,
                    seconds,
                    ours=OURS,
                    product=(seconds["product"], product_flops),
                    floor_flops=loss.products * 2.0 * (loss.views * batch) ** 2 * settings.width,
                    peak_bytes=peak_bytes,
                    details={"loss": cases.values[method]},
                )
                rows.append(row)
    return Report(
        command=command,
        machine=measure.this_machine(device),
        reuse_buffers=settings.reuse_buffers,
        product_flops=product_flops,
        product_seconds=Spread.of(product_seconds),
        peers={name: peers.version(name) for name in peers.PACKAGES if any(row.method == name for row in rows)},
        rows=rows,
        left_out=left_out,
    )


def _peaks(
    loss: str, batch: int, methods: Sequence[str], settings: Settings
) -> tuple[dict[str, int | None], dict[str, str]]:
    """By method its peak memory in a fresh process, or why there is none."""
    peaks: dict[str, int | None] = {}
    failures: dict[str, str] = {}
    for method in methods:
        reason = too_large(loss, method, batch, settings)
        if reason:
            failures[method] = reason
            continue
        job = {"kind": "loss", "loss": loss, "method": method, "batch": batch, "settings": asdict(settings)}
        try:
            peaks[method] = measure.in_fresh_process(job)
        except MethodFailed as error:
            failures[method] = str(error)
    return peaks, failures
