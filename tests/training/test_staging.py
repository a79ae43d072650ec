"""Micro-batches arrive whole and in order, however late the streams and whatever the inputs are.

Without a card its streams are played by threads: what is queued is done in order, later, while the host goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from triscale.errors import RunError
from triscale.losses import InfoNCE
from triscale.training import lane, staging
from triscale.training.lane import split_evenly
from triscale.training.step import ContrastiveStep

LATE = 0.03
"""Seconds by which a slow stream is behind."""


class Reached:
    """An event of a played stream."""

    def __init__(self, done: Future[object], seen_by_host: bool) -> None:
        self.done, self.seen_by_host = done, seen_by_host

    def synchronize(self) -> None:
        if self.seen_by_host:
            self.done.result()


class Played:
    """A stream played by a thread. Of its waits, and those of the host for it, some may be left out."""

    def __init__(self, seconds: float, waits: bool = True, seen_by_host: bool = True) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.seconds, self.waits, self.seen_by_host = seconds, waits, seen_by_host
        self.copied: list[tuple[int, int]] = []
        """Addresses that copies went to and came from."""
        self.queued: list[Future[object]] = []

    @property
    def under_way(self) -> int:
        return sum(not work.done() for work in self.queued)

    def queue(self, work: Callable[[], object]) -> Future[object]:
        self.queued.append(self.thread.submit(work))
        return self.queued[-1]

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        memory = torch.empty_strided(shape, strides, dtype=dtype)
        self.queue(lambda: memory.fill_(1))  # what was queued for the memory before still writes to it
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.copied.append((target.data_ptr(), source.data_ptr()))
        self.queue(lambda: time.sleep(self.seconds) or target.copy_(source))

    def record(self) -> Reached:
        return Reached(self.queue(lambda: None), self.seen_by_host)

    def wait(self, event: Reached) -> None:
        if self.waits:
            self.queue(event.done.result)


@contextmanager
def playing(*streams: Played) -> Iterator[None]:
    try:
        yield
    finally:
        for stream in streams:
            stream.thread.shutdown()


def arrived(
    order: Sequence[slice], read: Callable[[slice], Tensor], compute: Played, copies: Played, tower_seconds: float = 0.0
) -> list[Tensor]:
    """What a tower on the compute stream sees, which is asked to work without waiting for it."""
    seen: list[Tensor] = []
    with playing(compute, copies), staging.Staging(compute, copies, pin=False) as staged:
        for inputs in staging.one_ahead(order, lambda rows: staged.put(read(rows)), staged.take):
            compute.queue(lambda inputs=inputs: time.sleep(tower_seconds) or seen.append(inputs.clone()))
    return seen


def no_reader_left() -> bool:
    return not any(thread.name.startswith("triscale-reader") for thread in threading.enumerate())


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("reading", [0.0, LATE])
@pytest.mark.parametrize("copying", [0.0, LATE])
@pytest.mark.parametrize("working", [0.0, LATE])
def test_micro_batches_arrive_whole_and_in_order(
    reading: float, copying: float, working: float, rng: torch.Generator
) -> None:
    inputs, order = torch.randn(23, 5, generator=rng), split_evenly(23, 7)  # of three rows, or four

    def read(rows: slice) -> Tensor:
        time.sleep(reading)
        return inputs[rows]

    seen = arrived(order, read, Played(0.0), Played(copying), working)
    assert same(seen, [inputs[rows] for rows in order])
    assert no_reader_left()


@pytest.mark.parametrize(
    ("compute", "copies", "working"),
    [
        ({"seconds": 0.0, "waits": False}, {"seconds": LATE}, 0.0),  # takes rows that have not arrived
        ({"seconds": 0.0}, {"seconds": 0.0, "waits": False}, LATE),  # overwrites rows that were not taken
        ({"seconds": 0.0}, {"seconds": LATE, "seen_by_host": False}, 0.0),  # fills a buffer that is being copied from
    ],
)
def test_played_streams_show_a_wait_that_is_missing(
    compute: dict, copies: dict, working: float, rng: torch.Generator
) -> None:
    inputs, order = torch.randn(23, 5, generator=rng), split_evenly(23, 7)
    seen = arrived(order, lambda rows: inputs[rows], Played(**compute), Played(**copies), working)
    assert not same(seen, [inputs[rows] for rows in order])


def test_what_the_device_memory_held_before_is_no_danger(rng: torch.Generator) -> None:
    """Buffers are taken while the compute stream is behind, and what it still does to that memory comes first."""
    inputs, order = torch.randn(12, 5, generator=rng), split_evenly(12, 4)
    compute, copies = Played(0.0), Played(0.0)
    compute.queue(lambda: time.sleep(3 * LATE))
    assert same(arrived(order, lambda rows: inputs[rows], compute, copies), [inputs[rows] for rows in order])


def test_two_staging_buffers_take_turns_and_are_made_once(rng: torch.Generator) -> None:
    inputs, order = torch.randn(23, 5, generator=rng), split_evenly(23, 7)
    compute, copies = Played(0.0), Played(0.0)
    arrived(order, lambda rows: inputs[rows], compute, copies)
    landing, buffers = zip(*copies.copied, strict=True)
    assert len(set(landing)) == 1
    assert len(set(buffers[:2])) == 2
    assert buffers == tuple(buffers[number % 2] for number in range(7))
    assert {source for _, source in compute.copied} == set(landing)


def test_rows_are_read_one_ahead_of_what_is_taken_and_no_further() -> None:
    reads: list[int] = []
    inputs, compute, copies = torch.arange(12.0), Played(0.0), Played(0.0)

    def read(rows: slice) -> Tensor:
        reads.append(rows.start)
        return inputs[rows]

    with playing(compute, copies), staging.Staging(compute, copies, pin=False) as staged:
        arriving = staging.one_ahead(split_evenly(12, 6), lambda rows: staged.put(read(rows)), staged.take)
        for number, _ in enumerate(arriving):
            time.sleep(LATE)  # time enough to read everything
            assert reads == [0, 2, 4, 6, 8, 10][: number + 2]


def test_the_next_rows_are_put_when_the_last_ones_were_taken() -> None:
    """Before, their copy could be queued ahead of taking the last ones out of the landing buffer."""
    done: list[str] = []

    def take(number: int) -> Tensor:
        time.sleep(LATE)
        done.append(f"take {number}")
        return torch.tensor(number)

    for _ in staging.one_ahead(split_evenly(3, 3), lambda rows: done.append(f"put {rows.start}") or rows.start, take):
        time.sleep(LATE)
    assert done == ["put 0", "take 0", "put 1", "take 1", "put 2", "take 2"]


SHAPES: dict[str, Callable[[torch.Generator], list[Tensor]]] = {
    "one row less": lambda rng: [torch.rand(n, 3, generator=rng) for n in (4, 5, 4, 5)],
    "rows that grow": lambda rng: [torch.rand(3, width, generator=rng) for width in (1, 40, 7, 900, 900, 2)],
    "other numbers": lambda rng: [
        torch.randint(0, 2, (3, 4), generator=rng).to(dtype)
        for dtype in (torch.uint8, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.complex64)
    ],
    "channels last": lambda rng: [
        torch.rand(n, 3, 4, 5, generator=rng).contiguous(memory_format=torch.channels_last) for n in (2, 3, 2)
    ],
    "with gaps": lambda rng: [torch.rand(4, 6, generator=rng)[:, ::2] for _ in range(3)],
    "the same row": lambda rng: [torch.rand(1, 6, generator=rng).expand(4, 6) for _ in range(3)],
    "no values": lambda rng: [torch.rand(n, 0, generator=rng) for n in (2, 3)],
    "one value a row": lambda rng: [torch.rand(n, generator=rng) for n in (1, 2, 1)],
}


@pytest.mark.parametrize("kind", SHAPES)
def test_rows_of_any_shape_and_numbers_arrive_as_they_were(kind: str, rng: torch.Generator) -> None:
    batches = SHAPES[kind](rng)
    order = [slice(number, number + 1) for number in range(len(batches))]
    seen = arrived(order, lambda rows: batches[rows.start], Played(0.0), Played(LATE / 3))
    assert same(seen, batches)
    for found, batch in zip(seen, batches, strict=True):
        assert found.dtype == batch.dtype and found.stride() == torch.empty_like(batch).stride()


def test_sparse_rows_come_through_as_they_are() -> None:
    batches = [torch.eye(3).to_sparse() * number for number in range(3)]
    with staging.Staging(Played(0.0), Played(0.0), pin=False) as staged:
        assert all(staged.take(staged.put(batch)) is batch for batch in batches)


def test_what_a_read_raises_is_raised_in_its_place_and_nothing_is_left() -> None:
    inputs, compute, copies = torch.arange(12.0), Played(0.0), Played(LATE)
    seen = []

    def read(rows: slice) -> Tensor:
        if rows.start == 6:
            raise RunError("this shard could not be read")
        return inputs[rows]

    with playing(compute, copies):
        with (
            pytest.raises(RunError, match="this shard could not be read"),
            staging.Staging(compute, copies, pin=False) as staged,
        ):
            for rows in staging.one_ahead(split_evenly(12, 6), lambda rows: staged.put(read(rows)), staged.take):
                seen.append(rows)
        assert copies.under_way == 0
    assert same(seen, [inputs[0:2], inputs[2:4], inputs[4:6]])
    assert no_reader_left()


@pytest.mark.parametrize("error", [RunError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_whoever_leaves_early_leaves_no_copy_under_way_and_no_thread(error: type[BaseException]) -> None:
    inputs, compute, copies = torch.arange(12.0), Played(0.0), Played(LATE)
    with playing(compute, copies):
        with (
            pytest.raises(error),
            staging.Staging(compute, copies, pin=False) as staged,
            closing(
                staging.one_ahead(split_evenly(12, 6), lambda rows: staged.put(inputs[rows]), staged.take)
            ) as arriving,
        ):
            next(arriving)
            next(arriving)
            raise error("the tower stopped")
        assert copies.under_way == 0
        assert no_reader_left()
        assert not staged._slots and not staged._landing.nbytes


class Mapped:
    """Rows that are decoded when asked for."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: slice) -> Tensor:
        time.sleep(LATE / 10)
        return self.rows[wanted].clone()


def mapped(rows: Tensor, folder: Path, mode: str) -> np.memmap:
    path = folder / f"{mode.strip('+')}.bin"
    rows.numpy().tofile(path)
    return np.memmap(path, dtype=rows.numpy().dtype, mode=mode, shape=tuple(rows.shape))  # type: ignore[call-overload]


INPUTS: dict[str, Callable[[Tensor, Path], object]] = {
    "tensor": lambda rows, folder: rows,
    "array": lambda rows, folder: rows.numpy(),
    "map to read": lambda rows, folder: mapped(rows, folder, "r"),
    "map to write": lambda rows, folder: mapped(rows, folder, "r+"),
    "view": lambda rows, folder: Mapped(rows),
}
LANES = ("image", "text")


class Tower(nn.Module):
    """Linear first, so that a graph holds on to its inputs, which come as uint8; `largest` rows fit at once."""

    def __init__(self, largest: int = 99, before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 5))
        self.largest, self.before = largest, before

    def forward(self, rows: Tensor) -> Tensor:
        if len(rows) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        self.before()
        return self.layers(rows.float() / 255)


def gradients_of_step(
    inputs: dict[str, object], device: str = "cpu", keep: int = 1, **tower: object
) -> dict[str, Tensor]:
    """Of one step over 23 rows in micro-batches of at most four."""
    torch.manual_seed(0)
    towers = {name: Tower(**tower).to(device) for name in LANES}  # type: ignore[arg-type]
    loss = InfoNCE().to(device)
    step = ContrastiveStep(towers, loss, micro_batch=4, keep=keep, seed=3)
    assert step(inputs).metrics["replay_error"] == 0
    return reference.gradients({**towers, "loss": loss})


def rows_of_lanes(rng: torch.Generator) -> dict[str, Tensor]:
    return {name: torch.randint(0, 256, (23, 6), dtype=torch.uint8, generator=rng) for name in LANES}


def through_played_streams(
    order: Sequence[slice], put: Callable[[slice], Tensor], take: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """`one_ahead` by way of played streams, for towers that do not know of them."""
    compute, copies = Played(0.0), Played(LATE / 10)

    def taken(arriving: staging.Arriving) -> Tensor:
        rows = staged.take(arriving)
        compute.record().synchronize()
        return take(rows)

    with playing(compute, copies), staging.Staging(compute, copies, pin=False) as staged:
        yield from one_ahead(order, lambda rows: staged.put(put(rows)), taken)


one_ahead = staging.one_ahead


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("largest", [99, 2])
def test_a_step_over_staged_inputs_is_that_over_tensors_also_after_an_out_of_memory(
    kind: str, largest: int, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_lanes(rng)
    expected = gradients_of_step(dict(rows), largest=largest)
    monkeypatch.setattr(lane.staging, "one_ahead", through_played_streams)
    inputs = {}
    for name, values in rows.items():
        (tmp_path / name).mkdir()
        inputs[name] = INPUTS[kind](values, tmp_path / name)
    found = gradients_of_step(inputs, largest=largest)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert no_reader_left()


# On a card.

SLOW_CYCLES = 5_000_000
"""Some three milliseconds of a GPU."""


class SlowCopies:
    """A CUDA stream whose copies are late."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._copies = stream, staging.CudaStream(stream)
        self.empty, self.record, self.wait = self._copies.empty, self._copies.record, self._copies.wait

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(SLOW_CYCLES)
        self._copies.copy(target, source)


def slow_copies(device: torch.device) -> tuple[staging.Stream, staging.Stream]:
    return staging.CudaStream(torch.cuda.current_stream(device)), SlowCopies(torch.cuda.Stream(device))


class OnCard(Mapped):
    """Rows that are decoded on the card, by whatever stream the reading thread has."""

    def __getitem__(self, wanted: slice) -> Tensor:
        rows = self.rows[wanted].cuda()
        torch.cuda._sleep(SLOW_CYCLES // 10)
        return rows.clone()


ON_CARD: dict[str, Callable[[Tensor, Path], object]] = {
    **INPUTS,
    "pinned": lambda rows, folder: rows.pin_memory(),
    "pinned with gaps": lambda rows, folder: rows.repeat_interleave(2, 1).pin_memory()[:, ::2],
    "view on the card": lambda rows, folder: OnCard(rows),
}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ON_CARD)
@pytest.mark.parametrize("slow", ["nothing", "tower", "copies"])
@pytest.mark.parametrize("keep", [0, 3])
def test_on_a_card_a_step_over_any_inputs_is_bitwise_that_over_inputs_on_the_card(
    kind: str, slow: str, keep: int, rng: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_lanes(rng)
    expected = gradients_of_step({name: values.cuda() for name, values in rows.items()}, "cuda", keep)
    if slow == "copies":
        monkeypatch.setattr(staging, "cuda_streams", slow_copies)
    before = (lambda: torch.cuda._sleep(SLOW_CYCLES)) if slow == "tower" else (lambda: None)
    inputs = {}
    for name, values in rows.items():
        (tmp_path / name).mkdir()
        inputs[name] = ON_CARD[kind](values, tmp_path / name)
    torch.cuda.synchronize()
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.default_stream()):
        with torch.cuda.stream(stream):
            found = gradients_of_step(inputs, "cuda", keep, before=before)
            stream.synchronize()
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert no_reader_left()


@pytest.mark.gpu
def test_on_a_card_copies_go_on_beside_the_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "cuda_streams", slow_copies)
    device, order, inputs = torch.device("cuda", 0), split_evenly(40, 10), torch.rand(40, 1000)

    def milliseconds(copy: bool, work: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rows = staging.staged(order, lambda rows: inputs[rows], device) if copy else iter(order)
        torch.cuda.synchronize()
        begin.record()
        for _ in rows:
            if work:
                torch.cuda._sleep(SLOW_CYCLES)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    milliseconds(True, True)  # whatever is set up at the first time
    apart = milliseconds(True, False) + milliseconds(False, True)
    assert milliseconds(True, True) < 0.7 * apart  # 11 of 20 sleeps, if they overlap


@pytest.mark.gpu
@pytest.mark.parametrize("error", [RunError, KeyboardInterrupt])
def test_on_a_card_whoever_leaves_early_frees_what_was_staged(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "cuda_streams", slow_copies)
    device, inputs = torch.device("cuda", 0), torch.rand(40, 10_000)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with (
        pytest.raises(error),
        closing(staging.staged(split_evenly(40, 10), lambda rows: inputs[rows], device)) as arriving,
    ):
        next(arriving)
        assert torch.cuda.memory_allocated() > before
        raise error("the tower stopped")
    del arriving
    assert torch.cuda.memory_allocated() == before
    assert no_reader_left()


@pytest.mark.gpu
def test_on_a_card_no_more_waits_than_two_micro_batches() -> None:
    device, inputs = torch.device("cuda", 0), torch.rand(64, 500_000)  # 16 MB a micro-batch of eight
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for rows in staging.staged(split_evenly(64, 8), lambda rows: inputs[rows], device):
        torch.cuda._sleep(SLOW_CYCLES)
        del rows
    most = torch.cuda.max_memory_allocated() - before
    assert most < 3.3 * 8 * 500_000 * 4  # landing buffer, the one at work, and the one before until its name is gone
