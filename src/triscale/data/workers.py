"""Worker processes that make things in order; one that dies or stalls is named, and all are started again once.

Own code where torch's DataLoader would be at hand: its workers share one pipe, so that one that is killed in the middle
of a result, which is where a worker is that has made more than the pipe takes, leaves the training process waiting for
the rest for ever. Here every worker has a pipe of its own, which ends with it, and which is read with a deadline.
"""

from __future__ import annotations

import atexit
import math
import pickle
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from triscale.data.processes import NOTHING, Worker, noted, signals_held, start_method
from triscale.errors import RunError

Made = TypeVar("Made")
_SECONDS_TO_END = 2.0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _unnamed(noted: int) -> str:
    return f"is at {noted}"


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What is done while a result is awaited."""

    stall_seconds: float = 0.0
    """A worker that notes and sends nothing for so long has stalled; 0: none ever has."""
    describe: Callable[[int], str] = _unnamed
    """From what a worker has noted to what it does, to be put behind "it"."""
    report: Callable[[str], None] = _to_stderr
    """Gets the line about a worker that died or stalled, when all are started again. May be called in a thread."""
    beat: Callable[[], None] | None = None
    """Called every `beat_seconds` of the wait."""
    beat_seconds: float = math.inf


def run(
    make: Callable[[range], Made],
    ranges: Iterable[range],
    *,
    workers: int,
    ahead: int,
    watch: Watch | None = None,
) -> Generator[Made, None, None]:
    """`make(r)` for each r of `ranges`, in their order, whoever makes it. Close it to end the workers.

    Workers begin at the call, so that the first results are under way while the caller does something else. When one
    dies or stalls, all are ended and started again at the first range whose result was not given yet; when it happens
    again, the generator raises. So `make` has to give the same for a range each time.

    Args:
        make: pickled to the workers; so are its results to this process. It tells `processes.note` what it begins.
        ranges: what to make; may be endless.
        workers: processes; 0: this one makes each result when it is asked for.
        ahead: results that are being made or wait, at least two a worker.

    Raises:
        RunError, UsageError: from the generator, as `make` raised them, or RunError when workers died or stalled twice.
    """
    watch = watch or Watch()
    if not workers:
        return _made_here(make, ranges, watch)
    each = max(2, -(-ahead // workers))
    remaining = iter(ranges)
    asked = deque(islice(remaining, each * workers))
    return _made_by_workers(_Workers(make, workers, asked), asked, remaining, watch)


def _made_here(make: Callable[[range], Made], ranges: Iterable[range], watch: Watch) -> Generator[Made, None, None]:
    """Make each result when it is asked for. A read that hangs cannot be left from outside: it is named, no more."""

    def stalled() -> None:
        watch.report(
            f"the training process has made no batch for {watch.stall_seconds:g} s: it {_doing(noted(), watch)}; "
            "with --data.workers it would be read anew"
        )

    for wanted in ranges:
        timer = threading.Timer(watch.stall_seconds, stalled) if watch.stall_seconds else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            made = make(wanted)
        finally:
            if timer is not None:
                timer.cancel()
        yield made
        del made  # before the next is made


class _Failed(Exception):
    """A worker died or stalled."""


def _made_by_workers(
    pool: _Workers[Made], asked: deque[range], remaining: Iterator[range], watch: Watch
) -> Generator[Made, None, None]:
    """The results of `asked`, which `pool` has been asked for, and of `remaining`."""
    failed_before = False
    try:
        while asked:
            try:
                result = pool.result(watch)
            except _Failed as failure:
                if failed_before:
                    raise RunError(f"{failure}; it is the second time that data workers failed") from failure
                failed_before = True
                watch.report(f"{failure}; all data workers are started again at position {asked[0].start}")
                pool.close()
                pool = _Workers(pool.make, len(pool.workers), asked)
                continue
            asked.popleft()
            following = next(remaining, None)
            if following is not None:
                asked.append(following)
                pool.ask(following)
            if isinstance(result, Exception):
                raise result
            yield result
            del result  # before the next comes
    finally:
        pool.close()


class _Workers(Generic[Made]):
    """Worker processes that were asked for `ranges`, and give their results in order. Each takes its turn."""

    def __init__(self, make: Callable[[range], Made], workers: int, ranges: Iterable[range]) -> None:
        self.make = make
        self.workers: list[Worker] = []
        context = start_method()
        # Of each worker what it noted last, and when.
        self._board = context.RawArray("q", [NOTHING, 0] * workers)
        with signals_held():
            for number in range(workers):
                self.workers.append(Worker(context, make, self._board, number))
        _running.add(self)
        self._asked = self._given = 0
        for wanted in ranges:
            self.ask(wanted)

    def ask(self, wanted: range) -> None:
        """Have the worker whose turn it is make one more result."""
        with suppress(BrokenPipeError):  # it is dead, as will be seen when its result is awaited
            self.workers[self._asked % len(self.workers)].asks.send(wanted)
        self._asked += 1

    def result(self, watch: Watch) -> Made | Exception:
        """The next result, or the error that was raised instead. Raises _Failed where its worker died or stalled."""
        number = self._given % len(self.workers)
        worker = self.workers[number]
        began = last_beat = time.monotonic()

        def left() -> float:
            """Seconds for which the worker may still be waited for."""
            nonlocal last_beat
            now = time.monotonic()
            if watch.beat is not None and now - last_beat >= watch.beat_seconds:
                watch.beat()
                last_beat = now
            until = max(began, worker.heard, self._board[2 * number + 1] / 1e9) + watch.stall_seconds
            until = until if watch.stall_seconds else math.inf
            if until <= now:
                raise _Failed(
                    f"{worker} has stalled for {watch.stall_seconds:g} s: it {_doing(self._board[2 * number], watch)}"
                )
            return max(0.0, min(until, last_beat + watch.beat_seconds) - now)

        try:
            result = pickle.loads(worker.receive(left))
        except EOFError:
            raise _Failed(
                f"{worker} {worker.how_it_died(_SECONDS_TO_END)}: it {_doing(self._board[2 * number], watch)}"
            ) from None
        self._given += 1
        return result

    def close(self) -> None:
        """End the processes, those that do not listen by force."""
        _running.discard(self)
        for worker in self.workers:
            worker.asks.close()
            worker.results.close()
        deadline = time.monotonic() + _SECONDS_TO_END
        for worker in self.workers:
            worker.end(max(0.0, deadline - time.monotonic()))

    def __del__(self) -> None:
        self.close()  # of a generator that was never begun


def _doing(noted: int, watch: Watch) -> str:
    return "had nothing under way" if noted == NOTHING else watch.describe(noted)


_running: weakref.WeakSet[_Workers[Any]] = weakref.WeakSet()


@atexit.register  # behind multiprocessing's own, and so called before it, which would wait for the processes to end
def _close_all() -> None:
    for pool in list(_running):
        pool.close()
