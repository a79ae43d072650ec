"""The kernels' loss and gradients against float64, beside a dense loss of the same arithmetic; and repeatability.

An error is that of `triscale verify`: |g - g*| / max(|g*|, 1e-3 |G*|). Inputs are exact in every arithmetic (they hold
bfloat16 numbers), so that errors are those of the computation. Before each run freed memory is filled with NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from gpu_sections import reference
from gpu_sections.cases import Bench, Case, Failure, Found, Section, attempt, leave_out
from triscale.losses import InfoNCE, NTXent, Sigmoid, dense, launch
from triscale.training.verify import relative_errors

RUNS = 4
LOSSES = ("info_nce", "sigmoid", "nt_xent")
ROUNDING = {"inputs": 2**-8, "bf16": 2**-8, "fp16": 2**-11, "tf32": 2**-11, "float32": 1e-5}
"""Of the products' inputs; what a number may be off by, and the design's bound for float32."""
AUTOCAST = {"inputs": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_OF_DENSE = 1.1
"""The largest error, as a multiple of that of the dense loss."""
POISON_POWERS = range(8, 28)
NOISE = 0.5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is computed."""

    task: str
    rows: int
    width: int
    scale: float
    aligned: bool = False
    """Whether pairs fit, as late in a training, and some share an id."""
    products: str = "inputs"
    with_dense: bool = True

    def inputs(self, device: torch.device) -> tuple[list[Tensor], Tensor | None]:
        """Tower outputs that hold bfloat16 numbers, in float32; and ids."""
        generator = torch.Generator(device).manual_seed(self.rows)
        x, noise = (torch.randn(self.rows, self.width, device=device, generator=generator) for _ in range(2))
        y = x + NOISE * noise if self.aligned else noise
        samples = self.rows // 2 if self.task == "nt_xent" else self.rows
        ids = torch.arange(samples, device=device) // 3 if self.aligned else None
        if self.task == "nt_xent":
            return [torch.cat([x[:samples], y[:samples]]).bfloat16().float()], ids
        return [x.bfloat16().float(), y.bfloat16().float()], ids

    @property
    def bias(self) -> float:
        """Of the sigmoid loss, as it starts."""
        return -math.log(self.rows - 1)

    def module(self, **options: Any) -> nn.Module:
        """Our loss."""
        match self.task:
            case "info_nce":
                return InfoNCE(logit_scale=self.scale, **options)
            case "sigmoid":
                return Sigmoid(batch_size=self.rows, logit_scale=self.scale, **options)
            case _:
                return NTXent(1 / self.scale, learn_temperature=True, **options)

    def exact(self, device: torch.device) -> dict[str, Tensor]:
        """The loss and its gradients in float64."""
        inputs, ids = self.inputs(device)
        parameters = [torch.tensor(math.log(self.scale), dtype=torch.float32, device=device).double()]
        if self.task == "sigmoid":
            parameters.append(torch.tensor(self.bias, dtype=torch.float32, device=device).double())
        samples = torch.arange(self.rows // (3 - len(inputs)), device=device) if ids is None else ids
        every = samples.repeat(2) if self.task == "nt_xent" else samples
        found = getattr(reference, self.task)(*(rows.double() for rows in inputs), *parameters, every)
        return {"loss": found.loss, **found.gradients}

    def computed(self, loss: Callable[..., Tensor], parameters: Mapping[str, Tensor], device: torch.device) -> Parts:
        """The loss and its gradients by `loss(*inputs, ids)`; `parameters` are its own."""
        inputs, ids = self.inputs(device)
        poison(device)
        if self.products == "inputs":
            inputs = [rows.bfloat16() for rows in inputs]
        leaves = [rows.requires_grad_() for rows in inputs]
        value = loss(*leaves, ids)
        value.backward()
        names = ("z",) if len(leaves) == 1 else ("x", "y")
        tensors = {**dict(zip(names, leaves, strict=True)), **parameters}
        gradients = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
        return {"loss": value.detach(), **gradients}


Parts = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One form of one loss on one problem."""

    problem: Problem
    form: str
    errors: dict[str, float]
    """Of the loss and of each gradient."""
    dense_errors: dict[str, dict[str, float]]
    """The same of dense losses, by their name; none where none fits."""
    runs_that_differ: int
    """Of RUNS, in any bit of loss or gradients from the first."""
    within: bool
    """Whether no error is above what it may be."""


def poison(device: torch.device) -> None:
    """Fill memory that comes next with NaN, so that reading what nothing wrote shows."""
    blocks = [torch.full((2**power,), torch.nan, device=device) for power in POISON_POWERS if device.type == "cuda"]
    del blocks


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Float32 products of libraries by tf32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _dense(problem: Problem, rounded: bool, device: torch.device) -> Parts:
    """A dense loss: under autocast; or, if `rounded`, on unit rows of the products' precision, scores in float32."""
    parameters = {"logit_scale": torch.tensor(math.log(problem.scale), device=device, requires_grad=True)}
    if problem.task == "sigmoid":
        parameters["logit_bias"] = torch.tensor(problem.bias, device=device, requires_grad=True)
    precision = AUTOCAST.get(problem.products)
    formula = {"info_nce": dense.info_nce, "sigmoid": dense.sigmoid, "nt_xent": dense.nt_xent}[problem.task]

    def loss(*inputs: Any) -> Tensor:
        *rows, ids = inputs
        if precision and rounded:
            rows = [F.normalize(e.float()).to(precision).float() for e in rows]
        with nullcontext() if rounded or not precision else torch.autocast(device.type, precision):
            return formula(*(e.float() for e in rows), *parameters.values(), ids)[0]

    with tf32(problem.products == "tf32"):
        return problem.computed(loss, parameters, device)


def _ours(problem: Problem, form: launch.Form, device: torch.device) -> Parts:
    module = problem.module(products=problem.products).to(device)
    with launch.using(form):
        return problem.computed(module, dict(module.named_parameters()), device)


def _errors(parts: Parts, exact: Parts) -> dict[str, float]:
    """Relative, of the loss and of each gradient."""
    loss, true = float(parts["loss"].double()), float(exact["loss"])
    gradients = [{name: value for name, value in e.items() if name != "loss"} for e in (parts, exact)]
    return {"loss": abs(loss - true) / abs(true), **relative_errors(*gradients)}


def _measured(problem: Problem, form: launch.Form, bench: Bench, exact: Parts, others: dict[str, Parts]) -> ParityRow:
    runs = [_ours(problem, form, bench.device) for _ in range(RUNS)]
    differ = sum(any(not torch.equal(run[name], runs[0][name]) for name in exact) for run in runs[1:])
    errors = _errors(runs[0], exact)
    dense_errors = {name: _errors(parts, exact) for name, parts in others.items()}
    allowed = {
        name: max([ROUNDING[problem.products]] + [MOST_OF_DENSE * e[name] for e in list(dense_errors.values())[:1]])
        for name in exact
    }
    return ParityRow(
        problem=problem,
        form=form,
        errors=errors,
        dense_errors=dense_errors,
        runs_that_differ=differ,
        within=all(errors[name] <= allowed[name] for name in exact) and not differ,
    )


def _compare(bench: Bench, problem: Problem) -> Found:
    """Both forms on one problem."""
    found, label = Found(), f"{problem.task}, {problem.products}"
    exact = attempt(lambda: problem.exact(bench.device))
    if isinstance(exact, Failure):
        leave_out(found, label, "float64 reference", problem.rows, exact)
        return found
    others: dict[str, Parts] = {}
    names = {"autocast": False, "rounded rows": True} if problem.products in AUTOCAST else {"float32": False}
    for name, rounded in names.items() if problem.with_dense else ():
        parts = attempt(lambda rounded=rounded: _dense(problem, rounded, bench.device))
        if isinstance(parts, Failure):
            leave_out(found, label, f"dense, {name}", problem.rows, parts)
        else:
            others[name] = parts
    for form in launch.FORMS:
        row = attempt(lambda form=form: _measured(problem, form, bench, exact, others))
        if isinstance(row, Failure):
            leave_out(found, label, form, problem.rows, row)
        else:
            found.rows.append(row)
    return found


def _all(bench: Bench, problems: list[Problem]) -> Found:
    found = Found()
    for problem in problems:
        found.add(_compare(bench, problem))
    return found


def cases(bench: Bench) -> list[Case]:
    """Every loss in bfloat16, at odd sizes, at B=65,536, and in the other arithmetics."""
    rows, width, odd_rows, odd_width, large = (24, 16, 23, 10, 48) if bench.toy else (8192, 768, 5003, 100, 65_536)
    usual = [Problem(task=task, rows=rows, width=width, scale=1 / 0.07) for task in LOSSES]
    late = [Problem(task=task, rows=rows, width=width, scale=100.0, aligned=True) for task in LOSSES]
    odd = [Problem(task=t, rows=odd_rows - (t == "nt_xent"), width=odd_width, scale=20.0, aligned=True) for t in LOSSES]
    big = [Problem(task="info_nce", rows=large, width=width, scale=1 / 0.07, with_dense=False)]
    others = [
        Problem(task="info_nce", rows=rows, width=width, scale=30.0, aligned=True, products=products)
        for products in ("bf16", "fp16", "tf32", "float32")
    ]
    listed = [
        (f"bfloat16, B={rows:,}", 1, 35, usual),
        (f"bfloat16, pairs that fit, scale 100, ids, B={rows:,}", 1, 15, late),
        (f"bfloat16, B={large:,}", 1, 15, big),
        (f"bfloat16, B={odd_rows:,}, d={odd_width}", 2, 30, odd),
        (f"products in other arithmetics, B={rows:,}", 2, 35, others),
    ]
    return [
        Case(name=name, importance=p, estimate_seconds=s, run=partial(_all, bench, problems))
        for name, p, s, problems in listed
    ]


def table(rows: list[ParityRow]) -> Table:
    """Errors of ours, the largest gradient error of dense losses, and whether ours is within its bound."""
    made = Table(box=box.SIMPLE_HEAD)
    for heading in ("loss", "form", "products", "B", "d", "scale", "error: loss", "rows", "temperature", "bias"):
        made.add_column(heading, no_wrap=True)
    for heading in ("dense autocast: rows", "rounded: rows", "runs differ", "within"):
        made.add_column(heading, no_wrap=True)
    for row in rows:
        problem, errors = row.problem, row.errors
        dense_rows = [_of_rows(e) for e in row.dense_errors.values()]
        cells = [problem.task, row.form, problem.products, f"{problem.rows:,}", str(problem.width)]
        cells += [f"{problem.scale:.1f}", _text(errors["loss"]), _text(_of_rows(errors))]
        cells += [_text(errors.get("logit_scale")), _text(errors.get("logit_bias"))]
        cells += [_text(value) for value in (*dense_rows, None, None)[:2]]
        cells += [f"{row.runs_that_differ} of {RUNS}", "yes" if row.within else "NO"]
        made.add_row(*map(Text, cells))
    return made


def _of_rows(errors: Mapping[str, float]) -> float:
    """The largest error among the gradients of the rows."""
    return max(error for name, error in errors.items() if name in ("x", "y", "z"))


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def lines(rows: list[ParityRow]) -> list[str]:
    """How many are within their bounds, and which are not."""
    outside = [row for row in rows if not row.within]
    said = [f"{len(rows) - len(outside)} of {len(rows)} within their bounds and equal in every bit of {RUNS} runs"]
    return said + [f"NOT: {row.form}, {row.problem}: {row.errors}, {row.runs_that_differ} differ" for row in outside]


PARITY = Section(cases=cases, table=table, lines=lines)
