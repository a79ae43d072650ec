"""Which blocks of the kernels are fastest: candidates for `losses.launch.TABLE`, timed in the loss that uses them.

Everything else in the loss stays the same, so what a candidate gains shows whole. Candidates are compiled in several
processes first, whose kernels come back through Triton's cache on disk.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import nn

from gpu_sections.cases import Bench, Case, Failure, Found, Section, attempt, leave_out
from triscale.bench import measure
from triscale.bench.measure import Call, Spread
from triscale.losses import InfoNCE, Sigmoid, launch, tiles
from triscale.losses.launch import Blocks

KINDS: dict[str, tiles.Products] = {"16": "bf16", "tf32": "tf32", "float32": "float32"}
"""The kinds of operands in TABLE, and the arithmetic of products that has them; "scores" is the library form."""
KERNELS = ("softmax_statistics", "softmax_weights", "sigmoid_weights")
CANDIDATES: dict[str, list[Blocks]] = {
    "16": [
        Blocks(128, 256, 64, 8, 3),
        Blocks(128, 256, 64, 8, 4),
        Blocks(256, 128, 64, 8, 3),
        Blocks(256, 128, 64, 8, 4),
        Blocks(128, 128, 64, 8, 3),
        Blocks(128, 128, 64, 8, 4),
        Blocks(128, 128, 64, 4, 3),
        Blocks(128, 128, 64, 4, 4),
        Blocks(128, 128, 128, 8, 2),
        Blocks(128, 256, 32, 8, 4),
        Blocks(64, 256, 64, 4, 4),
        Blocks(64, 256, 64, 8, 4),
    ],
    "tf32": [
        Blocks(128, 128, 32, 8, 3),
        Blocks(128, 128, 32, 4, 3),
        Blocks(128, 128, 64, 8, 2),
        Blocks(128, 256, 32, 8, 3),
        Blocks(256, 128, 32, 8, 3),
        Blocks(64, 128, 32, 4, 4),
    ],
    "float32": [
        Blocks(64, 64, 32, 4, 3),
        Blocks(64, 64, 16, 4, 3),
        Blocks(128, 64, 16, 8, 3),
        Blocks(128, 128, 16, 8, 2),
    ],
    "scores": [
        Blocks(64, 128, 16, 8, 1),
        Blocks(32, 256, 16, 8, 1),
        Blocks(64, 256, 16, 8, 1),
        Blocks(128, 128, 16, 8, 1),
        Blocks(16, 512, 16, 8, 1),
        Blocks(32, 128, 16, 4, 1),
        Blocks(64, 128, 16, 4, 1),
        Blocks(16, 1024, 16, 8, 1),
    ],
}
MOST_SCORES_PER_THREAD = {"sigmoid_weights": 64}
"""Where more spill registers: compiled for compute capability 9.0, 2 KiB a thread of them."""
TILES = (4096, 8192, 16384)
COMPILED_ROWS = 512
"""Of the call that compiles; a multiple of 16, as in the timed one, so that it is the same kernel."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One candidate in the place of one entry of the table."""

    kernel: str
    kind: str
    blocks: Blocks

    @property
    def form(self) -> launch.Form:
        """The form that reads this entry."""
        return "library" if self.kind == "scores" else "fused"

    @property
    def in_table(self) -> bool:
        """Whether this is what the table has."""
        return launch.TABLE[self.kernel, self.kind] == self.blocks

    def loss(self, device: torch.device) -> nn.Module:
        """The loss that uses the kernel."""
        products = KINDS.get(self.kind, "bf16")
        if self.kernel == "sigmoid_weights":
            return Sigmoid(batch_size=COMPILED_ROWS, products=products).to(device)
        return InfoNCE(products=products).to(device)

    def call(self, rows: int, width: int, device: torch.device) -> Call:
        """Forward, which is what the first sweep's kernel is in, or forward and backward."""
        module, generator = self.loss(device), torch.Generator(device).manual_seed(0)
        inputs = [torch.randn(rows, width, device=device, generator=generator).requires_grad_() for _ in range(2)]

        def clear() -> None:
            for tensor in (*module.parameters(), *inputs):
                tensor.grad = None

        def run() -> None:
            gradients = self.kernel != "softmax_statistics"
            with launch.using(self.form, {(self.kernel, self.kind): self.blocks}), torch.set_grad_enabled(gradients):
                value = module(*inputs)
            if gradients:
                value.backward()

        return Call(run=run, before=clear, after=clear)


@dataclass(frozen=True, kw_only=True)
class TuneRow:
    """A candidate's time at every width."""

    kernel: str
    kind: str
    blocks: Blocks | None
    """None: the table's own, with tiles of another size."""
    tile: int
    in_table: bool
    seconds: dict[int, Spread]

    @property
    def total(self) -> float:
        """Seconds of the medians together."""
        return sum(spread.median for spread in self.seconds.values())


def compile_one(setting: Setting, widths: tuple[int, ...]) -> None:
    """Compile a candidate's kernels by one small call; what fails, fails again where it is timed."""
    for width in widths:
        attempt(setting.call(COMPILED_ROWS, width, torch.device("cuda")).run)


def _compile(settings: list[Setting], widths: tuple[int, ...]) -> None:
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(compile_one, widths=widths), settings))


def _timed(setting: Setting, rows: int, widths: tuple[int, ...], bench: Bench) -> TuneRow:
    seconds = {}
    for width in widths:
        call = setting.call(rows, width, bench.device)
        measure.seconds_of(call, bench.device)
        seconds[width] = Spread.of([measure.seconds_of(call, bench.device) for _ in range(2 if bench.toy else 7)])
    return TuneRow(
        kernel=setting.kernel,
        kind=setting.kind,
        blocks=setting.blocks,
        tile=tiles.ACCELERATOR_TILE,
        in_table=setting.in_table,
        seconds=seconds,
    )


def _candidates(kernel: str, kind: str) -> list[Blocks]:
    """Those that leave a thread no more scores than its registers hold."""
    most = MOST_SCORES_PER_THREAD.get(kernel)
    return [b for b in CANDIDATES[kind] if most is None or b.rows * b.columns <= 32 * b.warps * most]


def _tune(kind: str, bench: Bench, rows: int, widths: tuple[int, ...]) -> Found:
    """Every candidate of one kind of operands in every kernel."""
    found = Found()
    settings = []
    for kernel in KERNELS[:: 2 if bench.toy else 1]:
        candidates = dict.fromkeys((launch.TABLE[kernel, kind], *_candidates(kernel, kind)))
        settings += [Setting(kernel=kernel, kind=kind, blocks=blocks) for blocks in candidates][
            : 2 if bench.toy else None
        ]
    if bench.cuda:
        attempt(lambda: _compile(settings, widths))  # what that does not compile, the timed calls do
    for setting in settings:
        row = attempt(lambda setting=setting: _timed(setting, rows, widths, bench))
        if isinstance(row, Failure):
            leave_out(found, setting.kernel, f"{kind} {tuple(setting.blocks)}", rows, Failure(row.reason, ""))
        else:
            found.rows.append(row)
    return found


@contextmanager
def _tile(size: int) -> Iterator[None]:
    before, tiles.ACCELERATOR_TILE = tiles.ACCELERATOR_TILE, size
    try:
        yield
    finally:
        tiles.ACCELERATOR_TILE = before


def _tune_tiles(bench: Bench, rows: int, widths: tuple[int, ...]) -> Found:
    """Sizes of the tiles between kernels and library products, with the table's own blocks."""
    found = Found()
    for form in launch.FORMS:
        kind = "scores" if form == "library" else "16"
        for size in TILES:
            setting = Setting(kernel="softmax_weights", kind=kind, blocks=launch.TABLE["softmax_weights", kind])
            with _tile(size):
                row = attempt(lambda setting=setting: _timed(setting, rows, widths, bench))
            if isinstance(row, Failure):
                leave_out(found, "tile", f"{form} {size}", rows, row)
            else:
                found.rows.append(row)
    return found


def cases(bench: Bench) -> list[Case]:
    """Blocks by kind of operands, then the tiles."""
    rows, widths = (32, (16,)) if bench.toy else (32_768, (768, 512))
    estimates = {"16": 60, "scores": 45, "tf32": 45, "float32": 45}
    listed = [
        Case(
            name=f"blocks, {kind}",
            importance=1 + (kind in ("tf32", "float32")),
            estimate_seconds=estimates[kind],
            run=partial(_tune, kind, bench, rows, widths),
        )
        for kind in CANDIDATES
    ]
    tiled = Case(name="tiles", importance=1, estimate_seconds=15, run=partial(_tune_tiles, bench, rows, widths))
    return [*listed, tiled]


def best_lines(rows: list[TuneRow]) -> list[str]:
    """Lines for `launch.TABLE`: the fastest blocks of every entry, and what they gain."""
    lines = []
    for entry in dict.fromkeys((row.kernel, row.kind) for row in rows):
        timed = [row for row in rows if (row.kernel, row.kind) == entry and row.tile == tiles.ACCELERATOR_TILE]
        best = min(timed, key=lambda row: row.total, default=None)
        own = next((row for row in timed if row.in_table), None)
        if best is None or best.blocks is None:
            continue
        gain = "the table's own fails" if own is None else f"{own.total / best.total:.3f} times the table's speed"
        lines.append(f'    ("{entry[0]}", "{entry[1]}"): Blocks{tuple(best.blocks)},  # {gain}')
    return lines


def table(rows: list[TuneRow]) -> Table:
    """Fastest first within an entry of the table, whose own blocks are marked."""
    made = Table(box=box.SIMPLE_HEAD)
    widths = sorted({width for row in rows for width in row.seconds})
    for heading in ("kernel", "operands", "blocks", "tile", *(f"ms, d={width}" for width in widths)):
        made.add_column(heading, no_wrap=True)
    for row in sorted(rows, key=lambda row: (row.kernel, row.kind, row.total)):
        blocks: Any = None if row.blocks is None else tuple(row.blocks)
        cells = [f"{1000 * row.seconds[w].median:.3f} ({1000 * row.seconds[w].smallest:.3f})" for w in widths]
        cells = [row.kernel, row.kind, f"{blocks}{' *' * row.in_table}", f"{row.tile:,}", *cells]
        made.add_row(*map(Text, cells))
    return made


TUNE = Section(cases=cases, table=table, lines=best_lines)
