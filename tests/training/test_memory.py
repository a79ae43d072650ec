"""Activation bytes against what the layers are known to save, and what "auto" makes of a budget."""

from __future__ import annotations

import torch
from torch import nn

from triscale.training.memory import activation_bytes, default_budget_bytes
from triscale.training.plan import ActivationBytes, auto_keep, auto_micro_batch


def test_each_storage_counts_once_and_parameters_and_inputs_never() -> None:
    """Linear saves its input and weight, ReLU its output: of (8, 16) and (8, 32) float32 only ReLU's counts here."""
    rows = torch.randn(8, 16)
    tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    # ReLU's result is saved twice, by ReLU and by the second Linear, and is one storage.
    assert activation_bytes(tower, lambda: tower(rows), rows) == 8 * 32 * 4


def test_bytes_are_the_same_on_the_meta_device() -> None:
    counted = []
    for device in ("cpu", "meta"):
        rows = torch.empty(8, 16, device=device)
        tower = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4)).to(device)
        counted.append(activation_bytes(tower, lambda tower=tower, rows=rows: tower(rows), rows))
    assert counted[0] == counted[1] == 2 * 8 * 32 * 4


def test_auto_never_promises_more_than_the_budget() -> None:
    for budget in (0, 10**3, 10**6, 10**9):
        for row_bytes in (10.0, 10.0**4):
            micro_batch = auto_micro_batch(ActivationBytes(50.0, row_bytes), 512, budget, "cpu")
            keep = auto_keep(row_bytes * micro_batch, -(-512 // micro_batch), budget)
            assert 1 <= micro_batch <= 64
            if keep:
                assert (keep + 2) * micro_batch * row_bytes <= budget


def test_the_default_budget_is_below_what_the_host_has() -> None:
    import psutil

    assert 0 < default_budget_bytes(torch.device("cpu")) < psutil.virtual_memory().total
