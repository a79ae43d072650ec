"""Whether a run's batches are held: by what they take in flight, and each process's share of the host."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pictures import SETTINGS, make_reader
from triscale.config import RunConfig
from triscale.data.loader import rows_in_flight
from triscale.data.rows import Batch, StreamedBatch
from triscale.feed import open_batches
from triscale.training.log import RunLog
from triscale.training.memory import GIB
from triscale.training.settings import BatchSettings, MemorySettings, TrainSettings

NEEDED_BYTES = rows_in_flight(10, workers=0) * 3 * SETTINGS.image_size**2


def first(host_bytes: float, **data: int) -> tuple[Batch | StreamedBatch, str]:
    """The first batch after step 2 of a run whose images may take so much of the host, and what is said of it."""
    config = RunConfig(
        data=replace(SETTINGS, **{"workers": 0, **data}),
        batch=BatchSettings(size=10),
        memory=MemorySettings(host_gib=host_bytes / GIB),
        train=TrainSettings(steps=4),
    )
    console = Console(file=io.StringIO())
    with RunLog(Path("nowhere"), total_steps=4, chance=("B", 10), console=console) as log:
        batches = open_batches(config, make_reader(), torch.device("cpu"), 2, log)
    batch = next(batches)
    rest = list(batches)
    assert batch.position == 20 and [each.position for each in rest] == [30]
    assert isinstance(console.file, io.StringIO)
    return batch, " ".join(console.file.getvalue().split())


def test_batches_are_held_where_what_is_in_flight_fits_and_else_streamed() -> None:
    held, said = first(NEEDED_BYTES)
    assert isinstance(held, Batch) and "are held" in said
    streamed, said = first(NEEDED_BYTES - 1)
    assert isinstance(streamed, StreamedBatch) and "read again in each pass" in said
    assert torch.equal(streamed.images[0:10], held.images)


def test_processes_share_the_memory_of_their_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(first(2 * NEEDED_BYTES)[0], Batch)
    assert isinstance(first(2 * NEEDED_BYTES - 1)[0], StreamedBatch)


def test_batches_are_held_in_what_is_available_unless_said_otherwise() -> None:
    assert isinstance(first(0.0)[0], Batch)


def test_workers_need_room_for_what_they_make_ahead() -> None:
    assert isinstance(first(NEEDED_BYTES, workers=1)[0], StreamedBatch)
