"""Sets come from many places with the same meaning: were these to fail, the same images would be scored otherwise."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toy_sets
from triscale.errors import UsageError
from triscale.evaluation.datasets import SetOptions, open_own_set, open_set, open_sets
from triscale.evaluation.layouts import set_name
from triscale.evaluation.sets import EvaluationSet
from web import served

NAMES = ("ape", "bee", "cow")


def picture(path: Path, name: str = "ape") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(toy_sets.png(toy_sets.picture(name, 0)))


def labels(opened: EvaluationSet) -> list[tuple[int, ...]]:
    return [opened.read(index).labels for index in range(len(opened))]


def write_own(folder: Path, rows: list[str], classes: str = "ape\nbee\ncow\n") -> tuple[str, str, SetOptions]:
    """Pictures with a table of labels and a list of classes beside their folder."""
    (folder / "pictures").mkdir()
    for row in rows:
        picture(folder / "pictures" / row.split(",")[0])
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]) + "\n", encoding="utf-8")
    (folder / "classes.txt").write_text(classes, encoding="utf-8")
    return str(folder / "pictures"), str(folder / "labels.csv"), SetOptions(classes=str(folder / "classes.txt"))


def test_own_labels_are_names_or_numbers_and_keys_are_paths(tmp_path: Path) -> None:
    own = open_own_set(*write_own(tmp_path, ["a.png,bee", "b/c.png,2", "d.png,ape"]))
    assert (own.name, own.classnames, own.templates, own.multi_label) == ("pictures", NAMES, ("{c}",), False)
    assert labels(own) == [(1,), (2,), (0,)]
    assert [own.read(index).key for index in range(3)] == ["a.png", "b/c.png", "d.png"]


def test_several_own_labels_make_a_multi_label_set_and_an_empty_cell_is_no_label(tmp_path: Path) -> None:
    own = open_own_set(*write_own(tmp_path, ["a.png,bee|ape", "b.png,2", "c.png,", "d.png, 0 | cow "]))
    assert own.multi_label
    assert labels(own) == [(1, 0), (2,), (), (0, 2)]


def test_a_class_name_goes_before_the_number_that_it_spells_and_before_a_separator(tmp_path: Path) -> None:
    own = open_own_set(*write_own(tmp_path, ["a.png,1", "b.png,x|y", "c.png,0"], "x|y\n2\n1\n"))
    assert labels(own) == [(2,), (0,), (0,)]


def test_without_a_list_the_classes_are_the_labels_that_occur(tmp_path: Path) -> None:
    images, table, _ = write_own(tmp_path, ["a.png,emu", "b.png,ant|emu", "c.png,"])
    own = open_own_set(images, table, SetOptions())
    assert (own.classnames, labels(own)) == (("ant", "emu"), [(1,), (0, 1), ()])


def test_own_images_in_class_folders_need_no_table_and_take_names_in_any_order(tmp_path: Path) -> None:
    for name in NAMES:
        picture(tmp_path / "own" / name / "x.png")
    (tmp_path / "classes.txt").write_text("cow\nemu\nape\nbee\n")
    own = open_own_set(str(tmp_path / "own"), "", SetOptions(classes=str(tmp_path / "classes.txt")))
    assert labels(own) == [(2,), (3,), (0,)] and not own.multi_label and own.allowed is None


def test_other_names_of_as_many_class_folders_are_taken_in_their_order(tmp_path: Path) -> None:
    for name in NAMES:
        picture(tmp_path / "set" / f"n_{name}" / "x.png")
    (tmp_path / "set/classnames.txt").write_text("x\ny\nx\n")
    opened = open_set("set", str(tmp_path))
    assert (opened.classnames, opened.merged_classes, labels(opened)) == (("x", "y"), 1, [(0,), (1,), (0,)])


def test_an_own_image_that_is_missing_or_outside_is_bad_and_not_the_whole_set(tmp_path: Path) -> None:
    images, table, options = write_own(tmp_path, ["a.png,bee", "b.png,ape"])
    picture(tmp_path / "secret.png")
    (tmp_path / "pictures/b.png").unlink()
    Path(table).write_text(Path(table).read_text() + "../secret.png,cow\n")
    own = open_own_set(images, table, options)
    for index, reason in ((1, "image-missing"), (2, "image-path-outside")):
        with pytest.raises(Exception, match=reason):
            own.read(index)


OWN_FAULTS: dict[str, tuple[list[str], str, str]] = {
    "unknown names": (
        ["a.png,bea", "b.png,bea", "c.png,dog"],
        "ape\nbee\n",
        "2 labels name none of 2 classes, which count from 0: 'bea' (the first at 'a.png'; did you mean 'bee'?)",
    ),
    "out of range": (["a.png,3"], "ape\nbee\ncow\n", "3 is out of range (the first at 'a.png')"),
    "twice": (["a.png,ape", "a.png,bee"], "ape\nbee\n", "'a.png' is listed twice; several labels go in one cell"),
    "no labels": (["a.png,", "b.png,"], "ape\nbee\n", "none of its samples has a label"),
    "no rows": ([], "ape\n", "holds no rows"),
    "no classes": (["a.png,ape"], "\n", "no class names"),
    "a blank class": (["a.png,ape"], "ape\n\nbee\n", "line 2"),
    "hostile": (["a.png,[red]\x1b[2J"], "ape\n", "name none of 1 classes"),
    "endless": (["a.png," + "x" * 10_000], "ape\n", "name none of 1 classes"),
}


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_own_labels_that_do_not_go_with_the_classes_are_named_in_one_line(tmp_path: Path, fault: str) -> None:
    rows, classes, says = OWN_FAULTS[fault]
    own = write_own(tmp_path, rows, classes)
    with pytest.raises(UsageError) as error:
        open_own_set(*own)
    assert says in str(error.value)
    assert str(error.value).isprintable() and len(str(error.value)) < 1500


def test_numbers_without_class_names_are_asked_for(tmp_path: Path) -> None:
    images, table, _ = write_own(tmp_path, ["a.png,0", "b.png,1"])
    with pytest.raises(UsageError, match="no class names for its labels; name them with --classes"):
        open_own_set(images, table, SetOptions())


def test_class_folders_that_go_half_way_with_the_names_are_refused(tmp_path: Path) -> None:
    for name in NAMES:
        picture(tmp_path / "set" / name / "x.png")
    for content, says in (
        ("ape\nbea\ncow\n", "'bee'; did you mean 'bea'"),
        ("x\ny\n", "2 class names for samples of 3"),
    ):
        (tmp_path / "set/classnames.txt").write_text(content)
        with pytest.raises(UsageError, match=says):
            open_set("set", str(tmp_path))


def test_a_table_and_shards_with_labels_are_sets(tmp_path: Path) -> None:
    write_own(tmp_path, ["pictures/a.png,bee", "pictures/b.png,ape"])
    shutil.move(tmp_path / "pictures/pictures", tmp_path / "images")
    table = (tmp_path / "labels.csv").read_text().replace("pictures/", "images/")
    (tmp_path / "pets.csv").write_text(table)
    toy_sets.write_set(tmp_path / "shards", names=NAMES, labels=(2, 0))
    options = SetOptions(classes=str(tmp_path / "classes.txt"))
    pets, shards = open_sets(["pets.csv", "shards/test/*.tar"], str(tmp_path), options)
    assert (pets.name, labels(pets)) == ("pets", [(1,), (0,)])
    assert (shards.name, labels(shards)) == ("test", [(2,), (0,)])


def write_parquet(path: Path, metadata: dict[bytes, bytes]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = toy_sets.png(toy_sets.picture("ape", 0))
    table = arrow.table({"image": [image] * 3, "label": [2, 0, 1]})
    parquet.write_table(table.replace_schema_metadata(metadata), path)


def test_a_parquet_file_of_the_hub_says_its_class_names(tmp_path: Path) -> None:
    features = b'{"info": {"features": {"label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"}}}}'
    write_parquet(tmp_path / "pets.parquet", {b"huggingface": features})
    opened = open_set("pets.parquet", str(tmp_path))
    assert (opened.name, opened.classnames, labels(opened)) == ("pets", NAMES, [(2,), (0,), (1,)])
    for metadata in (
        {},
        {b"huggingface": b"{"},
        {b"huggingface": b'{"info": {"features": {"label": {"names": [1]}}}}'},
    ):
        write_parquet(tmp_path / "pets.parquet", metadata)
        with pytest.raises(UsageError, match="no class names for its labels"):
            open_set("pets.parquet", str(tmp_path))


def test_a_data_set_of_the_hub_has_its_features_names_whether_saved_or_as_files(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    datasets.disable_progress_bars()
    names = datasets.ClassLabel(names=list(NAMES))
    features = datasets.Features({"image": datasets.Image(), "label": names})
    image = {"bytes": toy_sets.png(toy_sets.picture("ape", 0)), "path": None}
    rows = datasets.Dataset.from_dict({"image": [image] * 4, "label": [2, 0, -1, 1]}, features=features)
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files/data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "files/data/test-00000-of-00001.parquet")
    for folder in ("saved", "files"):
        opened = open_set(f"hf:{folder}:test", str(tmp_path))
        assert (opened.name, opened.classnames, opened.multi_label) == (f"{folder}-test", NAMES, True)
        assert labels(opened) == [(2,), (0,), (), (1,)]


def test_names_of_sets_come_from_their_places() -> None:
    assert set_name("/data/wds_birds/") == "birds"
    assert set_name("https://hub/datasets/clip-benchmark/wds_cifar10/resolve/main") == "cifar10"
    assert set_name("s3://bucket/sets/wds_cars") == "cars"


aiohttp = pytest.mark.skipif(not pytest.importorskip("aiohttp"), reason="fetching over http needs aiohttp")


@aiohttp
@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")
def test_a_set_behind_a_url_is_the_one_in_the_folder(tmp_path: Path) -> None:
    toy_sets.write_set(tmp_path / "wds_birds", labels=range(12), shards=11)
    (tmp_path / "wds_birds/slices.json").write_text('{"first": ["0000"]}')
    local = open_set("wds_birds", str(tmp_path))
    with served(tmp_path) as web:
        remote = open_set(f"{web.url}/wds_birds", options=SetOptions(cache=str(tmp_path / "cache")))
        remote = pickle.loads(pickle.dumps(remote))
        same = ("name", "classnames", "templates", "class_of_label", "skipped", "slices", "multi_label")
        assert [getattr(remote, name) for name in same] == [getattr(local, name) for name in same]
        assert [remote.read(index).key for index in range(12)] == [local.read(index).key for index in range(12)]
        assert labels(remote) == labels(local)
        retrieval = toy_sets.write_retrieval_set(tmp_path / "pairs", ["one", "two"])
        found = open_set(f"{web.url}/{retrieval.name}/", options=SetOptions(cache=str(tmp_path / "cache")))
        assert (found.name, found.task, found.read(1).captions) == ("pairs", "retrieval", ("two",))


REMOTE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "count missing": (lambda folder: (folder / "test/nshards.txt").unlink(), "there is no test/nshards.txt"),
    "names missing": (lambda folder: (folder / "classnames.txt").unlink(), "classnames.txt': there is no such file"),
    "too many shards": (lambda folder: (folder / "test/nshards.txt").write_text("999999999"), "at most 100000"),
    "shard no tar": (lambda folder: (folder / "test/0.tar").write_bytes(b"no tar"), "0.tar"),
    "names too few": (lambda folder: (folder / "classnames.txt").write_text("a\n"), "out of range"),
}


@aiohttp
@pytest.mark.filterwarnings("ignore:Unclosed:ResourceWarning")
@pytest.mark.parametrize("fault", REMOTE_FAULTS)
def test_a_set_behind_a_url_that_lacks_something_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    folder = toy_sets.write_set(tmp_path / "web/wds_birds", labels=(3, 4))
    breaks, says = REMOTE_FAULTS[fault]
    breaks(folder)
    with served(tmp_path / "web") as web, pytest.raises(UsageError) as error:
        open_set(f"{web.url}/wds_birds", options=SetOptions(cache=str(tmp_path / "cache")))
    assert says in str(error.value) and "\n" not in str(error.value)
