"""`triscale report` and `compare` over run folders: were these to fail, a finished run could not be looked at again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from commands import call
from report_records import classified, predictions
from triscale.config import Phases, RunConfig, to_dict
from triscale.evaluation.predictions import predictions_file
from triscale.evaluation.suite import Evaluation, Results, write_evaluation
from triscale.recipes import RECIPES
from triscale.run_folder import Files

CLASSES = 10


def scenes() -> RunConfig:
    found = RECIPES["scenes"]()
    assert isinstance(found, RunConfig)
    return replace(found, data=replace(found.data, eval=("scenes:val", "scenes:sketch"), shifts=("sketch",)))


def trained(folder: Path, *, seed: int = 0, right: float = 0.7, config: RunConfig | None = None) -> Path:
    """A run folder as training leaves it, without checkpoints."""
    config = config or scenes()
    folder.mkdir(parents=True)
    files = Files(folder)
    files.config.write_text(json.dumps({"recipe": "scenes", **to_dict(config)}))
    resolved = {"parameters": {"image": 1000, "text": 500}, "versions": {"torch": "2"}, "plans": {}, "threads": 2}
    files.resolved.write_text(json.dumps(resolved))
    lines = (
        {"step": s, "seconds": s / 2, "loss": 6.0 / s, "accuracy": 1 - 1 / s, "skipped": False} for s in range(1, 40)
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files.quarantine.write_text('{"source": "a", "key": "<b>", "reason": "image-empty"}\n')
    evaluate(folder, seed=seed, right=right)
    return folder


def evaluate(folder: Path, *, seed: int = 0, right: float = 0.7) -> Path:
    """What `triscale eval --output` leaves."""
    found = {
        name: predictions(classes=CLASSES, right=right - 0.1 * place, seed=seed + place)
        for place, name in enumerate(("val", "sketch"))
    }
    sets = {name: classified(of) for name, of in found.items()}
    results = Results(sets=sets, shift_mean=float(sets["sketch"]["top1"]), drop=0.1)
    write_evaluation(folder, Evaluation(results=results, predictions=found, matches={}))
    return folder


def test_a_page_is_made_again_from_the_folder_with_pictures_of_its_sets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    status, out, err = call(capsys, "report", str(run))
    assert (status, err) == (0, "") and out.strip() == str(run / "report.html")
    page = (run / "report.html").read_text()
    assert page.count('src="data:image/webp') > 20 and "image-empty" in page
    for part in ("Scores", "Robustness", "Training", "Set by set", "The run"):
        assert f"<h2>{part}</h2>" in page
    call(capsys, "report", str(run), "--output", str(tmp_path / "again.html"))
    assert (tmp_path / "again.html").read_text() == page, "a pure function of the folder and its sets"


def test_a_page_without_its_sets_says_so_and_classes_have_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = scenes()
    gone = replace(config, data=replace(config.data, eval=("wds_val", "wds_sketch"), root=str(tmp_path / "gone")))
    status, _, _ = call(capsys, "report", str(trained(tmp_path / "run", config=gone)))
    page = (tmp_path / "run/report.html").read_text()
    assert status == 0 and "could not be opened" in page and "data:image/webp" not in page and "class 3" in page


def test_a_run_stands_against_others_and_models_that_were_evaluated_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = trained(tmp_path / "run"), evaluate(tmp_path / "clip", right=0.95)
    assert call(capsys, "report", str(run), "--against", str(other))[0] == 0
    page = (run / "report.html").read_text()
    assert "Against other runs" in page and "<bdi>clip</bdi>" in page and "▲" in page
    assert call(capsys, "report", str(other))[0] == 0
    assert "Evaluation" in (other / "report.html").read_text()


def test_a_damaged_file_of_predictions_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    predictions_file(run, "val").write_bytes(b"damaged")
    status, _, err = call(capsys, "report", str(run))
    assert status == 0 and "val" in err and len(err.strip().splitlines()) == 1
    assert "<bdi>sketch</bdi>" in (run / "report.html").read_text()


def test_phases_have_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = Phases({"one": scenes(), "two": scenes()})
    run = tmp_path / "run"
    trained(run / "1-one")
    trained(run / "2-two", seed=4)
    (run / "config.json").write_text(
        json.dumps({"recipe": "both", "phases": {name: to_dict(each) for name, each in phases.of.items()}})
    )
    assert call(capsys, "report", str(run))[0] == 0
    page = (run / "report.html").read_text()
    assert page.count("<bdi>1-one</bdi>") == page.count("<bdi>2-two</bdi>") == 2 and "Set by set" in page


def test_compare_tells_runs_apart_on_the_terminal_as_json_and_as_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    config = scenes()
    other = replace(config, optim=replace(config.optim, learning_rate=0.25))
    runs = [trained(tmp_path / "a"), trained(tmp_path / "b", seed=7, right=0.95, config=other)]
    files = ["--json", str(tmp_path / "c.json"), "--html", str(tmp_path / "c.html")]
    status, out, _ = call(capsys, "compare", *map(str, runs), *files)
    assert status == 0 and "optim.learning_rate" in out and "0.25" in out and "seed" not in out
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["settings"] == {"optim.learning_rate": [config.optim.learning_rate, 0.25]}
    first, second = found["sets"]["val"]
    assert second["difference"] == pytest.approx(second["score"] - first["score"])
    assert second["difference_interval"][0] < second["difference"] < second["difference_interval"][1]
    assert f"{100 * second['difference']:+.1f}" in out and found["costs"]["parameters"] == [1500, 1500]
    assert "optim.learning_rate" in (tmp_path / "c.html").read_text()


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(trained(tmp_path / place / "run")) for place in ("a", "b")]
    assert call(capsys, "compare", *runs, "--json", str(tmp_path / "c.json"))[0] == 0
    assert json.loads((tmp_path / "c.json").read_text())["runs"] == runs


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "/nowhere"], "/nowhere"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere"),
        (["compare", "RUN"], "two runs"),
        (["report", "RUN", "--against", "/nowhere"], "/nowhere"),
        (["report", "RUN", "--output", "/nowhere/page.html"], "/nowhere"),
        (["report", "DAMAGED"], "results"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run")
    damaged = trained(tmp_path / "damaged")
    Files(damaged).results.write_text('{"sets": {"val": {"task": "classification"}}}')
    places = {"RUN": str(run), "DAMAGED": str(damaged)}
    if "/nowhere/page.html" in arguments:
        (tmp_path / "file").write_text("x")
        arguments = [str(tmp_path / "file/page.html") if each == "/nowhere/page.html" else each for each in arguments]
        words = "page.html"
    status, _, err = call(capsys, *(places.get(each, each) for each in arguments))
    assert status in (1, 2) and words in err and len(err.strip().splitlines()) == 1
