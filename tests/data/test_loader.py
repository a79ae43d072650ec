"""Batches: the same whoever computes them, with bad samples replaced and nothing left running."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pictures import SETTINGS, Pictures, assert_equal, joined, make_reader
from pictures import rules as rules_of
from triscale.config import RunConfig
from triscale.data import canvases, loader, rows
from triscale.data.images import Pixels
from triscale.data.loader import batches, require_batch, rows_in_flight
from triscale.data.order import Order
from triscale.data.rows import Batch, BatchReader, Row, StreamedBatch
from triscale.data.samples import Sample
from triscale.data.shards import ShardSource
from triscale.data.sources import open_source
from triscale.errors import RunError, UsageError
from triscale.models.settings import ModelSettings
from triscale.runs import train_run
from triscale.training import starvation
from triscale.training.settings import BatchSettings, MemorySettings, OptimSettings, RunSettings, TrainSettings


class Buggy(Pictures):
    """A source with a bug in workers, but only there."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = os.getpid()

    def read(self, index: int, *, image: bool = True) -> Sample:
        if os.getpid() != self.parent:
            raise RuntimeError("a bug")
        return super().read(index)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE_ROWS", 4)
    monkeypatch.setattr(rows, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def test_a_batch_is_the_same_whatever_the_number_of_workers(small_pieces: None):
    reader = make_reader(Pictures(bad=range(0, 60, 5)))
    expected = [reader(range(first, first + 10)) for first in range(0, 70, 10)]
    assert sum(len(batch.bad) for batch in expected) > 5
    for workers in (0, 1, 2):
        made = list(batches(reader, start=0, batch_size=10, workers=workers, last=70))
        assert len(made) == 7
        for batch, literal in zip(made, expected, strict=True):
            assert_equal(batch, literal)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_batch_without_changing_it(world: int, small_pieces: None):
    reader = make_reader(Pictures(bad=range(0, 60, 5)))
    per_rank = [
        list(batches(reader, start=20, batch_size=11, rank=rank, world=world, last=42)) for rank in range(world)
    ]
    assert [len(batch.ids) for batch, _ in per_rank] == [11 * (r + 1) // world - 11 * r // world for r in range(world)]
    for step, parts in enumerate(zip(*per_rank, strict=True)):
        first = 20 + 11 * step
        assert_equal(joined(list(parts)), reader(range(first, first + 11)))
        assert all(part.position == first for part in parts)


def test_a_start_at_a_later_position_goes_on_where_the_earlier_run_would_be(small_pieces: None):
    reader = make_reader()
    whole = list(batches(reader, start=0, batch_size=6, last=60))
    resumed = list(batches(make_reader(), start=24, batch_size=6, last=60))
    for batch, expected in zip(resumed, whole[4:], strict=True):
        assert_equal(batch, expected)


def test_batches_end_before_the_last_position_or_never():
    reader = make_reader()
    assert [batch.position for batch in batches(reader, start=0, batch_size=6, last=23)] == [0, 6, 12]
    assert list(batches(reader, start=24, batch_size=6, last=24)) == []
    assert list(batches(reader, start=24, batch_size=6, last=3)) == []
    endless = batches(reader, start=0, batch_size=6)
    assert [batch.position for batch in islice(endless, 30)][-1] == 174


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_was_raised(workers: int):
    with pytest.raises(RunError) as caught:
        list(batches(make_reader(Pictures(bad=range(60))), start=0, batch_size=4, workers=workers, last=8))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pictures: 32 bad samples")


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in read.*a bug"):
        next(batches(make_reader(Buggy()), start=0, batch_size=4, workers=1))


@pytest.mark.alone
def test_closing_ends_the_workers_at_once():
    before = multiprocessing.active_children()
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    next(running)
    assert len(multiprocessing.active_children()) == len(before) + 2
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 4
    assert multiprocessing.active_children() == before


def test_batches_take_nothing_from_the_default_generator():
    state = torch.get_rng_state()
    assert len(list(batches(make_reader(), start=0, batch_size=8, last=16))) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_of_fewer_rows_than_processes_is_refused():
    with pytest.raises(UsageError, match="raise --batch.size"):
        batches(make_reader(), start=0, batch_size=2, rank=0, world=3)


def test_too_few_samples_for_a_batch_are_refused():
    require_batch(64, 64)
    with pytest.raises(UsageError, match="63 training samples do not fill one batch of 64"):
        require_batch(63, 64)


def test_sources_are_opened_by_what_they_are_called(tmp_path: Path):
    assert open_source("scenes", "").name == "scenes:train"
    with pytest.raises(UsageError, match="no training data is named"):
        open_source("", str(tmp_path))
    with pytest.raises(UsageError, match="absent"):
        open_source("absent/*.tar", str(tmp_path))


def write_shard(path: Path, samples: int, bad: Sequence[int]) -> None:
    """Pictures with captions as a tar shard, the samples numbered in `bad` without an image that can be read."""
    pictures = Pictures(size=samples)
    with tarfile.open(path, "w") as shard:
        for index in range(samples):
            sample = pictures.read(index if index % 3 else index + 1)
            image = b"not an image" if index in bad else sample.image
            assert isinstance(image, bytes) and sample.text
            for name, content in ((f"{index:03}.png", image), (f"{index:03}.txt", sample.text)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def test_shards_make_the_same_batches_in_workers_and_list_their_bad_samples(tmp_path: Path, small_pieces: None):
    write_shard(tmp_path / "00000.tar", 20, bad=[7])
    source = open_source("*.tar", str(tmp_path))
    tokenizer = make_reader().tokenizer
    order = Order([len(source)], seed=0)
    reader = BatchReader([source], [rules_of(SETTINGS)], order, tokenizer, Pixels(SETTINGS, len(source)), 0)
    made = list(batches(reader, start=0, batch_size=10, workers=1, last=20))
    for batch, expected in zip(made, (reader(range(10)), reader(range(10, 20))), strict=True):
        assert_equal(batch, expected)
    bad = {(record.key, record.reason) for batch in made for record in batch.bad}
    assert bad == {("007", "image-unreadable")}


@pytest.mark.parametrize("world", [1, 3])
def test_streamed_batches_are_those_that_are_held(world: int, small_pieces: None):
    reader = make_reader(Pictures(bad=range(0, 60, 5)))
    for rank in range(world):
        kind = {"start": 20, "batch_size": 11, "rank": rank, "world": world, "last": 64}
        held, streamed = (list(batches(reader, held=held, **kind)) for held in (True, False))
        assert len(held) == len(streamed) == 4
        for batch, other in zip(held, streamed, strict=True):
            assert isinstance(batch, Batch) and isinstance(other, StreamedBatch)
            columns = other.images[0 : len(batch.ids)], other.tokens[0 : len(batch.ids)], other.ids[0 : len(batch.ids)]
            images, tokens, ids = columns
            assert_equal(Batch(images=images, tokens=tokens, ids=ids, position=other.position, bad=other.bad), batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_holds_on_to_a_batch_while_the_next_is_made(workers: int, small_pieces: None):
    made = batches(make_reader(), start=0, batch_size=10, workers=workers)
    batch = next(made)
    images = weakref.ref(batch.images)
    del batch
    assert images() is None
    made.close()


def test_rows_in_flight_bound_what_workers_make_ahead(small_pieces: None):
    assert rows_in_flight(10, workers=0) == 10 + 2 * 4  # pieces of 4 rows at most: one made, one copied
    assert rows_in_flight(10, workers=1) == 10 + (2 + 6 + 2) * 4


def run_config(folder: Path, name: str, **memory: float) -> RunConfig:
    """A run of four steps over shards of which a tenth is bad, with BatchNorm, dropout and kept micro-batches."""
    return RunConfig(
        run=RunSettings(dir=str(folder / name)),
        data=replace(
            SETTINGS,
            root=str(folder),
            train=("*.tar",),
            image_size=24,
            canvas=24,
            vocabulary=60,
            max_bad=0.5,
            workers=0,
        ),
        model=ModelSettings(
            image="resnet10t",
            image_options='{"channels": [8, 8, 8, 8], "stem_width": 8}',
            text_width=16,
            text_layers=1,
            text_heads=2,
            embedding=8,
            dropout=0.1,
        ),
        batch=BatchSettings(size=48, micro="image=4,text=16", keep="1", batch_norm="per_micro_batch"),
        memory=MemorySettings(**memory),
        optim=OptimSettings(warmup_steps=1),
        train=TrainSettings(steps=4, checkpoint_every_steps=2, device="cpu"),
    )


def outcome(folder: Path) -> tuple[dict[str, Tensor], set[str], dict[str, object]]:
    """Weights and buffers, the quarantine's lines and its counts."""
    newest = folder / "checkpoints" / "step_00000004"
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))
    weights = {name: tensor.clone() for name, tensor in load_file(newest / "model.safetensors").items()}
    return weights, set(lines), json.loads((newest / "state.json").read_text())["quarantine"]


def assert_same_outcome(folder: Path, other: Path) -> None:
    (weights, lines, counts), (expected, its_lines, its_counts) = outcome(folder), outcome(other)
    assert weights.keys() == expected.keys()
    assert not [name for name in weights if not torch.equal(weights[name], expected[name])]
    assert lines == its_lines and counts == its_counts and len(lines) > 3


def test_a_run_whose_batches_do_not_fit_the_host_ends_as_one_that_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """Bitwise the same weights and the same quarantine, with the images of three micro-batches in memory at most."""
    write_shard(tmp_path / "00000.tar", 120, bad=range(0, 120, 10))
    monkeypatch.setattr(canvases, "CACHE_BYTES", 0)
    live: list[int] = []
    peaks: dict[str, int] = {}
    name = ""
    original = BatchReader.images

    def images(reader: BatchReader, made: Sequence[Row]) -> Tensor:
        tensor = original(reader, made)
        live.append(len(made))
        peaks[name] = max(peaks.get(name, 0), sum(live))
        weakref.finalize(tensor, live.remove, len(made))
        return tensor

    monkeypatch.setattr(BatchReader, "images", images)
    for name, gib in (("held", 1.0), ("streamed", 1e-5)):
        assert train_run(run_config(tmp_path, name, host_gib=gib), "toy") == 0
        said = capfd.readouterr().err
        assert ("images are read again in each pass" in said) == (name == "streamed")
        assert ("images of whole batches are held" in said) == (name == "held")
    assert_same_outcome(tmp_path / "streamed", tmp_path / "held")
    assert peaks["streamed"] <= 3 * 4 < 48 <= peaks["held"]

    # What one began holding its batches another ends reading them again.
    name = "resumed"
    shutil.copytree(tmp_path / "held", tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints" / "step_00000004")
    assert train_run(run_config(tmp_path, name, host_gib=1e-5), "toy") == 0
    assert_same_outcome(tmp_path / name, tmp_path / "held")


def test_a_resume_refuses_a_source_that_has_grown_and_one_of_an_older_version_does_not_look(tmp_path: Path):
    write_shard(tmp_path / "00000.tar", 60, bad=[])
    config = run_config(tmp_path, "run")
    assert train_run(config, "toy") == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.copy(tmp_path / "00000.tar", tmp_path / "00001.tar")
    with pytest.raises(UsageError, match=r"\*\.tar held 60 samples when the run was begun, now 120: .*--run\.dir"):
        train_run(config, "toy")
    state = tmp_path / "run" / "checkpoints" / "step_00000002" / "state.json"
    values = json.loads(state.read_text())
    assert values.pop("sources")[0]["samples"] == 60
    state.write_text(json.dumps(values))
    assert train_run(config, "toy") == 0


def test_a_run_with_a_slow_source_says_that_its_towers_wait_and_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    write_shard(tmp_path / "00000.tar", 60, bad=[])
    original = ShardSource.read

    def slow(source: ShardSource, index: int, *, image: bool = True) -> Sample:
        time.sleep(0.01)
        return original(source, index, image=image)

    monkeypatch.setattr(ShardSource, "read", slow)
    monkeypatch.setattr(canvases, "CACHE_BYTES", 0)
    monkeypatch.setattr(starvation, "STEPS", 2)
    monkeypatch.setattr(starvation, "FIRST_STEPS", 1)
    for name, gib, advice in (("held", 1.0, "raise --data.workers to"), ("streamed", 1e-5, "raise --memory.host-gib")):
        assert train_run(run_config(tmp_path, name, host_gib=gib), "toy") == 0
        lines = [line for line in capfd.readouterr().err.splitlines() if "the towers waited for data" in line]
        assert len(lines) == 2 and all(advice in line and "the training process reads" in line for line in lines)
        logged = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "notice" in line] == [3]


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from pictures import make_reader
from triscale.data.loader import batches
if __name__ == "__main__":
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    next(running)
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    positions = [next(running).position for _ in range(40)]
    print(len(stopped), positions[-1], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_outlive_a_signal_to_the_process_group_but_not_the_training_process(tmp_path: Path):
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(folder=str(Path(__file__).parents[1])))
    # Returns when the last process that has its output is gone: the workers too.
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert done.stdout == "2 320\n", done.stderr
    assert done.returncode == -signal.SIGKILL
