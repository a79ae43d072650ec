"""The verdict on towers that wait for data: when it comes, and advice that fits."""

from __future__ import annotations

import pytest

from triscale.training.starvation import FIRST_STEPS, STEPS, Starvation, verdict


def told(shares: list[float], speed: float = 100.0) -> tuple[list[tuple[int, str]], str | None]:
    """(step, line) of every verdict on steps with these shares, and the summary."""
    starvation = Starvation(lambda share, speed, steps: f"{share:.2f} {speed:.0f} {steps}")
    lines = [(step, starvation.add(share, speed)) for step, share in enumerate(shares, start=1)]
    return [(step, line) for step, line in lines if line is not None], starvation.summary()


def test_the_verdict_comes_once_when_most_recent_steps_waited() -> None:
    lines, summary = told([0.4] * 200)
    assert lines == [(FIRST_STEPS + STEPS, "0.40 100 50")]
    assert summary == f"0.40 100 {200 - FIRST_STEPS}"


def test_steps_at_the_beginning_and_a_few_slow_ones_do_not_count() -> None:
    assert told([0.9] * FIRST_STEPS + [0.0] * 100) == ([], None)
    assert told([0.0] * 100 + [0.9] * (STEPS // 2 - 1)) == ([], None)
    assert told([0.9] * (FIRST_STEPS + STEPS - 1)) == ([], None)
    assert told([0.1] * 200) == ([], None)


def test_the_verdict_comes_when_data_becomes_slow() -> None:
    ((step, _),), summary = told([0.0] * 100 + [0.5] * 100)
    assert 100 + STEPS // 2 <= step <= 100 + STEPS
    assert summary is not None and summary.startswith("0.26")  # 50 of 190 steps' worth


def test_the_verdict_tells_what_the_towers_could_take() -> None:
    line = verdict(0.25, 900.0, 50, workers=2, cores=8)
    assert line == (
        "the towers waited for data 25% of the last 50 steps: 2 workers deliver 900 samples/s, the towers could take "
        "1,200; raise --data.workers to 3 (8 cores here), see `triscale bench data RECIPE`"
    )


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"workers": 1, "cores": 8, "busy": 0.95}, "raise --data.workers to 3 (8 cores here), see"),
        ({"workers": 0, "cores": 8}, "the training process reads 100 samples/s"),
        ({"workers": 0, "cores": 8}, "raise --data.workers to 3 (8 cores here), see"),
        ({"workers": 3, "cores": 4, "busy": 0.95}, "raise --data.workers to 4 (4 cores here), and have less to decode"),
        ({"workers": 4, "cores": 4, "busy": 0.95}, "all 4 cores have a worker: have less to decode"),
        ({"workers": 4, "cores": 4, "busy": None}, "all 4 cores have a worker: have less to decode"),
        ({"workers": 4, "cores": 4, "busy": 0.2}, "workers compute for 20% of their time, the rest is storage"),
        ({"workers": 4, "cores": 4, "busy": 0.2}, "raise --data.workers to 10 for more reads at once"),
        ({"workers": 4, "cores": 4, "held": False}, "raise --memory.host-gib"),
        ({"workers": 2, "cores": 4, "processes": 8}, "2 workers in each of 8 processes deliver 100 samples/s"),
    ],
)
def test_advice_fits_the_case(numbers: dict[str, float], expected: str) -> None:
    assert expected in " ".join(verdict(0.6, 100.0, 50, **numbers).split())


@pytest.mark.parametrize("workers", [0, 2])
def test_towers_on_the_same_cores_gain_nothing_from_workers_that_compute(workers: int) -> None:
    line = verdict(0.3, 1100.0, 50, workers=workers, cores=2, busy=0.9 if workers else None, shared=True)
    assert "share 2 cores: have less to decode" in line
    assert f"where reading waits for storage raise --data.workers to {workers + 1}" in line


def test_a_step_that_only_waited_has_a_verdict_too() -> None:
    assert "100% of the last 50 steps" in verdict(1.0, 5.0, 50, workers=1, cores=2)
