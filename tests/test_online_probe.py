"""The online probe through whole runs: what it says is what `triscale probe` says, and training does not notice it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ranks
from phased import toy_phases, write_data
from toy_sets import picture, png, write_set, write_tar
from triscale import runs
from triscale.cli import main
from triscale.config import RunConfig, to_dict
from triscale.training.settings import ParallelSettings, RunSettings

NAMES = ("cat", "dog", "owl")
KINDS = {"cat": "mammal", "dog": "mammal", "owl": "bird"}
UNREADABLE = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's data, and sets of three classes with one image that cannot be read."""
    folder = write_data(tmp_path_factory.mktemp("online"))
    write_set(folder / "wds_animals", names=NAMES[::-1], labels=[0, 1, 2] * 4)
    files: dict[str, bytes] = {}
    for number in range(36):
        name = NAMES[number % 3]
        files |= {
            f"{number:02}.png": b"no image" if number == UNREADABLE else png(picture(name, 100 + number)),
            f"{number:02}.cls": str(number % 3).encode(),
            f"{number:02}.json": json.dumps({"kind": KINDS[name]}).encode(),
        }
    write_tar(folder / "animals.tar", files)
    (folder / "animals.txt").write_text("\n".join(NAMES))
    return folder


def config_of(root: Path, label: str = "class") -> RunConfig:
    """Two steps on labels, probed after each."""
    config = toy_phases(root)["image"]
    data = replace(config.data, probe=("animals.tar classes=animals.txt", "wds_animals"), probe_label=label)
    return replace(config, data=data, train=replace(config.train, steps=2, eval_every_steps=1))


def train(config: RunConfig, folder: Path, *options: str) -> dict[str, Any]:
    """Run it through the command line; its results."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(to_dict(config)))
    assert main(["train", "--config", str(file), "--run.dir", str(folder), *options]) == 0
    return json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}


def test_it_says_what_triscale_probe_says_and_training_does_not_notice_it(root: Path, tmp_path: Path) -> None:
    config = config_of(root)
    results = train(config, tmp_path / "probed")
    found = results["probe"]["sets"]["animals"]
    assert results["sets"] == {} and results["probe"]["bad_reasons"] == {"animals.tar": {"image-unreadable": 1}}
    assert (results["probe"]["label"], results["probe"]["train_samples"], found["samples"]) == ("class", 35, 12)
    said = evaluations(tmp_path / "probed")
    assert list(said) == [1, 2] and said[2] == {"animals knn": found["knn"], "animals linear": found["linear"]}

    arguments = ["--train", f"{root}/animals.tar classes={root}/animals.txt", "--test", str(root / "wds_animals")]
    where = [
        "--cache",
        str(tmp_path / "cache"),
        "--workers",
        "0",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "p.json"),
    ]
    assert main(["probe", str(tmp_path / "probed"), *arguments, *where, "--probes", "knn", "--knn", "20"]) == 0
    weighted = json.loads((tmp_path / "p.json").read_text())["probes"][0]
    assert weighted["votes"] == "weighted" and weighted["sets"]["animals"]["top1"] == found["knn"]

    train(replace(config, data=replace(config.data, probe=())), tmp_path / "alone")
    probed, alone = (
        load_file(tmp_path / name / "checkpoints/step_00000002/model.safetensors") for name in ("probed", "alone")
    )
    assert all(torch.equal(probed[name], tensor) for name, tensor in alone.items())
    page = (tmp_path / "probed/report.html").read_text()
    assert "Features probed" in page and "Scores during training" in page


def test_a_finished_run_that_is_asked_for_a_probe_is_probed(root: Path, tmp_path: Path) -> None:
    config = config_of(root, "json:kind")
    train(replace(config, data=replace(config.data, probe=())), tmp_path / "run")
    results = train(config, tmp_path / "run")
    assert results["probe"]["label"] == "json:kind" and evaluations(tmp_path / "run").keys() == {2}
    before = (tmp_path / "run/results.json").stat().st_mtime_ns
    train(config, tmp_path / "run")
    assert (tmp_path / "run/results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        (["animals.tar"], "name what it is judged on"),
        (["nothing.tar", "wds_animals"], "nothing.tar"),
        (["animals.tar classes=animals.txt", "wds_absent"], "wds_absent"),
    ],
)
def test_a_probe_that_cannot_be_is_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], probe: Sequence[str], says: str
) -> None:
    file = tmp_path / "config.json"
    file.write_text(
        json.dumps(to_dict(replace(config_of(root), data=replace(config_of(root).data, probe=tuple(probe)))))
    )
    assert main(["train", "--config", str(file), "--run.dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("triscale: ") and says in line
    assert not (tmp_path / "run").exists()


def run_on_ranks(rank: int, world: int, root: str, folder: str) -> int:
    os.environ["RANK"] = str(rank)
    config = config_of(Path(root))
    for name, parallel in (("whole", ParallelSettings()), ("sharded", ParallelSettings(shard="full"))):
        batch_norm = replace(config, model=replace(config.model, batch_norm="layer_norm", drop_path=0.0, dropout=0.0))
        settings = replace(batch_norm, parallel=parallel, run=RunSettings(dir=f"{folder}/{name}{world}"))
        assert runs.train_run(settings, "toy") == 0
    return 0


def test_any_number_of_processes_and_sharded_towers_give_the_scores_of_one(root: Path, tmp_path: Path) -> None:
    for world in (1, 2):
        assert ranks.run_ranks(run_on_ranks, world, str(root), str(tmp_path)) == [0] * world
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole1", "whole2", "sharded2")]
    assert found[0]["probe"] == found[1]["probe"] == found[2]["probe"]
