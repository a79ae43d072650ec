"""How a lane goes through its tower: what was asked for, what "auto" makes of it, and what an out-of-memory leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from triscale.errors import RunError, UsageError

LARGEST_AUTO_MICRO_BATCH = {"cpu": 64}  # beyond the caches a larger one gains nothing on a CPU
LARGEST_AUTO_MICRO_BATCH_ELSEWHERE = 1024

Size = int | Literal["auto"]
PerLane = Size | Mapping[str, Size]


class LanePlan(NamedTuple):
    """How a lane goes through its tower: `micro_batch` samples at once, the last `keep` micro-batches kept."""

    micro_batch: int
    keep: int


def per_lane(what: str, value: PerLane, lanes: Mapping[str, Any], smallest: int) -> dict[str, Size]:
    """`value` of every lane; refuses unknown lanes and numbers below `smallest`."""
    values: dict[str, Size] = {}
    if isinstance(value, Mapping):
        values.update(value)
    else:
        values.update((name, value) for name in lanes)
    if set(values) != set(lanes):
        raise UsageError(f"{what} names the lanes {sorted(values)}, the step has {sorted(lanes)}")
    for name, number in values.items():
        if number != "auto" and (not isinstance(number, int) or number < smallest):
            raise UsageError(f"{what} of lane '{name}' is {number!r}: it must be 'auto' or at least {smallest}")
    return values


class ActivationBytes(NamedTuple):
    """What a micro-batch keeps for its backward pass: something each (weights cast for autocast), more for each row."""

    each: float
    per_row: float

    def of(self, rows: int) -> float:
        """Of a micro-batch of so many rows."""
        return self.each + self.per_row * rows


def auto_micro_batch(activations: ActivationBytes, rows: int, budget_bytes: float, device_type: str) -> int:
    """The largest power of two that is useful on the device and takes at most a quarter of the budget."""
    largest = LARGEST_AUTO_MICRO_BATCH.get(device_type, LARGEST_AUTO_MICRO_BATCH_ELSEWHERE)
    micro_batch = 1
    while micro_batch * 2 <= min(rows, largest) and activations.of(2 * micro_batch) <= budget_bytes / 4:
        micro_batch *= 2
    return micro_batch


def auto_keep(bytes_per_micro_batch: float, micro_batches: int, budget_bytes: float) -> int:
    """How many micro-batches fit the budget beside the one at work, which needs gradients of its activations too."""
    if bytes_per_micro_batch == 0:
        return micro_batches
    fitting = int(budget_bytes // bytes_per_micro_batch) - 2
    return max(0, min(micro_batches, fitting))


def smaller(plans: Mapping[str, LanePlan]) -> dict[str, LanePlan]:
    """What to try after an out-of-memory: nothing kept; where nothing was, half of the micro-batch of every lane.

    Raises:
        RunError: nothing is kept and every micro-batch is one sample.
    """
    if any(plan.keep for plan in plans.values()):
        return {lane: plan._replace(keep=0) for lane, plan in plans.items()}
    if all(plan.micro_batch == 1 for plan in plans.values()):
        raise RunError("out of memory with micro-batches of one sample: use a smaller model or smaller images")
    return {lane: plan._replace(micro_batch=-(-plan.micro_batch // 2)) for lane, plan in plans.items()}
