"""Sources that changed since a run was begun are noticed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pictures import Pictures
from shards import write_shards
from triscale.data.shards import open_shards
from triscale.data.sources import open_source
from triscale.data.unchanged import describe_sources, require_unchanged
from triscale.errors import UsageError


def test_the_same_sources_pass_from_another_folder_too(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", shards=3, samples=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = json.loads(json.dumps(describe_sources([open_shards("*.tar", root=tmp_path / "a"), Pictures()])))
    require_unchanged(before, describe_sources([open_shards("*.tar", root=tmp_path / "b"), Pictures()]))


def test_another_number_of_samples_is_named_with_its_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures held 60 samples when the run was begun, now 61: .*--run.dir"):
        require_unchanged(describe_sources([Pictures(5), Pictures(60)]), describe_sources([Pictures(5), Pictures(61)]))
    with pytest.raises(UsageError, match="begun with 1 training sources, now there are 2"):
        require_unchanged(describe_sources([Pictures()]), describe_sources([Pictures(), Pictures()]))


def test_as_many_samples_in_other_shards_are_others(tmp_path: Path) -> None:
    write_shards(tmp_path, shards=3, samples=4)
    before = describe_sources([open_shards("*.tar", root=tmp_path)])
    (tmp_path / "00000.tar").rename(tmp_path / "00009.tar")
    with pytest.raises(UsageError, match=r"\*\.tar has other shards than when the run was begun"):
        require_unchanged(before, describe_sources([open_shards("*.tar", root=tmp_path)]))


def test_every_source_says_which_file_a_sample_lies_in_without_reading_it(tmp_path: Path) -> None:
    write_shards(tmp_path / "tars", shards=3, samples=4)
    shards = open_shards("tars/*.tar", root=tmp_path)
    assert [Path(shards.file(index)).name for index in (0, 3, 4, 11)] == [
        "00000.tar",
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    assert shards.shard_counts.tolist() == [4, 4, 4]
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\nimages/a/x.png,an x\nimages/a/y.png,a y\n")
    (tmp_path / "images" / "a").mkdir(parents=True)
    for name in "xy":
        (tmp_path / "images" / "a" / f"{name}.png").touch()
    for spec, expected in (
        ("pairs.csv", table),
        ("folder:images", tmp_path / "images/a/y.png"),
        ("classes:images", tmp_path / "images/a/y.png"),
    ):
        source = open_source(spec, str(tmp_path))
        assert source.file(1) == str(expected)
    assert open_source("scenes", "").file(0) == "scenes:train"
