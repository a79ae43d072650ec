"""Whether the towers wait for data, and in one line what to do about it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

STEPS = 50
"""Steps that the verdict is about."""
FIRST_STEPS = 10
"""Steps that it leaves out: workers begin, caches fill, kernels are chosen."""
THRESHOLD = 0.1
"""Largest share of a step that may be spent waiting without a word."""
BUSY = 0.6
"""Workers that compute for a smaller share of their time wait for storage."""

Advise = Callable[[float, float, int], str]
"""From the share of steps spent waiting, samples a second and the number of steps to a line."""


class Starvation:
    """Looks on while a run goes along, and speaks once.

    Args:
        advise: makes the line.
    """

    def __init__(self, advise: Advise) -> None:
        self._advise = advise
        self._recent: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self._steps = 0
        self._waited = self._took = 0.0
        self._told = False

    def add(self, share: float, samples_per_second: float) -> str | None:
        """Take in a step's share of waiting, 0 to 1, and its speed; the verdict, once, when it has to be given."""
        self._steps += 1
        if self._steps <= FIRST_STEPS or samples_per_second <= 0:
            return None
        self._recent.append((share, samples_per_second))
        self._waited += share / samples_per_second  # seconds a sample
        self._took += 1 / samples_per_second
        if self._told or len(self._recent) < STEPS:
            return None
        shares, speeds = zip(*self._recent, strict=True)
        if median(shares) <= THRESHOLD:
            return None
        self._told = True
        return self._advise(median(shares), median(speeds), STEPS)

    def summary(self) -> str | None:
        """The verdict on all steps, where one was given on the way."""
        if not self._told:
            return None
        counted = self._steps - FIRST_STEPS
        return self._advise(self._waited / self._took, counted / self._took, counted)


def verdict(
    share: float,
    samples_per_second: float,
    steps: int,
    *,
    workers: int,
    cores: int,
    busy: float | None = None,
    processes: int = 1,
    held: bool = True,
    shared: bool = False,
) -> str:
    """What is the matter with the data and what would help, in one line.

    Args:
        share: of the time spent waiting, 0 to 1.
        samples_per_second: of all processes together.
        steps: that the share is of.
        workers: of each process.
        cores: that each process has for itself and its workers.
        busy: share of their time that workers compute, 0 to 1; None: not known.
        processes: that train.
        held: whether batches are made ahead; otherwise workers are of no use.
        shared: whether the towers compute on the same cores, from which a worker takes what it gives.
    """
    possible = samples_per_second / max(1 - share, 0.01)
    needed = math.ceil(max(workers, 1) * possible / samples_per_second)
    many = processes > 1
    if not held or not workers:
        readers = "the training processes read" if many else "the training process reads"
    else:
        each = f" in each of {processes} processes" if many else ""
        readers = f"1 worker{each} deliver{'' if many else 's'}" if workers == 1 else f"{workers} workers{each} deliver"
    return (
        f"the towers waited for data {share:.0%} of the last {steps} steps: {readers} {samples_per_second:,.0f} "
        f"samples/s, the towers could take {possible:,.0f}; {_advice(workers, needed, cores, busy, held, shared)}, see "
        "`triscale bench data RECIPE`"
    )


def _advice(workers: int, needed: int, cores: int, busy: float | None, held: bool, shared: bool) -> str:
    smaller = "have less to decode (`triscale data pack SOURCE DIR --max-side 256`)"
    if not held:
        return f"batches are read in the step, as they do not fit the host: raise --memory.host-gib, or {smaller}"
    if workers and busy is not None and busy < BUSY:
        return (
            f"workers compute for {busy:.0%} of their time, the rest is storage: bring the data nearer, "
            f"or raise --data.workers to {max(needed, workers + 1)} for more reads at once"
        )
    if shared:
        here = f"reading and towers share {cores} core{'s' * (cores != 1)}"
        return f"{here}: {smaller}, or where reading waits for storage raise --data.workers to {workers + 1}"
    if workers < cores:
        more = f"raise --data.workers to {min(max(needed, workers + 1), cores)} ({cores} cores here)"
        return more if needed <= cores else f"{more}, and {smaller}"
    return f"all {cores} cores have a worker: {smaller}"
