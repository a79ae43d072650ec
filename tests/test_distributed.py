"""The collectives with uneven rows on real processes, and as the identity on one."""

from __future__ import annotations

import torch

import ranks
from triscale import distributed

COUNTS = [3, 1, 2]


def on_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    mine = torch.full((COUNTS[rank], 2), float(rank))
    everything = torch.arange(12.0).view(6, 2) * (rank + 1)
    pair = [torch.tensor([1.0 * rank]), torch.tensor([[2, rank]])]
    distributed.all_reduce_sum_coalesced(pair)
    return {
        "counts": torch.tensor(distributed.row_counts(COUNTS[rank])),
        "gathered": distributed.all_gather_rows(mine, COUNTS),
        "gathered parts": distributed.all_gather_parts(parts := list(mine.split(2)), mine[:0]),
        "parts left": torch.tensor(len(parts)),
        "scattered": distributed.reduce_scatter_rows(everything, COUNTS),
        "largest": distributed.all_reduce_max(torch.tensor(rank)),
        "smallest": distributed.all_reduce_min(torch.tensor(rank)),
        "rows": torch.tensor(list(distributed.rows_of(8))),
        "first of pair": pair[0],
        "second of pair": pair[1],
    }


def test_collectives_on_three_processes_with_uneven_rows() -> None:
    results = ranks.run_ranks(on_rank, 3)
    expected = torch.cat([torch.full((n, 2), float(r)) for r, n in enumerate(COUNTS)])
    whole = torch.arange(12.0).view(6, 2) * (1 + 2 + 3)
    for rank, result in enumerate(results):
        first = sum(COUNTS[:rank])
        assert result["counts"].tolist() == COUNTS
        assert torch.equal(result["gathered"], expected) and torch.equal(result["gathered parts"], expected)
        assert int(result["parts left"]) == 0
        assert torch.equal(result["scattered"], whole[first : first + COUNTS[rank]])
        assert (int(result["largest"]), int(result["smallest"])) == (2, 0)
        assert result["first of pair"].tolist() == [3.0] and result["second of pair"].tolist() == [[6, 3]]
    assert [row for result in results for row in result["rows"].tolist()] == list(range(8))


def test_on_one_process_every_collective_is_the_identity() -> None:
    rows = torch.randn(4, 2)
    assert distributed.row_counts(4) == [4]
    assert distributed.all_gather_rows(rows, [4]) is rows
    assert distributed.reduce_scatter_rows(rows, [4]) is rows
    assert torch.equal(distributed.all_gather_parts([rows[:1], rows[1:]], rows[:0]), rows)
    assert distributed.all_gather_parts([], rows[:0]).shape == (0, 2)
    assert distributed.all_reduce_sum(rows) is rows
    assert distributed.rows_of(5) == range(5)
