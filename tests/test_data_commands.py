"""`triscale data` as users meet it: index, stats and pack on files of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from test_cli import call
from triscale.data.decode import decode_image
from triscale.data.pack import write_shards
from triscale.data.scenes import Scenes
from triscale.data.shards import open_shards


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shards(Scenes("train", samples=30, size=16), tmp_path / "data", samples_per_shard=10)
    return tmp_path / "data"


def test_index_tells_what_it_did_and_names_damaged_shards(
    data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "index.json"
    spec = str(data / "{00000..00002}.tar")
    status, out, err = call(capsys, "data", "index", spec, "--workers", "0", "--json", str(report))
    assert status == 0 and "30" in out and err == ""
    assert [shard["outcome"] for shard in json.loads(report.read_text())] == ["written"] * 3
    assert (data / ".triscale" / "00002.tar.index").exists()
    (data / "00001.tar").write_bytes(b"hello" * 300)
    status, out, err = call(capsys, "data", "index", "*.tar", "--root", str(data), "--workers", "0")
    assert status == 1 and "00001.tar is not a tar shard" in err and "damaged shards" in out
    assert "Traceback" not in err


def test_stats_write_a_page_and_the_figures(data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, report, model = tmp_path / "page.html", tmp_path / "stats.json", tmp_path / "own.model"
    spec = str(data / "*.tar")
    assert call(capsys, "data", "tokenizer", spec, str(model))[0] == 0
    options = ["--workers", "0", "--html", str(page), "--json", str(report), "--tokenizer", str(model), "--tokens", "5"]
    status, out, err = call(capsys, "data", "stats", spec, *options)
    assert status == 0, err
    values = json.loads(report.read_text())
    assert values["samples"] == values["samples_read"] == values["images"] == 30 and values["bad"] == {}
    assert 0 < values["truncated_fraction"] <= 1 and "captions cut at 5 tokens" in out
    assert "Content-Security-Policy" in page.read_text(encoding="utf-8")


def test_any_source_is_packed_and_bad_samples_are_left_out_and_counted(
    data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shards = open_shards("*.tar", root=data)
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["filepath\ttitle\tlabel"]
    for index in range(10):
        image = shards.read(index).image
        assert isinstance(image, bytes)
        (folder / f"{index}.png").write_bytes(image if index != 3 else b"GIF89a")
        lines.append(f"images/{index}.png\tcaption {index}\t{index}")
    lines.append("images/absent.png\tx\t0")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    out_folder = tmp_path / "packed"
    arguments = ["pairs.csv", str(out_folder), "--root", str(tmp_path), "--samples-per-shard", "4"]
    status, out, err = call(capsys, "data", "pack", *arguments)
    assert status == 0 and "9 samples in 3 shards" in out
    assert "left out: 1 image-missing" in err and "left out: 1 image-unreadable" in err
    back = open_shards("*.tar", root=out_folder)
    assert [back.read(index).text for index in range(4)] == [b"caption %d" % i for i in (0, 1, 2, 4)]
    image = back.read(8).image
    assert isinstance(image, bytes) and decode_image(image).shape == (16, 16, 3) and back.read(8).label == b"9"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index"], ["shards"]),
        (["index", "folder:x"], ["folder:x", "only tar shards"]),
        (["index", "/nowhere/*.tar"], ["/nowhere"]),
        (["stats", "emoji"], ["emoji", "scenes", "train/*.tar"]),
        (["stats", "scenes", "--samples", "-1"], ["--samples"]),
        (["stats", "scenes", "--tokenizer", "/nowhere.model"], ["/nowhere.model"]),
        (["stats", "scenes", "--samples", "2", "--workers", "0", "--html", "/nowhere/x.html"], ["/nowhere/x.html"]),
        (["pack", "/nowhere.csv", "/nowhere/x"], ["/nowhere.csv"]),
    ],
)
def test_a_mistake_gets_one_short_message_and_status_two(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, "data", *arguments)
    assert status == 2 and "Traceback" not in err and len(err.strip().splitlines()) <= 12
    for word in words:
        assert word in err
