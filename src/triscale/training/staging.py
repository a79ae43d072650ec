"""Micro-batches read and moved to the device one ahead, on a stream of their own, through two pinned staging buffers.

While the tower works on micro-batch k:

    reader's thread   reads k+1 and writes it into the staging buffer that k did not use, once k-1 has left that buffer
    copy stream       staging buffer of k+1 -> landing buffer, once k has been taken out of that
    compute stream    tower on k | landing buffer -> memory of k+1 | tower on k+1

Taking out is a copy within the device, some microseconds. With it the tower gets memory that the compute stream alone
allocates, uses and frees, and that a graph may keep, so a micro-batch needs no `record_stream` and none can be
overwritten. On the device wait what is at work and the landing buffer: two micro-batches, as with a plain `.to()`.

Micro-batches travel and wait as the lane holds them, images as uint8, and are normalised by the tower: normalised by
the copy stream they would wait in four times the memory, and the work, by bytes 2 % of a ViT-B/16's forward pass (a
fifth of a per cent once compiled, fused), would not vanish but compete with the tower's for the same memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor

Put = TypeVar("Put")


def one_ahead(
    order: Sequence[slice], put: Callable[[slice], Put], take: Callable[[Put], Tensor]
) -> Generator[Tensor, None, None]:
    """take(put(rows)) of each of `order` (at least one); put is called one ahead, by a thread.

    Closed early, it waits for the call under way. What `put` raises is raised in place of the rows that it was for.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="triscale-reader") as reader:
        following = reader.submit(put, order[0])
        for rows in order[1:]:
            inputs = take(following.result())
            following = reader.submit(put, rows)
            yield inputs
        yield take(following.result())


@runtime_checkable
class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Keep the calling thread until the stream has come to this place."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Copies that are made in their order while the host goes on."""

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory on the device, free for what this stream is given from now on."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy."""
        ...

    def record(self) -> Event:
        """The place behind what is queued so far."""
        ...

    def wait(self, event: Event) -> None:
        """Queue a wait until `event`, a place in another stream, is reached."""
        ...


@final
class CudaStream:
    """A `Stream` on a CUDA device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        with torch.cuda.stream(self._stream):  # whose memory the allocator takes it from
            return torch.empty_strided(shape, strides, dtype=dtype, device=self._stream.device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if source.is_cuda:  # perhaps made just now, by what the calling thread has queued
            making = torch.cuda.current_stream(source.device)
            if making != self._stream:
                self._stream.wait_stream(making)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # a thread that waits sleeps
        event.record(self._stream)
        return event

    def wait(self, event: Any) -> None:
        self._stream.wait_event(event)


class Arriving(NamedTuple):
    """Rows on their way."""

    rows: Tensor
    copied: Event | None
    """When they are complete; None: they were not staged."""


@dataclass
class _Slot:
    """A staging buffer."""

    memory: Tensor
    """Bytes on the host."""
    source: Tensor | None = None
    """What its copy reads from, held until that is done."""
    copied: Event | None = None


@final
class Staging:
    """Two staging buffers on the host and a landing buffer on the device, large enough for what comes.

    One thread calls `put`, another `take`, in turns: `put` of the next rows may begin when `take` of the last ones has
    returned. A context manager; outside of it no copy is under way.

    Args:
        compute: where what `take` returns is used.
        copies: where rows are copied to the device.
        pin: whether staging buffers are page-locked, without which copies from them keep the host waiting.
    """

    def __init__(self, compute: Stream, copies: Stream, *, pin: bool) -> None:
        self._compute, self._copies, self._pin = compute, copies, pin
        self._slots = [_Slot(torch.empty(0, dtype=torch.uint8)) for _ in range(2)]
        self._landing = torch.empty(0, dtype=torch.uint8)
        self._emptied: Event | None = None

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *exception: object) -> None:
        for slot in self._slots:
            self._finish(slot)
        # Now, however long the traceback of an exception lives. Device memory that a copy stream still wrote to would
        # not be safe in the allocator's hands, nor would page-locked memory that is not the allocator's.
        self._slots.clear()
        self._landing = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def put(self, rows: Tensor) -> Arriving:
        """Queue the copy of `rows` to the device. Waits while both staging buffers are being copied from.

        Page-locked rows, and those of a device, need no staging buffer. What is not strided comes through as it is.
        """
        if rows.layout != torch.strided:
            return Arriving(rows, None)
        self._slots.reverse()
        slot = self._slots[0]  # the one that the last rows did not use
        self._finish(slot)
        slot.source = self._ready_to_copy(rows, slot)
        if self._landing.nbytes < rows.nbytes:
            self._landing = self._compute.empty((_room(rows),), (1,), torch.uint8)
            self._emptied = self._compute.record()  # behind whatever used this memory before
        landing = _shaped(self._landing, rows)
        if self._emptied is not None:
            self._copies.wait(self._emptied)  # or the last rows would be overwritten before they are taken
        self._copies.copy(landing, slot.source)
        slot.copied = self._copies.record()
        return Arriving(landing, slot.copied)

    @torch.no_grad()
    def take(self, arriving: Arriving) -> Tensor:
        """The rows, in memory of their own, for what is queued in the compute stream from now on."""
        if arriving.copied is None:
            return arriving.rows
        landing = arriving.rows
        self._compute.wait(arriving.copied)
        rows = self._compute.empty(landing.shape, landing.stride(), landing.dtype)
        self._compute.copy(rows, landing)
        self._emptied = self._compute.record()
        return rows

    def _ready_to_copy(self, rows: Tensor, slot: _Slot) -> Tensor:
        """The rows where, and as, they can be copied to the device in one piece while the host goes on."""
        if rows.device.type != "cpu" or (rows.stride() == _strides(rows) and rows.is_pinned()):
            return rows
        if slot.memory.nbytes < rows.nbytes:
            slot.memory = torch.empty(_room(rows), dtype=torch.uint8, pin_memory=self._pin)
        return _shaped(slot.memory, rows).copy_(rows)

    @staticmethod
    def _finish(slot: _Slot) -> None:
        """Wait until the slot's copy, if there is one, is done."""
        if slot.copied is not None:
            slot.copied.synchronize()
        slot.source = slot.copied = None


def _room(rows: Tensor) -> int:
    """Bytes of a buffer for `rows`, or for a row more: micro-batches of a lane differ by one."""
    return rows.nbytes + rows.nbytes // max(1, len(rows))


def _strides(rows: Tensor) -> tuple[int, ...]:
    """Those of a tensor without gaps that is like `rows`: the order of dimensions, such as channels last, is kept."""
    return torch.empty_like(rows, device="meta").stride()


def _shaped(memory: Tensor, rows: Tensor) -> Tensor:
    """The first bytes of `memory` as a tensor like `rows`."""
    return memory[: rows.nbytes].view(rows.dtype).as_strided(rows.shape, _strides(rows))


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all lanes, which take turns."""
    return torch.cuda.Stream(device)


def cuda_streams(device: torch.device) -> tuple[Stream, Stream]:
    """The calling thread's current stream on a CUDA device, for computing, and the one for copies."""
    return CudaStream(torch.cuda.current_stream(device)), CudaStream(_copy_stream(device))


def staged(
    order: Sequence[slice], read: Callable[[slice], Tensor], device: torch.device
) -> Generator[Tensor, None, None]:
    """read(rows) of each of `order` (at least one) on a CUDA device, read and moved one ahead.

    As `one_ahead`; when it ends or is closed, no copy is under way and the buffers are let go of.
    """
    compute, copies = cuda_streams(device)
    with Staging(compute, copies, pin=True) as staging:

        def put(rows: slice) -> Arriving:
            # A thread begins on device 0, to which torch.cuda.stream() would return and so make a context there.
            with torch.cuda.device(device):
                return staging.put(read(rows))

        yield from one_ahead(order, put, lambda arriving: staging.take(arriving).to(device))
