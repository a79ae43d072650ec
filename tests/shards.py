"""Tar shards for tests, written in moments however many samples they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from odd_files import TarPart, encode, tar_bytes


def write_shards(folder: Path, *, shards: int, samples: int, side: int = 16) -> None:
    """Write `shards` shards 00000.tar, 00001.tar, ... of `samples` JPEGs each, no two alike, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(shards):
        entries: list[TarPart] = []
        for index in range(samples):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            entries.append((f"{index:05}.jpg", encode(coarse.resize((side, side)), "jpeg")))
            entries.append((f"{index:05}.txt", f"red circle {number} {index}".encode()))
        (folder / f"{number:05}.tar").write_bytes(tar_bytes(entries))
