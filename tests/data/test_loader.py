"""Batches: the same whoever computes them, with bad samples replaced and nothing left running."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import triscale.data.loader as loader
from triscale.data.augment import Augmentation
from triscale.data.loader import Batch, BatchReader, batches, open_source, require_batch
from triscale.data.order import Order
from triscale.data.samples import BadSample, Sample
from triscale.data.settings import AugmentSettings, DataSettings
from triscale.data.text import Tokenizer, train_tokenizer
from triscale.errors import RunError, UsageError

NAMES = ["red circle", "blue square", "green star", "white heart"]
SETTINGS = DataSettings(
    image_size=12,
    canvas=16,
    tokens=12,
    caption_fields=("txt", "json:title"),
    caption_templates=("{c}", "a photo of a {c}"),
    caption_part_dropout=0.5,
    ids="caption",
    augment=AugmentSettings(zoom=(0.8, 1.25)),
)


class Pictures:
    """A source of PNG pictures, some of which are bad or cannot be read."""

    def __init__(self, size: int = 60, bad: Iterable[int] = (), unreadable: Iterable[int] = ()) -> None:
        self.name = "pictures"
        self.size = size
        self.bad = frozenset(bad)
        self.unreadable = frozenset(unreadable)

    def __len__(self) -> int:
        return self.size

    def read(self, index: int, *, image: bool = True) -> Sample:
        if index in self.unreadable:
            raise OSError("the disk is gone")
        if index in self.bad and index % 2:
            raise BadSample("image-too-large")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 14 + index % 9, 3), dtype=np.uint8)
        image: bytes | np.ndarray = pixels
        if index % 3:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            image = file.getvalue()
        if index in self.bad:
            image = b"\x89PNG\r\n\x1a\n and no more"
        name = NAMES[index % len(NAMES)]
        return Sample(
            key=f"k{index}", image=image, text=f"{name}, shape, {index}".encode(), metadata=b'{"title": "it"}'
        )


class Stuck(Pictures):
    """A source that dies, sleeps or has a bug in a worker, but only there."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.parent = os.getpid()

    def read(self, index: int, *, image: bool = True) -> Sample:
        if os.getpid() != self.parent:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "asleep":
                time.sleep(600)
            if self.how == "bug":
                raise RuntimeError("a bug")
        return super().read(index)


def make_reader(source: Pictures | None = None, settings: DataSettings = SETTINGS, seed: int = 3) -> BatchReader:
    sources = [source or Pictures()]
    tokenizer = Tokenizer(train_tokenizer([*NAMES, "a photo of it, shape 0123456789"], 60), settings.tokens)
    order = Order([len(source) for source in sources], seed=seed)
    return BatchReader(sources, order, tokenizer, Augmentation(settings.augment, settings.image_size), settings, seed)


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        images=torch.cat([part.images for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        ids=torch.cat([part.ids for part in parts]),
        position=parts[0].position,
        bad=tuple(record for part in parts for record in part.bad),
    )


def assert_equal(batch: Batch, other: Batch) -> None:
    assert torch.equal(batch.images, other.images)
    assert torch.equal(batch.tokens, other.tokens)
    assert torch.equal(batch.ids, other.ids)
    assert batch.position == other.position
    assert batch.bad == other.bad


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE_ROWS", 4)
    monkeypatch.setattr(loader, "RETRY_SECONDS", (0.0, 0.0, 0.0))


def test_a_batch_is_the_same_whatever_the_number_of_workers(small_pieces: None):
    reader = make_reader(Pictures(bad=range(0, 60, 5)))
    expected = [reader(range(first, first + 10)) for first in range(0, 70, 10)]
    assert sum(len(batch.bad) for batch in expected) > 5
    for workers in (0, 1, 2):
        made = list(batches(reader, start=0, batch_size=10, workers=workers, last=70))
        assert len(made) == 7
        for batch, literal in zip(made, expected, strict=True):
            assert_equal(batch, literal)


@pytest.mark.parametrize("kept", [True, False])
def test_images_are_decoded_once_where_all_can_be_kept_and_rows_are_the_same(
    kept: bool, monkeypatch: pytest.MonkeyPatch
):
    class Counting(Pictures):
        images = 0

        def read(self, index: int, *, image: bool = True) -> Sample:
            self.images += image
            sample = super().read(index)
            return sample if image else replace(sample, image=b"")

    monkeypatch.setattr(loader, "CACHE_BYTES", 60 * 3 * 16**2 - (not kept))
    source = Counting()
    reader = make_reader(source)
    first, again = (reader(range(0, 120)) for _ in range(2))
    assert source.images == (60 if kept else 240)
    assert_equal(again, first)
    assert_equal(make_reader()(range(0, 120)), first)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_a_batch_without_changing_it(world: int, small_pieces: None):
    reader = make_reader(Pictures(bad=range(0, 60, 5)))
    per_rank = [
        list(batches(reader, start=20, batch_size=11, rank=rank, world=world, last=42)) for rank in range(world)
    ]
    assert [len(batch.ids) for batch, _ in per_rank] == [11 * (r + 1) // world - 11 * r // world for r in range(world)]
    for step, parts in enumerate(zip(*per_rank, strict=True)):
        first = 20 + 11 * step
        assert_equal(joined(list(parts)), reader(range(first, first + 11)))
        assert all(part.position == first for part in parts)


def test_a_start_at_a_later_position_goes_on_where_the_earlier_run_would_be(small_pieces: None):
    reader = make_reader()
    whole = list(batches(reader, start=0, batch_size=6, last=60))
    resumed = list(batches(make_reader(), start=24, batch_size=6, last=60))
    for batch, expected in zip(resumed, whole[4:], strict=True):
        assert_equal(batch, expected)


def test_batches_end_before_the_last_position_or_never():
    reader = make_reader()
    assert [batch.position for batch in batches(reader, start=0, batch_size=6, last=23)] == [0, 6, 12]
    assert list(batches(reader, start=24, batch_size=6, last=24)) == []
    assert list(batches(reader, start=24, batch_size=6, last=3)) == []
    endless = batches(reader, start=0, batch_size=6)
    assert [batch.position for batch in islice(endless, 30)][-1] == 174


def test_rows_depend_on_seed_and_position_and_on_nothing_else():
    reader = make_reader()
    whole = reader(range(30, 50))
    assert_equal(joined([reader(range(p, p + 1)) for p in range(30, 50)]), whole)
    assert not torch.equal(make_reader(seed=4)(range(30, 50)).images, whole.images)
    later = reader(range(30 + 60, 50 + 60))  # the next epoch
    assert not torch.equal(later.images, whole.images)


def test_the_same_sample_is_drawn_with_other_augmentation_and_caption_at_another_position():
    reader = make_reader(Pictures(size=1))
    batch = reader(range(40))
    assert len({image.numpy().tobytes() for image in batch.images}) == 40
    assert len({row.numpy().tobytes() for row in batch.tokens}) > 3


def test_bad_samples_are_replaced_and_recorded_in_order():
    bad = range(0, 60, 3)
    batch = make_reader(Pictures(bad=bad))(range(60))
    literal = []
    order = Order([60], seed=3)
    for position in range(60):
        index, attempt = order[position][1], 0
        while index in bad:
            named = index % 2 == 0  # else its key could not be read either
            literal.append((f"k{index}", "image-truncated") if named else (f"#{index}", "image-too-large"))
            attempt += 1
            index = order.replacement(position, attempt)[1]
    assert [(record.key, record.reason) for record in batch.bad] == literal
    assert {record.source for record in batch.bad} == {"pictures"}
    assert len(batch.images) == 60


def test_a_source_of_bad_samples_alone_ends_the_run_instead_of_turning_for_ever():
    with pytest.raises(RunError, match="pictures: 32 bad samples in a row.*: image-too-large, image-truncated"):
        make_reader(Pictures(bad=range(60)))(range(1))


def test_a_read_that_fails_is_tried_again_and_then_named(small_pieces: None):
    class Flaky(Pictures):
        failures = 0

        def read(self, index: int, *, image: bool = True) -> Sample:
            self.failures += 1
            if self.failures % 4:
                raise OSError("timed out")
            return super().read(index)

    flaky = Flaky()
    assert_equal(make_reader(flaky)(range(5)), make_reader()(range(5)))
    assert flaky.failures == 20
    with pytest.raises(RunError, match=r"pictures: sample #\d+ could not be read in 4 tries: the disk is gone"):
        make_reader(Pictures(unreadable=range(60)))(range(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_arrives_as_it_was_raised(workers: int):
    with pytest.raises(RunError) as caught:
        list(batches(make_reader(Pictures(bad=range(60))), start=0, batch_size=4, workers=workers, last=8))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("pictures: 32 bad samples")


def test_a_worker_that_is_killed_ends_the_run_in_one_line():
    with pytest.raises(RunError, match="a data worker was killed"):
        next(batches(make_reader(Stuck("killed")), start=0, batch_size=4, workers=1))


def test_a_bug_in_a_worker_keeps_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in read.*a bug"):
        next(batches(make_reader(Stuck("bug")), start=0, batch_size=4, workers=1))


def test_closing_ends_the_workers_at_once():
    before = multiprocessing.active_children()
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    next(running)
    assert len(multiprocessing.active_children()) == len(before) + 2
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 4
    assert multiprocessing.active_children() == before


def test_batches_take_nothing_from_the_default_generator():
    state = torch.get_rng_state()
    assert len(list(batches(make_reader(), start=0, batch_size=8, last=16))) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_ids_follow_the_settings():
    reader = make_reader()
    captions = reader(range(60)).ids
    assert captions.min() >= 0
    assert 1 < len(captions.unique()) < 60
    unique = make_reader(settings=replace(SETTINGS, ids="none"))(range(8)).ids
    assert (unique == -1).all()
    with pytest.raises(RunError, match="label-missing"):
        make_reader(settings=replace(SETTINGS, ids="label"))(range(8))


def test_templates_do_not_part_positives():
    one_caption = replace(SETTINGS, caption_fields=("json:title",))
    assert len(make_reader(settings=one_caption)(range(60)).ids.unique()) == 1


def test_a_batch_of_fewer_rows_than_processes_is_refused():
    with pytest.raises(UsageError, match="raise --batch.size"):
        batches(make_reader(), start=0, batch_size=2, rank=0, world=3)


def test_too_few_samples_for_a_batch_are_refused():
    require_batch(64, 64)
    with pytest.raises(UsageError, match="63 training samples do not fill one batch of 64"):
        require_batch(63, 64)


def test_sources_are_opened_by_what_they_are_called(tmp_path: Path):
    assert open_source("scenes", "").name == "scenes:train"
    with pytest.raises(UsageError, match="no training data is named"):
        open_source("", str(tmp_path))
    with pytest.raises(UsageError, match="absent"):
        open_source("absent/*.tar", str(tmp_path))


def test_shards_make_the_same_batches_in_workers_and_list_their_bad_samples(tmp_path: Path, small_pieces: None):
    pictures = Pictures(size=20)
    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        for index in range(20):
            sample = pictures.read(index if index % 3 else index + 1)
            image = sample.image if index != 7 else b"not an image"
            assert isinstance(image, bytes) and sample.text
            for name, content in ((f"{index:03}.png", image), (f"{index:03}.txt", sample.text)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))
    source = open_source("*.tar", str(tmp_path))
    tokenizer = make_reader().tokenizer
    order = Order([len(source)], seed=0)
    reader = BatchReader([source], order, tokenizer, Augmentation(SETTINGS.augment, 12), SETTINGS, 0)
    made = list(batches(reader, start=0, batch_size=10, workers=1, last=20))
    for batch, expected in zip(made, (reader(range(10)), reader(range(10, 20))), strict=True):
        assert_equal(batch, expected)
    bad = {(record.key, record.reason) for batch in made for record in batch.bad}
    assert bad == {("007", "image-unreadable")}


def test_drawn_scenes_make_batches_too():
    reader = make_reader()
    scenes = open_source("scenes", "")
    settings = DataSettings(image_size=24, tokens=8)
    order = Order([len(scenes)], seed=0)
    tokenizer = Tokenizer(reader.tokenizer.model, 8)
    batch = BatchReader([scenes], order, tokenizer, Augmentation(settings.augment, 24), settings, 0)(range(4))
    assert batch.images.shape == (4, 3, 24, 24)
    assert batch.bad == ()


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from test_loader import make_reader
from triscale.data.loader import batches
if __name__ == "__main__":
    stopped = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    next(running)
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    positions = [next(running).position for _ in range(40)]
    print(len(stopped), positions[-1], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_outlive_a_signal_to_the_process_group_but_not_the_training_process(tmp_path: Path):
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(folder=str(Path(__file__).parent)))
    # Returns when the last process that has its output is gone: the workers too.
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert done.stdout == "2 320\n", done.stderr
    assert done.returncode == -signal.SIGKILL
