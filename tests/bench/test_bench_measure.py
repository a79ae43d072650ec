"""What the benchmarks rest on: turns that alternate, memory that is counted whole, failures in one line."""

from __future__ import annotations

import pytest
import torch

from triscale.bench import measure
from triscale.bench.measure import MIB, Call, MethodFailed
from triscale.bench.table import make_row
from triscale.errors import UsageError

CPU = torch.device("cpu")


def test_every_round_calls_each_method_once_and_begins_with_another() -> None:
    called: list[str] = []
    calls = {
        name: Call(
            run=lambda name=name: called.append(name),
            before=lambda name=name: called.append(f"before {name}"),
            after=lambda name=name: called.append(f"after {name}"),
        )
        for name in "abc"
    }
    seconds = measure.time_in_turns(calls, 4, CPU)
    assert [name for name in called if len(name) == 1] == list("abcbcacababc")
    assert called[:3] == ["before a", "a", "after a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_peak_memory_is_that_of_the_call_even_if_the_process_has_freed_as_much_before() -> None:
    held: list[torch.Tensor] = []
    small, count = 64 * 1024 // 4, 1024  # 64 MiB in pieces that come from the C library's heap

    def take_and_free() -> None:
        pieces = [torch.ones(small) for _ in range(count)]
        held.append(pieces[-1])  # keeps the end of the heap in place

    take_and_free()
    peak = measure.peak_bytes(Call(run=take_and_free), CPU)
    assert peak is not None and 60 * MIB < peak < 80 * MIB


def test_what_is_there_before_a_call_does_not_count() -> None:
    held: list[torch.Tensor] = []
    call = Call(run=lambda: torch.ones(4 * MIB), before=lambda: held.append(torch.ones(16 * MIB)))
    peak = measure.peak_bytes(call, CPU)
    assert peak is not None and 15 * MIB < peak < 24 * MIB


def test_a_process_that_fails_gives_its_last_line() -> None:
    with pytest.raises(MethodFailed, match="KeyError: 'kind'") as failure:
        measure.in_fresh_process({})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["tpu", "meta", "cpu of mine"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device '{name}'"):
        measure.usable_device(name)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios_and_the_floor_that_of_the_same_rounds() -> None:
    """The machine was three times slower in the second round, for both alike: the ratio does not see it."""
    row = make_row(
        "towers",
        "b",
        10,
        {"a": [1.0, 3.0, 1.0], "b": [2.0, 6.0, 2.0]},
        ours="a",
        product=([0.5, 1.5, 0.5], 50.0),
        floor_flops=100.0,
        peak_bytes=None,
        details={},
    )
    assert row.time_over_ours == 2.0
    assert row.samples_per_second == 5.0
    assert row.floor_share == pytest.approx(0.5), "100 FLOPs at 100 FLOP/s take half of two seconds"
    assert (row.seconds.smallest, row.seconds.largest) == (2.0, 6.0)


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    line = measure.this_machine(CPU).line()
    assert platform.node() not in line and torch.__version__ in line
