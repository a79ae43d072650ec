"""Hugging Face data sets: were these to fail, images would be taken from elsewhere, or a stranger's code be run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from triscale.data import hub
from triscale.data.hub import open_hub
from triscale.data.samples import BadSample, Sample
from triscale.errors import UsageError

datasets: Any = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def saved(folder: Path) -> Path:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "other": datasets.Value("int64"),
        }
    )
    images = [{"bytes": PNG + b"%d" % i, "path": "../x.png"} for i in range(3)]
    rows = {"image": images, "label": [0, 1, -1], "other": [5] * 3}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(folder)
    return folder


def test_a_saved_data_set_is_read_undecoded_with_its_class_names_for_captions(tmp_path: Path) -> None:
    saved(tmp_path / "pets")
    source = open_hub("pets:train", str(tmp_path))
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 3 and source.name == "hf:pets:train"
    assert [source.read(index) for index in range(3)] == [
        Sample(key="hf:pets:train#0", image=PNG + b"0", text=b"cat", label=b"0"),
        Sample(key="hf:pets:train#1", image=PNG + b"1", text=b"dog", label=b"1"),
        Sample(key="hf:pets:train#2", image=PNG + b"2"),
    ]
    assert source.read(0, image=False) == Sample(key="hf:pets:train#0", image=b"", text=b"cat", label=b"0")


def test_a_path_in_a_saved_data_set_must_not_leave_its_folder(tmp_path: Path) -> None:
    rows = {"filepath": ["../secret", "within.jpg"], "text": ["a", "b"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "paths")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "paths" / "within.jpg").write_bytes(b"picture")
    source = open_hub("paths", str(tmp_path))
    assert source.read(1) == Sample(key="hf:paths#1", image=b"picture", text=b"b")
    with pytest.raises(BadSample, match="image-path-outside"):
        source.read(0)


def test_the_split_is_asked_for_where_there_are_several(tmp_path: Path) -> None:
    saved(tmp_path / "pets")
    assert len(open_hub("pets:test", str(tmp_path))) == 1
    for spec in ("pets", "pets:dev"):
        with pytest.raises(UsageError, match="which split.*train, test"):
            open_hub(spec, str(tmp_path))


def test_what_is_not_there_is_one_line(tmp_path: Path) -> None:
    for spec in ("no-such/data:train", "no-such/data/config", ":x", ""):
        with pytest.raises(UsageError) as said:
            open_hub(spec, str(tmp_path))
        assert "\n" not in str(said.value) and f"hf:{spec}" in str(said.value)


def test_a_data_set_that_is_a_script_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    for spec in ("evil", "./evil/evil.py:train"):
        with pytest.raises(UsageError):
            open_hub(spec, "")
    assert not (tmp_path / "ran").exists()


def test_a_version_that_could_run_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UsageError, match="install datasets>=4"):
        open_hub("a/b", "")


def test_the_caches_that_paths_may_lie_in_hold_no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened = datasets.Dataset.from_dict({"image": [str(tmp_path / "token")], "text": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: opened)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "token").write_bytes(b"secret")
    with pytest.raises(BadSample, match="image-path-outside"):
        hub.open_hub("a/b:train", "").read(0)
