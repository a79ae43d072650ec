"""`triscale bench data`: phases add up to the time that passed, and the rates are those of what was made."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pictures import SETTINGS, Pictures, assert_equal, make_reader
from triscale.bench import data
from triscale.bench.measure import this_machine
from triscale.cli import main
from triscale.data.samples import Sample

CROPPED = replace(SETTINGS, augment=replace(SETTINGS.augment, crop_area=(0.5, 1.0)))


class Slow(Pictures):
    """Reading a sample takes four milliseconds."""

    def read(self, index: int, *, image: bool = True) -> Sample:
        time.sleep(0.004)
        return super().read(index, image=image)


def test_time_counts_for_the_innermost_phase_and_all_of_it_for_one() -> None:
    class Owner:
        def outer(self) -> None:
            time.sleep(0.02)
            self.inner()

        def inner(self) -> str:
            time.sleep(0.05)
            return "seen"

    owner, seen = Owner(), []
    clock = data.Clock("collate")
    clock.time_calls(owner, "inner", "decode", seen.append)
    clock.time_calls(owner, "outer", "read")
    began = time.perf_counter()
    owner.outer()
    time.sleep(0.03)
    clock.lap()
    passed = time.perf_counter() - began
    assert seen == ["seen"]
    assert clock.seconds["read"] >= 0.02 and clock.seconds["decode"] >= 0.05 and clock.seconds["collate"] >= 0.03
    assert sum(clock.seconds.values()) == pytest.approx(passed, abs=0.01)
    assert clock.seconds["read"] < 0.05, "what is spent in calls within is not counted twice"


def test_a_call_that_fails_leaves_its_phase() -> None:
    class Owner:
        def fail(self) -> None:
            raise ValueError

    owner, clock = Owner(), data.Clock("collate")
    clock.time_calls(owner, "fail", "read")
    with pytest.raises(ValueError):
        owner.fail()
    time.sleep(0.02)
    clock.lap()
    assert clock.seconds["collate"] >= 0.02 > clock.seconds["read"]


@pytest.mark.parametrize("settings", [SETTINGS, CROPPED])
def test_where_time_goes_in_one_process(settings) -> None:
    found = data.in_process(make_reader(Slow(size=1000), settings), 16, 0.3)
    assert found.images % 16 == 0 and found.images >= 16
    assert found.phase_seconds["read"] >= 0.004 * found.images
    assert all(seconds > 0 for seconds in found.phase_seconds.values())
    assert sum(found.phase_seconds.values()) == pytest.approx(found.wall_seconds)
    assert found.wall_seconds >= 0.3
    assert 0 < found.cpu_seconds < found.wall_seconds, "sleeping is no processor time"
    assert found.read_bytes > found.images * 20 * 14 * 3 / 2


def test_being_timed_changes_no_row() -> None:
    timed = make_reader(settings=CROPPED)
    data.in_process(timed, 8, 0.01)
    assert_equal(timed(range(20)), make_reader(settings=CROPPED)(range(20)))


def test_workers_deliver_what_they_deliver() -> None:
    found = data.with_workers(make_reader(Slow(size=1000)), 16, 1, 0.3)
    assert found.workers == 1 and found.images % 16 == 0
    assert 0 < found.wait_seconds <= found.wall_seconds
    assert found.images_per_second < 1 / 0.004


def report(needs: float | None, workers: int) -> data.DataReport:
    """Of 100 images a second in one process, and as many of each worker."""
    seconds = dict.fromkeys(data.PHASES, 0.2)
    one = data.InProcess(images=100, wall_seconds=1.0, cpu_seconds=0.5, phase_seconds=seconds, read_bytes=10**6)
    many = (
        data.Delivered(workers=workers, images=100 * workers, wall_seconds=1.0, wait_seconds=0.9) if workers else None
    )
    machine = this_machine(torch.device("cpu"))
    return data.DataReport(recipe="toy", machine=machine, in_process=one, delivered=many, needs=needs)


@pytest.mark.parametrize(
    ("needs", "workers", "line"),
    [
        (None, 2, "a core feeds a step of 100 samples/s"),
        (250.0, 0, "a step of 250 samples/s is fed by 3 cores; without workers the step waits"),
        (400.0, 2, "a step of 400 samples/s is fed by 4 cores; with 2 workers it waits 50% of the time"),
        (90.0, 1, "a step of 90 samples/s is fed by 1 core; with 1 worker it never waits"),
    ],
)
def test_the_verdict(needs: float | None, workers: int, line: str) -> None:
    assert line in report(needs, workers).verdict()
    assert report(needs, workers).images_per_second_core == 200


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "data.json"
    options = ["--seconds", "0.2", "--needs=1000", "--json", str(figures), "--data.workers", "1", "--batch.size", "32"]
    assert main(["bench", "data", "scenes", *options]) == 0
    out = capsys.readouterr().out
    values = json.loads(figures.read_text())
    assert values["recipe"] == "scenes" and values["delivered"]["workers"] == 1
    assert set(values["in_process"]["phase_seconds"]) == set(data.PHASES)
    assert values["images_per_second"] > 0 and values["delivered_images_per_second"] > 0 and values["cores"] >= 1
    for phase in (*data.PHASES, "wait"):
        assert phase in out
    assert "a step of 1,000 samples/s is fed by" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "must be above 0"),
        (["--needs", "-3"], "must be above 0"),
        (["--needs", "many"], "--needs 'many' is not a number"),
    ],
)
def test_a_number_that_cannot_be_is_bad_usage(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "data", "scenes", *options]) == 2
    assert message in capsys.readouterr().err
