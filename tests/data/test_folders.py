"""Folders of images: were these to fail, captions would go to other images, or a link would lead out of the data."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from triscale.data.folders import CaptionedFolder, ClassFolders
from triscale.data.samples import BadSample, Sample
from triscale.errors import UsageError


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def everything(source: CaptionedFolder | ClassFolders) -> list[Sample]:
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(index) for index in range(len(copy))] == [source.read(index) for index in range(len(source))]
    return [source.read(index) for index in range(len(source))]


def test_an_image_takes_the_files_beside_it_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    files = {
        "b.JPG": b"B",
        "b.Txt": b"of b",
        "a.png": b"A",
        "x/y/a.webp": b"XYA",
        "x/y/a.json": b"{}",
        "x/y/a.cls": b"3",
        "x/a.jpeg": b"XA",
        "x/a.txt": b"of x/a",
    }
    source = CaptionedFolder(str(write(tmp_path, files)), "folder")
    assert everything(source) == [
        Sample(key="a", image=b"A"),
        Sample(key="b", image=b"B", text=b"of b"),
        Sample(key="x/a", image=b"XA", text=b"of x/a"),
        Sample(key="x/y/a", image=b"XYA", metadata=b"{}", label=b"3"),
    ]
    assert source.read(1, image=False) == Sample(key="b", image=b"", text=b"of b")
    assert source.skipped == []


def test_what_is_not_used_is_listed_with_its_reason(tmp_path: Path) -> None:
    files = {"a.jpg": b"1", "a.png": b"2", "b.txt": b"alone", "inner/c.jpg": b"3", ".hidden/d.jpg": b"4", "notes": b""}
    write(tmp_path, files)
    (tmp_path / "again").symlink_to(tmp_path)
    source = CaptionedFolder(str(tmp_path), "folder")
    assert [sample.key for sample in everything(source)] == ["a", "inner/c"]
    assert sorted(source.skipped) == [("a", "key-duplicate"), ("again", "entry-is-link"), ("b", "image-missing")]


def test_a_file_that_is_too_large_or_outside_is_a_bad_sample_of_its_own_reason(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder, {"b.jpg": b"2", "b.txt": b"x" * 65_537, "c.txt": b"c"})
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "c.jpg").symlink_to(tmp_path / "secret")
    source = CaptionedFolder(str(folder), "folder")
    for index, (key, reason) in enumerate([("b", "caption-too-long"), ("c", "image-path-outside")]):
        with pytest.raises(BadSample) as bad:
            source.read(index)
        assert (bad.value.key, bad.value.reason) == (key, reason)


@pytest.mark.parametrize("kind", [CaptionedFolder, ClassFolders])
def test_a_file_that_disappears_is_a_failed_read_and_no_bad_sample(tmp_path: Path, kind: type) -> None:
    source = kind(str(write(tmp_path, {"a/1.jpg": b"1"})), "name")
    (tmp_path / "a" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        source.read(0)


def test_links_to_nothing_or_themselves_and_pipes_are_skipped_and_listed(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"1"})
    (tmp_path / "b.jpg").symlink_to("nothing")
    (tmp_path / "c.jpg").symlink_to("c.jpg")
    os.mkfifo(tmp_path / "d.jpg")
    (tmp_path / "e.jpg").symlink_to("a.jpg")
    source = CaptionedFolder(str(tmp_path), "folder")
    assert [(sample.key, sample.image) for sample in everything(source)] == [("a", b"1"), ("e", b"1")]
    assert source.skipped == [("b.jpg", "entry-is-link"), ("c.jpg", "entry-is-link"), ("d.jpg", "entry-is-device")]


def test_names_that_are_no_utf8_are_read_and_spelled_out(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"1")
    [sample] = everything(CaptionedFolder(str(tmp_path), "folder"))
    assert (sample.key, sample.image) == ("caf\\xe9", b"1")


def test_class_folders_are_labels_in_order_of_their_names_and_captions(tmp_path: Path) -> None:
    files = {"dog/2.jpg": b"d2", "cat/1.PNG": b"c1", "cat/sub/3.webp": b"c3", "cat/notes.txt": b"-", "top.jpg": b"-"}
    write(tmp_path, files)
    (tmp_path / "ant").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "dog")
    source = ClassFolders(str(tmp_path), "classes")
    assert source.classnames == ("ant", "cat", "dog")
    assert everything(source) == [
        Sample(key="cat/1.PNG", image=b"c1", text=b"cat", label=b"1"),
        Sample(key="cat/sub/3.webp", image=b"c3", text=b"cat", label=b"1"),
        Sample(key="dog/2.jpg", image=b"d2", text=b"dog", label=b"2"),
    ]
    assert source.read(2, image=False).image == b"" and source.skipped == [("link", "entry-is-link")]


@pytest.mark.parametrize("kind", [CaptionedFolder, ClassFolders])
def test_a_folder_without_images_is_named_with_what_it_holds_and_what_is_expected(tmp_path: Path, kind: type) -> None:
    write(tmp_path, {"a.txt": b"", "b.gif": b""})
    (tmp_path / "c").symlink_to(tmp_path)
    with pytest.raises(UsageError, match=r"holds no images: expected .*a\.txt, b\.gif, c.*entry-is-link") as said:
        kind(str(tmp_path), "name")
    assert "\n" not in str(said.value)
    with pytest.raises(UsageError, match="there is no folder"):
        kind(str(tmp_path / "absent"), "name")


@pytest.mark.parametrize("kind", [CaptionedFolder, ClassFolders])
def test_an_index_outside_is_an_error(tmp_path: Path, kind: type) -> None:
    source = kind(str(write(tmp_path, {"a/1.jpg": b"1"})), "name")
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)
