"""Parquet files: were these to fail, rows would be mixed up, or all captions of a data set would stand in memory."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from triscale.data import parquet
from triscale.data.parquet import ParquetSource
from triscale.data.samples import BadSample, Sample
from triscale.errors import RunError, UsageError

pa: Any = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
pq: Any = pytest.importorskip("pyarrow.parquet")


def write(path: Path, columns: dict[str, Any], group: int = 10) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return str(path)


def numbered(start: int, count: int) -> dict[str, Any]:
    return {
        "image": [b"image %d" % i for i in range(start, start + count)],
        "caption": [f"caption {i}" for i in range(start, start + count)],
        "label": list(range(start, start + count)),
    }


def everything(source: ParquetSource) -> list[Sample]:
    return [source.read(index) for index in range(len(source))]


def test_rows_of_several_files_come_in_order_with_their_places_in_the_file(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.parquet", numbered(0, 25)), write(tmp_path / "b.parquet", numbered(25, 7), 3)]
    source = ParquetSource("both", paths, "")
    assert len(source) == 32
    expected = [
        Sample(
            key=f"a.parquet#{i}" if i < 25 else f"b.parquet#{i - 25}",
            image=b"image %d" % i,
            text=b"caption %d" % i,
            label=b"%d" % i,
        )
        for i in range(32)
    ]
    assert everything(source) == expected
    order = [i * 7 % 32 for i in range(64)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(source.read, order)) == [expected[i] for i in order]
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(everything, (source,)) == expected
    for index in (-1, 32):
        with pytest.raises(IndexError):
            source.read(index)


def test_an_image_is_bytes_or_a_path_or_a_struct_of_both(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"from file")
    structs = [
        {"bytes": b"within", "path": "../a"},
        {"bytes": None, "path": "x.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    path = write(tmp_path / "a.parquet", {"image": structs, "text": ["a", "b", "c", "d"]})
    source = ParquetSource("a", [path], str(tmp_path))
    assert [source.read(index).image for index in range(2)] == [b"within", b"from file"]
    paths = write(tmp_path / "b.parquet", {"filepath": ["x.jpg", "../secret", "gone"], "text": ["a", "b", "c"]})
    by_path = ParquetSource("b", [paths], str(tmp_path))
    assert by_path.read(0).image == b"from file"
    for faulty, index, reason in (
        (source, 2, "image-missing"),
        (source, 3, "image-missing"),
        (by_path, 1, "image-path-outside"),
        (by_path, 2, "image-missing"),
    ):
        with pytest.raises(BadSample, match=reason) as bad:
            faulty.read(index)
        assert str(bad.value.key).endswith(f"#{index}")


def test_lists_of_captions_are_candidates_and_nulls_are_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"1", b"2"], "captions": [["one", "two\nlines"], None]})
    source = ParquetSource("a", [path], "")
    assert [source.read(index).text for index in range(2)] == [b"one\ntwo lines", None]


def test_without_the_image_its_column_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetSource("a", [write(tmp_path / "a.parquet", numbered(0, 5))], "")
    asked = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda *a, **options: asked.append(options["columns"]) or read(*a, **options)
    )
    assert source.read(3, image=False) == Sample(key="a.parquet#3", image=b"", text=b"caption 3", label=b"3")
    assert asked == [["caption", "label"]]


def test_row_groups_are_kept_up_to_the_budget_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": [b"x" * 1000] * 100, "caption": ["y" * 1000] * 100}
    monkeypatch.setattr(parquet, "CACHE_BYTES", 50_000)
    source = ParquetSource("a", [write(tmp_path / "a.parquet", columns)], "")
    for index in range(100):
        source.read(index)
    assert 1 <= len(source._whole) <= 2
    assert len(pickle.dumps(source)) < 3000, "a source is its row groups' sizes, whatever was read"


def test_a_file_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tmp_path / "whole.parquet", numbered(0, 5))
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(Path(whole).read_bytes()[:-20])
    other = write(tmp_path / "other.parquet", {"image": [b"1"], "text": ["a"]})
    empty = write(tmp_path / "empty.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    for paths, says in (
        ([str(broken)], "broken.parquet is no Parquet file"),
        ([str(tmp_path / "absent")], "cannot read"),
        ([whole, other], "other.parquet has no column 'caption'"),
        ([empty], "no rows"),
    ):
        with pytest.raises(UsageError, match=says) as said:
            ParquetSource("a", paths, "")
        assert "\n" not in str(said.value)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 10)
    with pytest.raises(UsageError, match="smaller row groups"):
        ParquetSource("a", [whole], "")


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd"])
def test_a_damaged_row_group_makes_bad_samples_and_the_others_stay(tmp_path: Path, compression: str) -> None:
    columns = {"image": [b"%d" % i * 500 for i in range(40)], "text": ["x"] * 40}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=20, compression=compression, use_dictionary=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(content)
    source = ParquetSource("a", [str(path)], "")
    with pytest.raises(BadSample) as bad:
        source.read(7)
    assert (bad.value.reason, bad.value.key) == ("row-group-damaged", "a.parquet#7")
    assert source.read(27).image == b"27" * 500


def test_a_file_that_changes_after_opening_is_reported_rather_than_misread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(0, 5))
    source = ParquetSource("a", [path], "")
    write(tmp_path / "a.parquet", numbered(5, 9))
    with pytest.raises(RunError, match="has changed"):
        source.read(0)
