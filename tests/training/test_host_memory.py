"""With the allocator set up, repeated steps ask the kernel for no memory; on other systems nothing happens."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
from functools import cache

import pytest

from triscale.training import host_memory

SETTLED = 4
"""Steps after which every buffer has had its place."""
GLIBC = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"

# Steps that keep 64 MiB of activations, in buffers of 8 MiB.
STEPS = """
import ctypes, json, resource, sys
import torch
from torch import nn
from triscale.losses import InfoNCE
from triscale.training.host_memory import reuse_large_buffers
from triscale.training.step import ContrastiveStep

# Huge pages, which the kernel gives as it likes, would come with one fault for 512 pages (linux/prctl.h).
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
took = reuse_large_buffers() if sys.argv[1] == "reused" else False
torch.set_num_threads(1)
torch.manual_seed(0)
towers = {name: nn.Sequential(nn.Linear(16, 8192), nn.ReLU(), nn.Linear(8192, 8)) for name in ("image", "text")}
inputs = {name: torch.randn(1024, 16) for name in towers}
loss = InfoNCE()
step = ContrastiveStep(towers, loss, micro_batch=256, keep=int(sys.argv[2]))
faults, resident = [], []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(inputs)
    for module in (*towers.values(), loss):
        module.zero_grad(set_to_none=True)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    resident.append(int(open("/proc/self/statm").read().split()[1]))
print(json.dumps({"took": took, "faults": faults, "resident": resident}))
"""


@cache
def repeated_steps(allocator: str, keep: int) -> dict[str, list[int]]:
    """Page faults and resident pages of twelve steps in a process of their own."""
    command = [sys.executable, "-c", STEPS, allocator, str(keep)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
def test_repeated_steps_fault_in_at_most_a_fifth_of_the_pages() -> None:
    reused, default = repeated_steps("reused", 4), repeated_steps("default", 4)
    assert reused["took"]
    assert sum(default["faults"][SETTLED:]) >= 5 * sum(reused["faults"][SETTLED:])


@pytest.mark.skipif(not GLIBC, reason="the settings are glibc's")
@pytest.mark.parametrize("keep", [0, 4])
def test_the_process_does_not_grow_from_step_to_step(keep: int) -> None:
    resident = repeated_steps("reused", keep)["resident"]
    assert max(resident[SETTLED:]) <= 1.05 * resident[SETTLED]


@pytest.mark.parametrize(("system", "libc"), [("linux", "musl"), ("linux", ""), ("darwin", ""), ("win32", "")])
def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, system: str, libc: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(ctypes, "CDLL", None)  # nothing may be called
    assert host_memory.reuse_large_buffers() is False
