"""Packing: were these to fail, what is written as shards would not be what was meant, or be there by halves."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triscale.data.decode import decode_image, image_extension
from triscale.data.pack import pack_scenes, shrunk, write_evaluation_set, write_shards
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


# Smaller images.


def picture_file(form: str, height: int, width: int, **options: object) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(300, 400, (48, 64)), (400, 300, (64, 48)), (65, 65, (64, 64)), (1, 900, (1, 64))]
)
@pytest.mark.parametrize(("form", "becomes"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "jpg")])
def test_a_larger_image_is_shrunk_to_the_longer_side(
    form: str, becomes: str, height: int, width: int, shape: tuple[int, int]
) -> None:
    data = picture_file(form, height, width, quality=95)
    small = shrunk(data, 64)
    assert isinstance(small, bytes) and image_extension(small) == becomes
    decoded = decode_image(small)
    assert decoded.shape == (*shape, 3)
    whole = Image.fromarray(decode_image(data))
    expected = np.asarray(whole.resize(shape[::-1], Image.Resampling.BICUBIC)).astype(int)
    distance = np.abs(decoded.astype(int) - expected)
    assert distance.max() <= 1 if becomes == "png" else distance.mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_small_enough_keeps_its_bytes(form: str) -> None:
    data = picture_file(form, 64, 40)
    assert shrunk(data, 64) is data
    cut = data[:-30]
    assert form == "WEBP" or shrunk(cut, 64) is cut, "of such only the header is read; of WebP that is all"


def test_pixels_are_shrunk_to_pixels() -> None:
    image = pixels(0, 90, 30)
    small = shrunk(image, 30)
    assert isinstance(small, np.ndarray) and small.shape == (30, 10, 3)
    assert shrunk(image, 90) is image


def test_orientation_is_applied_to_what_is_encoded_anew() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture_file("JPEG", 100, 200, exif=exif, quality=95)
    small = shrunk(data, 50)
    assert isinstance(small, bytes) and b"Exif" not in small
    assert decode_image(small).shape == (50, 25, 3)
    expected = np.asarray(Image.fromarray(decode_image(data)).resize((25, 50), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(decode_image(small).astype(int) - expected).mean() < 2


def test_packing_with_a_largest_side_leaves_out_what_cannot_be_decoded(tmp_path: Path) -> None:
    large, small = picture_file("JPEG", 200, 300), picture_file("PNG", 20, 30)
    images = [large, small, large[: len(large) // 2], b"GIF89a", pixels(1, 40, 80)]
    source = Listed([Sample(key=f"k{i}", image=image, text=b"words") for i, image in enumerate(images)])
    left_out: list[tuple[str, str]] = []
    write_shards(source, tmp_path / "new", max_side=32, leave_out=lambda *bad: left_out.append(bad))
    back = open_shards("new/*.tar", root=tmp_path)
    assert left_out == [("k2", "image-truncated"), ("k3", "image-unreadable")]
    found = [back.read(index).image for index in range(len(back))]
    assert found[1] == small
    assert [decode_image(image).shape[:2] for image in found if isinstance(image, bytes)] == [
        (21, 32),
        (20, 30),
        (16, 32),
    ]
    assert write_shards(source, tmp_path / "again", max_side=32, leave_out=lambda *_: None)
    assert all_bytes(tmp_path / "new") == all_bytes(tmp_path / "again")


def test_a_largest_side_below_one_pixel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least 1 pixel, not 0"):
        write_shards(drawn(2), tmp_path / "new", max_side=0)
