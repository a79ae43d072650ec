"""What Triton makes of the kernels for compute capability 9.0; needs no device."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from triscale.losses import launch

MOST_SHARED_BYTES = 227 * 1024
"""Of a block, at compute capability 9.0 (CUDA C++ Programming Guide, table of technical specifications)."""
MOST_SPILLED_BYTES = 300


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_kernel_of_the_table_fits_the_registers_and_the_shared_memory(tmp_path: Path) -> None:
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(launch.TABLE)
    for kernel in found:
        assert kernel["shared"] <= MOST_SHARED_BYTES, kernel
        assert kernel["spilled"] <= MOST_SPILLED_BYTES, kernel
        assert (kernel["wgmma"] > 0) == (kernel["kind"] in ("16", "tf32")), kernel
