"""The features that a frozen image tower gives, computed once for all training samples before the first step.

Where the backbone of the image tower does not change and images are the same each time, its pass over a sample gives
the same features in every epoch. They are kept in the run folder (data.features), and the image lane takes them in
place of images: what is left of its tower is dropout and projection, trained or not.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from triscale import distributed
from triscale.config import RunConfig
from triscale.data.features import FeatureParts, StoredFeatures
from triscale.data.images import ImageRow, Pixels
from triscale.data.mixture import Mixture
from triscale.data.processes import note
from triscale.data.rows import read_sample
from triscale.data.samples import BadSample, FetchesAhead
from triscale.data.settings import is_still
from triscale.data.unchanged import describe_sources
from triscale.data.workers import Watch, run
from triscale.errors import RunError, UsageError
from triscale.models.image import ImageTower
from triscale.training.frozen import is_frozen
from triscale.training.loop import StopFlag

BATCH = {"cpu": 64}
"""Images that go through the backbone at once; `BATCH_ELSEWHERE` on other devices."""
BATCH_ELSEWHERE = 256
REPORT_SECONDS = 10.0
FORMAT = 1
"""Of the files; part of the digest."""


def is_cached(config: RunConfig, mixture: Mixture, image: nn.Module) -> bool:
    """Whether a run takes features in place of images. A pure function of settings and data, so resumes agree.

    Raises:
        UsageError: it should, and cannot.
    """
    if config.data.cache_features == "off":
        return False
    reason = _obstacle(config, mixture, image)
    if reason and config.data.cache_features == "on":
        raise UsageError(f"--data.cache-features on: {reason}")
    draws = config.train.steps * config.batch.size
    return not reason and (config.data.cache_features == "on" or draws > len(mixture))


def _obstacle(config: RunConfig, mixture: Mixture, image: nn.Module) -> str:
    """Why features cannot be computed once for all; empty where they can."""
    if not isinstance(image, ImageTower) or not is_frozen(image.backbone):
        return "the image tower's backbone is trained; add --train.frozen image.backbone"
    if not is_still(config.data.augment):
        return "images are augmented, so they differ each time"
    if any(isinstance(source, FetchesAhead) for source in mixture.sources):
        return "shards are behind URLs; fetch them first"
    return ""


def open_features(
    config: RunConfig,
    mixture: Mixture,
    image: ImageTower,
    folder: Path,
    device: torch.device,
    report: Callable[[str], None],
) -> tuple[StoredFeatures, int]:
    """The features of all samples, those that are missing computed by all ranks together. A collective.

    Args:
        image: bare, on `device`.
        folder: that keeps them.
        report: hears how far it is.

    Returns:
        The features, and the signal that ended the computation early (0: none), after which they are not complete.

    Raises:
        RunError: a source cannot be read, or the disk is full.
    """
    counts = [len(source) for source in mixture.sources]
    parts = FeatureParts(folder / _digest(config, mixture, image), counts, image.feature_width)
    pixels = Pixels(config.data, sum(counts))
    missing = [part for part in range(len(parts)) if not parts.is_there(part)]
    if distributed.rank() == 0:
        parts.remove_torn()
    distributed.barrier()  # every rank has looked before one writes
    signal = 0
    if missing:
        report(f"features of the frozen image tower: {len(missing)} of {len(parts)} parts are to be computed")
        signal = _Computation(config, mixture, image, parts, pixels, device, report).run(missing)
    return StoredFeatures(parts, pixels), signal


def _digest(config: RunConfig, mixture: Mixture, image: ImageTower) -> str:
    """Of all that features depend on."""
    data, model = config.data, config.model
    words: list[Any] = [FORMAT, config.train.precision, data.image_size, data.canvas, data.fit]
    words += [model.image, model.image_options, model.batch_norm, model.image_mean, model.image_std]
    words += describe_sources(mixture.sources)
    digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=16)
    for name, tensor in sorted(image.backbone.state_dict().items()):
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Decoder:
    """Images of consecutive samples for the backbone, and which of them could be decoded. Pickled to workers."""

    def __init__(self, mixture: Mixture, pixels: Pixels, chunks: list[tuple[int, range]]) -> None:
        self.sources, self.pixels, self.chunks = mixture.sources, pixels, chunks

    def __call__(self, asked: range) -> tuple[np.ndarray, np.ndarray]:
        number, samples = self.chunks[asked.start]
        note(asked.start)
        rng = np.random.default_rng(0)  # of which nothing that is drawn is used
        rows: list[ImageRow] = []
        good = np.zeros(len(samples), dtype=bool)
        for place, index in enumerate(samples):
            try:
                sample = read_sample(self.sources[number], index, image=True)
                rows.append(self.pixels.draw(sample, (number, index), rng))
                good[place] = True
            except BadSample:  # counted and listed when it is drawn
                continue
        return (self.pixels.stack(rows).numpy() if rows else np.empty(0, dtype=np.uint8)), good

    def under_way(self, noted: int) -> str:
        """What a process was doing that has noted this last."""
        number, samples = self.chunks[noted]
        return f"was reading samples {samples.start} to {samples.stop - 1} of {self.sources[number].name}"


class _Computation:
    """This rank's share of the missing parts, a chunk at a time; after each one all ranks agree on going on."""

    def __init__(
        self,
        config: RunConfig,
        mixture: Mixture,
        image: ImageTower,
        parts: FeatureParts,
        pixels: Pixels,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.mixture, self.image = config, mixture, image
        self.parts, self.pixels, self.device, self.report = parts, pixels, device, report
        self.size = BATCH.get(device.type, BATCH_ELSEWHERE)

    def run(self, missing: list[int]) -> int:
        """Compute `missing`, shared out over ranks; the signal that ended it early, 0: none."""
        mine = missing[distributed.rank() :: distributed.world_size()]
        chunks = [(part, chunk) for part in mine for chunk in self._chunks(part)]
        decoder = _Decoder(self.mixture, self.pixels, [(self.parts.samples(part)[0], chunk) for part, chunk in chunks])
        wanted = (range(number, number + 1) for number in range(len(chunks)))
        workers = self.config.data.workers
        watch = Watch(describe=decoder.under_way, stall_seconds=self.config.data.stall_seconds, report=self.report)
        done, told = 0, time.monotonic()
        with StopFlag() as stop, closing(run(decoder, wanted, workers=workers, ahead=4 * workers, watch=watch)) as made:
            unfinished: list[tuple[np.ndarray, np.ndarray]] = []
            while True:
                failure = None
                try:
                    done += self._advance(made, chunks, done, unfinished)
                except RunError as error:
                    failure = error
                left, signal, failed = self._agree(len(chunks) - done, stop.signal, int(failure is not None))
                if failed:
                    raise failure or RunError("another process could not compute its features; its message says why")
                if signal or not left:
                    return signal
                if time.monotonic() - told > REPORT_SECONDS:
                    told = time.monotonic()
                    self.report(f"features of the frozen image tower: {done / max(len(chunks), 1):.0%}")

    def _advance(self, made: Any, chunks: list[tuple[int, range]], done: int, unfinished: list[Any]) -> int:
        """Compute one chunk more, if there is one, and write its part where that is the last of it; how many it did."""
        if done == len(chunks):
            return 0
        images, good = next(made)
        unfinished.append((self._features(images, good), good))
        part, chunk = chunks[done]
        if chunk.stop == self.parts.samples(part)[1].stop:
            features, good = (np.concatenate(column) for column in zip(*unfinished, strict=True))
            unfinished.clear()
            self.parts.write(part, features, good)
        return 1

    def _chunks(self, part: int) -> list[range]:
        """A part's samples, as many as go through the backbone at once."""
        _, samples = self.parts.samples(part)
        return [samples[first : first + self.size] for first in range(0, len(samples), self.size)]

    @torch.no_grad()
    def _features(self, images: np.ndarray, good: np.ndarray) -> np.ndarray:
        """Rows of features, zeros where there is no image."""
        rows = np.zeros((len(good), self.image.feature_width), dtype=np.float32)
        if good.any():
            dtype = torch.bfloat16 if self.config.train.precision == "bfloat16" else None
            pixels = torch.from_numpy(images).to(self.device)
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                rows[good] = self.image.features(pixels).float().cpu().numpy()
        return rows

    def _agree(self, *flags: int) -> list[int]:
        where = self.device if self.device.type == "cuda" else torch.device("cpu")
        return distributed.all_reduce_max(torch.tensor(flags, dtype=torch.int64, device=where)).tolist()
