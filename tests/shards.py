"""Tar shards for tests, written in moments however many samples they hold."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_shards(folder: Path, *, shards: int, samples: int, side: int = 16) -> None:
    """Write `shards` shards 00000.tar, 00001.tar, ... of `samples` JPEGs each, no two alike, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(shards):
        with tarfile.open(folder / f"{number:05}.tar", "w") as shard:
            for index in range(samples):
                picture = io.BytesIO()
                coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
                coarse.resize((side, side)).save(picture, "jpeg")
                for name, content in (
                    (f"{index:05}.jpg", picture.getvalue()),
                    (f"{index:05}.txt", f"red circle {number} {index}".encode()),
                ):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
