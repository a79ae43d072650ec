"""What the schedules say, step by step."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest

from triscale.assembly import describe_optimizer, make_schedule, peak_rate
from triscale.config import RunConfig
from triscale.training.schedule import SCALES, SCHEDULES, learning_rate
from triscale.training.settings import BatchSettings, OptimSettings, TrainSettings


def test_the_rate_warms_up_linearly_to_its_peak_and_falls_as_a_cosine_to_zero() -> None:
    rates = [learning_rate(step, peak=2.0, warmup_steps=4, total_steps=104) for step in range(105)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[54] == pytest.approx(1.0)  # half of the cosine
    assert rates[29] == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert rates[104] == pytest.approx(0.0, abs=1e-15) and rates[103] > 0.0
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))


@pytest.mark.parametrize("total_steps", [1, 3, 4])
def test_a_run_shorter_than_its_warmup_has_a_rate_for_every_step(total_steps: int) -> None:
    rates = [learning_rate(step, peak=1.0, warmup_steps=4, total_steps=total_steps) for step in range(total_steps)]
    assert rates == [0.25 * (step + 1) for step in range(total_steps)]


def test_the_default_is_bit_for_bit_the_cosine() -> None:
    for step in range(7, 200):
        progress = (step - 7) / (200 - 7)
        rate = learning_rate(step, peak=3e-4, warmup_steps=7, total_steps=200)
        assert rate == 3e-4 * 0.5 * (1.0 + math.cos(math.pi * progress))


def rates(schedule: str, cooldown_steps: int = 0) -> list[float]:
    return [
        learning_rate(step, peak=2.0, warmup_steps=4, total_steps=20, schedule=schedule, cooldown_steps=cooldown_steps)
        for step in range(20)
    ]


def test_the_settings_name_the_schedules_and_scales_that_there_are() -> None:
    hints = get_type_hints(OptimSettings)
    assert get_args(hints["schedule"]) == tuple(SCHEDULES) and get_args(hints["scale"]) == tuple(SCALES)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_begins_with_the_same_warmup_and_never_reaches_zero(schedule: str) -> None:
    assert rates(schedule)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert min(rates(schedule, cooldown_steps=3)) > 0


def test_linear_constant_and_inverse_square_root() -> None:
    assert rates("constant")[4:] == [2.0] * 16
    assert rates("linear")[4:] == pytest.approx([2.0 * (20 - step) / 16 for step in range(4, 20)])
    assert rates("rsqrt")[4:] == pytest.approx([2.0 * math.sqrt(4 / step) for step in range(4, 20)])


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_cooldown_takes_the_last_steps_linearly_to_zero(schedule: str) -> None:
    plain, cooled = rates(schedule), rates(schedule, cooldown_steps=5)
    assert cooled[:16] == plain[:16]
    assert [c / p for c, p in zip(cooled[16:], plain[16:], strict=True)] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_run_without_warmup_has_a_rate_for_every_step() -> None:
    for schedule in SCHEDULES:
        assert learning_rate(0, peak=1.0, warmup_steps=0, total_steps=1, schedule=schedule) == 1.0


@pytest.mark.parametrize(
    ("scale", "base", "peak", "said"),
    [
        ("none", 0.3, 0.3, "learning rate 0.3,"),
        ("linear", 0.3, 4.8, "learning rate 4.8 = 0.3 * 4096 / 256,"),
        ("sqrt", 0.075, 4.8, "learning rate 4.8 = 0.075 * sqrt(4096),"),
    ],
)
def test_the_rate_follows_the_batch_as_in_simclr(scale: str, base: float, peak: float, said: str) -> None:
    """At B = 4096 both of SimCLR's rules give 4.8."""
    config = RunConfig(
        batch=BatchSettings(size=4096),
        optim=OptimSettings(name="lars", learning_rate=base, scale=scale, schedule="linear", warmup_steps=10),  # type: ignore[arg-type]
        train=TrainSettings(steps=30),
    )
    assert peak_rate(config) == pytest.approx(peak)
    assert make_schedule(config)(9) == peak_rate(config) and make_schedule(config)(20) == pytest.approx(peak / 2)
    assert said in describe_optimizer(config) and "lars" in describe_optimizer(config)
