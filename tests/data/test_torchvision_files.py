"""torchvision's files are read without running what is in them: were these to fail, a download could execute code."""

from __future__ import annotations

import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triscale.data.inert_pickle import InertArray, Span, read_inert_pickle
from triscale.data.sources import absolute, needs_root, open_source
from triscale.errors import UsageError
from triscale.evaluation.datasets import open_set

NAMES = [f"thing {number}" for number in range(10)]


def images(count: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def text(value: bytes) -> bytes:
    """A string as Python 2 pickled it."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value


def listed(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def batch(pixels: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    """A batch as CIFAR's authors pickled it: a dict with an array, lists and strings, by Python 2's cPickle."""
    count = struct.pack("<H", len(labels))
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01M" + count + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(pixels.tobytes()) + b"tb"
    )
    items = text(b"batch_label") + text(b"testing batch") + text(key) + listed([b"K" + bytes([n]) for n in labels])
    items += text(b"data") + array + text(b"filenames") + listed([text(b"a_%d.png" % n) for n in range(len(labels))])
    return b"\x80\x02}q\x01(" + items + b"u."


def write_cifar10(root: Path, pixels: np.ndarray, labels: list[int]) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    meta = b"\x80\x02}(" + text(b"label_names") + listed([text(name.encode()) for name in NAMES]) + b"u."
    (folder / "batches.meta").write_bytes(meta)
    (folder / "test_batch").write_bytes(batch(pixels, labels))


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)


def test_the_batches_of_these_tests_are_what_pickle_reads(tmp_path: Path) -> None:
    pixels = images(30, (3, 32, 32))
    found = pickle.loads(batch(pixels, [1] * 30), encoding="latin1")
    np.testing.assert_array_equal(found["data"], pixels.reshape(30, 3072))
    assert found["labels"] == [1] * 30


@pytest.mark.usefixtures("no_unpickling")
def test_cifars_pickled_and_binary_forms_give_the_same_images_and_labels(tmp_path: Path) -> None:
    pixels, labels = images(30, (3, 32, 32)), [number % 10 for number in range(30)]
    write_cifar10(tmp_path / "py", pixels, labels)
    binary = tmp_path / "bin/cifar-10-batches-bin"
    binary.mkdir(parents=True)
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
    (binary / "test_batch.bin").write_bytes(b"".join(records))
    (binary / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    for form in ("py", "bin"):
        opened = open_set(f"torchvision:cifar10:{form}", str(tmp_path))
        assert (opened.name, opened.classnames, len(opened)) == ("cifar10", tuple(NAMES), 30)
        for index in (0, 17, 29):
            example = opened.read(index)
            assert example.labels == (labels[index],)
            np.testing.assert_array_equal(example.image, pixels[index].transpose(1, 2, 0))


@pytest.mark.usefixtures("no_unpickling")
def test_cifar100_is_read_by_its_fine_labels(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels, labels = images(22, (3, 32, 32)), [number % 3 for number in range(22)]
    names = text(b"coarse_label_names") + listed([text(b"x")]) + text(b"fine_label_names")
    (folder / "meta").write_bytes(b"\x80\x02}(" + names + listed([text(b"ape"), text(b"bee"), text(b"cow")]) + b"u.")
    (folder / "test").write_bytes(batch(pixels, labels, b"fine_labels"))
    (folder / "train").write_bytes(batch(pixels[:21], labels[1:], b"fine_labels"))
    opened, train = (open_set(f"torchvision:{name}:", str(tmp_path)) for name in ("cifar100", "cifar100/train"))
    assert (opened.classnames, opened.read(4).labels, opened.read(4).key) == (("ape", "bee", "cow"), (1,), "test#4")
    assert (train.name, len(train), train.read(0).labels) == ("cifar100-train", 21, (1,))


def test_stl10_is_read_by_columns(tmp_path: Path) -> None:
    folder, pixels = tmp_path / "stl10_binary", images(3, (3, 96, 96))
    folder.mkdir()
    (folder / "test_X.bin").write_bytes(pixels.tobytes())
    (folder / "test_y.bin").write_bytes(bytes([10, 1, 2]))
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    opened = open_set("torchvision:stl10:.", str(tmp_path))
    assert [opened.read(index).labels for index in range(3)] == [(9,), (0,), (1,)]
    np.testing.assert_array_equal(opened.read(2).image, pixels[2].transpose(2, 1, 0))


def test_stl10s_unlabelled_images_can_be_trained_on_but_not_scored(tmp_path: Path) -> None:
    folder, pixels = tmp_path / "stl10_binary", images(3, (3, 96, 96))
    folder.mkdir()
    (folder / "unlabeled_X.bin").write_bytes(pixels.tobytes())
    (folder / "class_names.txt").write_text("\n".join(NAMES))
    source = open_source("torchvision:stl10/unlabeled:.", str(tmp_path))
    sample = source.read(2)
    assert (len(source), sample.label, sample.text) == (3, None, None)
    np.testing.assert_array_equal(sample.image, pixels[2].transpose(2, 1, 0))
    (folder / "test_X.bin").write_bytes(pixels.tobytes())
    (folder / "test_y.bin").write_bytes(bytes(3))
    with pytest.raises(UsageError, match="count from 1"):
        open_set("torchvision:stl10:.", str(tmp_path))


def test_training_takes_the_split_that_is_named_and_its_class_names_as_captions(tmp_path: Path) -> None:
    write_cifar10(tmp_path, images(30, (3, 32, 32)), [number % 10 for number in range(30)])
    source = open_source("torchvision:cifar10/test:", str(tmp_path))
    assert (source.name, source.read(7).text) == ("torchvision:cifar10/test", b"thing 7")
    with pytest.raises(UsageError, match="is of test images: write torchvision:cifar10/train:here"):
        open_source("torchvision:cifar10:here", str(tmp_path))
    assert needs_root("torchvision:cifar10/test:here") and not needs_root(f"torchvision:cifar10/test:{tmp_path}")
    assert absolute("torchvision:cifar10/test:here") == f"torchvision:cifar10/test:{Path('here').absolute()}"


def write_mnist(root: Path, pixels: np.ndarray, labels: bytes, folder: str = "FashionMNIST") -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    header = struct.pack(">4I", 0x803, len(pixels), *pixels.shape[1:])
    (raw / "t10k-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (raw / "t10k-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels)
    return raw


def test_grey_images_in_mnists_form_are_read_in_three_equal_colours(tmp_path: Path) -> None:
    pixels = images(4, (28, 28))
    write_mnist(tmp_path, pixels, bytes([9, 0, 3, 3]))
    opened = open_set("torchvision:fashion-mnist:.", str(tmp_path))
    assert (opened.name, opened.classnames[9], opened.read(0).labels) == ("fashion-mnist", "Ankle boot", (9,))
    np.testing.assert_array_equal(opened.read(2).image, np.repeat(pixels[2][:, :, None], 3, axis=2))
    copy = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(copy.read(2).image, opened.read(2).image)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not(tmp_path: Path) -> None:
    for protocol in range(6):
        file = tmp_path / f"evil{protocol}"
        file.write_bytes(pickle.dumps({"data": Evil(tmp_path / "ran"), "labels": [1]}, protocol=protocol))
        with pytest.raises(UsageError, match="never executed"):
            read_inert_pickle(file)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=60)
@given(st.data())
def test_whatever_bytes_a_pickle_has_they_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(batch(images(21, (3, 32, 32)), [1] * 21))
    codes = [ord(code.code) for code in pickletools.opcodes]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 400))
        content[place] = data.draw(st.sampled_from(codes))
    file = tmp_path_factory.mktemp("fuzz") / "batch"
    file.write_bytes(content[: data.draw(st.sampled_from([200, 400, len(content)]))])
    try:
        assert isinstance(read_inert_pickle(file), dict)
    except UsageError as error:
        assert "\n" not in str(error)


def test_an_array_is_told_by_its_place(tmp_path: Path) -> None:
    pixels = images(22, (3, 32, 32))
    (tmp_path / "b").write_bytes(batch(pixels, [0] * 22))
    found = read_inert_pickle(tmp_path / "b")["data"]
    assert isinstance(found, InertArray) and isinstance(found.data, Span)
    assert (found.shape, found.dtype, found.column_major) == ((22, 3072), "u1", False)
    assert (tmp_path / "b").read_bytes()[found.data.offset :][: found.data.size] == pixels.tobytes()


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_what_is_missing_cut_off_or_out_of_range_is_one_line(tmp_path: Path) -> None:
    raw = write_mnist(tmp_path / "cut", images(4, (28, 28)), bytes(4))
    cut(raw / "t10k-images-idx3-ubyte", 900)
    write_mnist(tmp_path / "range", images(2, (28, 28)), bytes([3, 10]))
    raw = write_mnist(tmp_path / "count", images(2, (28, 28)), bytes([3, 1]))
    cut(raw / "t10k-labels-idx1-ubyte", 9)
    write_mnist(tmp_path / "none", images(0, (28, 28)), b"")
    write_cifar10(tmp_path / "label", images(30, (3, 32, 32)), [10] * 30)
    write_cifar10(tmp_path / "half", images(30, (3, 32, 32)), [1] * 30)
    cut(tmp_path / "half/cifar-10-batches-py/test_batch", 50_000)
    for spec, says in {
        "fashion-mnist:cut": "cut off",
        "fashion-mnist:range": "label 10 of image 1 is out of range",
        "fashion-mnist:count": "it and the labels beside it are not 2 images",
        "fashion-mnist:none": "no images",
        "cifar10:label": "label 10 of image 0 is out of range",
        "cifar10:half": "test_batch",
        "cifar10:cut": "neither cifar-10-batches-py nor cifar-10-batches-bin",
        "kmnist:nowhere": "no folder",
        "cifar11:cut": "write torchvision:NAME:DIR",
        "cifar10": "write torchvision:NAME:DIR",
        "cifar10/val:cut": "write torchvision:NAME:DIR",
    }.items():
        with pytest.raises(UsageError) as error:
            open_set(f"torchvision:{spec}", str(tmp_path))
        assert says in str(error.value) and "\n" not in str(error.value), spec
