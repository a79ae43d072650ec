"""Runs of two real processes under torchrun, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil


class Torchrun:
    """A run of two processes under torchrun: the processes, what each of them says, and the folder that it leaves."""

    def __init__(self, folder: Path, config: Path, *options: str) -> None:
        self.folder = folder
        self.logs = folder.with_name(f"{folder.name}.logs{time.monotonic_ns()}")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        redirected = ["--log-dir", str(self.logs), "--redirects", "3"]
        train = ["-m", "triscale", "train", "--config", str(config), "--run.dir", str(folder), *options]
        self.process = subprocess.Popen(
            [*torchrun, *redirected, *train],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for child in psutil.Process(self.process.pid).children():
            if child.environ().get("RANK") == str(number):
                return child
        raise AssertionError(f"there is no rank {number}")

    def wait_for_step(self, step: int) -> None:
        """Return as soon as the run has logged `step`."""
        deadline = time.monotonic() + 240
        while last_step(self.folder) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, "the run ended too early"
            time.sleep(0.005)

    def end(self, seconds: float = 240.0) -> int:
        """Wait for the end of torchrun and give its exit status; too late is a failure, and leaves nothing running."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            raise

    def said(self, number: int) -> list[str]:
        """The lines that a rank wrote to stderr."""
        (file,) = self.logs.glob(f"*/attempt_0/{number}/stderr.log")
        return file.read_text().splitlines()


def last_step(folder: Path) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0
