"""Worker processes that make things in order: torch's DataLoader, made safe to start, to interrupt and to end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from triscale.errors import RunError, UsageError

Made = TypeVar("Made")


def run(
    make: Callable[[range], Made], ranges: Iterable[range], *, workers: int, ahead: int
) -> Generator[Made, None, None]:
    """`make(r)` for each r of `ranges`, in their order, whoever makes it. Close it to end the workers.

    Workers begin at the call, so that the first results are under way while the caller does something else.

    Args:
        make: pickled to the workers; so are its results to this process.
        ranges: what to make; may be endless.
        workers: processes; 0: this one makes each result when it is asked for.
        ahead: results that are being made or wait, at least two a worker.

    Raises:
        RunError, UsageError: from the generator, as `make` raised them, or RunError when a worker was killed.
    """
    options: dict[str, Any] = {}
    if workers:
        options["multiprocessing_context"] = _context()
        options["prefetch_factor"] = max(2, -(-ahead // workers))
        options["worker_init_fn"] = _end_with_parent
    others = multiprocessing.active_children()
    with warnings.catch_warnings(), _signals_held():
        # How many workers there are is the caller's choice, and more than cores do not fail.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Results(make),
            batch_size=None,
            sampler=ranges,
            num_workers=workers,
            collate_fn=_as_it_is,
            # Otherwise every start of an iterator would take a number from the default generator.
            generator=torch.Generator(),
            **options,
        )
        results = iter(loader)
    started = [process for process in multiprocessing.active_children() if process not in others]
    return _checked(results, started)


class _Results(Dataset[Any], Generic[Made]):
    """Maps a range to what is made of it, or to the error that ends the run.

    Errors travel as values, since DataLoader would raise them again with a worker's traceback for a message.
    """

    def __init__(self, make: Callable[[range], Made]) -> None:
        self.make = make

    def __getitem__(self, asked: range) -> Made | Exception:
        try:
            return self.make(asked)
        except (RunError, UsageError) as error:
            return error


def _checked(results: Iterator[Any], processes: Sequence[BaseProcess]) -> Generator[Any, None, None]:
    """`results` with the errors among them raised, and the death of a worker; `processes` ended at last."""
    try:
        while True:
            try:
                result = next(results)
            except StopIteration:
                return
            except RuntimeError as error:
                if str(error).startswith("DataLoader worker"):  # an error inside of one begins with "Caught"
                    raise RunError(f"a data worker was killed, for want of memory perhaps: {error}") from error
                raise
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        del results  # DataLoader's iterator asks its workers to end, and waits some seconds
        for process in processes:
            if process.is_alive():  # in a read that does not return, or the iterator lives on in a traceback
                process.kill()
                process.join()


def _context() -> BaseContext:
    """How workers start: forked from a server process that has imported torch once, else (Windows) spawned.

    Not forked from this process: it has threads by now (OpenMP, gloo, CUDA, a progress bar), and a lock that one of
    them holds stays locked in the fork for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["triscale.data.loader"])
    # Started first, since starting it would let the held signals go.
    resource_tracker.ensure_running()
    with _signals_held():
        forkserver.ensure_running()
    return context


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back from processes started meanwhile; this process gets them at the end.

    A Ctrl-C or the signal of a scheduler goes to the whole process group. The training process decides what becomes of
    it, and needs its workers until the step is done; they end with it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker: int) -> None:
    """In a worker: end when the process dies that started it, be it killed.

    DataLoader's own watchdog waits for the server process to end, which waits for its workers to end.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _as_it_is(result: Any) -> Any:
    return result
