"""Runs with sharded towers: evaluation on the way, other numbers of processes, what is refused, a dead process.

One set of processes takes runs one after the other in groups of four, two and one, because to start one takes longer
than a run.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
import ranks
import toy_sets
from torchrun import Torchrun
from triscale import runs
from triscale.config import RunConfig, to_dict
from triscale.data.settings import DataSettings
from triscale.data.text import train_tokenizer
from triscale.errors import UsageError
from triscale.inference import load
from triscale.models.settings import ModelSettings
from triscale.training.settings import BatchSettings, OptimSettings, ParallelSettings, RunSettings, TrainSettings
from triscale.validation import validate

STEPS = 4
FULL = ParallelSettings(shard="full")
MISTAKES = {
    "three": replace(FULL, replicas=3),
    "all": replace(FULL, replicas=4),
    "offload": replace(FULL, offload=True),
}


def small_config(folder: Path) -> RunConfig:
    """A run of seconds: averaged weights, replayed micro-batches and two evaluations; its data are in the folder."""
    return RunConfig(
        data=DataSettings(
            train=("scenes",),
            eval=(str(folder / "classes"), str(folder / "captions")),
            image_size=16,
            ids="label",
            tokens=12,
            tokenizer=str(folder / "tokenizer.model"),
            workers=0,
        ),
        model=ModelSettings(
            image="vit_tiny_patch16_224",
            image_options='{"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}',
            text_width=16,
            text_layers=2,
            text_heads=2,
            embedding=8,
        ),
        batch=BatchSettings(size=32, micro="4", keep="1"),
        optim=OptimSettings(warmup_steps=2, ema=0.9),
        train=TrainSettings(steps=STEPS, checkpoint_every_steps=2, eval_every_steps=2, device="cpu"),
    )


def write_data(folder: Path) -> None:
    """A tokenizer, and sets whose single batch one process embeds while the others have none."""
    (folder / "tokenizer.model").write_bytes(train_tokenizer(["a red circle above a blue square", "a green star"], 60))
    toy_sets.write_set(folder / "classes", labels=(0, 1, 2, 3, 4), bad=(1,))
    toy_sets.write_retrieval_set(folder / "captions", ["kind 1\nkind 3", "kind 2", "kind 4"])


def train(folder: Path, name: str, parallel: ParallelSettings, ranks: Sequence[int] = (), port: int = 0) -> int:
    """A run in the folder `name`, by this process alone, or as torchrun would have it by several; the exit status."""
    config = replace(small_config(folder), run=RunSettings(dir=str(folder / name)), parallel=parallel)
    with pytest.MonkeyPatch.context() as patch:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(ranks)}
        for variable, value in {**place, "RANK": RANK, "LOCAL_RANK": RANK}.items() if ranks else ():
            patch.setenv(variable, str(value))
        return runs.train_run(config, "small")


RANK = 0


def work(rank: int, folder: str, ports: Sequence[int]) -> None:
    """What process `rank` of four does; its results are written to a file."""
    global RANK
    RANK = rank
    torch.set_num_threads(1)
    place, found = Path(folder), {"mistakes": []}  # type: ignore[var-annotated]
    for port, mistake in zip(ports, MISTAKES.values(), strict=False):
        try:
            train(place, "mistake", mistake, range(4), port)
        except UsageError as error:
            found["mistakes"].append(str(error))
    found["four"] = train(place, "four", replace(FULL, replicas=2), range(4), ports[3])
    if rank == 0:
        for name in ("two", "one"):
            shutil.copytree(place / "four", place / name)
            shutil.rmtree(place / name / f"checkpoints/step_{STEPS:08d}")
            (place / name / "results.json").unlink()
        (place / "copied").touch()
    if rank == 3:
        found["alone"] = train(place, "alone", ParallelSettings())
    if rank < 2:
        while not (place / "copied").exists():
            time.sleep(0.01)
        found["two"] = train(place, "two", FULL, range(2), ports[4])
    if rank == 0:
        found["one"] = train(place, "one", FULL)
    (place / f"{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # as `triscale` itself ends under torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_data(folder)
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    ranks.wait_for_all([forked.call(work, rank, str(folder), ports) for rank in range(4)])
    return folder


def results_of_ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def lines(folder: Path, key: str) -> list[Any]:
    values = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [value[key] for value in values if key in value]


def test_every_run_ends_with_status_0(folder: Path) -> None:
    found = results_of_ranks(folder)
    assert [each["four"] for each in found] == [0] * 4
    assert [each["two"] for each in found[:2]] == [0, 0]
    assert found[0]["one"] == 0 and found[3]["alone"] == 0


@pytest.mark.parametrize("name", ["four", "two", "one"])
def test_losses_and_norms_are_those_of_one_process_wherever_the_run_went_on(folder: Path, name: str) -> None:
    """("two" and "one" go on from the middle of "four", whose towers are sharded in two groups.)"""
    for key in ("step", "loss", "gradient_norm"):
        assert lines(folder / name, key) == pytest.approx(lines(folder / "alone", key), rel=1e-5)


@pytest.mark.parametrize("name", ["four", "two", "one"])
def test_results_are_those_of_one_process_though_most_processes_have_nothing_to_embed(folder: Path, name: str) -> None:
    results, expected = (json.loads((folder / run / "results.json").read_text()) for run in (name, "alone"))
    assert results == expected
    assert (folder / name / "guesses.png").exists()


def test_a_folder_written_by_sharded_processes_is_like_any_other(folder: Path) -> None:
    for file in ("model", "optimizer", "average"):
        found, expected = (
            load_file(folder / run / f"checkpoints/step_{STEPS:08d}/{file}.safetensors") for run in ("four", "alone")
        )
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    images = [toy_sets.picture("kind 1", number) for number in range(3)]
    found, expected = (load(folder / run).encode_image(images) for run in ("four", "alone"))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_sharded_so_is_refused_in_one_line_before_a_folder_is_made(folder: Path) -> None:
    for found in results_of_ranks(folder):
        assert found["mistakes"] == [
            "--parallel.replicas 3 must divide the 4 processes into groups of two or more",
            "--parallel.replicas 4 must divide the 4 processes into groups of two or more",
            "--parallel.offload keeps what a CUDA device does not hold: there is none here",
        ]
    assert not (folder / "mistake").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ParallelSettings(replicas=2), "--parallel.replicas is about sharded towers: add --parallel.shard full"),
        (ParallelSettings(reduce="once"), "--parallel.reduce is about sharded towers"),
        (replace(FULL, parameters="bfloat16"), "--parallel.parameters bfloat16 needs --train.precision bfloat16"),
        (replace(FULL, replicas=0), "--parallel.replicas is 0: it must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: ParallelSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(RunConfig(parallel=settings))


@pytest.fixture(scope="module")
def config_file(folder: Path) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(to_dict(replace(small_config(folder), parallel=FULL))))
    return path


def test_after_a_process_is_killed_the_other_ends_in_one_line(config_file: Path, tmp_path: Path) -> None:
    run = Torchrun(tmp_path / "run", config_file, "--train.steps", "100000", "--train.eval-every-steps", "0")
    run.wait_for_step(3)
    survivor = run.rank(0)
    run.rank(1).kill()
    survivor.wait(timeout=25)
    assert run.end(seconds=60) != 0
    said = run.said(0)
    assert said[-1].startswith("triscale: process 0 of 2 lost contact with the others")
    assert "checkpoint step_" in said[-1] and not [line for line in said if "Traceback" in line]


@pytest.mark.slow  # twenty starts of two processes
def test_runs_end_with_their_own_status_every_time(config_file: Path, tmp_path: Path) -> None:
    """Python's end would abort now and then while gloo's threads let go of tensors."""
    for number in range(20):
        run = Torchrun(tmp_path / f"{number}", config_file, "--train.steps", "1")
        assert run.end() == 0, run.said(0)


@pytest.mark.gpu
def test_shards_kept_on_the_host_give_the_same_losses(config_file: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for name, options in {"card": (), "host": ("--parallel.offload",)}.items():
        run = Torchrun(tmp_path / name, config_file, "--train.device", "cuda", *options)
        assert run.end() == 0, run.said(0)
    assert lines(tmp_path / "host", "loss") == pytest.approx(lines(tmp_path / "card", "loss"), rel=1e-5)
