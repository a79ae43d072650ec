"""Features of sources on the disk: made where they are missing, never those of another model or of other data."""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triscale import distributed
from triscale.data.cache import user_cache
from triscale.data.features import FeatureParts, Precision
from triscale.data.samples import Source
from triscale.errors import UsageError
from triscale.evaluation.features import Pass, compute_parts, digest
from triscale.image_models import Embedder
from triscale.models.weights import read_json

FORMAT = 1
"""Of the files; part of the digest."""
INDEX = "index.json"
BAD_LIST = "bad.jsonl"


class Interrupted(Exception):
    """A signal came; what was computed by then is kept.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def cache_folder(named: str) -> Path:
    """The folder that probes share features in: `named`, or the user's own."""
    return Path(named) if named else user_cache("features")


def identity(embedder: Embedder, source: Source, dtype: Precision) -> str:
    """A digest of all that features depend on: weights, data, transform, size and precision."""
    return digest([FORMAT, dtype, *embedder.words], [source], embedder.module)


def cached_features(
    embedder: Embedder,
    source: Source,
    cache: Path,
    report: Callable[[str], None],
    *,
    workers: int,
    dtype: Precision = "float32",
) -> FeatureParts:
    """Features of a source from the cache, those that are missing computed by all processes. A collective.

    Raises:
        Interrupted: by a signal.
        UsageError: another process computes them just now.
        RunError: the source cannot be read, or the disk is full.
    """
    folder = cache / identity(embedder, source, dtype)
    return _complete(embedder, source, folder, dtype, report, workers=workers, list_rows=False)


def write_features(
    embedder: Embedder,
    source: Source,
    folder: Path,
    report: Callable[[str], None],
    *,
    workers: int,
    dtype: Precision,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Write features as a folder to be used elsewhere: parts, their rows' keys and labels, an index. A collective.

    Args:
        embedder: what computes them.
        source: whose.
        folder: new, or begun by the same command.
        report: hears how far it is.
        workers: processes that read and decode.
        dtype: of the values.
        described: what the index says besides.

    Returns:
        What the index says: what is in the folder, and how many samples are bad by reason.

    Raises:
        UsageError: the folder holds something else.
        Interrupted, RunError: as `cached_features`.
    """
    own = identity(embedder, source, dtype)
    index = folder / INDEX
    if index.exists():
        if read_json(index).get("digest") != own:
            raise UsageError(f"{str(folder)!r} holds embeddings of another model or of other data: use another folder")
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{str(folder)!r} is not empty and holds no embeddings: use another folder")
    parts = FeatureParts(folder, [len(source)], embedder.width, dtype)
    values: dict[str, Any] = {
        "digest": own,
        "what": embedder.what,
        "samples": len(source),
        "width": embedder.width,
        "dtype": dtype,
        "parts": [parts.path(part).name for part in range(len(parts))],
        **described,
    }
    distributed.barrier()  # every process has looked before one writes
    if distributed.rank() == 0 and not index.exists():
        parts.write_file(index, _json({**values, "complete": False}))
    parts = _complete(embedder, source, folder, dtype, report, workers=workers, list_rows=True)
    faults = [fault for _, fault in parts.faults()]
    counts = dict(Counter(fault.reason for fault in faults).most_common())
    values |= {"complete": True, "bad": len(faults), "bad_reasons": counts}
    if distributed.rank() == 0:
        lines = "".join(json.dumps({"source": source.name, **fault._asdict()}) + "\n" for fault in faults)
        parts.write_file(folder / BAD_LIST, lines.encode())
        parts.write_file(index, _json(values))
    return values


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _complete(
    embedder: Embedder,
    source: Source,
    folder: Path,
    dtype: Precision,
    report: Callable[[str], None],
    *,
    workers: int,
    list_rows: bool,
) -> FeatureParts:
    """The parts of a folder, those that are missing computed."""
    parts = FeatureParts(folder, [len(source)], embedder.width, dtype)
    missing = parts.missing()
    distributed.barrier()  # every process has looked before one writes
    if not missing:
        return parts
    if distributed.rank() == 0:
        report(f"{source.name}: {len(missing)} of {len(parts)} parts of its {embedder.what} are to be computed")
    work = Pass(
        sources=[source],
        rows=embedder.rows,
        embed=embedder.embed,
        batch_size=embedder.batch_size,
        name=f"{source.name}, {embedder.what}",
        workers=workers,
        with_image=embedder.what != "text",
        list_rows=list_rows,
    )
    with _locked(folder):
        if distributed.rank() == 0:
            parts.remove_torn()
        distributed.barrier()
        signal = compute_parts(work, parts, missing, embedder.device, report)
    if signal:
        raise Interrupted(signal)
    return parts


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other commands from computing the same features meanwhile; the first process alone. Ends with the process.

    Raises:
        UsageError: another command does already.
    """
    if distributed.rank() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another process computes features into {str(folder)!r}: wait for it") from error
        yield
    finally:
        os.close(descriptor)
