"""What a position costs among 10^10 samples: microseconds and memory, in whole permutations and in windows of shards.

    python benchmarks/order.py [--samples 10000000000] [--positions 200000]

Positions in sequence, as one rank reads them, and at random within an epoch; and the first one of an epoch. Memory is
what Python and numpy allocate meanwhile. Then the window of a batch of distinct ids, of 65,536 rows.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from collections.abc import Sequence

import numpy as np

from triscale.data.distinct import WINDOW_BATCHES, DistinctOrder
from triscale.data.order import Order

SHARD_SAMPLES = 10_000
WINDOW_SHARDS = 64
BATCH = 65_536
DISTINCT_SAMPLES = 10_000_000


def microseconds(order: Order, positions: Sequence[int]) -> float:
    """Of one position, by wall clock."""
    began = time.perf_counter()
    for position in positions:
        order[position]
    return (time.perf_counter() - began) / len(positions) * 1e6


def memory(order: Order, positions: Sequence[int]) -> tuple[int, int]:
    """Bytes allocated after the first and after the second half of `positions`."""
    tracemalloc.start()
    try:
        halves = positions[: len(positions) // 2], positions[len(positions) // 2 :]
        after = []
        for half in halves:
            for position in half:
                order[position]
            after.append(tracemalloc.get_traced_memory()[0])
        return after[0], after[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**10)
    parser.add_argument("--positions", type=int, default=200_000)
    options = parser.parse_args()
    shards = np.full(options.samples // SHARD_SAMPLES, SHARD_SAMPLES)
    kinds = {
        "whole": Order([options.samples], seed=0),
        "mixture of three": Order([options.samples, options.samples // 10, 10**6], (5, 2, 1), seed=0),
        f"windows of {WINDOW_SHARDS} of {len(shards):,} shards": Order(
            [options.samples], seed=0, shards=[shards], window_shards=WINDOW_SHARDS
        ),
    }
    first = 3 * options.samples + 12_345
    in_sequence = range(first, first + options.positions)
    at_random = np.random.default_rng(0).integers(first, 4 * options.samples, options.positions // 4).tolist()
    for name, order in kinds.items():
        begun = microseconds(order, [first]) / 1e6
        each = [microseconds(order, positions) for positions in (in_sequence, at_random)]
        before, after = memory(order, range(first, first + 20_000))
        print(
            f"{name}: {each[0]:.1f} us in sequence, {each[1]:.1f} us at random, an epoch begins in {begun:.2f} s; "
            f"allocated {before / 1024:.0f} KiB by 10,000 positions, {after / 1024:.0f} KiB by 20,000",
            flush=True,
        )
    ids = np.random.default_rng(0).integers(0, DISTINCT_SAMPLES // 2, DISTINCT_SAMPLES)
    distinct = DistinctOrder(Order([DISTINCT_SAMPLES], seed=0), [ids], BATCH)
    began = time.perf_counter()
    distinct[5 * WINDOW_BATCHES * BATCH]
    took = time.perf_counter() - began
    print(f"distinct ids: {took:.2f} s for a window of {WINDOW_BATCHES} batches of {BATCH:,}")


if __name__ == "__main__":
    main()
