"""Which kernel runs on a tile of scores, in which form and with which blocks.

Two forms, with equal results:

- "fused": a kernel makes a block of scores by tensor cores and turns it into what is wanted while it is in registers.
- "library": a library product stores the scores of a tile in float32, and a kernel goes over them.

Shape suffixes: r rows and c columns of a tile, d width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from triscale.losses.columns import Piece
from triscale.losses.sweeps import Scores
from triscale.losses.tiles import Products

Form = Literal["fused", "library"]
FORMS: tuple[Form, ...] = get_args(Form)
OPERANDS: Mapping[Products, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Blocks(NamedTuple):
    """How a kernel is cut up: scores per program, width per step of its product, warps, steps loaded ahead."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


TABLE: dict[tuple[str, str], Blocks] = {
    ("softmax_statistics", "16"): Blocks(128, 256, 64, 8, 3),
    ("softmax_weights", "16"): Blocks(256, 128, 64, 8, 3),
    ("sigmoid_weights", "16"): Blocks(128, 128, 64, 8, 4),
    ("softmax_statistics", "tf32"): Blocks(128, 128, 32, 8, 3),
    ("softmax_weights", "tf32"): Blocks(128, 128, 32, 8, 3),
    ("sigmoid_weights", "tf32"): Blocks(128, 128, 32, 8, 3),
    ("softmax_statistics", "float32"): Blocks(64, 64, 32, 4, 3),
    ("softmax_weights", "float32"): Blocks(64, 64, 32, 4, 3),
    ("sigmoid_weights", "float32"): Blocks(64, 64, 32, 4, 3),
    ("softmax_statistics", "scores"): Blocks(64, 128, 16, 8, 1),
    ("softmax_weights", "scores"): Blocks(32, 256, 16, 8, 1),
    ("sigmoid_weights", "scores"): Blocks(32, 256, 16, 8, 1),
}
"""Blocks by kernel and by operands: 16 bits, TF32 or float32 products, or scores that are read. Those of the fused form
fit the registers and the shared memory of compute capability 9.0, with at most 100 bytes spilled (by Triton 3.6)."""
GROUP = 8
"""So many rows of blocks run together."""


@dataclass(frozen=True)
class _Choice:
    form: Form = "fused"
    table: Mapping[tuple[str, str], Blocks] | None = None


_choice = _Choice()


def form() -> Form:
    """The form in use."""
    return _choice.form


@contextmanager
def using(form: Form | None = None, table: Mapping[tuple[str, str], Blocks] | None = None) -> Iterator[None]:
    """Run with this form, or with these blocks in place of those in TABLE: for measurements."""
    global _choice
    before, changes = _choice, {"form": form, "table": table}
    _choice = replace(_choice, **{name: value for name, value in changes.items() if value is not None})
    try:
        yield
    finally:
        _choice = before


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def available(rows: Tensor) -> bool:
    """Whether the kernels serve these tower outputs: on CUDA, not in float64."""
    return rows.is_cuda and rows.dtype != torch.float64 and _has_triton()


def operands(rows: Tensor, products: Products) -> tuple[torch.dtype, bool]:
    """In what the kernels' operands are held, and whether products may round them to TF32."""
    return (rows.dtype if products == "inputs" else OPERANDS[products]), products == "tf32"


def _kernels() -> ModuleType:
    return importlib.import_module("triscale.losses.kernels")  # needs Triton, which not every platform has


@contextmanager
def library_products(tf32: bool) -> Iterator[None]:
    """Library products of float32 operands as asked, whatever the process has set."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def score_product(x: Float[Tensor, "r d"], y: Float[Tensor, "c d"]) -> Float[Tensor, "r c"]:
    """x @ y.T, summed and returned in float32."""
    if x.dtype == torch.float32:
        return x @ y.T
    return torch.mm(x, y.T, torch.float32) if x.is_cuda else x.float() @ y.float().T


def add_product_(total: Float[Tensor, "r d"], a: Tensor, b: Tensor, alpha: float) -> None:
    """total += alpha * a @ b, summed in float32."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, alpha=alpha, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, torch.float32, alpha=alpha, out=total)
    else:
        torch.addmm(total, a.float(), b.float(), alpha=alpha, out=total)


class Tile:
    """A tile of scores, of rows by the rows of a piece, ready for any of the kernels."""

    def __init__(self, scores: Scores, piece: Piece, rows: slice, columns: slice) -> None:
        self.x, self.y = scores.x[rows], piece.rows[columns]
        self._tf32 = scores.tf32
        self._scores = score_product(self.x, self.y) if form() == "library" else scores.x.new_empty(1).float()
        self.diagonal = scores.ranks.first + rows.start - piece.start - columns.start

    def blocks(self, kernel: str) -> Blocks:
        """How `kernel` is cut up."""
        kind = "16" if self.x.element_size() == 2 else "tf32" if self._tf32 else "float32"
        kind = "scores" if form() == "library" else kind
        blocks = (_choice.table or {}).get((kernel, kind), TABLE[kernel, kind])
        width = self.x.shape[1]
        return blocks._replace(width=max(16, min(blocks.width, 1 << (width - 1).bit_length())))

    def counts(self, kernel: str) -> tuple[int, int]:
        """How many blocks there are over its rows and over its columns."""
        blocks = self.blocks(kernel)
        return -(-len(self.x) // blocks.rows), -(-len(self.y) // blocks.columns)

    def run(self, kernel: str, *arguments: Tensor | float, after: tuple[float, ...] = (), **flags: bool) -> None:
        """Launch `kernel`: x, y and scores, `arguments`, the tile's shape, `after`."""
        blocks, (over_rows, over_columns) = self.blocks(kernel), self.counts(kernel)
        rows, columns, width = len(self.x), len(self.y), self.x.shape[1]
        getattr(_kernels(), kernel)[(over_rows * over_columns,)](
            self.x,
            self.y,
            self._scores,
            *arguments,
            rows,
            columns,
            width,
            *after,
            **flags,
            FROM_SCORES=form() == "library",
            BLOCK_ROWS=blocks.rows,
            BLOCK_COLUMNS=blocks.columns,
            BLOCK_WIDTH=blocks.width,
            EVEN_WIDTH=width % blocks.width == 0,
            PRECISION="tf32" if self._tf32 else "ieee",
            GROUP=GROUP,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            enable_fp_fusion=True,
        )
