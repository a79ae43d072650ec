"""Evaluation sets on disk and an encoder that knows their classes fairly well, for tests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from triscale.evaluation.encoder import Encoder
from triscale.randomness import generator

SIDE = 4
LOGIT_SCALE = 20.0
TEMPLATES = ("{c}", "drawn: {c}", "photo: {c}")
NAMES = tuple(f"kind {number}" for number in range(12))


def prototype(name: str) -> np.ndarray:
    """What pictures of `name` look like, (SIDE, SIDE, 3) in 0..255."""
    return generator("prototype", name).uniform(0, 255, (SIDE, SIDE, 3))


def picture(name: str, number: int, noise: float = 160.0) -> np.ndarray:
    """A noisy uint8 picture of `name`."""
    shifts = generator("picture", name, number).normal(0, noise, (SIDE, SIDE, 3))
    return np.clip(prototype(name) + shifts, 0, 255).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def embed_images(images: Tensor) -> Tensor:
    return images.permute(0, 2, 3, 1).flatten(1).double() / 255 - 0.5


def embed_texts(texts: list[str]) -> Tensor:
    rows = [
        (prototype(text.split(": ")[-1]) + generator("prompt", text).normal(0, 80, (SIDE, SIDE, 3))).ravel() / 255 - 0.5
        for text in texts
    ]
    return torch.from_numpy(np.stack(rows))


def encoder(batch_size: int = 7) -> Encoder:
    return Encoder(
        image=embed_images,
        text=embed_texts,
        logit_scale=lambda: LOGIT_SCALE,
        image_size=SIDE,
        fit="crop",
        batch_size=batch_size,
    )


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def write_set(
    folder: Path,
    *,
    names: Sequence[str] = NAMES,
    labels: Sequence[int] = tuple(range(12)),
    templates: Sequence[str] = TEMPLATES,
    shards: int = 1,
    bad: Sequence[int] = (),
) -> Path:
    """Write a classification set in CLIP_benchmark's layout; the samples numbered in `bad` hold no image."""
    samples: list[dict[str, bytes]] = [{} for _ in range(shards)]
    for number, label in enumerate(labels):
        pixels = png(picture(names[label], number))
        samples[number % shards][f"{number:04}.png"] = b"no image" if number in bad else pixels
        samples[number % shards][f"{number:04}.cls"] = str(label).encode()
    for number, files in enumerate(samples):
        write_tar(folder / "test" / f"{number}.tar", files)
    (folder / "test/nshards.txt").write_text(f"{shards}\n")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{text}\n" for text in templates))
    return folder


def write_retrieval_set(folder: Path, captions: Sequence[str], bad: Sequence[int] = ()) -> Path:
    """Write a retrieval set: image i is of the first line of `captions[i]`."""
    files: dict[str, bytes] = {}
    for number, text in enumerate(captions):
        pixels = png(picture(text.strip().split("\n")[0], number))
        files |= {f"{number}.png": b"no image" if number in bad else pixels, f"{number}.txt": text.encode()}
    write_tar(folder / "test/0.tar", files)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder
