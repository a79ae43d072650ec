"""Hugging Face data sets, from a local folder or the hub: pip install 'triscale[datasets]'. Their code is never run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from triscale.data.samples import Sample
from triscale.data.tables import choose_columns, make_sample, require_package
from triscale.errors import UsageError

_NAME = re.compile(r"(?P<name>[^:]+?)(?::(?P<split>[^:]+))?")
_FIRST_WITHOUT_CODE = 4
"""Since this version the package itself cannot run a data set's code any more."""


class HubSource:
    """A split of a Hugging Face data set. A row's key is "NAME#ROW", from 0.

    An image column may be of the feature Image, encoded bytes or paths; class labels have their names for captions
    where no caption column is there.

    Args:
        name: what reports call this source.
        dataset: `datasets.Dataset`.
        folders: what image paths must lie in; relative ones are relative to the first.
        columns: see `tables.choose_columns`.
    """

    def __init__(self, name: str, dataset: Any, folders: Sequence[str], columns: Sequence[str] = ()) -> None:
        package = _package()
        self.name = name
        self._folders = tuple(folders)
        if not len(dataset):
            raise UsageError(f"{name} holds no rows")
        self._columns = choose_columns(dataset.column_names, columns, name)
        chosen = dataset.select_columns([self._columns.image, *self._columns.beside_image]).with_format(None)
        if isinstance(chosen.features[self._columns.image], package.Image):
            chosen = chosen.cast_column(self._columns.image, package.Image(decode=False))
        self._whole = chosen
        self._beside = chosen.select_columns(self._columns.beside_image)
        feature = chosen.features[self._columns.label] if self._columns.label else None
        self.classnames: tuple[str, ...] = tuple(getattr(feature, "names", None) or ())

    def __len__(self) -> int:
        return len(self._whole)

    def file(self, index: int) -> str:
        """The source's name: which file holds a row is the data set's own affair."""
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`, 0 <= index < len; without `image` the image's column is not read.

        Raises:
            BadSample: as `tables.make_sample`.
            OSError: reading failed.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no sample {index}")
        columns, key = self._columns, f"{self.name}#{index}"
        if not image and not columns.beside_image:
            return Sample(key=key, image=b"")
        row = (self._whole if image else self._beside)[index]
        label = row[columns.label] if columns.label else None
        captions = [row[caption] for caption in columns.captions]
        if not captions and isinstance(label, int) and 0 <= label < len(self.classnames):
            captions = [self.classnames[label]]
        if label == -1:  # says that there is none
            label = None
        picture = row[columns.image] if image else b""
        return make_sample(key, picture, captions, label, self._folder_of(picture))

    def _folder_of(self, image: object) -> str:
        """The folder that an image's path is to lie in."""
        path = image.get("path") if isinstance(image, dict) else image
        if isinstance(path, str):
            for folder in self._folders:
                if path.startswith(os.path.join(folder, "")):
                    return os.path.realpath(folder)
        return os.path.realpath(self._folders[0])


def open_hub(spec: str, root: str, columns: Sequence[str] = ()) -> HubSource:
    """Open a data set.

    Args:
        spec: "NAME:SPLIT" with NAME a folder below `root` as `save_to_disk` writes it, or on the hub "ORG/NAME" or
            "ORG/NAME/CONFIG"; the split may be left out where there is only one.
        columns: see `tables.choose_columns`.

    Raises:
        UsageError: the package is missing or too old, or there is no such data set, configuration or split.
    """
    match = _NAME.fullmatch(spec)
    if match is None:
        raise UsageError(f"hf:{spec}: write hf:ORG/NAME, hf:ORG/NAME/CONFIG or hf:FOLDER, each with :SPLIT behind")
    package, name = _package(), match["name"]
    folder = os.path.join(root, name)
    try:
        if os.path.isdir(folder):
            found, folders = _open_folder(package, folder, match["split"]), (folder,)
        else:
            # Of the caches, the two that hold data and nothing else.
            constants = import_module("huggingface_hub.constants")
            folders = (str(package.config.HF_DATASETS_CACHE), str(constants.HF_HUB_CACHE))
            parts = name.split("/")
            found = package.load_dataset("/".join(parts[:2]), "/".join(parts[2:]) or None, split=match["split"])
    except (OSError, ValueError, RuntimeError, package.exceptions.DatasetsError) as error:
        raise UsageError(f"hf:{spec} cannot be opened: {' '.join(str(error).split())[:300]}") from error
    return HubSource(f"hf:{spec}", _one_split(found, match["split"], spec), folders, columns)


def _open_folder(package: Any, folder: str, split: str | None) -> Any:
    """What `save_to_disk` wrote, or the files of a data set as they lie on the hub."""
    saved = any(os.path.exists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
    return package.load_from_disk(folder) if saved else package.load_dataset(folder, split=split)


def _one_split(found: Any, split: str | None, spec: str) -> Any:
    """The split of that name, or the only one, where several were found."""
    if not isinstance(found, dict):
        return found
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    if split not in found:
        raise UsageError(f"hf:{spec}: which split? There are {', '.join(map(str, found))}; write hf:NAME:SPLIT")
    return found[split]


def _package() -> Any:
    package = require_package("datasets", "datasets", "reading Hugging Face data sets")
    if int(package.__version__.split(".")[0]) < _FIRST_WITHOUT_CODE:
        raise UsageError(f"datasets {package.__version__} can run a data set's own code: install datasets>=4")
    return package
