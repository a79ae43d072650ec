"""The loop: what a step does and leaves, checkpoints when due, exact resumes, signals in real processes."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from pictures import SETTINGS, Pictures, make_reader
from ranks import run_ranks
from triscale import distributed
from triscale.data.loader import batches
from triscale.data.quarantine import BadRecord, Quarantine
from triscale.data.rows import Batch
from triscale.data.samples import Sample
from triscale.errors import LostProcess, RunError
from triscale.training import checkpoint
from triscale.training.log import RunLog
from triscale.training.loop import Outcome, StopFlag, tell_waiting, train
from triscale.training.optim import OPTIMIZERS, load_optimizer, optimizer_tensors, parameter_groups
from triscale.training.schedule import learning_rate
from triscale.training.settings import OptimSettings
from triscale.training.step import StepOutput

ROWS = 4


class Step:
    """A stand-in for ContrastiveStep: a regression whose gradient depends on the batch, with faults on demand."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.faults, self.number = model, dict[int, str](), 0

    def __call__(self, inputs: dict[str, Tensor], ids: Tensor | None = None) -> StepOutput:
        self.number += 1
        assert all(p.grad is None for p in self.model.parameters())
        images, text = inputs["image"].float() / 255, inputs["text"].float() / 10
        loss = (self.model(images.flatten(1)) - text).square().mean()
        fault = self.faults.get(self.number)
        if fault == "lost":
            raise LostProcess("process 0 of 2 lost contact with the others")
        if fault == "failed":
            raise RunError("shard 3 could not be read")
        if fault == "loss":
            return StepOutput(loss.detach() * math.nan, {"logit_scale": 10.0})
        loss.backward()
        if fault == "gradient":
            next(self.model.parameters()).grad[0] = math.inf
        return StepOutput(loss.detach(), {"logit_scale": 10.0})


def batch_at(position: int, bad: tuple[BadRecord, ...] = ()) -> Batch:
    """A pure function of the position, as the loader's are."""
    rng = torch.Generator().manual_seed(position)
    return Batch(
        images=torch.randint(256, (ROWS, 3, 2, 2), generator=rng, dtype=torch.uint8),
        tokens=torch.randint(10, (ROWS, 3), generator=rng),
        ids=torch.arange(ROWS),
        position=position,
        bad=bad,
    )


class Run:
    """A small run in a folder, put together as the command line does; resumes from the newest checkpoint."""

    def __init__(self, folder: Path, total_steps: int = 12) -> None:
        torch.manual_seed(0)
        self.folder, self.total_steps = folder, total_steps
        self.model = nn.Sequential(nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
        self.step = Step(self.model)
        groups = parameter_groups({"image": self.model}, 0.1)
        self.optimizer = OPTIMIZERS["adamw"](groups, OptimSettings(learning_rate=1.0))
        self.quarantine = Quarantine(None, 0.05)
        self.stop = StopFlag()
        self.saved: list[int] = []
        self.clamped = 0
        self.start_step = 0
        newest = checkpoint.latest(folder)
        if newest is not None:
            checkpoint.load_into({"image": self.model}, newest.model())
            load_optimizer(self.optimizer, newest.optimizer())
            self.quarantine.load_state_dict(newest.state["quarantine"])
            self.start_step = newest.step

    def save(self, step: int) -> None:
        self.saved.append(step)
        model, optimizer = checkpoint.module_tensors({"image": self.model}), optimizer_tensors(self.optimizer)
        state = {"position": step * ROWS, "quarantine": self.quarantine.state_dict()}
        checkpoint.save(self.folder, step, model=model, optimizer=optimizer, state=state, keep=2)

    def batches(self) -> Iterator[Batch]:
        for step in range(self.start_step, self.total_steps):
            yield batch_at(step * ROWS)

    def clamp(self) -> None:
        self.clamped += 1

    def train(self, **changes: Any) -> Outcome:
        with RunLog(
            self.folder, total_steps=self.total_steps, chance=("B", ROWS), console=Console(file=io.StringIO())
        ) as log:
            log.cut(self.start_step)
            return train(**{**self.arguments(log), **changes})

    def arguments(self, log: RunLog) -> dict[str, Any]:
        return {
            "step": self.step,
            "lanes": ("image", "text"),
            "optimizer": self.optimizer,
            "schedule": lambda step: learning_rate(step, peak=0.01, warmup_steps=3, total_steps=self.total_steps),
            "batches": self.batches(),
            "start_step": self.start_step,
            "total_steps": self.total_steps,
            "batch_size": ROWS,
            "clip_norm": 1.0,
            "after_step": self.clamp,
            "record": lambda: None,
            "save": self.save,
            "checkpoint_every_steps": 5,
            "checkpoint_every_minutes": 0.0,
            "evaluate": None,
            "eval_every_steps": 0,
            "log": log,
            "quarantine": self.quarantine,
            "stop": self.stop,
            "device": torch.device("cpu"),
        }

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_takes_every_step_and_logs_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.train() == Outcome(step=12, signal=0, skipped=0)
    assert run.saved == [5, 10, 12] and run.clamped == 12
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == list(range(1, 13))
    rates = [learning_rate(step, peak=0.01, warmup_steps=3, total_steps=12) for step in range(12)]
    assert [m["learning_rate"] for m in metrics] == rates
    assert all(m["gradient_norm"] > 0 and 0 <= m["data_wait"] <= 1 and m["samples_per_second"] > 0 for m in metrics)
    assert all(p.grad is None for p in run.model.parameters())


def test_the_loop_is_plain_adamw_with_clipping_and_schedule(tmp_path: Path) -> None:
    """The same optimisation written out with torch's own parts ends with the same weights."""
    run, plain = Run(tmp_path), Run(tmp_path / "plain")
    decayed, rest = plain.optimizer.param_groups
    reference = torch.optim.AdamW(
        [{"params": decayed["params"], "weight_decay": 0.1}, {"params": rest["params"], "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        foreach=False,
    )
    run.train(clip_norm=0.05)
    for step, batch in enumerate(plain.batches()):
        for group in reference.param_groups:
            group["lr"] = learning_rate(step, peak=0.01, warmup_steps=3, total_steps=12)
        plain.step({"image": batch.images, "text": batch.tokens})
        nn.utils.clip_grad_norm_(plain.model.parameters(), 0.05)
        reference.step()
        reference.zero_grad()
    torch.testing.assert_close(run.weights(), plain.weights(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("killed_after", [3, 5, 8])
def test_a_killed_and_resumed_run_ends_with_bitwise_the_same_weights_and_metrics(
    tmp_path: Path, killed_after: int
) -> None:
    undisturbed = Run(tmp_path / "undisturbed")
    undisturbed.folder.mkdir()
    undisturbed.train()

    class Killed(BaseException):
        pass

    def dying(self: Run) -> Iterator[Batch]:
        for batch in Run.batches(self):
            if batch.position == killed_after * ROWS:
                raise Killed
            yield batch

    first = Run(tmp_path)
    with pytest.raises(Killed):
        first.train(batches=dying(first))
    second = Run(tmp_path)
    assert second.start_step == killed_after // 5 * 5
    second.train()
    assert torch.equal(second.weights(), undisturbed.weights())
    for name, tensor in optimizer_tensors(undisturbed.optimizer).items():
        assert torch.equal(tensor, optimizer_tensors(second.optimizer)[name]), name
    losses = [(m["step"], m["loss"], m["gradient_norm"]) for m in undisturbed.metrics()]
    assert [(m["step"], m["loss"], m["gradient_norm"]) for m in second.metrics()] == losses
    assert second.quarantine.state_dict() == undisturbed.quarantine.state_dict()


def test_a_finished_run_takes_no_further_step(tmp_path: Path) -> None:
    Run(tmp_path).train()
    again = Run(tmp_path)
    before = again.weights()
    assert again.train() == Outcome(step=12, signal=0, skipped=0)
    assert again.saved == [] and torch.equal(again.weights(), before)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_leaves_the_weights(tmp_path: Path, fault: str) -> None:
    run = Run(tmp_path)
    run.step.faults = {4: fault, 5: fault, 8: fault}
    seen: dict[int, Tensor] = {}

    def batches() -> Iterator[Batch]:
        for number, batch in enumerate(run.batches()):
            seen[number] = run.weights()
            yield batch

    assert run.train(batches=batches()) == Outcome(step=12, signal=0, skipped=3)
    assert torch.equal(seen[3], seen[5]) and not torch.equal(seen[5], seen[6])
    assert run.clamped == 9
    assert [m["step"] for m in run.metrics() if m["skipped"]] == [4, 5, 8]
    assert run.metrics()[3]["gradient_norm" if fault == "gradient" else "loss"] is None
    assert bool(torch.isfinite(run.weights()).all())


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_three_steps_in_a_row_end_the_run_with_a_diagnosis_and_the_last_good_weights(
    tmp_path: Path, fault: str
) -> None:
    good = Run(tmp_path / "good", total_steps=12)
    good.folder.mkdir()
    run = Run(tmp_path)
    run.step.faults = {7: fault, 8: fault, 9: fault}
    good.step.faults = run.step.faults | {10: fault}
    with pytest.raises(RunError) as caught:
        run.train()
    message = str(caught.value)
    assert f"the {fault} was not finite in steps 7 to 9" in message and "weights are those of step 6" in message
    assert "logit scale 10" in message and "--optim.learning-rate" in message and "\n" not in message

    with pytest.raises(RunError):
        good.train(total_steps=9)
    assert torch.equal(run.weights(), good.weights()) and bool(torch.isfinite(run.weights()).all())
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.step == 9 and newest.state["position"] == 9 * ROWS


def test_checkpoints_come_by_the_clock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    run = Run(tmp_path)

    def batches() -> Iterator[Batch]:
        for batch in run.batches():
            now[0] += 45.0
            yield batch

    run.train(batches=batches(), checkpoint_every_steps=0, checkpoint_every_minutes=2.0)
    assert run.saved == [3, 6, 9, 12]


def test_evaluation_comes_every_few_steps_but_not_after_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path)
    evaluated: list[int] = []

    def evaluate(step: int) -> dict[str, float]:
        evaluated.append(step)
        return {"val/top1": step / 100}

    run.train(evaluate=evaluate, eval_every_steps=4)
    assert evaluated == [4, 8]
    scores = [(m["step"], m["evaluation"]) for m in run.metrics() if "evaluation" in m]
    assert scores == [(4, {"val/top1": 0.04}), (8, {"val/top1": 0.08})]


def test_unreadable_data_ends_the_run_with_a_checkpoint_of_what_was_done(tmp_path: Path) -> None:
    def failing(run: Run, step: int) -> Iterator[Batch]:
        for batch in run.batches():
            if batch.position == step * ROWS:
                raise RunError("shard 3 could not be read")
            yield batch

    run = Run(tmp_path)
    with pytest.raises(RunError, match="shard 3"):
        run.train(batches=failing(run, 7))
    assert run.saved == [5, 7]
    again = Run(tmp_path)
    assert again.start_step == 7
    with pytest.raises(RunError, match="shard 3"):
        again.train(batches=failing(again, 7))
    assert again.saved == []


def test_time_that_a_batch_is_read_in_counts_as_waiting_whether_before_the_step_or_in_it(tmp_path: Path) -> None:
    class Slow(Pictures):
        def read(self, index: int, *, image: bool = True) -> Sample:
            time.sleep(0.02)
            return super().read(index, image=image)

    def waits(folder: Path, held: bool) -> list[float]:
        run = Run(folder, total_steps=3)
        folder.mkdir()

        def step(inputs: dict[str, Any], ids: Any = None) -> StepOutput:
            images, loss = inputs["image"][0:ROWS], torch.zeros(())
            assert len(images) == ROWS and len(ids[0:ROWS]) == ROWS
            time.sleep(0.05)
            return StepOutput(loss, {})

        settings = replace(SETTINGS, image_size=12)
        rows = batches(make_reader(Slow(), settings), start=0, batch_size=ROWS, last=3 * ROWS, held=held)
        run.train(step=step, batches=rows, quarantine=Quarantine(None, 1.0))
        return [line["data_wait"] for line in run.metrics()]

    for held in (True, False):
        assert all(0.4 < share < 0.9 for share in waits(tmp_path / str(held), held))


def test_a_step_that_fails_ends_the_run_with_a_checkpoint_of_the_last_good_one(tmp_path: Path) -> None:
    """As a batch that is read in the step does, when its source fails."""
    run = Run(tmp_path)
    run.step.faults = {8: "failed"}
    with pytest.raises(RunError, match="shard 3"):
        run.train()
    assert run.saved == [5, 7] and steps_logged(tmp_path) == list(range(1, 8))


def test_no_checkpoint_is_tried_after_a_process_was_lost(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step.faults = {8: "lost"}
    with pytest.raises(LostProcess, match="lost contact"):
        run.train()
    assert run.saved == [5]


def test_what_is_recorded_is_recorded_after_every_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.step.faults = {4: "loss"}
    recorded: list[int] = []
    run.train(record=lambda: recorded.append(run.step.number))
    assert recorded == list(range(1, 13))


def test_a_record_that_cannot_be_written_ends_the_run_with_a_checkpoint_of_the_step(tmp_path: Path) -> None:
    def full() -> None:
        if run.step.number == 7:
            raise RunError("No space left on device")

    run = Run(tmp_path)
    with pytest.raises(RunError, match="No space"):
        run.train(record=full)
    assert run.saved == [5, 7]


def test_too_many_bad_samples_end_the_run_with_counts(tmp_path: Path) -> None:
    record = BadRecord(source="train", key="1", reason="image-unreadable")
    run = Run(tmp_path, total_steps=1000)
    with pytest.raises(RunError, match="image-unreadable"):
        run.train(batches=(batch_at(step * ROWS, (record,)) for step in range(1000)), checkpoint_every_steps=0)
    # The step that counted them is done and saved with its counts, so that going on counts nothing twice.
    assert len(run.saved) == 1 and run.saved[0] == len(run.metrics()) < 1000
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.state["quarantine"]["bad"] == run.quarantine.bad
    assert run.quarantine.drawn == (ROWS + 1) * newest.step


def test_a_full_disk_ends_the_run_in_one_line(tmp_path: Path) -> None:
    def full(step: int) -> None:
        raise RunError("No space left on device")

    with pytest.raises(RunError, match="No space"):
        Run(tmp_path).train(save=full)


def test_handlers_are_put_back_after_the_context() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_after_a_lost_process_the_launchers_signal_does_not_cut_off_what_is_said() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(LostProcess), StopFlag() as stop:
            raise LostProcess("process 0 of 2 lost contact with the others")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM, "the process goes on to its message"
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


SIGNALS = """
import json, os, signal, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_loop import Run
from triscale.training.loop import StopFlag


def process(function, *arguments):
    # Run in a process and session of its own, forked after the imports; gives its id and what it writes.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        function(lambda text: os.write(writing, text.encode() + b"\\n"), *arguments)
        os._exit(0)
    os.close(writing)
    return child, os.fdopen(reading)


def endless(report, folder):
    def batches():
        for number, batch in enumerate(run.batches()):
            if number == 3:
                report("three steps are done")
            time.sleep(0.01)
            yield batch

    run = Run(folder, total_steps=10**6)
    with run.stop:
        outcome = run.train(batches=batches(), checkpoint_every_steps=0)
    report(f"{outcome.step} {outcome.signal}")


def stuck(report):
    with StopFlag() as stop:
        worker = os.fork()  # as a DataLoader's
        if worker == 0:
            report("ready")
            time.sleep(1.0)
            report(f"worker served on, signal {stop.signal}")
            os._exit(0)
        os.waitpid(worker, 0)
        report(f"main goes on, signal {stop.signal}")
        time.sleep(60)


results = {}
for number in (signal.SIGTERM, signal.SIGINT):
    child, lines = process(endless, Path(sys.argv[1]) / number.name)
    lines.readline()
    os.kill(child, number)
    results[number.name] = [lines.read(), os.waitpid(child, 0)[1]]
child, lines = process(stuck)
lines.readline()
os.killpg(child, signal.SIGINT)  # as a terminal does: to every process of the group
heard = [lines.readline(), lines.readline()]
os.kill(child, signal.SIGINT)
results["stuck"] = [heard, os.WTERMSIG(os.waitpid(child, 0)[1])]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def signalled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Real processes that were sent real signals; the folder of their runs, and how they ended."""
    folder = tmp_path_factory.mktemp("signalled")
    for name in ("SIGTERM", "SIGINT"):
        (folder / name).mkdir()
    paths = [str(Path(__file__).parents[n]) for n in (0, 1)]
    done = subprocess.run([sys.executable, "-c", SIGNALS, str(folder), *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_at_the_steps_end_with_a_checkpoint(
    signalled: tuple[Path, dict[str, Any]], number: signal.Signals
) -> None:
    folder, (said, status) = signalled[0] / number.name, signalled[1][number.name]
    step, ended_by = map(int, said.split())
    assert status == 0 and ended_by == number and 3 <= step < 10**6
    newest = checkpoint.latest(folder)
    assert newest is not None and newest.step == step
    assert steps_logged(folder) == list(range(1, step + 1))


def test_a_second_interrupt_kills_at_once_and_workers_outlive_the_first(
    signalled: tuple[Path, dict[str, Any]],
) -> None:
    said, killed_by = signalled[1]["stuck"]
    assert said == ["worker served on, signal 0\n", "main goes on, signal 2\n"]
    assert killed_by == signal.SIGINT


def disturbed_rank(rank: int, world: int, folder: str, what: str) -> dict[str, Any]:
    """A rank of a run in which rank 1 alone meets with something; what this rank saw of it."""
    run = Run(Path(folder))

    def batches() -> Iterator[Batch]:
        for batch in run.batches():
            if rank == 1 and batch.position == 4 * ROWS:
                if what == "signal":
                    run.stop.signal = int(signal.SIGTERM)
                for _ in range(3 if what == "waiting" else 0):
                    tell_waiting(torch.device("cpu"))
                if what == "data":
                    raise RunError("shard 3 could not be read")
            key = f"{rank}:{batch.position}"
            bad = (BadRecord(source="train", key=key, reason="image-empty"),) if what == "bad" and rank == 1 else ()
            yield batch_at(batch.position, bad)

    def record() -> None:
        if what == "record" and rank == 0 and run.step.number == 6:
            raise RunError("No space left on device")

    message, outcome = "", None
    try:
        outcome = run.train(batches=batches(), record=record)
    except RunError as error:
        message = str(error)
    distributed.barrier()
    newest = checkpoint.latest(Path(folder))
    return {
        "outcome": (outcome.step, outcome.signal) if outcome else None,
        "message": message,
        "newest": newest.step if newest else None,
        "bad": run.quarantine.bad,
    }


def several(rank: int, world: int, folder: str) -> dict[str, dict[str, Any]]:
    """All disturbances in one spawn."""
    results = {}
    for what in ("signal", "data", "bad", "waiting", "record"):
        path = Path(folder) / what
        path.mkdir(exist_ok=True)
        distributed.barrier()
        results[what] = disturbed_rank(rank, world, str(path), what)
    return results


def test_what_one_rank_meets_with_all_ranks_agree_on(tmp_path: Path) -> None:
    first, second = run_ranks(several, 2, str(tmp_path))
    # A signal that reached rank 1 alone ends both after the same step, with one checkpoint.
    assert first["signal"] == second["signal"]
    assert first["signal"]["outcome"] == (5, signal.SIGTERM) and first["signal"]["newest"] == 5
    # Data that rank 1 could not read ends both, and rank 1 says why.
    assert "shard 3" in second["data"]["message"] and "another process" in first["data"]["message"]
    assert first["data"]["newest"] == second["data"]["newest"] == 4
    # Bad samples of rank 1 count on both.
    assert first["bad"]["bad"] == second["bad"]["bad"] == {"image-empty": 12}
    # A rank may wait for its data for longer than a collective may take, as long as it says so.
    assert first["waiting"]["outcome"] == second["waiting"]["outcome"] == (12, 0)
    # What rank 0 alone could not write ends both after the same step.
    assert "No space" in first["record"]["message"] and "another process" in second["record"]["message"]
    assert first["record"]["newest"] == 6
    for what in ("signal", "data", "bad", "record"):
        steps = steps_logged(tmp_path / what)
        assert steps == list(range(1, len(steps) + 1)), "rank 0 alone logs"
