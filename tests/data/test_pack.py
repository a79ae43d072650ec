"""Packing: were these to fail, what is written as shards would not be what was meant, or be there by halves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triscale.data.decode import decode_image
from triscale.data.pack import pack_scenes, write_evaluation_set, write_shards
from triscale.data.samples import BadSample, Sample
from triscale.data.scenes import CLASSNAMES, SPLITS, TEMPLATES, Scenes
from triscale.data.shards import open_shards
from triscale.errors import RunError, UsageError


class Listed:
    """A source of given samples; an exception in the list is raised when it is read."""

    name = "listed"

    def __init__(self, samples: Sequence[Sample | Exception]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def file(self, index: int) -> str:
        return self.name

    def read(self, index: int) -> Sample:
        sample = self.samples[index]
        if isinstance(sample, Exception):
            raise sample
        return sample


def pixels(seed: int, height: int = 9, width: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def drawn(count: int) -> Listed:
    return Listed(
        [
            Sample(
                key=f"s/{i:03d}", image=pixels(i), text=f"caption {i} é".encode(), metadata=b'{"n": 1}', label=b"%d" % i
            )
            for i in range(count)
        ]
    )


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(0)).save(file, form)
    return file.getvalue()


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_is_read_back_equals_what_was_written_pixel_by_pixel(tmp_path: Path) -> None:
    source = drawn(25)
    paths = write_shards(source, tmp_path / "train", samples_per_shard=10)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    back = open_shards("train/*.tar", root=tmp_path)
    assert len(back) == 25 and back.skipped == []
    for index in range(25):
        written, read = source.read(index), back.read(index)
        assert isinstance(read.image, bytes) and isinstance(written.image, np.ndarray)
        assert np.array_equal(decode_image(read.image), written.image)
        assert (read.key, read.text, read.metadata, read.label) == (
            written.key,
            written.text,
            written.metadata,
            written.label,
        )


@pytest.mark.parametrize(("form", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_encoded_images_keep_their_bytes(tmp_path: Path, form: str, extension: str) -> None:
    [path] = write_shards(Listed([Sample(key="a", image=encoded(form))]), tmp_path / "out")
    with tarfile.open(path) as tar:
        assert tar.getnames() == [f"a.{extension}"]
    assert open_shards(path).read(0) == Sample(key="a", image=encoded(form))


def test_the_same_samples_give_the_same_bytes_without_times_or_owners(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_shards(drawn(12), tmp_path / name, samples_per_shard=5)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "00000.tar") as tar:
        assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in tar} == {(0, 0, 0, "")}


def test_no_sample_is_lost_whatever_its_key(tmp_path: Path) -> None:
    names = [
        "a",
        "a",
        "b.c",
        "",
        ".hidden",
        "/etc/x",
        "../y",
        "./z",
        "nul\0l",
        "n" * 300,
        "x/é ü",
        "000000012",
        "a",
        "q\n",
    ]
    source = Listed([Sample(key=key, image=pixels(i)) for i, key in enumerate(names)])
    back = open_shards(write_shards(source, tmp_path / "out"))
    assert len(back) == len(names) and back.skipped == []
    for index in range(len(names)):
        image = back.read(index).image
        assert isinstance(image, bytes) and np.array_equal(decode_image(image), pixels(index))
    kept = [back.key(index) for index in range(len(names))]
    assert [kept[i] for i in (0, 9, 10, 11, 13)] == [names[i] for i in (0, 9, 10, 11, 13)]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (BadSample("caption-too-long", "k7"), "sample k7 is bad: caption-too-long"),
        (OSError("the disk is gone"), "sample 3 cannot be read: the disk is gone"),
        (Sample(key="k9", image=b"GIF89a"), "sample k9 is neither"),
    ],
)
def test_a_failure_under_way_leaves_nothing_behind(tmp_path: Path, fault: Exception | Sample, says: str) -> None:
    source = Listed([*drawn(3).samples, fault])
    with pytest.raises(RunError, match=says):
        write_shards(source, tmp_path / "out", samples_per_shard=1)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "00007.tar").write_bytes(b"half")
    write_shards(drawn(1), tmp_path / "out")
    assert list(all_bytes(tmp_path)) == ["out/00000.tar"]


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    for write in (
        lambda: write_shards(drawn(1), tmp_path),
        lambda: write_evaluation_set(tmp_path, ["a"], ["{c}"], [Sample(key="s", image=pixels(0), label=b"0")]),
        lambda: pack_scenes(tmp_path, train_samples=1, eval_samples=1),
        lambda: write_shards(drawn(1), tmp_path / "mine.txt"),
    ):
        with pytest.raises(UsageError, match="not an empty folder"):
            write()
    assert all_bytes(tmp_path) == {"mine.txt": b"keep me"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert len(open_shards(write_shards(drawn(2), tmp_path / "out"))) == 2


def test_a_place_that_cannot_be_written_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write .*file/out") as failed:
        write_shards(drawn(1), tmp_path / "file" / "out")
    assert "\n" not in str(failed.value)


def test_an_empty_source_or_shard_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="listed is empty"):
        write_shards(Listed([]), tmp_path / "out")
    with pytest.raises(UsageError, match="at least 1 sample"):
        write_shards(drawn(1), tmp_path / "out", samples_per_shard=0)


def test_an_evaluation_set_has_the_layout_of_clip_benchmark(tmp_path: Path) -> None:
    names, templates = ["cat", "dög", "cat"], ["a photo of a {c}.", "{c}"]
    items = [Sample(key=f"s{i}", image=pixels(i), label=b"%d" % (i % 3)) for i in range(5)]
    write_evaluation_set(tmp_path / "wds_pets", names, templates, iter(items), samples_per_shard=2)
    files = all_bytes(tmp_path / "wds_pets")
    assert list(files) == [
        "classnames.txt",
        "test/0.tar",
        "test/1.tar",
        "test/2.tar",
        "test/nshards.txt",
        "zeroshot_classification_templates.txt",
    ]
    assert files["classnames.txt"].decode() == "cat\ndög\ncat\n"
    assert files["zeroshot_classification_templates.txt"] == b"a photo of a {c}.\n{c}\n"
    assert files["test/nshards.txt"] == b"3\n"
    back = open_shards("test/*.tar", root=tmp_path / "wds_pets")
    assert [back.read(index).label for index in range(5)] == [b"0", b"1", b"2", b"0", b"1"]


@pytest.mark.parametrize(
    ("names", "templates", "labels", "says"),
    [
        (["a"], ["a photo"], [b"0"], "has no {c}"),
        (["a", "two\nlines"], ["{c}"], [b"0"], "must be one line"),
        (["a", " "], ["{c}"], [b"0"], "must be one line"),
        (["a"], ["{c}"], [b"1"], "no label below 1"),
        (["a"], ["{c}"], [b"-1"], "no label below 1"),
        (["a"], ["{c}"], [None], "no label below 1"),
        (["a"], ["{c}"], [], "no samples"),
    ],
)
def test_an_evaluation_set_that_could_not_be_used_is_refused(tmp_path, names, templates, labels, says) -> None:
    items = [Sample(key="s", image=pixels(0), label=label) for label in labels]
    with pytest.raises(UsageError, match=says):
        write_evaluation_set(tmp_path / "wds_x", names, templates, items)
    assert list(tmp_path.iterdir()) == []


def test_packed_scenes_are_the_scenes(tmp_path: Path) -> None:
    pack_scenes(tmp_path / "scenes", size=32, seed=4, train_samples=6, eval_samples=2)
    assert sorted(path.name for path in (tmp_path / "scenes").iterdir()) == sorted(
        ["train", *(f"wds_{split}" for split in SPLITS if split != "train")]
    )
    for split in SPLITS:
        folder = tmp_path / "scenes" / ("train" if split == "train" else f"wds_{split}/test")
        back = open_shards("*.tar", root=folder)
        source = Scenes(split, size=32, seed=4, samples=len(back))
        assert len(back) == (6 if split == "train" else 2)
        for index in range(len(back)):
            read, made = back.read(index), source.read(index)
            assert isinstance(read.image, bytes)
            assert np.array_equal(decode_image(read.image), made.image)
            assert (read.key, read.text, read.label) == (made.key, made.text, made.label)
        if split != "train":
            assert (folder.parent / "classnames.txt").read_text(encoding="utf-8").splitlines() == list(CLASSNAMES)
            templates = folder.parent / "zeroshot_classification_templates.txt"
            assert templates.read_text(encoding="utf-8").splitlines() == list(TEMPLATES)
