"""Tar shards: were these to fail, samples would be lost or mixed up, or a stranger's file could do harm."""

from __future__ import annotations

import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odd_files import special, tar_bytes
from triscale.data import shards
from triscale.data.samples import BadSample
from triscale.data.shards import open_shards
from triscale.errors import RunError, UsageError


@pytest.fixture
def write(tmp_path: Path):
    def write_shard(entries: list, name: str = "0.tar", form: int = tarfile.USTAR_FORMAT) -> Path:
        path = tmp_path / name
        path.write_bytes(tar_bytes(entries, form))
        return path

    return write_shard


def keys(source: shards.ShardSource) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def test_a_sample_is_an_image_with_its_sidecars(write) -> None:
    path = write([("a.cls", b"3"), ("a.jpg", b"A" * 700), ("a.json", b"{}"), ("a.txt", b"word"), ("b.png", b"B")])
    source = open_shards(path)
    first, second = source.read(0), source.read(1)
    assert (first.key, first.image, first.text, first.metadata, first.label) == ("a", b"A" * 700, b"word", b"{}", b"3")
    assert (second.key, second.image, second.text, second.metadata, second.label) == ("b", b"B", None, None, None)
    assert len(source) == 2 and source.skipped == []


@pytest.mark.parametrize("extension", ["jpg", "JPG", "jpeg", "Jpeg", "png", "PNG", "webp", "WebP"])
def test_image_extensions_count_in_any_case(write, extension: str) -> None:
    assert open_shards(write([(f"a.{extension}", b"pixels"), ("a.TXT", b"t")])).read(0).text == b"t"


def test_a_key_is_the_path_up_to_the_first_dot_of_the_file_name(write) -> None:
    names = ["./x/a.jpg", "x.y/b.jpg", "c.seg.png", "d.jpg.txt", ".DS_Store", "._a.jpg", "README", "e.npy", "é ü.jpg"]
    source = open_shards(write([(name, b"data") for name in names], form=tarfile.PAX_FORMAT))
    assert keys(source) == ["x/a", "x.y/b", "é ü"]
    assert source.skipped == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("length", [99, 100, 101, 150, 250])
def test_long_names_are_read_in_every_tar_format(write, form: int, length: int) -> None:
    folder = length * 3 // 5
    name = "f" * folder + "/" + "k" * (length - folder - 5) + ".jpg"
    source = open_shards(write([("a.jpg", b"before"), (name, b"long"), ("b.jpg", b"after")], form=form))
    assert keys(source) == ["a", name[:-4], "b"]
    assert [source.read(index).image for index in range(3)] == [b"before", b"long", b"after"]


def test_a_very_long_name_is_read_and_an_absurd_one_refused_unread(write) -> None:
    name = "n" * 5000
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert keys(open_shards(write([(f"{name}.jpg", b"x")], form=form))) == [name]
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**40
    path = write([])
    with path.open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**41)
    with pytest.raises(UsageError, match="name is 1099511627776 bytes long"):
        open_shards(path)


def test_sizes_in_binary_notation_are_read(write) -> None:
    path = write([("a.jpg", b"pixels"), ("b.jpg", b"more")])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (6).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert [open_shards(path).read(index).image for index in range(2)] == [b"pixels", b"more"]


def test_entries_that_point_outside_and_links_and_devices_are_skipped_and_listed(write) -> None:
    entries = [
        ("/etc/a.jpg", b"x"),
        ("../b.jpg", b"x"),
        ("x/../../c.jpg", b"x"),
        special("d.jpg", tarfile.SYMTYPE),
        special("e.jpg", tarfile.LNKTYPE),
        special("f.jpg", tarfile.CHRTYPE),
        special("g.jpg", tarfile.BLKTYPE),
        special("h.jpg", tarfile.FIFOTYPE),
        special("folder.jpg", tarfile.DIRTYPE),
        ("good.jpg", b"good"),
    ]
    source = open_shards(write(entries))
    assert keys(source) == ["good"] and source.read(0).image == b"good"
    assert source.skipped == [
        ("/etc/a.jpg", "entry-outside-shard"),
        ("../b.jpg", "entry-outside-shard"),
        ("x/../../c.jpg", "entry-outside-shard"),
        ("d.jpg", "entry-is-link"),
        ("e.jpg", "entry-is-link"),
        ("f.jpg", "entry-is-device"),
        ("g.jpg", "entry-is-device"),
        ("h.jpg", "entry-is-device"),
    ]


def test_of_two_samples_of_a_key_the_first_is_used_and_the_second_listed(write) -> None:
    entries = [
        ("a.jpg", b"1"),
        ("a.txt", b"one"),
        ("b.jpg", b"2"),
        ("a.jpg", b"3"),
        ("a.txt", b"three"),
        ("a.cls", b"9"),
    ]
    source = open_shards(write(entries))
    assert [(s.key, s.image, s.text, s.label) for s in map(source.read, range(2))] == [
        ("a", b"1", b"one", None),
        ("b", b"2", None, None),
    ]
    assert source.skipped == [("a", "key-duplicate")]


def test_two_images_of_one_key_are_a_duplicate(write) -> None:
    source = open_shards(write([("a.jpg", b"1"), ("a.png", b"2")]))
    assert source.read(0).image == b"1" and source.skipped == [("a", "key-duplicate")]


def test_two_shards_may_use_the_same_key(write) -> None:
    paths = [write([("a.jpg", b"0")], "0.tar"), write([("a.jpg", b"1")], "1.tar")]
    source = open_shards(paths)
    assert [source.read(index).image for index in range(2)] == [b"0", b"1"] and source.skipped == []


def test_a_sample_without_an_image_is_skipped_and_listed(write) -> None:
    source = open_shards(write([("a.txt", b"alone"), ("b.jpg", b"2")]))
    assert keys(source) == ["b"] and source.skipped == [("a", "image-missing")]


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("a.txt", 65_537, "caption-too-long"),
        ("a.json", 65_537, "metadata-too-large"),
        ("a.cls", 65_537, "label-too-large"),
    ],
)
def test_an_oversized_sidecar_makes_a_bad_sample_that_is_named(write, name: str, size: int, reason: str) -> None:
    source = open_shards(write([("a.jpg", b"1"), (name, b"x" * size), ("b.jpg", b"2"), ("b.txt", b"x" * 65_536)]))
    with pytest.raises(BadSample, match=reason) as bad:
        source.read(0)
    assert (bad.value.reason, bad.value.key) == (reason, "a")
    assert pickle.loads(pickle.dumps(bad.value)).reason == reason  # workers send it to the training process
    assert len(source.read(1).text or b"") == 65_536


def test_an_image_is_refused_unread_when_too_large_or_empty(tmp_path: Path) -> None:
    header = tarfile.TarInfo("huge.jpg")
    header.size = 300 * 2**20
    path = tmp_path / "0.tar"
    with path.open("wb") as file:  # sparse: 300 MiB that take no place
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.seek(header.size, os.SEEK_CUR)
        file.write(tar_bytes([("empty.jpg", b""), ("good.jpg", b"x")]))
    source = open_shards(path)
    assert keys(source) == ["huge", "empty", "good"]
    for index, reason in enumerate(("image-too-large", "image-empty")):
        with pytest.raises(BadSample, match=reason):
            source.read(index)
    assert source.read(2).image == b"x"


def test_shards_come_sorted_and_once_each_however_they_are_named(write, tmp_path: Path) -> None:
    for number in (2, 0, 1):
        write([(f"k{number}.jpg", b"x")], f"{number}.tar")
    for patterns in ("*.tar", ["2.tar", "[01].tar", "*.tar"], ["1.tar", "0.tar", "2.tar"]):
        assert keys(open_shards(patterns, root=tmp_path)) == ["k0", "k1", "k2"]
    assert keys(open_shards(str(tmp_path / "?.tar"))) == ["k0", "k1", "k2"]


def test_a_root_with_glob_characters_in_its_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data [v2]*"
    folder.mkdir()
    (folder / "0.tar").write_bytes(tar_bytes([("a.jpg", b"x")]))
    assert open_shards("*.tar", root=folder, name="train").name == "train"
    assert len(open_shards(folder / "0.tar")) == 1


def one_line(action) -> str:
    with pytest.raises(UsageError) as refused:
        action()
    message = str(refused.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_a_pattern_that_matches_nothing_is_named_with_what_is_there(write, tmp_path: Path) -> None:
    write([("a.jpg", b"x")], "train0.tar")
    message = one_line(lambda: open_shards("trian*.tar", root=tmp_path))
    assert "trian*.tar" in message and "train0.tar" in message
    assert "train0.tar" in one_line(lambda: open_shards("no/such/folder/0.tar", root=tmp_path))
    assert "*.tar" in one_line(lambda: open_shards(tmp_path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello", "not a tar"),
        (b"hello, world. " * 200, "not a tar"),
        (b"\x1f\x8b" + b"z" * 2000, "compressed"),
        (tar_bytes([("a.txt", b"no image")]), "holds no samples"),
        (tar_bytes([]), "holds no samples"),
    ],
)
def test_a_shard_that_is_none_is_named_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken.tar"
    path.write_bytes(content)
    message = one_line(lambda: open_shards(path))
    assert "broken.tar" in message and says in message


WHOLE = tar_bytes([("a.jpg", b"A" * 700), ("b.jpg", b"B" * 10), ("c.jpg", b"C" * 512)])
END = 3 * 512 + 1024 + 512 + 512


@pytest.mark.parametrize("length", [512, 513, 1000, 1536, 1537, 2048, 2560, END - 1, END, END + 511])
def test_a_shard_cut_off_anywhere_is_named_even_between_two_entries(tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(WHOLE[:length])
    message = one_line(lambda: open_shards(path))
    assert "cut.tar" in message and "cut off" in message


def test_a_shard_with_one_end_block_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "whole.tar"
    path.write_bytes(WHOLE[: END + 512])
    assert len(open_shards(path)) == 3


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "damaged.tar"
    path.write_bytes(WHOLE[:1536] + b"\xff" * 512 + WHOLE[2048:])
    assert "damaged at byte 1536" in one_line(lambda: open_shards(path))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=6), st.booleans(), st.data())
def test_no_header_makes_the_reader_fail_otherwise_than_by_naming_the_shard(
    tmp_path_factory, changes: list[tuple[int, int]], pax: bool, data
) -> None:
    form = tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT
    content = bytearray(tar_bytes([("n" * 120 + ".jpg", b"A" * 700), ("b.jpg", b"B")], form))
    for offset, value in changes:
        content[data.draw(st.sampled_from([0, 512, 1024])) + offset] = value
    for block in (0, 1024):  # with the checksum made right, or nothing else would be reached
        content[block + 148 : block + 156] = b" " * 8
        content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + 512])
    path = tmp_path_factory.mktemp("fuzz") / "0.tar"
    path.write_bytes(content)
    try:
        source = open_shards(path)
    except UsageError as refused:
        assert "0.tar" in str(refused)
    else:
        assert all(".." not in key.split("/") and not key.startswith("/") for key in keys(source))


def test_a_shard_that_changes_after_opening_is_reported_rather_than_misread(write) -> None:
    path = write([("a.jpg", b"first")])
    source = open_shards(path)
    path.write_bytes(tar_bytes([("a.txt", b"another"), ("b.jpg", b"second")]))
    with pytest.raises(RunError, match="has changed"):
        source.read(0)


def test_a_shard_that_disappears_is_a_failed_read_and_no_bad_sample(write) -> None:
    path = write([("a.jpg", b"first")])
    source = open_shards(path)
    path.unlink()
    with pytest.raises(OSError):
        source.read(0)


def test_an_index_outside_the_source_is_an_error(write) -> None:
    source = open_shards(write([("a.jpg", b"x")]))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


def read_images(source: shards.ShardSource, indices: list[int]) -> list[object]:
    return [source.read(index).image for index in indices]


def test_threads_and_processes_read_the_same_with_fewer_files_open_than_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    for number in range(6):
        entries: list = [(f"{number}-{i}.jpg", b"%d-%d" % (number, i) * 50) for i in range(20)]
        (tmp_path / f"{number}.tar").write_bytes(tar_bytes(entries))
    source = open_shards("*.tar", root=tmp_path)
    indices = [(i * 37) % 120 for i in range(240)]
    expected = [b"%d-%d" % divmod(i, 20) * 50 for i in indices]
    assert read_images(source, indices) == expected
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: source.read(i).image, indices)) == expected
    assert len(source._open) == 2
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_images, (source, indices)) == expected


def test_a_pickled_source_takes_no_open_file_along(write) -> None:
    source = open_shards(write([("a.jpg", b"x")]))
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy._open) == 0 and copy.read(0) == source.read(0)
