"""Batches are the same whoever makes them, made as training makes them, and a worker that dies costs nothing."""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import toy_sets
from triscale.data.canvases import Canvases
from triscale.data.decode import decode_image
from triscale.data.resize import fit_square
from triscale.data.scenes import Scenes
from triscale.data.settings import DataSettings, Fit
from triscale.errors import UsageError
from triscale.evaluation.datasets import open_set
from triscale.evaluation.encoder import Batch, Encoder, read_batches
from triscale.evaluation.sets import EvaluationSet
from triscale.randomness import generator

LABELS = tuple(n % 12 for n in range(150))


def encoder(workers: int, size: int = 6, fit: Fit = "pad", batch_size: int = 40) -> Encoder:
    return dataclasses.replace(
        toy_sets.encoder(batch_size), workers=workers, image_size=size, fit=fit, image=pytest.fail, text=pytest.fail
    )


def same(one: list[Batch], other: list[Batch]) -> bool:
    fields = [each.name for each in dataclasses.fields(Batch)]
    pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in fields]
    return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)


def sets_of(folder: Path) -> list[EvaluationSet]:
    """Of images and captions on disk, and of arrays that are drawn."""
    toy_sets.write_set(folder / "wds_images", labels=LABELS, bad=(0, 35, 36, 149), shards=2)
    toy_sets.write_retrieval_set(folder / "wds_pictures", [f"kind {n}\nagain {n}" for n in range(70)], bad=(3,))
    drawn = dataclasses.replace(open_set("scenes:val"), source=Scenes("val", samples=90))
    return [open_set(str(folder / "wds_images")), open_set(str(folder / "wds_pictures")), drawn]


def test_batches_are_bitwise_the_same_with_any_number_of_workers(tmp_path: Path) -> None:
    for each in sets_of(tmp_path):
        alone = list(read_batches(each, encoder(0)))
        assert sum(map(len, alone)) + sum(sum(batch.bad.values()) for batch in alone) == len(each)
        for workers in (1, 3):
            assert same(alone, list(read_batches(each, encoder(workers)))), each.name


def photograph(number: int) -> bytes:
    rng = generator("photograph", number)
    pixels = rng.integers(0, 255, (4, 5, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((310, 240), Image.Resampling.BICUBIC).save(file, "jpeg", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_photograph_reaches_the_towers_as_in_training(tmp_path: Path, fit: Fit) -> None:
    (tmp_path / "set/a").mkdir(parents=True)
    (tmp_path / "set/a/1.jpg").write_bytes(photograph(1))
    examples = open_set(str(tmp_path / "set"))
    (batch,) = read_batches(examples, encoder(0, 32, fit))
    canvases = Canvases(DataSettings(image_size=32, canvas=32, fit=fit), 1)
    (square,) = canvases.squares(examples.source.read(0), (0, 0), [None])
    np.testing.assert_array_equal(batch.pixels[0].transpose(1, 2, 0), square)
    whole = fit_square(decode_image(photograph(1)), 32, fit)
    assert 0 < np.abs(square.astype(int) - whole).mean() < 3, "it is decoded at a fraction of its size, and looks alike"


def test_a_killed_worker_changes_nothing_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = sets_of(tmp_path)[0]
    expected = list(read_batches(examples, encoder(0, batch_size=8)))
    found = []
    before = {process.pid for process in multiprocessing.active_children()}
    for batch in read_batches(examples, encoder(1, batch_size=8)):
        found.append(batch)
        if len(found) == 2:
            (worker,) = {process.pid for process in multiprocessing.active_children()} - before
            assert worker is not None
            os.kill(worker, signal.SIGKILL)
    assert same(expected, found)
    assert "killed by SIGKILL" in capsys.readouterr().err


def test_a_wrong_label_that_a_worker_meets_is_a_line_for_the_user(tmp_path: Path) -> None:
    labels = [n % 12 for n in range(600)]
    toy_sets.write_set(tmp_path / "set", labels=labels)
    opened = open_set(str(tmp_path / "set"))
    opened = dataclasses.replace(opened, class_of_label=tuple(range(11)), classnames=opened.classnames[:11])
    with pytest.raises(UsageError, match="label 11 is out of range"):
        list(read_batches(opened, encoder(1)))


def test_readers_end_when_nobody_wants_more(tmp_path: Path) -> None:
    before = {process.pid for process in multiprocessing.active_children()}
    batches = read_batches(sets_of(tmp_path)[0], encoder(2))
    next(batches)
    batches.close()
    assert {process.pid for process in multiprocessing.active_children()} <= before
