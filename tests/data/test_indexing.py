"""The index of shards: were these to fail, a stale index would give wrong bytes, or a large data set start slowly."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data import indexing, shard_index, shards
from triscale.data.indexing import index_shards
from triscale.data.samples import BadSample
from triscale.data.shard_index import FOLDER, build_index, index_folders, load_index
from triscale.data.shards import ShardSource, open_shards
from triscale.errors import RunError, UsageError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, samples: int, name: str = "") -> str:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for extension, content in (("jpg", b"%s %d" % (path.name.encode(), number)), ("txt", b"caption")):
                header = tarfile.TarInfo(f"{name}{number:03d}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type = tarfile.SYMTYPE
        tar.addfile(link)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(3):
        write(tmp_path / "data" / f"{number}.tar", 10 + number)
    return tmp_path / "data"


def paths(data: Path) -> list[str]:
    return sorted(str(path) for path in data.glob("*.tar"))


def everything(source: ShardSource) -> list[object]:
    return [source.read(index) for index in range(len(source))]


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose headers were read."""
    read: list[str] = []
    build = shard_index.build_index

    def counted(path: str) -> shard_index.ShardIndex:
        read.append(os.path.basename(path))
        return build(path)

    for module in (shards, indexing):
        monkeypatch.setattr(module, "build_index", counted)
    return read


@pytest.mark.parametrize("workers", [0, 1])
def test_an_indexed_source_is_the_same_and_reads_no_header(data: Path, headers_read: list[str], workers: int) -> None:
    plain = open_shards("*.tar", root=data)
    expected, skipped = everything(plain), plain.skipped
    made = index_shards(paths(data), workers=workers)
    assert [(shard.outcome, shard.holds.samples, shard.skipped) for shard in made] == [
        ("written", 10 + number, {"entry-is-link": 1}) for number in range(3)
    ]
    headers_read.clear()
    source = open_shards("*.tar", root=data)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(source) == expected
    assert source.skipped == skipped == [("link.jpg", "entry-is-link")] * 3
    assert [shard.outcome for shard in index_shards(paths(data))] == ["kept"] * 3
    assert headers_read == []


def test_opening_reads_the_counts_and_a_shard_s_index_when_it_is_needed(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_shards(paths(data))
    mapped: list[str] = []
    load = shard_index.load_index
    monkeypatch.setattr(
        shards, "load_index", lambda path, *a, **o: mapped.append(os.path.basename(path)) or load(path, *a, **o)
    )
    source = open_shards("*.tar", root=data)
    assert len(source) == 33 and mapped == []
    source.read(15)
    source.read(12)
    assert mapped == ["1.tar"]


def test_a_shard_that_has_changed_is_indexed_again_and_never_misread(data: Path, headers_read: list[str]) -> None:
    index_shards(paths(data))
    write(data / "1.tar", 4, name="new")
    headers_read.clear()
    source = open_shards("*.tar", root=data)
    assert len(source) == 26 and source.key(10) == "new000" and headers_read == ["1.tar"]
    assert [shard.outcome for shard in index_shards(paths(data))] == ["kept", "written", "kept"]
    headers_read.clear()
    assert len(open_shards("*.tar", root=data)) == 26 and headers_read == []


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_index_is_made_again(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder / "data" / "0.tar", 5)
    expected = everything(open_shards(path))
    index_shards([path])
    file = folder / "data" / FOLDER / "0.tar.index"
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:place]
    file.write_bytes(content)
    stamp = build_index(path).stamp
    assert load_index(path, stamp) is None
    assert everything(open_shards(path)) == expected
    assert load_index(path, stamp) is not None, "the cache has a whole one now"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 2, "shards": {}}',
        b'{"version": 1, "shards": {"0.tar": [1]}}',
        b'{"version": 1, "shards": 3}',
        b"[" * 100_000,
    ],
)
def test_damaged_counts_are_as_if_they_were_not_there(data: Path, headers_read: list[str], content: bytes) -> None:
    index_shards(paths(data))
    (data / FOLDER / "counts.json").write_bytes(content)
    headers_read.clear()
    assert len(open_shards("*.tar", root=data)) == 33 and sorted(headers_read) == ["0.tar", "1.tar", "2.tar"]


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(data: Path, headers_read: list[str]) -> None:
    (data / FOLDER).write_bytes(b"a file in the folder's place")
    index_shards(paths(data))
    headers_read.clear()
    assert len(everything(open_shards("*.tar", root=data))) == 33 and headers_read == []
    beside, cache = index_folders(str(data))
    assert sorted(os.listdir(cache)) == ["0.tar.index", "1.tar.index", "2.tar.index", "counts.json"]
    assert os.path.isfile(beside)


def test_nowhere_to_write_is_one_line(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (data / FOLDER).write_bytes(b"")
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(RunError, match="XDG_CACHE_HOME"):
        index_shards(paths(data))


def test_damaged_shards_are_told_and_the_others_indexed(data: Path) -> None:
    (data / "1.tar").write_bytes((data / "1.tar").read_bytes()[:2000])
    made = index_shards([*paths(data), str(data / "absent.tar")])
    assert [shard.outcome for shard in made] == ["written", "damaged", "written", "damaged"]
    assert "1.tar is cut off" in made[1].fault and "absent.tar" in made[3].fault
    with pytest.raises(UsageError, match="1.tar is cut off"):
        open_shards("*.tar", root=data)


def test_a_check_reads_the_headers_of_valid_indexes_too(data: Path, headers_read: list[str]) -> None:
    index_shards(paths(data))
    stamp = build_index(str(data / "0.tar")).stamp
    other = build_index(str(data / "1.tar"))
    forged = bytearray(other.data)
    forged[8:24] = np.array(stamp, "<i8").tobytes()  # whole, but of another shard
    (data / FOLDER / "0.tar.index").write_bytes(forged)
    assert [shard.outcome for shard in index_shards(paths(data))] == ["kept"] * 3
    assert [shard.outcome for shard in index_shards(paths(data), check=True)] == ["written", "kept", "kept"]
    assert everything(open_shards("0.tar", root=data))[9]


def write_stats(data: Path, number: int, successes: object) -> None:
    (data / f"{number}_stats.json").write_text(json.dumps({"count": 100, "successes": successes}))


def test_img2datasets_counts_serve_and_headers_are_read_once_when_needed(data: Path, headers_read: list[str]) -> None:
    expected = everything(open_shards("*.tar", root=data))
    for number in range(3):
        write_stats(data, number, 10 + number)
    headers_read.clear()
    source = open_shards("*.tar", root=data)
    assert len(source) == 33 and headers_read == []
    source.read(15)
    assert headers_read == ["1.tar"]
    assert everything(source) == expected
    assert sorted(headers_read) == ["0.tar", "1.tar", "2.tar"], "each once"
    assert everything(open_shards("*.tar", root=data)) == expected and len(headers_read) == 3, "the cache keeps them"


def test_a_count_that_is_too_high_makes_bad_samples_and_one_that_is_none_is_not_believed(data: Path) -> None:
    write_stats(data, 1, 13)
    source = open_shards("*.tar", root=data)
    assert len(source) == 35
    with pytest.raises(BadSample) as bad:
        source.read(22)
    assert (bad.value.reason, bad.value.key) == ("sample-missing", "1.tar#12")
    for successes in ("11", -1, True, None, 2**50):
        write_stats(data, 1, successes)
        assert len(open_shards("*.tar", root=data)) == 33


def test_a_shard_known_by_its_count_alone_that_is_damaged_ends_the_run_with_its_name(data: Path) -> None:
    write_stats(data, 1, 11)
    (data / "1.tar").write_bytes((data / "1.tar").read_bytes()[:2000])
    source = open_shards("*.tar", root=data)
    with pytest.raises(RunError, match="1.tar is cut off"):
        source.read(12)


def test_without_a_cache_the_headers_are_kept_in_memory(data: Path, headers_read: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    write_stats(data, 0, 10)
    source = open_shards("0.tar", root=data)
    assert len(everything(source)) == 10
    assert len(everything(pickle.loads(pickle.dumps(source)))) == 10
    assert headers_read == ["0.tar"]


SHARDS, SAMPLES = 10_000, 1_000
OPEN = r"""
import re, sys, time
from pathlib import Path
from triscale.data.sources import open_source
before = time.perf_counter()
source = open_source("{00000..09999}.tar", sys.argv[1])
opened = time.perf_counter() - before
for index in range(0, len(source), len(source) // 500):
    source.read(index)
peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss is the parent's, too
print(len(source), opened, int(peak[1]) * 1024)
"""


@pytest.mark.slow
def test_ten_thousand_indexed_shards_open_in_ten_seconds_and_500_mb(tmp_path: Path) -> None:
    """One shard under 10,000 names (hard links): what opening does is the same."""
    folder = tmp_path / "data"
    first = write(folder / "00000.tar", SAMPLES)
    index_shards([first])
    [(_, (stamp, count))] = shard_index.read_counts(str(folder)).items()
    for number in range(1, SHARDS):
        os.link(first, folder / f"{number:05d}.tar")
        os.link(folder / FOLDER / "00000.tar.index", folder / FOLDER / f"{number:05d}.tar.index")
    shard_index.write_counts(str(folder / FOLDER), {f"{number:05d}.tar": (stamp, count) for number in range(SHARDS)})
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True)
    samples, seconds, memory = done.stdout.split()
    print(f"{seconds} s, {float(memory) / 2**20:.0f} MiB")
    assert int(samples) == SHARDS * SAMPLES
    assert float(seconds) < 10 and float(memory) < 500e6
