"""Folders of image files: with captions in files beside them, or in one folder a class.

The tree is walked once at opening and its names kept packed, a few bytes beside each name. Links to folders are not
followed, and a file that a link puts outside the folder is not read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from triscale.data.entries import IMAGE_EXTENSIONS, LIMITS, MAX_IMAGE_BYTES, TOO_LARGE, gather
from triscale.data.files import PackedStrings, read_below
from triscale.data.paths import describe_folder
from triscale.data.samples import Sample
from triscale.errors import UsageError

_FIELD_NAMES = ("image", "caption", "metadata", "label")


class CaptionedFolder:
    """Images of a folder and of those within, KEY.jpg beside KEY.txt, .json and .cls, in the order of their names.

    Args:
        folder: where they lie; keys are paths relative to it.
        name: what reports call this source.

    Attributes:
        skipped: (key, reason) of what is not used: links to folders, second images of a key, sidecars without an image.

    Raises:
        UsageError: there is no such folder, or no image in it.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.folder = os.path.realpath(folder)
        self.skipped: list[tuple[str, str]] = []
        self._endings: list[str] = [""]
        keys: list[str] = []
        rows: list[tuple[int, ...]] = []
        numbers = {"": 0}
        for inner, files in _walk(folder, self.skipped):
            samples, skipped = gather((inner + file, file[file.index(".") :] if "." in file else "") for file in files)
            self.skipped += [(printable(key), reason) for key, reason in skipped]
            keys += samples
            for places in samples.values():
                rows.append(tuple(numbers.setdefault(place or "", len(numbers)) for place in places))
        _require_images(keys, folder, "KEY.jpg, .jpeg, .png or .webp with KEY.txt", self.skipped)
        self._endings = list(numbers)
        self._keys = PackedStrings.of(keys)
        self._fields = np.array(rows, dtype=np.uint16 if len(numbers) < 2**16 else np.uint32)

    def __len__(self) -> int:
        return len(self._keys)

    def file(self, index: int) -> str:
        """Path of the image file of sample `index`."""
        ending = self._endings[int(self._fields[index][0])]
        return os.path.join(self.folder, printable(self._keys[index] + ending))

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` only its sidecars are read.

        Raises:
            BadSample: a file is too large, no regular file any more, or outside of the folder.
            OSError: reading failed, or a file is gone that was there at opening.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        key = self._keys[index]
        parts: list[bytes | None] = [None] * 4
        for field, number in enumerate(self._fields[index].tolist()):
            if number and (image or field):
                parts[field] = read_below(
                    self.folder,
                    key + self._endings[number],
                    LIMITS[field],
                    key=printable(key),
                    field=_FIELD_NAMES[field],
                    listed=True,
                    too_large=TOO_LARGE[field],
                )
        return Sample(key=printable(key), image=parts[0] or b"", text=parts[1], metadata=parts[2], label=parts[3])


class ClassFolders:
    """Images that lie in one folder a class, at any depth of it. Labels count the folders in order of their names.

    Args:
        folder: holds the class folders; those that begin with a dot are none.
        name: what reports call this source.

    Attributes:
        classnames: the class folders' names; the caption of a sample is that of its class.
        skipped: (path, reason) of what is not used: links to folders.

    Raises:
        UsageError: there is no such folder, or no image in a class folder.
    """

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.folder = os.path.realpath(folder)
        self.skipped: list[tuple[str, str]] = []
        paths: list[str] = []
        for inner, files in _walk(folder, self.skipped):
            paths += [inner + file for file in files if inner and _is_image(file)]
        self.classnames = tuple(sorted(_class_folders(folder)))
        _require_images(paths, folder, "one folder a class with images in it", self.skipped)
        label_of = {classname: label for label, classname in enumerate(self.classnames)}
        self._paths = PackedStrings.of(paths)
        self._labels = np.array([label_of[path.partition("/")[0]] for path in paths], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._paths)

    def file(self, index: int) -> str:
        """Path of the image file of sample `index`."""
        return os.path.join(self.folder, printable(self._paths[index]))

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`; its key is the path below the folder, its text the class name, its label the class's number.

        Raises BadSample and OSError as `CaptionedFolder.read`.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        path, label = self._paths[index], int(self._labels[index])
        key = printable(path)
        content = b""
        if image:
            content = read_below(
                self.folder, path, MAX_IMAGE_BYTES, key=key, field="image", listed=True, too_large="image-too-large"
            )
        text = printable(self.classnames[label]).encode()
        return Sample(key=key, image=content, text=text, label=str(label).encode())


def printable(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are spelled out, as in tar shards."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _walk(folder: str, skipped: list[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """Every folder below `folder` as "a/b/" ("" for itself) with its files' names sorted, in order; dot names left out.

    Links to folders are not followed, but added to `skipped`; so are links to nothing, pipes and devices.
    """
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {folder}")
    to_do = [""]
    while to_do:
        inner = to_do.pop()
        try:
            entries = sorted(os.scandir(os.path.join(folder, inner)), key=lambda entry: entry.name)
            entries = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise UsageError(f"cannot read {os.path.join(folder, inner)}: {error.strerror}") from error
        files: list[str] = []
        folders: list[str] = []
        for entry in entries:
            kind = _kind(entry)
            if kind == "file":
                files.append(entry.name)
            elif kind == "folder":
                folders.append(f"{inner}{entry.name}/")
            else:
                skipped.append((printable(inner + entry.name), kind))
        to_do += reversed(folders)
        yield inner, files


def _kind(entry: os.DirEntry[str]) -> Literal["file", "folder", "entry-is-link", "entry-is-device"]:
    """What an entry is: a file, by a link too; a folder; or why it is not used."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir(follow_symlinks=False):
            return "folder"
    except OSError:  # a link that leads to itself
        return "entry-is-link"
    return "entry-is-link" if entry.is_symlink() else "entry-is-device"


def _class_folders(folder: str) -> list[str]:
    entries = (entry for entry in os.scandir(folder) if not entry.name.startswith("."))
    return [entry.name for entry in entries if _kind(entry) == "folder"]


def _is_image(file: str) -> bool:
    return file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _require_images(found: Sequence[str], folder: str, expected: str, skipped: Sequence[tuple[str, str]]) -> None:
    if not found:
        links = f" ({len(skipped)} entries cannot be used, the first: {': '.join(skipped[0])})" if skipped else ""
        raise UsageError(f"{folder} holds no images: expected {expected}; {describe_folder(folder)}{links}")
