"""Bad samples: counted over everything, listed once, never lost, and the reason why a run stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ranks import run_ranks
from triscale.data.quarantine import BadRecord, Quarantine, exceeds, gather_records
from triscale.errors import RunError


def record(key: str, reason: str = "image-truncated") -> BadRecord:
    return BadRecord(source="shards", key=key, reason=reason)


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "quarantine.jsonl"


def test_a_sample_is_listed_once_for_each_reason_and_counted_for_each_draw(path: Path):
    quarantine = Quarantine(path, 0.5)
    quarantine.add([record("a"), record("b"), record("a")], drawn=10)
    quarantine.add([record("a"), record("a", "caption-empty")], drawn=10)
    assert lines(path) == [
        {"source": "shards", "key": "a", "reason": "image-truncated"},
        {"source": "shards", "key": "b", "reason": "image-truncated"},
        {"source": "shards", "key": "a", "reason": "caption-empty"},
    ]
    assert quarantine.bad == {"image-truncated": 4, "caption-empty": 1}
    assert quarantine.fraction == 5 / 25


def test_no_file_is_made_for_nothing_or_without_a_path(path: Path):
    Quarantine(path, 0.05).add([], drawn=100)
    Quarantine(None, 0.05).add([record("a")], drawn=100)
    assert not path.exists()


def test_a_resumed_run_keeps_its_counts_and_repeats_no_line(path: Path):
    first = Quarantine(path, 0.05)
    first.add([record("a"), record("b", "caption-empty")], drawn=100)
    state = json.loads(json.dumps(first.state_dict()))
    first.add([record("c")], drawn=100)  # after the checkpoint: drawn again by the resumed run
    resumed = Quarantine(path, 0.05)
    resumed.load_state_dict(state)
    resumed.add([record("c"), record("a")], drawn=100)
    assert [line["key"] for line in lines(path)] == ["a", "b", "c"]
    assert resumed.bad == {"image-truncated": 3, "caption-empty": 1}
    assert resumed.drawn == 204


def test_a_line_that_a_kill_cut_off_does_not_spoil_the_next(path: Path):
    Quarantine(path, 0.05).add([record("a"), record("b")], drawn=100)
    path.write_bytes(path.read_bytes()[:-10])
    Quarantine(path, 0.05).add([record("b"), record("a")], drawn=100)
    assert [line["key"] for line in lines(path)] == ["a", "b"]


def test_a_few_early_bad_samples_do_not_stop_a_run():
    quarantine = Quarantine(None, 0.05)
    quarantine.add([record(str(i)) for i in range(100)], drawn=800)
    with pytest.raises(RunError):
        quarantine.check(minimum_draws=1)  # at the end of a short run it is judged all the same


def test_too_many_bad_samples_stop_the_run_in_one_line_that_says_all(path: Path):
    quarantine = Quarantine(path, 0.05)
    quarantine.add([record(str(i)) for i in range(40)] + [record("x", "caption-empty")] * 9, drawn=951)
    with pytest.raises(RunError) as caught:
        quarantine.add([record("y", "caption-empty")] * 11, drawn=0)
    message = str(caught.value)
    assert "5.9% of 1011" in message
    assert "40 image-truncated, 20 caption-empty" in message
    assert "--data.max-bad 0.05" in message
    assert str(path) in message
    assert "\n" not in message
    assert lines(path)[-1]["key"] == "y"  # what stopped the run is on file


def test_exactly_the_limit_is_not_more_than_the_limit():
    assert not exceeds(5, 100, 0.05)
    assert exceeds(6, 100, 0.05)
    assert not exceeds(0, 0, 0.0)
    assert exceeds(1, 1000, 0.0)


def test_hostile_keys_stay_on_their_line(path: Path):
    keys = ["a\nb", '"}', "\u2028", "\udcff", "\x1b[31m"]
    Quarantine(path, 1.0).add([record(key) for key in keys], drawn=10)
    assert [line["key"] for line in lines(path)] == keys
    Quarantine(path, 1.0).add([record(key) for key in keys], drawn=10)
    assert len(lines(path)) == len(keys)


def test_a_file_that_cannot_be_written_ends_the_run_in_one_line(tmp_path: Path):
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*quarantine.jsonl"):
        Quarantine(tmp_path / "run" / "quarantine.jsonl", 0.05).add([record("a")], drawn=1)


def _gathered(rank: int, world: int) -> list[list[str]]:
    mine = [record(f"{rank}/{i}-é\n\udcff", "caption-empty") for i in range(2 * rank)]
    return [
        [bad.source, bad.key, bad.reason] for gathered in (gather_records(mine), gather_records([])) for bad in gathered
    ]


def test_every_rank_learns_of_the_bad_samples_of_all():
    results = run_ranks(_gathered, 2)  # rank 0 has none
    expected = [["shards", f"1/{i}-é\n\udcff", "caption-empty"] for i in range(2)]
    assert results == [expected] * 2
    assert gather_records([record("a")]) == [record("a")]
