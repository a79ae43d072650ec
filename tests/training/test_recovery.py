"""Passes that fail: out of memory is tried again smaller by all ranks, anything else ends the step on all of them."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import ranks
import reference
from triscale.errors import RunError
from triscale.losses import InfoNCE
from triscale.training.memory import is_out_of_memory
from triscale.training.plan import LanePlan, smaller
from triscale.training.step import ContrastiveStep

LANES = ("image", "text")
ROWS = 12


class SmallMemory(reference.BatchNormTower):
    """Fits `largest` rows at once and `graphs` graphs at a time; beyond, allocations fail as a card's do."""

    def __init__(self, largest: int, graphs: int = 99, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.largest, self.graphs, self.error, self.alive = largest, graphs, error, 0

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) > self.largest or self.alive >= self.graphs:
            raise self.error("CUDA out of memory. Tried to allocate")
        output = super().forward(rows)
        if output.requires_grad:
            self.alive += 1
            weakref.finalize(output, self._freed)
        return output

    def _freed(self) -> None:
        self.alive -= 1


def inputs_of(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {lane: torch.randn(rows, 6, dtype=torch.float64, generator=generator) for lane in LANES}


def towers_of(kind: type[nn.Module], *arguments: object) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {lane: kind(*arguments).double() for lane in LANES}


def states(towers: dict[str, nn.Module]) -> list[Tensor]:
    return [value.clone() for tower in towers.values() for value in tower.state_dict().values()]


def step_over(towers: dict[str, nn.Module], micro_batch: int, keep: int) -> ContrastiveStep:
    return ContrastiveStep(
        towers, InfoNCE().double(), micro_batch=micro_batch, keep=keep, batch_norm="per_micro_batch", seed=5
    )


def compare_recovered(rank: int, world: int) -> dict[str, float | int]:
    """On the last rank alone memory is short: everywhere the step must end as a smaller one that never failed."""
    mine = slice(ROWS * rank // world, ROWS * (rank + 1) // world)
    inputs = {lane: rows[mine] for lane, rows in inputs_of().items()}
    short = towers_of(SmallMemory, 2 if rank == world - 1 else 99)
    step = step_over(short, micro_batch=4, keep=1)
    step(inputs)
    plain = towers_of(reference.BatchNormTower)
    expected = step_over(plain, micro_batch=2, keep=0)
    expected(inputs)
    error = reference.largest_error(
        reference.gradients({**short, "loss": step.loss}), reference.gradients({**plain, "loss": expected.loss})
    )
    buffers = max(
        float((a.double() - b.double()).abs().max()) for a, b in zip(states(short), states(plain), strict=True)
    )
    return {"error": error, "buffers": buffers, "tries": len(step.recoveries), **step.plans["image"]._asdict()}


@pytest.mark.parametrize("world", [1, 2])
def test_after_an_out_of_memory_all_ranks_redo_the_step_smaller(world: int) -> None:
    """First nothing is kept, then micro-batches are halved; gradients and statistics are those of the smaller step."""
    for found in ranks.run_ranks(compare_recovered, world):
        assert found == {"error": found["error"], "buffers": 0.0, "tries": 2, "micro_batch": 2, "keep": 0}
        assert found["error"] < 1e-12


def test_what_was_kept_is_given_up_first() -> None:
    towers = towers_of(SmallMemory, 99, 1)
    step = step_over(towers, micro_batch=4, keep=3)
    assert step(inputs_of()).loss.isfinite()
    assert step.plans == dict.fromkeys(LANES, LanePlan(4, 0))
    assert len(step.recoveries) == 1 and "out of memory in step 1" in step.recoveries[0]


def test_the_smaller_plan_stays() -> None:
    towers = towers_of(SmallMemory, 2)
    step = step_over(towers, micro_batch=4, keep=0)
    for _ in range(2):
        step(inputs_of())
        for tower in (*towers.values(), step.loss):
            tower.zero_grad(set_to_none=True)
    assert len(step.recoveries) == 1 and step.steps == 2


def test_memory_too_short_for_one_sample_ends_in_one_line_and_leaves_everything_as_it_was() -> None:
    towers = towers_of(SmallMemory, 0)
    before = states(towers)
    step = step_over(towers, micro_batch=4, keep=1)
    with pytest.raises(RunError, match="micro-batches of one sample"):
        step(inputs_of())
    assert all(torch.equal(a, b) for a, b in zip(states(towers), before, strict=True))
    assert all(p.grad is None for tower in towers.values() for p in tower.parameters())


def test_plans_shrink_until_there_is_nothing_left() -> None:
    plans = {"image": LanePlan(5, 2), "text": LanePlan(1, 0)}
    plans = smaller(plans)
    assert plans == {"image": LanePlan(5, 0), "text": LanePlan(1, 0)}
    sizes = []
    while plans["image"].micro_batch > 1:
        plans = smaller(plans)
        sizes.append(plans["image"].micro_batch)
    assert sizes == [3, 2, 1]
    with pytest.raises(RunError):
        smaller(plans)


def test_the_hosts_own_allocator_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


class Refusing(reference.DropoutTower):
    def forward(self, rows: Tensor) -> Tensor:
        raise RunError("this shard could not be read")


def fail_on_one(rank: int, world: int) -> str:
    towers = towers_of(Refusing if rank == 1 else reference.DropoutTower)
    try:
        ContrastiveStep(towers, InfoNCE().double(), micro_batch=2, keep=0)(inputs_of(4))
    except RunError as error:
        return str(error)
    return "went on"


def test_a_pass_that_fails_on_one_rank_ends_the_step_on_all() -> None:
    other, failed = ranks.run_ranks(fail_on_one, 2)
    assert failed == "this shard could not be read"
    assert "another process failed" in other


class Slow:
    """Rows that are read when asked for, and remember by which thread and while which others were."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.reads, self.threads = rows, [], set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: slice) -> Tensor:
        self.reads.append(wanted)
        self.threads.add(threading.get_ident())
        return self.rows[wanted]


def test_inputs_are_read_one_micro_batch_ahead_by_another_thread() -> None:
    torch.manual_seed(0)
    seen: list[int] = []
    rows = {lane: Slow(values) for lane, values in inputs_of().items()}

    class Watching(reference.DropoutTower):
        def forward(self, values: Tensor) -> Tensor:
            seen.append(len(rows["image"].reads))
            return super().forward(values)

    towers = {"image": Watching().double(), "text": reference.DropoutTower().double()}
    step = step_over(towers, micro_batch=3, keep=0)
    step(rows)
    assert threading.get_ident() not in rows["image"].threads
    assert [wanted.start for wanted in rows["image"].reads] == [0, 3, 6, 9, 9, 6, 3, 0]
    for number, reads in enumerate(seen):  # at most one more than what the tower works on
        assert number + 1 <= reads <= number + 2 + (number == 3)

    plain = {lane: reference.DropoutTower().double() for lane in LANES}
    for lane in LANES:
        plain[lane].load_state_dict(towers[lane].state_dict())
    held = step_over(plain, micro_batch=3, keep=0)
    held(inputs_of())
    assert reference.largest_error(reference.gradients(plain), reference.gradients(towers)) == 0


def test_ids_are_read_after_the_first_pass() -> None:
    """So that they may come out of the same view of a data set as the inputs."""
    reads: list[str] = []

    class Named(Slow):
        def __init__(self, name: str, rows: Tensor) -> None:
            super().__init__(rows)
            self.name = name

        def __getitem__(self, wanted: slice) -> Tensor:
            reads.append(self.name)
            return super().__getitem__(wanted)

    inputs = {lane: Named(lane, values) for lane, values in inputs_of().items()}
    ids = torch.arange(ROWS) % 5
    towers, plain = towers_of(reference.DropoutTower), towers_of(reference.DropoutTower)
    step_over(towers, micro_batch=6, keep=0)(inputs, Named("ids", ids))
    step_over(plain, micro_batch=6, keep=0)(inputs_of(), ids)
    assert reads[:5] == ["image", "image", "text", "text", "ids"]
    assert reference.largest_error(reference.gradients(towers), reference.gradients(plain)) == 0
