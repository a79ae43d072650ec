"""Positives by id as group sums, so that tiles never see ids.

Positives enter every loss linearly: sum_{j in P(i)} x_i . y_j = x_i . (the sum of y over P(i)). Rows whose id nobody
shares have one positive, which this rank holds; only the groups with several members need sums over ranks. They are
made a few thousand groups at a time, and a rank keeps those that it has a row in: O(b d) at any number of ranks.

Shape suffixes: B rows over all ranks, b of this rank, d width, g groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from triscale import distributed
from triscale.losses.columns import RankRows
from triscale.losses.tiles import precise_dtype

GROUPS_AT_ONCE = 4096
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Groups:
    """Which rows belong together. Without ids, `by_row` of pairs is their own number and nothing is shared."""

    by_row: Int[Tensor, " b"]
    """The group of each of all B rows."""
    sizes: Int[Tensor, " m"]
    """|P(i)|, i included, of each of this rank's rows."""
    slots: Int[Tensor, " m"]
    """The shared group, counted over those of all ranks, of each of this rank's rows; -1: none but its own views."""
    shared: int
    """The number of shared groups over all ranks."""


def group_rows(ids: Int[Tensor, " n"] | None, ranks: RankRows, device: torch.device, views: int = 1) -> Groups:
    """Number the groups of equal ids over all ranks; a negative id is a group of its own.

    Args:
        ids: of this rank's samples, each of which has `views` rows, view by view.
        ranks: how rows, not samples, lie on the ranks.
    """
    samples = [count // views for count in ranks.counts]
    total = sum(samples)
    if ids is None:
        by_sample = torch.arange(total, device=device)
        sizes, shared_number, shared = by_sample.new_ones(total), by_sample.new_full((total,), -1), 0
    else:
        by_sample = _number(distributed.all_gather_rows(ids, samples))
        members = torch.bincount(by_sample, minlength=total)
        is_shared = members > 1
        shared = int(is_shared.sum())
        number = torch.where(is_shared, is_shared.cumsum(0) - 1, -1)
        sizes, shared_number = members[by_sample], number[by_sample]
    parts = [part.repeat(views) for part in by_sample.split(samples)]
    first = sum(samples[: ranks.rank])
    mine = slice(first, first + samples[ranks.rank])
    return Groups(torch.cat(parts), sizes[mine].repeat(views) * views, shared_number[mine].repeat(views), shared)


def _number(ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """A number below B for each id; rows with the same non-negative id, and only they, get the same."""
    shared = ids >= 0
    index = torch.empty_like(ids)
    values, inverse = torch.unique(ids[shared], return_inverse=True)
    index[shared] = inverse.to(index.dtype)
    alone = int((~shared).sum())
    index[~shared] = torch.arange(len(values), len(values) + alone, dtype=ids.dtype, device=ids.device)
    return index.long()


class PositiveSums:
    """sum_{j in P(i)} of the partners' rows, for this rank's rows i, a tile at a time.

    Args:
        partners: the rows whose sum is wanted, those of this rank. Row i's own partner stands at row i or, with two
            views, half the rows further on.
        without_self: whether row i itself is left out of P(i) (two views of one lane).
    """

    def __init__(self, partners: Float[Tensor, "b d"], groups: Groups, without_self: bool = False) -> None:
        self._partners, self._without_self = partners, without_self
        self._sums = partners[:0]
        if groups.shared:
            self._local, self._slots = self._local_slots(groups)
            self._sums = self._group_sums(groups)

    def _local_slots(self, groups: Groups) -> tuple[Tensor, Tensor]:
        """The shared groups that this rank has rows in, in order; and for each of its rows the place there, or -1."""
        held, place = torch.unique(groups.slots, return_inverse=True)
        none = int((held < 0).sum())  # 1 if some rows share with nobody: -1 comes first
        return held[none:], place - none

    def _group_sums(self, groups: Groups) -> Tensor:
        """The sum over all ranks of every group that this rank has a row in."""
        width = self._partners.shape[1]
        sums = self._partners.new_empty((len(self._local), width), dtype=precise_dtype(self._partners.dtype))
        for first in range(0, groups.shared, GROUPS_AT_ONCE):
            last = min(first + GROUPS_AT_ONCE, groups.shared)
            part = sums.new_zeros((last - first, sums.shape[1]))
            rows = ((groups.slots >= first) & (groups.slots < last)).nonzero()[:, 0]
            for some in rows.split(ROWS_AT_ONCE):
                part.index_add_(0, groups.slots[some] - first, self._partners[some].to(part.dtype))
            distributed.all_reduce_sum(part)
            here = (self._local >= first) & (self._local < last)
            sums[here] = part[self._local[here] - first]
        return sums

    def tile(self, rows: slice) -> Float[Tensor, "r d"]:
        """The sums of some rows, in `precise_dtype`. Perhaps a view: not to be written to."""
        precise = precise_dtype(self._partners.dtype)
        own = self._partners[rows].to(precise)
        partners = own
        if self._without_self:
            count = len(self._partners)
            index = (torch.arange(rows.start, rows.stop, device=own.device) + count // 2) % count
            partners = self._partners[index].to(precise)
        if not len(self._sums):
            return partners
        slots = self._slots[rows, None]
        sums = self._sums[slots[:, 0].clamp_min(0)]
        return torch.where(slots >= 0, sums - own if self._without_self else sums, partners)
