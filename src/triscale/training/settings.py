"""What a recipe or the command line says about training. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from triscale.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """The contrastive batch and how it passes through the towers."""

    size: int = 1024
    """B: pairs in one optimizer step, over all processes."""
    micro: str = "auto"
    """m: samples that go through a tower at once: a number, "auto", or one per lane: "image=64,text=512"."""
    keep: str = "auto"
    """Micro-batches that keep their activations (no second pass): a number, "auto", or one per lane."""
    batch_norm: Literal["refuse", "per_micro_batch"] = "refuse"
    """Towers with BatchNorm under more than one micro-batch: refused, or statistics of each micro-batch."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What "auto" may use."""

    budget_gib: float = 0.0
    """Memory for activations in GiB; 0: 90 % of free CUDA memory, half of what is available on CPU."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """InfoNCE and its temperature."""

    tiled: bool = True
    """Compute the loss in tiles, in O(B*d) memory; otherwise the dense formula."""
    logit_scale: float = 14.2857
    """Initial factor on the cosines (CLIP: 1/0.07). It is learned, as its natural logarithm."""
    max_logit_scale: float = 100.0
    """The factor is clamped to this after each optimizer step; 0: no clamp."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW with linear warmup and a cosine to zero."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and filters; vectors, embeddings' positions and temperature get none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.98
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    warmup_steps: int = 100
    """Steps of linear warmup."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Length, device, checkpoints and evaluation of a run."""

    steps: int = 1000
    """Optimizer steps in all."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; auto: cuda, else mps, else cpu."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the towers; embeddings, loss and weights are float32 always."""
    checkpoint_every_steps: int = 500
    """Steps between checkpoints; 0: only at the end and on a signal."""
    checkpoint_every_minutes: float = 0.0
    """Minutes between checkpoints; 0: by steps alone."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay on disk."""
    eval_every_steps: int = 0
    """Steps between evaluations; 0: only at the end."""
    log_every_steps: int = 10
    """Steps between lines of metrics on a terminal that shows no progress bar; metrics.jsonl has every step."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lives."""

    dir: str = ""
    """The run folder; default runs/NAME."""
    name: str = ""
    """Name of the run; default the recipe's."""


PerLane = Mapping[str, int | Literal["auto"]]


def parse_per_lane(what: str, text: str, lanes: Sequence[str], smallest: int) -> PerLane:
    """The value of every lane that "64", "auto" or "image=64,text=auto" gives.

    Raises:
        UsageError: it is none of these, names other lanes, or a number is below `smallest`.
    """
    if "=" not in text:
        return dict.fromkeys(lanes, _number_or_auto(what, text, smallest))
    pairs = [part.partition("=") for part in text.split(",")]
    if sorted(lane.strip() for lane, _, _ in pairs) != sorted(lanes):
        raise UsageError(f"{what} {text!r} must give one value for each of the lanes {', '.join(lanes)}")
    return {lane.strip(): _number_or_auto(what, value, smallest) for lane, _, value in pairs}


def _number_or_auto(what: str, text: str, smallest: int) -> int | Literal["auto"]:
    if text.strip() == "auto":
        return "auto"
    try:
        number = int(text)
    except ValueError:
        number = smallest - 1
    if number < smallest:
        raise UsageError(f"{what} {text!r} must be 'auto', a number of at least {smallest}, or one per lane")
    return number
