"""Checkpoints survive kills, damage and a full disk, and are read without unpickling."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import nn

from triscale.errors import RunError, UsageError
from triscale.training.checkpoint import latest, load_into, module_tensors, save


def save_step(folder: Path, step: int, keep: int = 3) -> None:
    """A checkpoint whose contents tell its step."""
    model = {"image.weight": torch.full((64, 32), float(step)), "loss.logit_scale": torch.tensor(2.5)}
    optimizer = {"exp_avg.image.weight": torch.full((64, 32), -float(step)), "step.image.weight": torch.tensor(step)}
    save(folder, step, model=model, optimizer=optimizer, state={"position": 10 * step}, keep=keep)


def assert_holds(checkpoint: object, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step and checkpoint.state == {"position": 10 * step}
    assert torch.equal(checkpoint.model()["image.weight"], torch.full((64, 32), float(step)))
    assert torch.equal(checkpoint.optimizer()["exp_avg.image.weight"], torch.full((64, 32), -float(step)))


def steps_on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    save_step(tmp_path, 7)
    assert_holds(latest(tmp_path), 7)
    content = json.loads((tmp_path / "checkpoints/step_00000007/state.json").read_text())
    assert content["step"] == 7 and content["position"] == 70


def test_state_that_json_changes_is_still_good(tmp_path: Path) -> None:
    state = {"tuple": (1, 2), "counts": {10: 1, 9: 2}, "rate": 0.1 + 0.2, "name": "\u00fc\u2028"}
    save(tmp_path, 1, model={}, optimizer={}, state=state, keep=1)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state == {"tuple": [1, 2], "counts": {"10": 1, "9": 2}, "rate": 0.1 + 0.2, "name": "\u00fc\u2028"}


def test_the_newest_are_kept_and_leftovers_of_a_kill_removed(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints/.temporary_step_00000002"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    for step in (1, 2, 10, 9_999_999, 123_456_789):
        save_step(tmp_path, step, keep=2)
    assert steps_on_disk(tmp_path) == ["step_09999999", "step_123456789"]
    assert_holds(latest(tmp_path), 123_456_789)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path: Path, name, damage) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "checkpoints/step_00000002" / name)
    reports: list[str] = []
    assert_holds(latest(tmp_path, report=reports.append), 1)
    assert len(reports) == 1 and "step_00000002 is damaged" in reports[0] and "\n" not in reports[0]


@pytest.mark.parametrize("position", range(0, 400, 13))
def test_no_flipped_bit_of_the_state_goes_unseen(tmp_path: Path, position: int) -> None:
    save_step(tmp_path, 1)
    path = tmp_path / "checkpoints/step_00000001/state.json"
    content = bytearray(path.read_bytes())
    before = json.loads(content)
    content[position % len(content)] ^= 1 << (position % 8)
    path.write_bytes(content)
    checkpoint = latest(tmp_path)
    if checkpoint is not None:  # white space has no meaning
        assert json.loads(content) == before


def test_a_run_that_went_back_behind_a_damaged_checkpoint_keeps_what_it_saves(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    for step in (2, 3):
        flip(tmp_path / f"checkpoints/step_0000000{step}/model.safetensors")
    save_step(tmp_path, 2, keep=1)
    assert steps_on_disk(tmp_path) == ["step_00000002"]
    assert_holds(latest(tmp_path), 2)


def test_inference_needs_no_optimizer_file(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    (tmp_path / "checkpoints/step_00000004/optimizer.safetensors").unlink()
    assert latest(tmp_path) is None
    checkpoint = latest(tmp_path, with_optimizer=False)
    assert checkpoint is not None and torch.equal(checkpoint.model()["loss.logit_scale"], torch.tensor(2.5))


def test_an_average_is_kept_beside_the_model_and_checked_with_it(tmp_path: Path) -> None:
    for step in (1, 2):
        average = {"image.weight": torch.full((8,), step / 2), "updates": torch.tensor(step)}
        save(tmp_path, step, model={"image.weight": torch.ones(8)}, optimizer={}, state={}, keep=2, average=average)
    newest = latest(tmp_path)
    assert newest is not None and newest.averaged
    assert torch.equal((newest.average() or {})["image.weight"], torch.full((8,), 1.0))
    (tmp_path / "checkpoints/step_00000002/optimizer.safetensors").unlink()
    inference = latest(tmp_path, with_optimizer=False)
    assert inference is not None and inference.step == 2 and inference.average() is not None
    flip(tmp_path / "checkpoints/step_00000002/average.safetensors")
    before = latest(tmp_path, with_optimizer=False)
    assert before is not None and before.step == 1


def test_a_checkpoint_without_an_average_has_none(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    (checkpoint,) = [latest(tmp_path)]
    assert checkpoint is not None and not checkpoint.averaged and checkpoint.average() is None


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> NoReturn:
        raise AssertionError("something was unpickled")

    module = nn.Linear(3, 2)
    save(tmp_path, 1, model=module_tensors({"image": module}), optimizer={}, state={}, keep=1)
    for name in ("load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    load_into({"image": module}, checkpoint.model())
    assert checkpoint.optimizer() == {}


def test_weights_come_back_bit_for_bit_tied_and_strided_ones_too(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    towers = {"image": nn.Sequential(first, nn.BatchNorm1d(4)), "text": second}
    tensors = module_tensors(towers) | {
        "loss.strided": torch.arange(12.0).view(3, 4).T,
        "loss.view": torch.ones(9)[3:5],
    }
    save(tmp_path, 1, model=tensors, optimizer={}, state={}, keep=1)
    checkpoint = latest(tmp_path)
    assert checkpoint is not None
    loaded = checkpoint.model()
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, loaded[name]) and tensor.dtype == loaded[name].dtype, name


def test_other_modules_tensors_are_left_and_misfits_named() -> None:
    source = {"image": nn.Linear(3, 2), "loss": nn.Linear(1, 1)}
    tensors = module_tensors(source)
    target = nn.Linear(3, 2)
    load_into({"image": target}, tensors)
    assert torch.equal(target.weight, source["image"].weight)

    untouched = nn.Linear(4, 2)
    before = untouched.bias.detach().clone()
    with pytest.raises(
        UsageError, match=r"image\.weight is \(2, 3\) in the checkpoint, \(2, 4\) in the model"
    ) as caught:
        load_into({"image": untouched}, tensors)
    assert "\n" not in str(caught.value) and torch.equal(untouched.bias, before)
    with pytest.raises(UsageError, match=r"image\.bias is \(2,\) in the checkpoint, missing in the model"):
        load_into({"image": nn.Linear(3, 2, bias=False)}, tensors)
    with pytest.raises(UsageError, match=r"text\.bias is missing in the checkpoint.*and 1 more"):
        load_into({"text": nn.Linear(3, 2)}, tensors)


def test_a_failing_sync_leaves_the_last_checkpoint_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1, keep=1)
    real, calls = os.fsync, []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RunError, match="No space left on device") as caught:
        save_step(tmp_path, 2, keep=1)
    assert "\n" not in str(caught.value)
    assert steps_on_disk(tmp_path) == ["step_00000001"]
    assert_holds(latest(tmp_path), 1)


def test_a_disk_that_takes_no_more_bytes_ends_in_one_line(tmp_path: Path) -> None:
    """A real failing write, in the native code that writes tensors: the file-size limit stands for a full disk."""
    save_step(tmp_path, 1, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(RunError, match="step_00000002 could not be written: .*File too large") as caught:
            save(tmp_path, 2, model={"image.weight": torch.zeros(2**20)}, optimizer={}, state={}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert steps_on_disk(tmp_path) == ["step_00000001"]
    assert_holds(latest(tmp_path), 1)


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from triscale.training.checkpoint import latest, save

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
delays = random.Random(0)


def save_in_a_loop(first, report):
    for step in range(first, 10**8):
        model = {"image.weight": torch.full((64, 32), float(step))}
        optimizer = {"exp_avg.image.weight": torch.full((64, 32), -float(step))}
        save(folder, step, model=model, optimizer=optimizer, state={"position": 10 * step}, keep=1)
        os.write(report, b"%9d" % step)


saved = 0
for kill in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_in_a_loop(saved + 1, writing)
    os.close(writing)
    for _ in range(delays.randrange(3)):
        saved = int(os.read(reading, 9))
    time.sleep(delays.uniform(0.0, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading) as reports:
        saved = max([saved, *map(int, reports.read().split())])
    damaged = []
    checkpoint = latest(folder, report=damaged.append)
    assert damaged == [], damaged
    for path in folder.glob("checkpoints/step_*"):
        assert len(list(path.iterdir())) == 3, "half of a checkpoint bears a checkpoint's name"
    found = checkpoint.step if checkpoint else 0
    assert found >= saved, f"step {saved} was saved, the newest is {found}"
    if checkpoint:
        assert checkpoint.state == {"position": 10 * found}
        assert torch.equal(checkpoint.model()["image.weight"], torch.full((64, 32), float(found)))
    saved = found
assert saved > kills // 2, f"only {saved} checkpoints were written"
"""


def test_a_kill_at_any_instant_of_saving_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """Real processes, killed with SIGKILL while they save in a loop and keep one checkpoint only."""
    done = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path), "30"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
