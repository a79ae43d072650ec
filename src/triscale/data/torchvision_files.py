"""Data sets as torchvision leaves them on the disk: CIFAR, STL-10 and those in MNIST's form. Never downloaded.

Images are uncompressed and of one size, so each is read from its file when it is wanted; labels are kept. torchvision
itself unpickles CIFAR's files; here they are read without (see inert_pickle), and so is CIFAR's binary form.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from triscale.data.files import OPEN_FILES, Recent, open_unchanged
from triscale.data.inert_pickle import MAX_PICKLE_BYTES, InertArray, read_inert_pickle
from triscale.data.lists import quote, read_classnames, read_small
from triscale.data.samples import Sample
from triscale.data.tar import ReadOnlyFile
from triscale.errors import UsageError

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
DIGITS = tuple("0123456789")
NO_LABEL = -1
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Images of one size, one behind another in a file."""

    path: Path
    offset: int
    stride: int
    """Bytes from an image to the next."""
    labels: np.ndarray
    """Of every image; all are NO_LABEL where the split has none."""


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How an image lies in its bytes."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """The axes of `shape` in the order rows, columns, colours."""


PLANES = Pixels(shape=(3, 32, 32), axes=(1, 2, 0))
COLUMN_PLANES = Pixels(shape=(3, 96, 96), axes=(2, 1, 0))


class RawImages:
    """Uncompressed images in files. May be pickled to worker processes. A sample's key is "FILE#NUMBER", from 0.

    Its caption is the name of its class.

    Args:
        name: what reports call this source.
        blocks: where the images lie, in their order.
        pixels: how each lies in its bytes.
        classnames: of labels 0, 1, ...

    Raises:
        UsageError: there are none, a file is cut off, or a label is beyond the class names.
    """

    def __init__(self, name: str, blocks: Sequence[Block], pixels: Pixels, classnames: tuple[str, ...]) -> None:
        self.name = name
        self.classnames = classnames
        self._blocks = tuple(blocks)
        self._pixels = pixels
        self._ends = np.cumsum([len(block.labels) for block in blocks])
        if not len(self):
            raise UsageError(f"{name} holds no images")
        self._bytes = int(np.prod(pixels.shape))
        stamps = [self._check(block) for block in blocks]
        self._files = Recent(partial(open_unchanged, [str(block.path) for block in blocks], stamps), OPEN_FILES)

    def _check(self, block: Block) -> tuple[int, int]:
        """The file's stamp, after it was found to hold what it should."""
        file = _open(block.path)
        if len(block.labels) and block.offset + (len(block.labels) - 1) * block.stride + self._bytes > file.size:
            raise UsageError(f"{quote(str(block.path))}: cut off, it holds less than {len(block.labels)} images")
        wrong = np.flatnonzero((block.labels < 0) | (block.labels >= len(self.classnames)))
        if wrong.size and not (block.labels == NO_LABEL).all():
            raise UsageError(
                f"{quote(str(block.path))}: label {int(block.labels[wrong[0]])} of image {int(wrong[0])} is out of "
                f"range; {len(self.classnames)} class names count from 0"
            )
        return file.stamp

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def file(self, index: int) -> str:
        """Path of the file that image `index` lies in."""
        return str(self._blocks[self._place(index)[0]].path)

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len. Raises OSError if reading failed, RunError if the file has changed."""
        number, row = self._place(index)
        block = self._blocks[number]
        content: bytes | np.ndarray = b""
        if image:
            data = self._files[number].read(block.offset + row * block.stride, self._bytes)
            pixels = np.frombuffer(data, np.uint8).reshape(self._pixels.shape).transpose(self._pixels.axes)
            content = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
        key, label = f"{block.path.name}#{row}", int(block.labels[row])
        if label == NO_LABEL:
            return Sample(key=key, image=content)
        return Sample(key=key, image=content, text=self.classnames[label].encode(), label=str(label).encode())

    def _place(self, index: int) -> tuple[int, int]:
        """Number of the block that image `index` lies in, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)


def open_torchvision(rest: str, root: str) -> RawImages:
    """Open a data set that torchvision has left on the disk.

    Args:
        rest: "NAME:DIR", of the test images, or "NAME/train:DIR", DIR being what torchvision calls root, relative to
            `root`. STL-10 has "stl10/unlabeled:DIR" besides.

    Raises:
        UsageError: no such data set is known, it is not there, or damaged.
    """
    named, colon, folder = rest.partition(":")
    name, slash, split = named.partition("/")
    if name not in SETS or not colon or (slash and split not in (*SPLITS, *MORE_SPLITS.get(name, ()))):
        raise UsageError(
            f"torchvision:{quote(rest)}: write torchvision:NAME:DIR or torchvision:NAME/train:DIR, NAME one of "
            f"{', '.join(SETS)}; for a folder of class folders name the folder itself"
        )
    where = Path(root, folder)
    if not where.is_dir():
        raise UsageError(f"torchvision:{named}: there is no folder {quote(str(where))}")
    return SETS[name](f"torchvision:{named}", where, split or "test")


def _cifar(name: str, root: Path, split: str, *, classes: int) -> RawImages:
    """CIFAR-10 or -100, from the pickled or the binary form, whichever is there."""
    pickled, binary, batches = _CIFAR[classes][0], _CIFAR[classes][1], _CIFAR[classes][2 + SPLITS.index(split)]
    if (root / pickled).is_dir():
        meta, key, labels = _CIFAR_KEYS[classes]
        names = read_inert_pickle(root / pickled / meta).get(key)
        if not isinstance(names, list) or not all(isinstance(each, str) for each in names):
            raise UsageError(f"{quote(str(root / pickled / meta))}: it holds no {key}")
        blocks = [_pickled_block(root / pickled / batch, labels) for batch in batches]
        return RawImages(name, blocks, PLANES, tuple(names))
    if (root / binary).is_dir():
        file = "batches.meta.txt" if classes == 10 else "fine_label_names.txt"
        files = [f"{batch}.bin" for batch in batches]
        blocks = [_binary_block(root / binary / batch, 1 if classes == 10 else 2) for batch in files]
        return RawImages(name, blocks, PLANES, read_classnames(root / binary / file))
    raise UsageError(f"{name}: neither {pickled} nor {binary} is in {quote(str(root))}")


_CIFAR = {
    10: (
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        [f"data_batch_{number}" for number in range(1, 6)],
        ["test_batch"],
    ),
    100: ("cifar-100-python", "cifar-100-binary", ["train"], ["test"]),
}
"""By the number of classes: the folders of both forms, and the files of training and test."""
_CIFAR_KEYS = {10: ("batches.meta", "label_names", "labels"), 100: ("meta", "fine_label_names", "fine_labels")}


def _pickled_block(path: Path, key: str) -> Block:
    batch: dict[str, Any] = read_inert_pickle(path)
    labels, data = batch.get(key), batch.get("data")
    if not isinstance(labels, list) or not isinstance(data, InertArray) or data.data is None:
        raise UsageError(f"{quote(str(path))}: it holds no data and {key}")
    if not all(type(label) is int and abs(label) < 2**31 for label in labels):
        raise UsageError(f"{quote(str(path))}: its {key} are not all numbers")
    if data.shape != (len(labels), 3072) or data.dtype != "u1" or data.column_major:
        raise UsageError(f"{quote(str(path))}: its data are not {len(labels)} rows of 3,072 bytes")
    if data.data.size != 3072 * len(labels):
        raise UsageError(f"{quote(str(path))}: cut off")
    return Block(path=path, offset=data.data.offset, stride=3072, labels=np.array(labels, dtype=np.int64))


def _binary_block(path: Path, label_bytes: int) -> Block:
    """Records of `label_bytes` labels, the last of which counts, and 3,072 bytes of pixels."""
    file = _open(path)
    stride = label_bytes + 3072
    if file.size % stride or file.size > MAX_PICKLE_BYTES:
        raise UsageError(f"{quote(str(path))}: {file.size} bytes are no records of {stride}; is it cut off?")
    records = np.frombuffer(file.read(0, file.size), np.uint8).reshape(-1, stride)
    return Block(path=path, offset=label_bytes, stride=stride, labels=records[:, label_bytes - 1].astype(np.int64))


def _stl10(name: str, root: Path, split: str) -> RawImages:
    folder, stride = root / "stl10_binary", 3 * 96 * 96
    path = folder / f"{split}_X.bin"
    if split in SPLITS:
        labels = np.frombuffer(read_small(folder / f"{split}_y.bin"), np.uint8).astype(np.int64) - 1
        if (labels == NO_LABEL).any():
            raise UsageError(f"{quote(str(folder / f'{split}_y.bin'))}: a label is 0, and they count from 1")
    else:
        labels = np.full(_open(path).size // stride, NO_LABEL)
    block = Block(path=path, offset=0, stride=stride, labels=labels)
    return RawImages(name, [block], COLUMN_PLANES, read_classnames(folder / "class_names.txt"))


def _idx(name: str, root: Path, split: str, *, folder: str, classnames: tuple[str, ...]) -> RawImages:
    """Images and labels in MNIST's own form (yann.lecun.com/exdb/mnist): a header of big-endian numbers, then bytes."""
    prefix = str(root / folder / "raw" / ("train" if split == "train" else "t10k"))
    images, labels = Path(f"{prefix}-images-idx3-ubyte"), read_small(Path(f"{prefix}-labels-idx1-ubyte"))
    header = _open(images).read(0, min(16, _open(images).size))
    if len(header) < 16 or len(labels) < 8:
        raise UsageError(f"{quote(str(images))}: it, or the labels beside it, ends within its header")
    magic, count, height, width = struct.unpack(">4I", header)
    label_magic, label_count = struct.unpack(">2I", labels[:8])
    if (magic, label_magic) != (0x803, 0x801) or count != label_count or label_count != len(labels) - 8:
        raise UsageError(
            f"{quote(str(images))}: it and the labels beside it are not {count} images with as many labels"
        )
    if not 0 < height <= 4096 or not 0 < width <= 4096:
        raise UsageError(f"{quote(str(images))}: images of {height} x {width} pixels")
    numbers = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    block = Block(path=images, offset=16, stride=height * width, labels=numbers)
    return RawImages(name, [block], Pixels(shape=(height, width, 1), axes=(0, 1, 2)), classnames)


def _open(path: Path) -> ReadOnlyFile:
    try:
        if not os.path.isfile(path):
            raise UsageError(f"{quote(str(path))}: there is no such file")
        return ReadOnlyFile(str(path))
    except OSError as error:
        raise UsageError(f"{quote(str(path))}: {error.strerror or 'cannot be read'}") from error


SETS: dict[str, Callable[[str, Path, str], RawImages]] = {
    "cifar10": partial(_cifar, classes=10),
    "cifar100": partial(_cifar, classes=100),
    "stl10": _stl10,
    "mnist": partial(_idx, folder="MNIST", classnames=DIGITS),
    "fashion-mnist": partial(_idx, folder="FashionMNIST", classnames=FASHION),
    "kmnist": partial(_idx, folder="KMNIST", classnames=KUZUSHIJI),
}
"""Name to what opens it: from the source's name, torchvision's root, and the split."""
MORE_SPLITS = {"stl10": ("unlabeled",)}
"""Beside `SPLITS`."""
