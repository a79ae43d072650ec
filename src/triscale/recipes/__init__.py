"""Whole runs as functions that return a config. Their docstrings hold command, hardware, time and result."""

from __future__ import annotations

from collections.abc import Callable

from triscale.config import RunConfig
from triscale.recipes import clipart, emoji, scenes

RECIPES: dict[str, Callable[[], RunConfig]] = {
    "scenes": scenes.config,
    "emoji": emoji.config,
    "clipart": clipart.config,
}
"""Name to recipe, as `triscale train NAME` takes it."""
