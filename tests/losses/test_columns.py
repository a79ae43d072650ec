"""Columns over real processes: pieces that arrive while one is at work, and how "auto" chooses."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist

from ranks import run_ranks
from triscale import distributed
from triscale.errors import LostProcess
from triscale.losses import columns, tiles

COUNTS = [1, 70, 20]
WIDTH = 5


def every_row() -> torch.Tensor:
    return torch.arange(sum(COUNTS) * WIDTH, dtype=torch.float32).view(-1, WIDTH)


def go_through(rank: int, world: int) -> dict[str, object]:
    """What each exchange's pieces held while the next was on its way, and what came of their gradients."""
    tiles.TILE_COLUMNS = 24  # pieces of 24 rows gathered, of 12 that travel
    ranks = columns.rank_rows(COUNTS[rank], torch.device("cpu"))
    results: dict[str, object] = {}
    for exchange, dtype in (("gather", torch.float32), ("blocks", torch.float32), ("blocks", torch.float16)):
        mine = every_row()[ranks.mine].to(dtype)
        held = columns.columns(exchange, mine.clone(), ranks)  # type: ignore[arg-type]
        seen = []
        for piece in held.pieces():
            distributed.barrier()  # another rank's next piece may well have arrived by now
            seen.append(piece.rows.clone())
            # A gradient that float16 would round, from every rank.
            held.give(piece, (piece.start + torch.arange(len(piece.rows)))[:, None] + torch.full((1, WIDTH), 2.0**-12))
        results[f"{exchange} {dtype}"] = [torch.cat(seen), held.gradient().clone()]
    small = type(columns.columns("auto", every_row()[ranks.mine], ranks)).__name__
    columns.GATHER_BYTES = 4 * sum(COUNTS) * WIDTH - 1
    large = type(columns.columns("auto", every_row()[ranks.mine], ranks)).__name__
    results["auto"] = [small, large]
    return results


def test_pieces_are_whole_while_the_next_arrives_and_gradients_reach_their_owners() -> None:
    for rank, result in enumerate(run_ranks(go_through, len(COUNTS))):
        first = sum(COUNTS[:rank])
        numbers = torch.arange(first, first + COUNTS[rank]).float()[:, None]
        expected = len(COUNTS) * (numbers + 2.0**-12).expand(-1, WIDTH)
        for name in ("gather torch.float32", "blocks torch.float32", "blocks torch.float16"):
            rows, gradient = result[name]
            assert torch.equal(rows.float(), every_row().to(rows.dtype).float()), name
            assert gradient.dtype == torch.float32 and torch.equal(gradient, expected), name
        assert result["auto"] == ["Gathered", "Broadcast"]


def stop_in_the_middle(rank: int, world: int) -> str:
    """Rank 1 leaves after two pieces; what the other's wait says."""
    tiles.TILE_COLUMNS = 8
    ranks = columns.rank_rows(40, torch.device("cpu"))
    held = columns.columns("blocks", torch.ones(40, WIDTH), ranks)
    try:
        for number, piece in enumerate(held.pieces()):
            if rank == 1 and number == 2:
                dist.destroy_process_group()
                return "left"
            held.give(piece, torch.zeros_like(piece.rows))
    except LostProcess as error:
        return str(error)
    return "done"


def lose_a_rank(rank: int, world: int) -> str:
    said = stop_in_the_middle(rank, world)
    if dist.is_initialized():
        dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:  # a group of its own, for the harness' last barrier
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)  # type: ignore[attr-defined]
    return said


def test_a_rank_that_leaves_between_pieces_is_a_lost_process() -> None:
    said = run_ranks(lose_a_rank, 2)
    assert said[1] == "left"
    assert said[0].startswith("process 0 of 2 lost contact with the others")
