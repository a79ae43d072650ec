"""The benchmarks run as their docstrings say, and hold what docs/results.md claims of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_batch(tmp_path: Path) -> None:
    """B=8,192 takes at most 1.2 times the memory of B=512, embeddings and inputs taken off."""
    figures = tmp_path / "memory.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / "memory.py", "--json", figures], check=True, timeout=600)
    small, large = json.loads(figures.read_text())
    assert (small["batch"], large["batch"]) == (512, 8192)
    assert large["above_embeddings"] <= 1.2 * small["above_embeddings"]
