"""The training loop: one function over plain arguments, and the signal flag that ends it in good order."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch

from triscale import distributed
from triscale.data.quarantine import BadRecord, Quarantine, gather_records
from triscale.data.rows import Batch, StreamedBatch, lane_inputs
from triscale.errors import LostProcess, RunError
from triscale.training.log import RunLog
from triscale.training.optim import clip_gradients
from triscale.training.step import StepOutput

MAX_NON_FINITE_STEPS = 3
"""Steps in a row that may have a loss or gradient that is not finite before the run ends."""


@dataclass(frozen=True)
class Outcome:
    """How `train` ended."""

    step: int
    """Optimizer steps done, skipped ones counted."""
    signal: int
    """The signal that ended the run early (2, 15), 0: none."""
    skipped: int
    """Steps of this process that were skipped because they were not finite."""


class StopFlag:
    """Within the context, SIGTERM and SIGINT (Ctrl-C) set `signal` and nothing else; a second Ctrl-C kills at once.

    Processes forked within (DataLoader workers) ignore both, so that they serve until the step is done. To be entered
    in the main thread. After a LostProcess the handlers stay: the launcher ends the others with SIGTERM, which must not
    cut off what this process has to say.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._process = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, LostProcess):
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.signal = number


def train(
    *,
    step: Callable[..., StepOutput],
    lanes: Sequence[str],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    batches: Iterator[Batch | StreamedBatch],
    start_step: int,
    total_steps: int,
    batch_size: int,
    clip_norm: float,
    after_step: Callable[[], None],
    record: Callable[[], None],
    save: Callable[[int], None],
    checkpoint_every_steps: int,
    checkpoint_every_minutes: float,
    evaluate: Callable[[int], Mapping[str, float]] | None,
    eval_every_steps: int,
    log: RunLog,
    quarantine: Quarantine,
    stop: StopFlag,
    device: torch.device,
) -> Outcome:
    """Take optimizer steps `start_step` + 1 to `total_steps`; every rank calls this alike.

    Args:
        step: the `ContrastiveStep`; every `.grad` is None. Where it raises, towers and loss must be as they were.
        lanes: of the step; see `lane_inputs`.
        optimizer: over all trainable parameters, in `optim.parameter_groups`.
        schedule: steps done -> learning rate of the next one.
        batches: this rank's rows of the batches from position start_step * batch_size on.
        batch_size: B, over all ranks.
        clip_norm: largest L2 norm of the gradient; 0: no clipping.
        after_step: called after each optimizer step, such as the loss's `clamp_`.
        record: called after every step, finite or not: writes down what the step had to recover from.
        save: write a checkpoint of so many steps done; called on every rank.
        checkpoint_every_steps: 0: none by steps. One is written at the end, on a signal and before a RunError too.
        checkpoint_every_minutes: by rank 0's clock; 0: none by time.
        evaluate: step -> scores, leaving the towers in training mode; called on every rank, every `eval_every_steps`
            (0: never) but not after the last step: the trained model is the caller's to evaluate.
        device: of the collectives.

    Raises:
        RunError: data could not be read, too much of it is bad, the loss or gradient was not finite three times in a
            row, or the disk is full. The weights are those of the last good step, and so is the last checkpoint.
        LostProcess: another process died or hangs. No checkpoint is written, as it would need the others.
    """
    checkpoints = _Checkpoints(save, start_step, checkpoint_every_steps, checkpoint_every_minutes, device)
    skipped = _Skipped()
    for number in range(start_step + 1, total_steps + 1):
        began = time.perf_counter()
        try:
            out, bad, waited = _next_step(step, lanes, batches, device)
        except LostProcess:
            raise
        except RunError:
            checkpoints.save(number - 1)
            raise
        metrics = _update(out, optimizer, clip_norm, schedule(number - 1), after_step)
        took = time.perf_counter() - began
        metrics |= {"samples_per_second": batch_size / took, "data_wait": waited / took, **_memory(device)}
        failure = None
        try:
            log.step(number, metrics)
            record()
            quarantine.add(bad, batch_size)
            skipped.count(number, metrics)
        except RunError as error:
            failure = error
        stopped_by, due, failed = _agree(
            stop.signal, int(checkpoints.due(number)), int(failure is not None), device=device
        )
        if due or stopped_by or failed or number == total_steps:
            checkpoints.save(number)
        if failed:
            raise failure or RunError("another process could not go on; its message says why")
        if stopped_by:
            return Outcome(number, stopped_by, skipped.steps)
        if evaluate is not None and _every(eval_every_steps, number) and number < total_steps:
            log.evaluation(number, evaluate(number))
    return Outcome(max(start_step, total_steps), 0, skipped.steps)


def _next_step(
    step: Callable[..., StepOutput],
    lanes: Sequence[str],
    batches: Iterator[Batch | StreamedBatch],
    device: torch.device,
) -> tuple[StepOutput, list[BadRecord], float]:
    """What the step made of the next batch, the bad samples of all ranks, and the seconds that data was waited for."""
    began = time.perf_counter()
    batch = _next_batch(batches, device)
    waited = time.perf_counter() - began
    out = step(lane_inputs(batch, lanes), ids=batch.ids)
    # A streamed batch was read within the step, and knows its bad samples only now.
    if isinstance(batch, StreamedBatch):
        waited += batch.seconds_waited
    return out, gather_records(batch.bad, _for_collectives(device)), waited


def _update(
    out: StepOutput, optimizer: torch.optim.Optimizer, clip_norm: float, rate: float, after_step: Callable[[], None]
) -> dict[str, Any]:
    """Take an optimizer step where loss and gradient are finite, and drop the gradient; the step's metrics."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loss, norm = float(out.loss), float(clip_gradients(parameters, clip_norm))
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()
        after_step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, **out.metrics, "gradient_norm": norm, "learning_rate": rate, "skipped": not finite}


class _Skipped:
    """Counts the steps that were not finite."""

    def __init__(self) -> None:
        self.steps = self._in_row = 0

    def count(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Count step `number`. Raises RunError with a diagnosis where it is the third in a row."""
        if not metrics["skipped"]:
            self._in_row = 0
            return
        self.steps += 1
        self._in_row += 1
        if self._in_row == MAX_NON_FINITE_STEPS:
            raise RunError(_diagnosis(number, metrics))


class _Checkpoints:
    """When checkpoints are due, and which was the last; see `train`."""

    def __init__(
        self,
        save: Callable[[int], None],
        start_step: int,
        every_steps: int,
        every_minutes: float,
        device: torch.device,
    ) -> None:
        self._save, self._every_steps, self._every_minutes, self._device = save, every_steps, every_minutes, device
        self._saved_step, self._saved_at = start_step, time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after `step`; rank 0's clock decides for all."""
        minutes = (time.monotonic() - self._saved_at) / 60
        time_is_up = distributed.rank() == 0 and 0 < self._every_minutes <= minutes
        return time_is_up or _every(self._every_steps, step)

    def save(self, step: int) -> None:
        """Write one of so many steps done, unless there is, and wait for it. If rank 0 cannot, all raise RunError."""
        if step <= self._saved_step:
            return
        error = None
        try:
            self._save(step)
        except RunError as failure:
            error = failure
        (failed,) = _agree(int(error is not None), device=self._device)
        if error is not None:
            raise error
        if failed:
            raise RunError("the checkpoint could not be written; the first process's message says why")
        self._saved_step, self._saved_at = step, time.monotonic()


def _next_batch(batches: Iterator[Batch | StreamedBatch], device: torch.device) -> Batch | StreamedBatch:
    """This rank's rows of the next batch. If any rank has none, all raise RunError."""
    error, batch = None, None
    try:
        batch = next(batches)
    except LostProcess:
        raise
    except RunError as failure:
        error = failure
    failed, waiting = 0, 1
    while waiting:  # for a rank whose data is late, see `tell_waiting`
        failed, waiting = _agree(int(error is not None), 0, device=device)
    if error is not None:
        raise error
    if failed or batch is None:
        raise RunError("another process could not read its data; its message says why")
    return batch


def tell_waiting(device: torch.device) -> None:
    """To be called now and then while a rank's next batch is awaited, lest the others take it for dead.

    They wait in the same collective, once for each call.
    """
    _agree(0, 1, device=device)


def _agree(*flags: int, device: torch.device) -> list[int]:
    """The largest of every flag over ranks."""
    agreed = distributed.all_reduce_max(torch.tensor(flags, dtype=torch.int64, device=_for_collectives(device)))
    return [int(flag) for flag in agreed.tolist()]


def _for_collectives(device: torch.device) -> torch.device:
    """Where tensors travel from: the card under NCCL, the host's memory under gloo."""
    return device if device.type == "cuda" else torch.device("cpu")


def _every(steps: int, number: int) -> bool:
    return steps > 0 and number % steps == 0


def _memory(device: torch.device) -> dict[str, float]:
    """Largest memory that tensors took on the card so far, in GiB."""
    return {"memory_peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}


def _diagnosis(number: int, metrics: Mapping[str, float]) -> str:
    """What is known about steps that were not finite, in one line."""
    what = "gradient" if math.isfinite(metrics["loss"]) else "loss"
    scale = f", logit scale {metrics['logit_scale']:.4g}" if "logit_scale" in metrics else ""
    advice = (
        "lower --optim.learning-rate or raise --optim.warmup-steps"
        if number > MAX_NON_FINITE_STEPS
        else "it was so from the first step: check the towers and --train.precision"
    )
    first, good = number - MAX_NON_FINITE_STEPS + 1, number - MAX_NON_FINITE_STEPS
    return (
        f"the {what} was not finite in steps {first} to {number} (loss {metrics['loss']:.4g}, gradient norm"
        f" {metrics['gradient_norm']:.4g}{scale}, learning rate {metrics['learning_rate']:.4g}); the weights are those"
        f" of step {good}: {advice}"
    )
