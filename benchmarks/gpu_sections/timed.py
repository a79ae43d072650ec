"""The table of rows that were timed, of losses and of steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table

from triscale.bench.measure import MIB
from triscale.bench.table import Row, make_table


def timed_table(rows: list[Row], *, task: str, details: dict[str, str] | None = None) -> Table:
    """`bench.table.make_table` of these rows, with the memory that the process took from the card in all."""
    shown = [replace(row, details={**row.details, **_memory(row.details)}) for row in rows]
    headings = {"reserved": "reserved MiB", "of_card": "of card", **(details or {})}
    return make_table(shown, task=task, ours="ours", details=headings)


def _memory(details: dict[str, Any]) -> dict[str, str]:
    """The memory taken from the card as text, and its share."""
    reserved, card = details["reserved_bytes"], details["card_bytes"]
    return {} if reserved is None else {"reserved": f"{reserved / MIB:,.0f}", "of_card": f"{reserved / card:.0%}"}
