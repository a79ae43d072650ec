"""`triscale bench step`: the gradient of a whole contrastive batch, by our step, plain autograd and peers, against B.

Every method works on its own copy of the same towers, on the same inputs and in the same micro-batches, without
randomness; no optimizer step is taken. Plain autograd holds the graphs of all micro-batches at once: it computes
nothing again, so it is the time to compare with, and its gradients are those that the others' are held against.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triscale.bench import measure, peers
from triscale.bench.measure import Call, MethodFailed, Spread
from triscale.bench.table import LeftOut, Report, Row, make_row
from triscale.bench.towers import Workload, make_workload
from triscale.config import LANES
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.training import memory
from triscale.training.remat import rematerialise
from triscale.training.settings import parse_per_lane
from triscale.training.step import ContrastiveStep
from triscale.training.verify import named_gradients, relative_errors

WARM_UP_ROWS = 4
PLAIN = "plain"
OURS = "keep=0"
"""The method that others are compared with."""
TEMPERATURE = "loss.logit_scale"
LEARN_NO_TEMPERATURE = ("sentence_transformers",)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all rows of a table share."""

    micro_batch: int
    device: str
    threads: int
    reuse_buffers: bool
    budget_bytes: int
    """Memory that keep="auto" and plain autograd may use for activations."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to the gradient: our step with so many micro-batches kept, plain autograd, or a peer's."""

    name: str
    keep: str = ""
    """Of our step; "": it is another's."""
    remat: str = "none"


def methods(keeps: Sequence[str], remats: Sequence[str], with_peers: bool) -> list[Method]:
    """Every keep under every rematerialisation, plain autograd, and the peers that are installed."""
    ours = [
        Method(name=f"keep={keep}" + f" remat={remat}" * (remat != "none"), keep=keep, remat=remat)
        for remat in remats
        for keep in keeps
    ]
    others = [name for name in peers.STEPS if with_peers and peers.installed(name)]
    return [*ours, *(Method(name=name) for name in (PLAIN, *others))]


class Case:
    """One method with its own copy of the towers and a temperature, on inputs that it shares with others."""

    def __init__(self, method: Method, workload: Workload, inputs: Mapping[str, Tensor], settings: Settings) -> None:
        self.towers = {name: copy.deepcopy(tower) for name, tower in workload.towers.items()}
        self.loss = InfoNCE().to(next(iter(inputs.values())).device)
        self.inputs = inputs
        self.kept = {lane: 0 for lane in self.towers}
        self.gradients: dict[str, Tensor] = {}
        """Those of the last call, by lane and parameter's name."""
        if method.keep:
            self.step = self._our_step(method, workload, settings)
        else:
            make = peers.STEPS.get(method.name, plain)
            self.step = make(self.towers, self.loss, settings.micro_batch)

    def _our_step(self, method: Method, workload: Workload, settings: Settings) -> peers.Step:
        for tower in self.towers.values() if method.remat != "none" else ():
            rematerialise(tower, method.remat)
        step = ContrastiveStep(
            self.towers,
            self.loss,
            micro_batch=settings.micro_batch,
            keep=parse_per_lane("--keep", method.keep, LANES, smallest=0),
            batch_norm=workload.batch_norm,
            budget_bytes=settings.budget_bytes,
        )
        step.plans = step.resolve(self.inputs)
        self.kept = {lane: plan.keep for lane, plan in step.plans.items()}

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            loss = step(inputs).loss
            if step.recoveries:
                raise MethodFailed(step.recoveries[-1])
            return loss

        return run

    def clear(self) -> None:
        """Drop the gradients of the last call."""
        for module in (*self.towers.values(), self.loss):
            module.zero_grad(set_to_none=True)

    def call(self) -> Call:
        """The whole step; its gradients are kept aside afterwards."""

        def after() -> None:
            self.gradients = {
                name: gradient.cpu() for name, gradient in named_gradients(self.towers, self.loss).items()
            }

        return Call(run=lambda: self.step(self.inputs), before=self.clear, after=after)


def plain(towers: Mapping[str, nn.Module], loss: InfoNCE, micro_batch: int) -> peers.Step:
    """Autograd through one graph of all micro-batches."""

    def step(inputs: Mapping[str, Tensor]) -> Tensor:
        x, y = (torch.cat([towers[name](part) for part in inputs[name].split(micro_batch)]) for name in LANES)
        value = peers.symmetric_cross_entropy(x, y, loss.logit_scale)
        value.backward()
        return value.detach()

    return step


def warmed_up(method: Method, workload: Workload, inputs: Mapping[str, Tensor], settings: Settings) -> Case:
    """A case that has taken a step over a few rows, so that everything is loaded."""
    case = Case(method, workload, inputs, settings)
    case.step({name: rows[:WARM_UP_ROWS] for name, rows in inputs.items()})
    case.clear()
    return case


def peak(job: Mapping[str, Any]) -> int | None:
    """Peak memory of one step in bytes, in this process, which has measured nothing before."""
    settings = Settings(**job["settings"])
    measure.set_up(settings.threads, settings.reuse_buffers)
    device = torch.device(settings.device)
    workload = make_workload(job["towers"], device)
    case = warmed_up(Method(**job["method"]), workload, workload.inputs(job["batch"], device), settings)
    return measure.peak_bytes(Call(run=lambda: case.step(case.inputs)), device)


def too_large(method: Method, batch: int, workload: Workload, settings: Settings) -> str:
    """Why plain autograd is not tried at this batch: its activations would not fit; "" if they do."""
    if method.name != PLAIN:
        return ""
    inputs = workload.inputs(memory.PROBE_ROWS, torch.device(settings.device))
    needed = 0.0
    for name, tower in workload.towers.items():
        held = memory.activation_bytes(tower, lambda tower=tower, rows=inputs[name]: tower(rows), inputs[name])
        needed += held / memory.PROBE_ROWS * batch
    if needed <= settings.budget_bytes:
        return ""
    budget = settings.budget_bytes / memory.GIB
    return f"its activations would take {needed / memory.GIB:.1f} GiB; the budget is {budget:.1f} GiB"


def floor_flops(case: Case, forward_flops: Mapping[str, float], method: Method, batch: int, micro_batch: int) -> float:
    """FLOPs of the towers: forward and backward are three forward passes, and what is not kept takes a fourth.

    What rematerialisation computes again is left out.
    """
    count = math.ceil(batch / micro_batch)
    again = {lane: 0.0 if method.name == PLAIN else 1 - min(kept, count) / count for lane, kept in case.kept.items()}
    return batch * sum(flops * (3 + again[lane]) for lane, flops in forward_flops.items())


def kept_text(case: Case, method: Method, batch: int, settings: Settings) -> str | None:
    """How many of the micro-batches our step kept, such as "4 of 16"; None for others."""
    if not method.keep:
        return None
    count = math.ceil(batch / settings.micro_batch)
    numbers = {lane: min(kept, count) for lane, kept in case.kept.items()}
    text = [f"{lane} {kept}" for lane, kept in numbers.items()]
    return f"{', '.join(text) if len(set(numbers.values())) > 1 else min(numbers.values())} of {count}"


def largest_errors(case: Case, direct: Case | None, method: Method) -> dict[str, float | None]:
    """The largest relative error of the towers' gradients, and that of the temperature's; None where unknown."""
    if direct is None or case is direct:
        return {"tower_error": None, "temperature_error": None}
    errors = relative_errors(case.gradients, direct.gradients)
    temperature = errors.pop(TEMPERATURE)
    learned = method.name not in LEARN_NO_TEMPERATURE
    return {"tower_error": max(errors.values()), "temperature_error": temperature if learned else None}


def check_batches(batches: Sequence[int], micro_batch: int) -> None:
    """Raise UsageError for a batch that is no whole number of micro-batches, which peers' loops need."""
    for batch in batches:
        if batch > micro_batch and batch % micro_batch:
            raise UsageError(f"--batches {batch} is no multiple of --micro {micro_batch}, which some peers need")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured at every batch of one table."""

    towers: str
    methods: Sequence[Method]
    rounds: int
    settings: Settings
    product: Call
    product_flops: float

    def measure(self, workload: Workload, batch: int) -> tuple[list[Row], list[LeftOut], list[float]]:
        """The rows of one batch, what was left out, and the seconds of the matrix product."""
        device = torch.device(self.settings.device)
        peaks, left_out = self._peaks(workload, batch)
        inputs = workload.inputs(batch, device)
        taking_part = [method for method in self.methods if method.name in peaks]
        cases = {method.name: warmed_up(method, workload, inputs, self.settings) for method in taking_part}
        calls = {name: case.call() for name, case in cases.items()}
        seconds = measure.time_in_turns({**calls, "product": self.product}, self.rounds, device)
        forward = workload.forward_flops()
        rows = []
        for method in taking_part:
            case = cases[method.name]
            row = make_row(
                self.towers,
                method.name,
                batch,
                seconds,
                ours=OURS,
                product=(seconds["product"], self.product_flops),
                floor_flops=floor_flops(case, forward, method, batch, self.settings.micro_batch),
                peak_bytes=peaks[method.name],
                details={
                    "kept": kept_text(case, method, batch, self.settings),
                    **largest_errors(case, cases.get(PLAIN), method),
                },
            )
            rows.append(row)
        return rows, left_out, seconds["product"]

    def _peaks(self, workload: Workload, batch: int) -> tuple[dict[str, int | None], list[LeftOut]]:
        """By method its peak memory in a fresh process; what could not be had, with the reason."""
        peaks: dict[str, int | None] = {}
        left_out = []
        for method in self.methods:
            reason = too_large(method, batch, workload, self.settings)
            job = {"kind": "step", "towers": self.towers, "method": asdict(method), "batch": batch}
            try:
                if not reason:
                    peaks[method.name] = measure.in_fresh_process({**job, "settings": asdict(self.settings)})
            except MethodFailed as error:
                reason = str(error)
            if reason:
                left_out.append(LeftOut(task=self.towers, method=method.name, batch=batch, reason=reason))
        return peaks, left_out


def run(
    names: Sequence[str],
    batches: Sequence[int],
    chosen: Sequence[Method],
    *,
    rounds: int,
    settings: Settings,
    command: str,
    say: Callable[[str], None],
) -> Report:
    """Measure every method on every kind of towers at every batch."""
    device = torch.device(settings.device)
    product, product_flops = measure.product(torch.float32, device)
    product_seconds: list[float] = []
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for name in names:
        workload = make_workload(name, device)
        bench = Bench(
            towers=name,
            methods=chosen,
            rounds=rounds,
            settings=settings,
            product=product,
            product_flops=product_flops,
        )
        for batch in batches:
            say(f"{name}, B={batch:,}: memory of {', '.join(m.name for m in chosen)}; then {rounds} rounds of time")
            found, missing, seconds = bench.measure(workload, batch)
            rows += found
            left_out += missing
            product_seconds += seconds
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
