"""The command line as users meet it: mistakes get one line and status 2, help answers at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import call
from triscale.arguments import parse_recipe
from triscale.config import Phases, RunConfig
from triscale.models.presets import PRESETS


@pytest.mark.alone
def test_help_answers_in_under_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "triscale", "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.5
    for command in ("train", "eval", "classify", "verify", "bench", "data"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tran", "scenes"], ["tran", "did you mean 'train'"]),
        (["train"], ["which recipe", "scenes"]),
        (["train", "scene"], ["scene", "did you mean 'scenes'"]),
        (["train", "scenes", "--optim.learningrate", "1"], ["learningrate", "learning-rate"]),
        (["train", "scenes", "--train.steps", "many"], ["many"]),
        (["train", "scenes", "--train.steps", "0"], ["--train.steps"]),
        (["train", "scenes", "--batch.micro", "none"], ["--batch.micro"]),
        (["train", "scenes", "--model.image", "resnet19"], ["resnet19", "resnet18"]),
        (["train", "scenes", "--preset", "basic-x"], ["basic-x", "did you mean 'basic-"]),
        (["train", "scenes", "--preset"], ["--preset needs a value"]),
        (["train", "scenes", "--model.text", "hf-bert"], ["hf-bert"]),
        (["train", "emoji"], ["--data.root"]),
        (["train", "emoji", "--data.root", "/nowhere"], ["/nowhere"]),
        (["train", "--config", "/nowhere.json"], ["/nowhere.json"]),
        (["verify", "nothing"], ["nothing"]),
        (["verify", "emoji-phases"], ["image, text, both", "--phase"]),
        (["verify", "emoji-phases", "--phase", "txt"], ["txt", "did you mean 'text'"]),
        (["verify", "scenes", "--phase", "text"], ["--phase", "one run"]),
        (["bench", "data", "emoji-phases"], ["image, text, both", "--phase"]),
        (["train", "emoji-phases"], ["phase image", "--data.root"]),
        (["train", "emoji-phases", "--txt.train.steps", "3"], ["txt", "did you mean 'text'"]),
        (["train", "emoji-phases", "--text.run.dir", "x"], ["--text.run", "share one run folder"]),
        (["train", "emoji-phases", "--text.optim.learningrate", "1"], ["learningrate", "learning-rate"]),
        (["train", "scenes", "--loss.name", "classification", "--data.ids", "none"], ["--data.ids label"]),
        (["train", "scenes", "--loss.label-smoothing", "0.1"], ["--loss.name classification"]),
        (["train", "scenes", "--train.frozen", "image.backbones"], ["did you mean 'image.backbone'"]),
        (["train", "scenes", "--train.frozen", "image", "text"], ["nothing of image and text is left"]),
        (["train", "scenes", "--train.init", "/nowhere"], ["--train.init", "/nowhere"]),
        (["train", "scenes", "--data.cache-features", "on"], ["--train.frozen image.backbone"]),
        (["eval", "/nowhere"], ["/nowhere"]),
        (["classify", "/nowhere", "--labels", "a,b", "x.png"], ["/nowhere"]),
        (["classify", "/nowhere", "--labels", "a,,b", "x.png"], ["--labels"]),
        (["classify", "/nowhere", "--labels", "a,a", "x.png"], ["--labels"]),
        (["data", "pact"], ["pact", "pack"]),
        (["data", "pack", "emoji", "/nowhere/x"], ["emoji", "scenes"]),
        (["data", "tokenizer", "/nowhere/*.tar", "out.model"], ["/nowhere"]),
        (["bench", "los"], ["los", "did you mean 'loss'"]),
        (["bench", "loss", "--losses", "infonce"], ["infonce", "info_nce", "nt_xent"]),
        (["bench", "loss", "--losses"], ["nothing to measure"]),
        (["bench", "loss", "--batches", "64", "0"], ["--batches", "64 0"]),
        (["bench", "loss", "--width", "0"], ["--width"]),
        (["bench", "loss", "--scale", "0"], ["--scale"]),
        (["bench", "loss", "--device", "tpu"], ["--device", "tpu", "cpu"]),
        (["bench", "loss", "--threads", "-1"], ["--threads"]),
        (["bench", "loss", "--json", "/nowhere/x.json"], ["--json", "/nowhere/x.json"]),
        (["bench", "loss", "--picture", "/nowhere/x.png"], ["--picture", "/nowhere/x.png"]),
        (["bench", "step", "--micro", "0"], ["--micro"]),
        (["bench", "step", "--rounds", "0"], ["--rounds"]),
        (["bench", "step", "--batches", "100", "--micro", "64"], ["100", "64"]),
        (["bench", "step", "--keep", "some"], ["--keep", "some"]),
        (["bench", "step", "--remat", "all"], ["all", "selective"]),
        (["bench", "step", "--towers", "emojy"], ["emojy", "did you mean 'emoji'"]),
        (["bench", "step", "--budget-gib", "-1"], ["--budget-gib"]),
    ],
)
def test_a_mistake_gets_one_short_message_and_status_two(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 12
    assert not any(tmp_path.rglob("*.safetensors"))


def test_a_preset_takes_the_place_of_a_recipes_towers_and_options_that_of_the_presets() -> None:
    """All of it is in the config, so a resume needs no preset's name."""
    arguments = ["scenes", "--model.text-layers", "1", "--preset", "cpu-tiny", "--data.tokens", "12"]
    config, name = parse_recipe("train", arguments)
    assert isinstance(config, RunConfig)
    preset = PRESETS["cpu-tiny"]
    assert name == "scenes"
    assert config.model == replace(preset.model, text_layers=1)
    data = config.data
    assert (data.image_size, data.tokens, data.vocabulary) == (preset.image_size, 12, preset.vocabulary)
    assert data.train == ("scenes",)


def test_options_are_of_all_phases_or_of_one_which_then_counts() -> None:
    arguments = ["emoji-phases", "--both.train.steps", "7", "--train.steps=5", "--data.eval", "wds_val", "wds_fxemoji"]
    phases, _ = parse_recipe("train", [*arguments, "--text.data.eval", "--seed", "3", "--image.data.augment.flip=0.5"])
    assert isinstance(phases, Phases)
    assert {name: config.train.steps for name, config in phases.of.items()} == {"image": 5, "text": 5, "both": 7}
    assert phases["text"].data.eval == () and phases["both"].data.eval == ("wds_val", "wds_fxemoji")
    assert phases["image"].data.augment.flip == 0.5 and phases["both"].data.augment.flip == 0.0
    assert all(config.seed == 3 for config in phases.of.values())


def test_a_preset_is_of_all_phases() -> None:
    phases, _ = parse_recipe("train", ["emoji-phases", "--preset", "cpu-tiny"])
    assert isinstance(phases, Phases)
    assert all(config.model == PRESETS["cpu-tiny"].model for config in phases.of.values())


def test_help_of_a_recipe_of_phases_says_how_to_speak_to_one_and_lists_the_fields_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, _ = call(capsys, "train", "emoji-phases", "--help")
    assert status == 0
    assert "image, text, both" in out and "--PHASE.section.field" in " ".join(out.split())
    assert out.count("--data.workers ") == 1


def test_help_of_training_lists_presets(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "train", "--help")
    assert status == 0 and all(name in out for name in PRESETS)


def test_every_field_of_a_recipe_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "train", "scenes", "--help")
    assert status == 0
    for field in ("--run.dir", "--seed", "--data.workers", "--batch.keep", "--memory.budget-gib", "--train.steps"):
        assert field in out
    status, out, _ = call(capsys, "train", "--help")
    assert status == 0 and all(recipe in out for recipe in ("scenes", "emoji", "clipart"))


def test_packed_scenes_are_shards_that_train_and_sets_that_evaluate(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pack -> tokenizer -> train on the shards -> eval --data -> classify an image, with files of a user's own."""
    packed, folder = tmp_path / "packed", tmp_path / "run"
    sizes = ["--train-samples", "300", "--eval-samples", "60", "--size", "24"]
    assert call(capsys, "data", "pack", "scenes", str(packed), *sizes)[0] == 0
    status, out, _ = call(capsys, "data", "tokenizer", f"{packed}/train/*.tar", str(tmp_path / "own.model"))
    assert status == 0 and "tokens" in out
    config = ["--data.root", str(packed), "--data.train", "train/*.tar", "--data.eval", "wds_val", "wds_sketch"]
    config += ["--data.shifts", "sketch", "--data.tokenizer", str(tmp_path / "own.model"), "--data.workers", "0"]
    config += ["--batch.size", "64", "--batch.micro", "16", "--train.steps", "2", "--data.image-size", "24"]
    config += ["--train.eval-every-steps", "1"]
    status, _, err = call(capsys, "train", "scenes", *config, "--run.dir", str(folder), "--train.device", "cpu")
    assert status == 0, err
    results = json.loads((folder / "results.json").read_text())
    assert results["sets"]["val"]["samples"] == 60 and results["shift_mean"] is not None
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [set(line["evaluation"]) for line in lines if "evaluation" in line] == [{"val", "sketch", "shift_mean"}]

    report = tmp_path / "eval.json"
    status, out, err = call(capsys, "eval", str(folder), "--json", str(report))
    assert status == 0, err
    assert json.loads(report.read_text()) == results, "a loaded run must score as it did when it was trained"
    status, out, _ = call(capsys, "eval", str(folder), "--data", str(packed / "wds_v2"))
    assert status == 0 and "v2" in out

    monkeypatch.chdir(tmp_path)
    picture = Path("a [red] $picture$.png")
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(picture)
    guesses = tmp_path / "guesses.json"
    arguments = ["--labels", "red circle,[/red]", str(picture), "--json", str(guesses)]
    status, out, err = call(capsys, "classify", str(folder), *arguments)
    assert status == 0, err
    assert "[/red]" in out and "[red]" in out
    assert sum(json.loads(guesses.read_text())[str(picture)].values()) == pytest.approx(1.0, abs=1e-5)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    status, _, err = call(capsys, "classify", str(folder), "--labels", "a,b", str(tmp_path / "broken.png"))
    assert status == 2 and "broken.png" in err and "Traceback" not in err
