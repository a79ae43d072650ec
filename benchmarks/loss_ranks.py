"""What a rank of W pays for a loss, as a share of what one process pays for the same batch: 1/W is the goal.

    python benchmarks/loss_ranks.py [--world 4] [--batch 8192] [--width 256] [--losses info_nce sigmoid nt_xent]
        [--repeats 3] [--json FILE]

Real processes on this machine, joined by gloo, one thread each, on the CPU. Of each loss and exchange, forward and
backward over `--batch` rows (NT-Xent: two views of half as many images), the slowest or largest rank:

- CPU seconds of the process, the communication's own included (`time.process_time`; the median of the repeats), and
  wall seconds, which W processes on fewer cores share;
- peak resident memory above that before the call, inputs there by then, gradients included, in a fresh process that
  gives every buffer back to the system (MALLOC_MMAP_THRESHOLD_): what the loss needs, not what an allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from triscale.bench.measure import MIB, status_bytes
from triscale.distributed import rows_of
from triscale.losses import InfoNCE, NTXent, Sigmoid, tiles
from triscale.losses.contrastive import ContrastiveLoss

LOSSES = ("info_nce", "sigmoid", "nt_xent")
EXCHANGES = ("gather", "blocks")


def _make(name: str, exchange, batch: int) -> ContrastiveLoss:
    if name == "info_nce":
        return InfoNCE(exchange=exchange)
    return Sigmoid(batch_size=batch, exchange=exchange) if name == "sigmoid" else NTXent(exchange=exchange)


def _warm_up(loss: ContrastiveLoss, width: int) -> list[torch.Tensor]:
    """Let libraries, threads and connections take the memory that they take once: a product and a message as large as
    the loss's largest. What is returned is to be held, so that the allocator has nothing left over for the loss.
    """
    rows = [torch.randn(4, width, requires_grad=True) for _ in range(3 - loss.views)]
    loss(*rows).backward()
    loss.zero_grad(set_to_none=True)
    x, y = torch.randn(tiles.TILE_ROWS, width), torch.randn(tiles.TILE_COLUMNS, width)
    dist.broadcast(y, src=0)
    dist.reduce(y, dst=0)
    return [x, y, x @ y.T]


def _rank(rank: int, world: int, folder: str, name: str, exchange: str, batch: int, width: int, repeats: int) -> None:
    torch.set_num_threads(1)
    rendezvous = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    dist.init_process_group("gloo", timeout=timedelta(seconds=600), **rendezvous)
    loss = _make(name, exchange, batch)
    count = len(rows_of(batch // loss.views)) * loss.views
    torch.manual_seed(rank)
    rows = [torch.randn(count, width, requires_grad=True) for _ in range(3 - loss.views)]
    held = _warm_up(loss, width)
    cpu_seconds, wall_seconds, peak = [], [], 0
    for repeat in range(repeats):
        for e in rows:
            e.grad = None
        dist.barrier()
        before = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        wall, cpu = time.perf_counter(), time.process_time()
        loss(*rows).backward()
        cpu_seconds.append(time.process_time() - cpu)
        wall_seconds.append(time.perf_counter() - wall)
        if repeat == 0:  # afterwards the allocator holds what the first call had
            peak = status_bytes("VmHWM") - before
    figures = {"cpu_seconds": statistics.median(cpu_seconds), "wall_seconds": statistics.median(wall_seconds)}
    Path(folder, f"{rank}.json").write_text(json.dumps({**figures, "peak_bytes": peak}))
    dist.barrier()
    del held
    dist.destroy_process_group()


def measure(name: str, exchange: str, world: int, batch: int, width: int, repeats: int) -> dict[str, float]:
    """CPU seconds, wall seconds and peak bytes of the rank that has the most of each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world, folder, name, exchange, batch, width, repeats), nprocs=world)  # type: ignore[attr-defined]
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return {key: max(rank[key] for rank in ranks) for key in ranks[0]}


def main() -> None:
    """Measure one process and W, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=4, help="processes")
    parser.add_argument("--batch", type=int, default=8192, help="rows of all processes together")
    parser.add_argument("--width", type=int, default=256, help="of the embeddings")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--repeats", type=int, default=3, help="calls of which the median counts")
    parser.add_argument("--json", default="", help="file for the figures")
    options = parser.parse_args()
    size = (options.batch, options.width, options.repeats)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 * 1024)  # the ranks' C library reads it as they start
    rows = []
    print(f"B={options.batch}, d={options.width}; the goal of W={options.world} is {1 / options.world:.2f} of W=1")
    print(f"{'loss':>9} {'exchange':>9} {'W':>3} {'CPU s':>8} {'share':>6} {'wall s':>8} {'peak':>10} {'share':>6}")
    for name in options.losses:
        one = measure(name, "gather", 1, *size)
        for exchange, world in (("gather", 1), *((exchange, options.world) for exchange in EXCHANGES)):
            figures = one if world == 1 else measure(name, exchange, world, *size)
            shares = {f"{key}_share": figures[key] / max(one[key], 1e-9) for key in ("cpu_seconds", "peak_bytes")}
            rows.append({"loss": name, "exchange": exchange, "world": world, **figures, **shares})
            print(
                f"{name:>9} {'-' if world == 1 else exchange:>9} {world:>3} {figures['cpu_seconds']:>8.2f} "
                f"{shares['cpu_seconds_share']:>6.2f} {figures['wall_seconds']:>8.2f} "
                f"{figures['peak_bytes'] / MIB:>6.1f} MiB {shares['peak_bytes_share']:>6.2f}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
