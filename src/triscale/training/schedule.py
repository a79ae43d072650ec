"""Learning rates: how the peak follows from the batch, and what of it each step has."""

from __future__ import annotations

import math
from collections.abc import Callable

BASE_BATCH = 256
"""Batch that the linear rule counts in."""


def cosine(done: int, total: int, warmup: int) -> float:
    """Half a cosine from 1 to 0 (Loshchilov and Hutter, arXiv 1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * (done / total)))


def linear(done: int, total: int, warmup: int) -> float:
    """A straight line from 1 to 0."""
    return 1.0 - done / total


def constant(done: int, total: int, warmup: int) -> float:
    """1 throughout."""
    return 1.0


def rsqrt(done: int, total: int, warmup: int) -> float:
    """Inverse square root of the steps since the start over those of the warmup (arXiv 1706.03762, section 5.3)."""
    return math.sqrt(max(warmup, 1) / (max(warmup, 1) + done))


SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
    "rsqrt": rsqrt,
}
"""Name to (steps done since the warmup, steps in all after it, warmup steps) -> share of the peak."""

SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda batch: 1.0,
    "linear": lambda batch: batch / BASE_BATCH,
    "sqrt": math.sqrt,
}
"""Name to B -> factor on the learning rate: SimCLR's rules (Chen et al., arXiv 2002.05709, appendix B.1)."""


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: str = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """The rate of the step that follows `step` done ones: linear warmup to `peak`, the schedule, a linear cooldown.

    Warmup reaches `peak` with its last step. What falls to zero would be zero at `total_steps`, so that every step
    counts. The last `cooldown_steps` steps are multiplied by a line from 1 to 0, whatever the schedule.
    """
    cooldown = min(1.0, (total_steps - step) / cooldown_steps) if cooldown_steps else 1.0
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps * cooldown
    total = max(total_steps - warmup_steps, 1)
    return peak * SCHEDULES[schedule](min(step - warmup_steps, total), total, warmup_steps) * cooldown
