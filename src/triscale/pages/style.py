"""The one style sheet of all pages."""

from __future__ import annotations

from importlib.resources import files

SERIES = 8
"""Colours of series; a further one would look like an earlier one."""
STYLE = files("triscale.pages").joinpath("style.css").read_text(encoding="utf-8")
