"""Bad samples: counted by reason, listed once each, and the run stopped when they are too many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from triscale.distributed import all_gather_rows, row_counts
from triscale.errors import RunError

MINIMUM_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRecord:
    """A sample that was drawn and found bad."""

    source: str
    """The name of its source."""
    key: str
    """Its key there; "#INDEX" where not even that could be read."""
    reason: str
    """A kebab-case code, see samples.BadSample."""


class Quarantine:
    """Counts of bad draws of the whole contrastive batch, and the file that lists the samples.

    Every rank counts alike (`gather_records`), so all stop together; rank 0 alone has a `path`.

    Args:
        path: JSON lines {"source", "key", "reason"}, appended to, once for each sample and reason; None: no file.
        max_bad: largest fraction of bad draws.
    """

    def __init__(self, path: Path | None, max_bad: float) -> None:
        self.path = path
        self.max_bad = max_bad
        self.drawn = 0
        self.bad: dict[str, int] = {}
        self._listed = set() if path is None else _listed(path)

    @property
    def fraction(self) -> float:
        """Bad draws over all draws."""
        return sum(self.bad.values()) / self.drawn if self.drawn else 0.0

    def add(self, records: Iterable[BadRecord], drawn: int) -> None:
        """Count and list the bad samples of a batch.

        Args:
            records: the bad samples, in order; each was replaced by a further draw.
            drawn: positions that were filled with good samples.

        Raises:
            RunError: too many are bad (judged from 1,000 draws on), or the file cannot be written.
        """
        records = list(records)
        self.drawn += drawn + len(records)
        for record in records:
            self.bad[record.reason] = self.bad.get(record.reason, 0) + 1
        self._list(records)
        self.check()

    def list_unused(self, source: str, entries: Iterable[tuple[str, str]]) -> None:
        """List (key, reason) of what a source holds but never draws; the counts are of draws and stay."""
        self._list([BadRecord(source=source, key=key, reason=reason) for key, reason in entries])

    def check(self, minimum_draws: int = MINIMUM_DRAWS) -> None:
        """Raise RunError if there are at least `minimum_draws` draws and more than `max_bad` of them bad."""
        if self.drawn < minimum_draws or not exceeds(sum(self.bad.values()), self.drawn, self.max_bad):
            return
        reasons = ", ".join(
            f"{count} {reason}" for reason, count in sorted(self.bad.items(), key=lambda item: -item[1])
        )
        listed = f"; they are listed in {self.path}" if self.path else ""
        raise RunError(
            f"{self.fraction:.1%} of {self.drawn} samples drawn are bad, more than --data.max-bad {self.max_bad:g}: "
            f"{reasons}{listed}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The counts, as plain JSON values."""
        return {"drawn": self.drawn, "bad": dict(self.bad)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the counts of `state_dict`. The file stays: what it lists already is not listed again."""
        self.drawn = int(state["drawn"])
        self.bad = {str(reason): int(count) for reason, count in state["bad"].items()}

    def _list(self, records: Sequence[BadRecord]) -> None:
        lines = []
        for record in records:
            line = json.dumps(asdict(record))
            if self.path is not None and _digest(line) not in self._listed:
                self._listed.add(_digest(line))
                lines.append(line + "\n")
        if self.path is None or not lines:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}") from error


def exceeds(bad: int, drawn: int, max_bad: float) -> bool:
    """Whether more than the fraction `max_bad` of `drawn` are bad."""
    return bad > max_bad * drawn


def gather_records(records: Sequence[BadRecord], device: torch.device | str = "cpu") -> list[BadRecord]:
    """All ranks' records, in rank order, on every rank. A collective: all ranks enter it. NCCL needs device "cuda"."""
    spelled = "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()
    counts = row_counts(len(spelled), device)
    if sum(counts) == 0:
        return []
    mine = torch.frombuffer(bytearray(spelled), dtype=torch.uint8) if spelled else torch.empty(0, dtype=torch.uint8)
    everyones = bytes(all_gather_rows(mine.to(device), counts).cpu().numpy())
    return [BadRecord(**json.loads(line)) for line in everyones.splitlines()]


def _digest(line: str) -> int:
    # Eight bytes a sample, since a bad sample in a thousand of a large source is still millions.
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little")


def _listed(path: Path) -> set[int]:
    """Digests of the lines that stand in `path`. A last line that a kill has cut is taken off."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return set()
    whole, newline, cut = content.rpartition(b"\n")
    if cut:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    return {_digest(line) for line in whole.decode("utf-8", "replace").splitlines()}
