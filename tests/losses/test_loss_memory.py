"""Memory and shares of the tiled losses in fresh processes, as Linux counts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MIB = 2**20

PEAK = """
import sys
from pathlib import Path
import torch
from triscale import losses

def status_bytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

name, form, rows, width = sys.argv[1], sys.argv[2] == "tiled", int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
if name == "InfoNCE":
    loss = losses.InfoNCE(form)
elif name == "Sigmoid":
    loss = losses.Sigmoid(form, batch_size=rows)
else:
    loss = losses.NTXent(tiled=form)
lanes = [torch.randn(rows, width, requires_grad=True) for _ in range(3 - loss.views)]
before = status_bytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
loss(*lanes).backward()
print(status_bytes("VmHWM") - before)
"""


def peak_bytes(loss: str, form: str, rows: int, width: int) -> int:
    """Peak of one forward and backward pass in a fresh process, above its size just before, inputs there by then."""
    command = [sys.executable, "-c", PEAK, loss, form, str(rows), str(width)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout)


@pytest.mark.parametrize("loss", ["InfoNCE", "Sigmoid", "NTXent"])
def test_a_tiled_loss_takes_three_buffers_of_its_inputs_and_a_few_mebibytes(loss: str) -> None:
    """B=8,192, d=512: three (B, d) of 16 MiB (two for NT-Xent); code, first touched here, is in the allowance, too."""
    buffers = 2 if loss == "NTXent" else 3
    assert peak_bytes(loss, "tiled", 8192, 512) < buffers * 16 * MIB + 32 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["InfoNCE", "Sigmoid", "NTXent"])
def test_a_batch_of_131072_takes_less_than_256_mib(loss: str) -> None:
    """d=64, forward and backward, on one process: all scores would be 64 GiB."""
    assert peak_bytes(loss, "tiled", 131072, 64) < 256 * MIB


@pytest.mark.slow
def test_tiled_info_nce_takes_at_most_3_percent_of_the_dense_forms_memory() -> None:
    """B=16,384, d=512."""
    assert peak_bytes("InfoNCE", "tiled", 16384, 512) <= 0.03 * peak_bytes("InfoNCE", "dense", 16384, 512)


def test_the_benchmark_of_ranks_prints_shares_of_one_process(tmp_path: Path) -> None:
    """At toy size: both exchanges, one process and two."""
    figures = tmp_path / "ranks.json"
    command = [sys.executable, ROOT / "benchmarks" / "loss_ranks.py", "--world", "2", "--batch", "64", "--width", "8"]
    command += ["--repeats", "1", "--losses", "nt_xent", "--json", figures]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    rows = json.loads(figures.read_text())
    assert [(row["exchange"], row["world"]) for row in rows] == [("gather", 1), ("gather", 2), ("blocks", 2)]
    assert all(row["cpu_seconds"] > 0 and row["cpu_seconds_share"] > 0 for row in rows)
    assert "the goal of W=2 is 0.50" in done.stdout
