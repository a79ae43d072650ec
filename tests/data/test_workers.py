"""Workers that die or stall: named with what they read, started again once, and nothing lost or repeated."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pictures import SETTINGS, Pictures, assert_equal, make_reader
from triscale.data import loader
from triscale.data.loader import batches
from triscale.data.processes import note
from triscale.data.rows import MAX_ATTEMPTS
from triscale.data.samples import Sample
from triscale.data.workers import Watch, run
from triscale.errors import RunError

STALL_SECONDS = 1.5


class Failing(Pictures):
    """A source whose sample `index` ends the first `times` workers that read it, or keeps them."""

    def __init__(self, folder: Path, how: str, index: int = 17, times: int = 1, bad: Sequence[int] = ()) -> None:
        super().__init__(bad=bad)
        self.folder, self.how, self.index, self.times = folder, how, index, times
        self.parent = os.getpid()
        os.mkfifo(folder / "pipe")

    def read(self, index: int, *, image: bool = True) -> Sample:
        if index == self.index and os.getpid() != self.parent:
            met = len(list(self.folder.glob("met*")))
            if met < self.times:
                (self.folder / f"met{met}").touch()
                if self.how == "reads a pipe that nobody writes to":
                    (self.folder / "pipe").read_bytes()
                os.kill(os.getpid(), {"is killed": signal.SIGKILL, "is stopped": signal.SIGSTOP}[self.how])
                time.sleep(60)
        return super().read(index, image=image)


class Told:
    """Lines that were reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def watch(self) -> Watch:
        return Watch(stall_seconds=STALL_SECONDS, report=self.lines.append)


@pytest.fixture(autouse=True)
def nothing_left_running() -> object:
    before = multiprocessing.active_children()
    yield
    assert multiprocessing.active_children() == before


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "PIECE_ROWS", 4)


HOW = ["is killed", "is stopped", "reads a pipe that nobody writes to"]


@pytest.mark.parametrize("how", HOW)
def test_a_worker_that_fails_is_named_and_the_batches_are_those_of_an_undisturbed_run(
    how: str, tmp_path: Path, small_pieces: None
) -> None:
    told, reader = Told(), make_reader(Failing(tmp_path, how))
    expected = [make_reader()(range(first, first + 10)) for first in range(0, 70, 10)]
    with closing(batches(reader, start=0, batch_size=10, workers=2, last=70, watch=told.watch())) as made:
        for batch, literal in zip(made, expected, strict=True):
            assert_equal(batch, literal)
    (line,) = told.lines
    assert "\n" not in line and ("was killed by SIGKILL, for want of memory" in line) == (how == "is killed")
    assert ("has stalled for 1.5 s" in line) == (how != "is killed")
    assert "was reading sample 17 of pictures, in pictures.file" in line
    # The first position that was not delivered: that of the piece which the failing row belongs to, or one before it.
    row = next(position for position in range(70) if reader.order[position] == (0, 17))
    restarted = int(line.rpartition("started again at position ")[2])
    assert restarted <= row and (tmp_path / "met0").exists()


@pytest.mark.parametrize("how", HOW[::2])
def test_the_second_failure_ends_the_run_in_one_line(how: str, tmp_path: Path, small_pieces: None) -> None:
    told, reader = Told(), make_reader(Failing(tmp_path, how, times=2))
    made = batches(reader, start=0, batch_size=10, workers=1, last=70, watch=told.watch())
    with closing(made), pytest.raises(RunError, match=r"sample 17 of pictures.*second time") as caught:
        list(made)
    assert "\n" not in str(caught.value) and len(told.lines) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_may_fail_in_the_middle_of_what_it_sends(number: signal.Signals) -> None:
    """As most do that fail: one that has made more than a pipe takes waits there until it is wanted."""
    told, settings = Told(), replace(SETTINGS, image_size=64, canvas=64)
    reader = make_reader(settings=settings)
    with closing(batches(reader, start=0, batch_size=32, workers=1, watch=told.watch())) as made:
        assert_equal(next(made), reader(range(32)))
        time.sleep(1.0)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, number)
        for first in range(32, 160, 32):
            assert_equal(next(made), reader(range(first, first + 32)))
    assert len(told.lines) == 1


class Slow:
    """Gives each range, every number of it after some time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, numbers: range) -> list[int]:
        for number in numbers:
            note(number)
            time.sleep(self.seconds)
        return list(numbers)


def test_a_worker_that_is_slow_but_goes_on_has_not_stalled() -> None:
    told = Told()
    assert list(run(Slow(0.5), [range(5), range(5, 8)], workers=1, ahead=2, watch=told.watch())) == [
        [0, 1, 2, 3, 4],
        [5, 6, 7],
    ]
    assert told.lines == []


def test_whoever_waits_is_called_now_and_then() -> None:
    beats: list[float] = []
    watch = Watch(beat=lambda: beats.append(time.monotonic()), beat_seconds=0.2)
    assert list(run(Slow(1.5), [range(1)], workers=1, ahead=2, watch=watch)) == [[0]]
    assert len(beats) >= 5


def test_without_workers_a_read_that_does_not_return_is_named() -> None:
    told = Told()
    watch = Watch(stall_seconds=0.2, report=told.lines.append, describe=lambda number: f"was reading row {number}")
    assert list(run(Slow(0.5), [range(7, 8)], workers=0, ahead=0, watch=watch)) == [[7]]
    (line,) = told.lines
    assert line.startswith("the training process has made no batch for 0.2 s: it was reading row 7;")
    assert list(run(Slow(0.0), [range(7, 8)], workers=0, ahead=0, watch=watch)) == [[7]]
    time.sleep(0.4)
    assert len(told.lines) == 1


def test_what_stands_in_for_a_bad_sample_is_named_itself() -> None:
    reader = make_reader()
    number, index = reader.order.replacement(5, 3)
    assert number == 0 and index != reader.order[5][1]
    assert reader.under_way(5 * MAX_ATTEMPTS + 3) == f"was reading sample {index} of pictures, in pictures.file"


def test_several_workers_that_die_at_once_are_one_failure(small_pieces: None) -> None:
    told, reader = Told(), make_reader()
    with closing(batches(reader, start=0, batch_size=8, workers=3, watch=told.watch())) as made:
        next(made)
        for worker in multiprocessing.active_children():
            worker.kill()
        for first in range(8, 80, 8):
            assert_equal(next(made), reader(range(first, first + 8)))
    assert len(told.lines) == 1


def test_workers_end_with_a_generator_that_was_never_begun() -> None:
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    del running


UNCLOSED = """
import sys
sys.path.insert(0, {folder!r})
from pictures import make_reader
from triscale.data.loader import batches
if __name__ == "__main__":
    running = batches(make_reader(), start=0, batch_size=8, workers=2)
    kept = [running, next(running)]
    kept.append(kept)
    sys.exit(3)
"""


def test_a_program_ends_that_did_not_close_its_batches(tmp_path: Path) -> None:
    script = tmp_path / "unclosed.py"
    script.write_text(UNCLOSED.format(folder=str(Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr == ""


def test_results_of_any_size_come_whole(small_pieces: None) -> None:
    sizes = [range(0, 0), range(0, 1), range(0, 8191), range(0, 8192), range(0, 3_000_000)]
    for made, wanted in zip(run(Counting(), sizes, workers=2, ahead=4), sizes, strict=True):
        assert np.array_equal(made, np.arange(wanted.stop))


class Counting:
    """Gives the numbers of a range as an array."""

    def __call__(self, numbers: range) -> np.ndarray:
        return np.arange(numbers.start, numbers.stop)


def test_the_call_of_a_bug_is_no_failure_of_a_worker() -> None:
    makes: Callable[[range], list[int]] = Buggy()
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug"):
        list(run(makes, [range(1)], workers=1, ahead=2))


class Buggy:
    def __call__(self, numbers: range) -> list[int]:
        raise ValueError("a bug")
