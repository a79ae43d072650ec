"""Where evaluation sets come from.

A set is written as one of

* ``scenes:NAME``, a split of the embedded data set;
* a folder in CLIP_benchmark's webdataset layout: ``test/nshards.txt`` and ``test/0.tar`` onwards beside
  ``classnames.txt`` and ``zeroshot_classification_templates.txt`` (prompts with ``{c}``, one a line), or beside a
  ``dataset_type.txt`` that says ``retrieval``, when the captions are the lines of each sample's ``.txt``;
* a folder of class folders: each folder's name is a class, the images lie in it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from triscale.data.folders import ClassFolders
from triscale.data.lists import quote, read_classnames, read_lines, read_templates
from triscale.data.samples import Source
from triscale.data.scenes import CLASSNAMES, SPLITS, TEMPLATES, Scenes
from triscale.data.shards import open_shards
from triscale.errors import UsageError
from triscale.evaluation.sets import EvaluationSet

CLASSNAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
TASK_FILE = "dataset_type.txt"
SHARD_COUNT_FILE = "test/nshards.txt"


def open_set(spec: str, root: str = "") -> EvaluationSet:
    """Open one evaluation set.

    Args:
        spec: "scenes:NAME" or a folder, relative to `root` (see the module's docstring).

    Raises:
        UsageError: no such set, or something that scoring needs is missing or wrong.
    """
    if spec.startswith("scenes:"):
        split = spec.removeprefix("scenes:")
        if split == "train" or split not in SPLITS:
            raise UsageError(f"evaluation set {quote(spec)}: there are {', '.join(s for s in SPLITS if s != 'train')}")
        return _classification(split, Scenes(split), CLASSNAMES, TEMPLATES)
    folder = Path(root, spec)
    if not folder.is_dir():
        raise UsageError(f"evaluation set {quote(str(folder))}: there is no such folder")
    if (folder / "test").is_dir() or (folder / CLASSNAMES_FILE).exists() or (folder / TASK_FILE).exists():
        return _open_webdataset(folder)
    return _open_class_folders(folder)


def open_sets(specs: Sequence[str], root: str = "") -> list[EvaluationSet]:
    """Open the sets that `specs` name, in that order; a spec may be a glob of folders, taken in order of their names.

    A folder that an earlier spec has named already is left out, so ("wds_val", "wds_*") puts one set first.

    Raises:
        UsageError: as `open_set`; also for a glob without a match and for two sets of the same name.
    """
    found: dict[str, str] = {}
    for spec in specs:
        for single in _expand(spec, root):
            identity = single if single.startswith("scenes:") else os.path.realpath(os.path.join(root, single))
            found.setdefault(identity, single)
    sets: dict[str, EvaluationSet] = {}
    for spec in found.values():
        opened = open_set(spec, root)
        if opened.name in sets:
            raise UsageError(f"two evaluation sets are named {quote(opened.name)}: rename one folder")
        sets[opened.name] = opened
    return list(sets.values())


def _expand(spec: str, root: str) -> list[str]:
    if spec.startswith("scenes:") or os.path.isdir(os.path.join(root, spec)) or not glob.has_magic(spec):
        return [spec]
    matches = sorted(m for m in glob.glob(spec, root_dir=root or None) if os.path.isdir(os.path.join(root, m)))
    if not matches:
        raise UsageError(f"evaluation sets {quote(spec)}: no folder below {quote(root or '.')} matches")
    return matches


def _classification(
    name: str, source: Source, classnames: Sequence[str], templates: Sequence[str], skipped: int = 0
) -> EvaluationSet:
    position: dict[str, int] = {}
    for classname in classnames:
        position.setdefault(classname, len(position))
    return EvaluationSet(
        name=name,
        task="classification",
        source=source,
        classnames=tuple(position),
        templates=tuple(templates),
        class_of_label=tuple(position[classname] for classname in classnames),
        skipped=skipped,
    )


def _open_webdataset(folder: Path) -> EvaluationSet:
    name = _set_name(folder)
    said = read_lines(folder / TASK_FILE) if (folder / TASK_FILE).exists() else []
    task = said[0] if said else "classification"
    if task not in ("classification", "retrieval"):
        raise UsageError(f"{quote(str(folder / TASK_FILE))}: {quote(task)} is neither 'classification' nor 'retrieval'")
    if task == "retrieval":
        source = open_shards(_shards(folder))
        return EvaluationSet(name=name, task="retrieval", source=source, skipped=len(source.skipped))
    classnames, templates = read_classnames(folder / CLASSNAMES_FILE), read_templates(folder / TEMPLATES_FILE)
    source = open_shards(_shards(folder))
    opened = _classification(name, source, classnames, templates, len(source.skipped))
    opened.check_labels()
    return opened


def _open_class_folders(folder: Path) -> EvaluationSet:
    try:
        source = ClassFolders(str(folder), _set_name(folder))
    except UsageError as fault:
        inner = [entry for entry in folder.iterdir() if (entry / SHARD_COUNT_FILE).exists()]
        hint = f"for the sets inside it, give {quote(str(folder / '*'))}" if inner else "see the documented layouts"
        raise UsageError(
            f"evaluation set {quote(str(folder))}: neither {SHARD_COUNT_FILE} nor class folders with images; {hint}"
        ) from fault
    for classname in source.classnames:
        if not classname.isprintable():
            raise UsageError(f"class folder {quote(str(folder / classname))}: its name holds unprintable characters")
    templates = read_templates(folder / TEMPLATES_FILE) if (folder / TEMPLATES_FILE).exists() else ("{c}",)
    return _classification(source.name, source, source.classnames, templates, len(source.skipped))


def _set_name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder)).removeprefix("wds_")


def _shards(folder: Path) -> list[str]:
    """The paths of test/0.tar to test/(n-1).tar, n as test/nshards.txt says."""
    count_file = folder / SHARD_COUNT_FILE
    text = "".join(read_lines(count_file)[:1])
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise UsageError(f"{quote(str(count_file))}: it must hold the number of shards, not {quote(text)}")
    shards = []
    for number in range(int(text)):
        shard = folder / "test" / f"{number}.tar"
        if not shard.is_file():
            raise UsageError(f"{quote(str(count_file))} says {int(text)} shards, but {number}.tar is not there")
        shards.append(str(shard))
    if (folder / "test" / f"{int(text)}.tar").exists():
        raise UsageError(f"{quote(str(count_file))} says {int(text)} shards, but there is a {int(text)}.tar too")
    return shards
