"""Sharded towers for callers that use them in their own time, such as evaluation, each rank on its own samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from triscale import distributed
from triscale.training import parallel
from triscale.training.lane import device_of


class Lockstep:
    """Towers by name. To go through a sharded one all ranks must come along, so each call asks who calls what.

    All ranks go through every tower that one of them calls, those without rows of their own with idle ones. Towers that
    are not sharded are simply called.

    Args:
        towers: by name; all in evaluation mode while they are called, so that idle rows leave no trace.
        idle: rows for each of them, on its device.
    """

    def __init__(self, towers: Mapping[str, nn.Module], idle: Mapping[str, Tensor]) -> None:
        self._towers, self._idle = dict(towers), dict(idle)
        self._sharded = any(parallel.is_sharded(tower) for tower in towers.values())

    def __call__(self, name: str, rows: Tensor) -> Tensor:
        """What the tower `name` makes of `rows`."""
        if not self._sharded:
            return self._towers[name](rows)
        return self._round({name: rows})[name]

    def finish(self) -> None:
        """Take part in the other ranks' calls until none has any left. Every rank comes here equally often."""
        while self._sharded and self._round({}):
            pass

    def _round(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass through all towers that any rank calls now; their outputs."""
        device = device_of(next(iter(self._towers.values())))
        called = distributed.all_reduce_max(torch.tensor([name in mine for name in self._towers], device=device).int())
        names = [name for name, any_rank in zip(self._towers, called.tolist(), strict=True) if any_rank]
        return {name: self._towers[name](mine.get(name, self._idle[name])) for name in names}
