"""Ids read beforehand are those that training gives, and files of them hold nothing else."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pictures import SETTINGS, Pictures, make_reader, rules
from triscale.config import RunConfig
from triscale.data.captions import CaptionRules
from triscale.data.distinct import BAD, NO_ID
from triscale.data.ids import IdFile, ids_path, read_ids, write_ids
from triscale.data.samples import Sample
from triscale.data.settings import DataSettings
from triscale.errors import UsageError
from triscale.validation import validate

ONE_CAPTION = replace(SETTINGS, caption_fields=("txt",), caption_part_dropout=0.0)


class Labelled(Pictures):
    """Pictures with labels, of which some are missing."""

    def file(self, index: int) -> str:
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        label = None if index % 7 == 0 else str(index % 5).encode()
        return replace(super().read(index, image=image), label=label)


@pytest.mark.parametrize("ids", ["caption", "label"])
def test_ids_read_beforehand_are_those_that_training_gives(ids: str) -> None:
    settings = replace(ONE_CAPTION, ids=ids)
    source = Labelled(bad=[11])
    known = read_ids(source, rules(settings), range(len(source)))
    reader = make_reader(source, settings)
    for position in range(120):
        sample = reader.order[position][1]
        row = reader.rows(range(position, position + 1))[0]
        assert row.bad if known[sample] == BAD else (row.bad or row.id == known[sample])
    missing = np.arange(60) % 7 == 0 if ids == "label" else np.zeros(60, dtype=bool)
    missing[11] = True  # its text cannot be had either
    assert np.array_equal(known == BAD, missing)
    assert np.array_equal(read_ids(source, rules(settings), range(20, 40)), known[20:40])


def test_samples_without_ids_are_not_read() -> None:
    ids = read_ids(Pictures(unreadable=range(60)), CaptionRules(), range(60))
    assert np.array_equal(ids, np.full(60, NO_ID))


def test_a_sample_of_which_one_of_several_captions_is_drawn_has_no_id_beforehand() -> None:
    with pytest.raises(UsageError, match="pictures: k0 has 2 captions") as refused:
        read_ids(Pictures(), rules(SETTINGS), range(3))
    assert "\n" not in str(refused.value)


def test_a_file_of_ids_gives_them_back_and_sends_its_path_alone(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 2**62, 10_000)
    path = ids_path(tmp_path / "ids", Pictures(), CaptionRules(ids="label"))
    write_ids(path, ids)
    write_ids(path, ids)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    file = IdFile(path)
    assert len(file) == 10_000
    assert np.array_equal(file[np.array([7, 9999, 7])], ids[[7, 9999, 7]])
    assert len(pickle.dumps(file)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(file))[np.arange(10_000)], ids)


def test_other_rules_and_other_lengths_have_other_files(tmp_path: Path) -> None:
    kinds = [
        CaptionRules(ids="label"),
        CaptionRules(ids="caption"),
        CaptionRules(ids="caption", fields=("json:a",)),
        CaptionRules(ids="caption", fields=("cls",), classnames=("a", "b")),
        CaptionRules(ids="caption", fields=("cls",), classnames=("a", "c")),
        CaptionRules(ids="label", source=1),
    ]
    paths = {ids_path(tmp_path, Pictures(size), each) for each in kinds for size in (60, 61)}
    assert len(paths) == 12


@pytest.mark.parametrize("content", [b"", b"no ids", b"\x80\x04N."])
def test_a_damaged_file_of_ids_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "0.npy"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="0.npy"):
        IdFile(path)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (DataSettings(train=("a",), distinct_ids=True), "needs ids"),
        (
            DataSettings(train=("a",), distinct_ids=True, ids="caption", caption_part_dropout=0.1),
            "--data.caption-part-dropout 0",
        ),
    ],
)
def test_distinct_ids_without_fixed_ids_are_refused(data: DataSettings, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        validate(RunConfig(data=data))
    validate(RunConfig(data=replace(data, ids="label", train=("a ids=label", "b ids=none"))))
