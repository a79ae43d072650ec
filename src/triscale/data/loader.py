"""From positions to batches: read, choose a caption, decode, augment, tokenize; in worker processes or not.

A batch is a pure function of (seed, positions). Workers, ranks and resumes only decide who computes which rows:

1. position p of `order` names a source and a sample; its caption is drawn by ("caption", seed, p, view, attempt), its
   augmentation by ("augment", seed, p, view, attempt), so that p's row is the same wherever it is computed;
2. a bad sample is recorded and the one that (p, attempt) names stands in; a read that fails is tried again;
3. a rank's rows of a batch are cut into pieces, which the workers take in turn and the training process joins in order.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count, islice

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from triscale.data.augment import Augmentation
from triscale.data.captions import choose_caption, fill_template, sample_id
from triscale.data.decode import decode_image, fit_square
from triscale.data.order import Order
from triscale.data.quarantine import BadRecord
from triscale.data.samples import BadSample, Sample, Source
from triscale.data.scenes import Scenes
from triscale.data.settings import DataSettings
from triscale.data.shards import open_shards
from triscale.data.text import Tokenizer
from triscale.data.workers import run
from triscale.errors import RunError, UsageError
from triscale.randomness import generator

CACHE_BYTES = 256 * 2**20
"""Decoded images are kept in a process's memory where those of all samples fit into so much."""
MAX_ATTEMPTS = 32
"""Bad samples in a row at one position before the run gives up."""
RETRY_SECONDS = (0.2, 1.0, 5.0)
"""Pauses before a failed read is tried again."""
PIECE_ROWS = 256
"""Most rows that a worker makes at a time: small enough that all workers share even one batch."""
_VIEW = 0
"""Image-text pairs have one view of each image."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of a contrastive batch, in the order of their positions."""

    images: UInt8[Tensor, "b 3 s s"]
    tokens: Int64[Tensor, "b l"]
    ids: Int64[Tensor, " b"]
    """Rows of an equal id are positives of each other; a negative id is unique."""
    position: int
    """Of the contrastive batch's first row."""
    bad: tuple[BadRecord, ...]
    """Samples that were found bad and replaced while these rows were made, in order."""


def open_source(spec: str, root: str) -> Source:
    """The training source that `spec` names: "scenes", or tar shards as a path or glob below `root`.

    Raises:
        UsageError: nothing is named, or the shards are missing, damaged or empty.
    """
    if not spec:
        raise UsageError('no training data is named: --data.train takes "scenes" or shards such as "train/*.tar"')
    if spec == "scenes":
        return Scenes("train")
    return open_shards(spec, root=root)


def require_batch(samples: int, batch_size: int) -> None:
    """Raise UsageError where `samples` do not fill one contrastive batch."""
    if samples < batch_size:
        raise UsageError(f"{samples} training samples do not fill one batch of {batch_size}: lower --batch.size")


class BatchReader:
    """Makes the rows of any positions, as a pure function of (seed, positions). May be pickled to worker processes.

    Args:
        sources: as many as `order` has, in its order.
        order: which sample stands at a position.
        tokenizer: of captions.
        augmentation: from squares of `settings.canvas` (or `settings.image_size`) pixels to the images of the batch.
        settings: fit, caption fields, templates, part dropout and ids.
        seed: of the run.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: Order,
        tokenizer: Tokenizer,
        augmentation: Augmentation,
        settings: DataSettings,
        seed: int,
    ) -> None:
        self.sources = tuple(sources)
        self.order = order
        self.tokenizer = tokenizer
        self.augmentation = augmentation
        self.settings = settings
        self.seed = seed
        self._size = settings.canvas or settings.image_size
        # All or nothing: of a larger data set, what is kept would seldom be drawn again before it has to go.
        self._caches = sum(len(source) for source in self.sources) * 3 * self._size**2 <= CACHE_BYTES
        self._canvases: dict[tuple[int, int], np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        """To worker processes go no images; each keeps those that it has decoded itself."""
        return {**vars(self), "_canvases": {}}

    def __call__(self, positions: range) -> Batch:
        """The rows at `positions` (at least one).

        Raises:
            RunError: a source cannot be read, or 32 samples in a row are bad.
        """
        bad: list[BadRecord] = []
        rows = [self._row(position, bad) for position in positions]
        canvases = torch.from_numpy(np.stack([row.canvas for row in rows])).permute(0, 3, 1, 2).contiguous()
        numbers = torch.from_numpy(np.stack([row.numbers for row in rows]))
        return Batch(
            images=self.augmentation.apply(canvases, numbers),
            tokens=torch.from_numpy(self.tokenizer.encode([row.text for row in rows])),
            ids=torch.tensor([row.id for row in rows], dtype=torch.int64),
            position=positions.start,
            bad=tuple(bad),
        )

    def _row(self, position: int, bad: list[BadRecord]) -> _Row:
        """The row at `position`, from the first good sample of those that may stand there; adds the others to `bad`."""
        number, index = self.order[position]
        source = self.sources[number]
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                _, index = self.order.replacement(position, attempt)
            key = f"#{index}"
            try:
                sample = _read(source, index, image=(number, index) not in self._canvases)
                key = sample.key
                return self._prepare(sample, (number, index), position, attempt)
            except BadSample as error:
                bad.append(BadRecord(source=source.name, key=key, reason=error.reason))
        reasons = ", ".join(sorted({record.reason for record in bad[-MAX_ATTEMPTS:]}))
        raise RunError(f"{source.name}: {MAX_ATTEMPTS} bad samples in a row, the last {bad[-1].key}: {reasons}")

    def _prepare(self, sample: Sample, place: tuple[int, int], position: int, attempt: int) -> _Row:
        settings = self.settings
        words = (self.seed, position, _VIEW, attempt)
        rng = generator("caption", *words)
        fields, part_dropout = settings.caption_fields, settings.caption_part_dropout
        caption = choose_caption(sample, fields=fields, part_dropout=part_dropout, rng=rng)
        text = fill_template(caption, settings.caption_templates, rng)
        id = sample_id(sample, settings.ids, caption)
        return _Row(
            canvas=self._canvas(sample, place),
            numbers=self.augmentation.draw(generator("augment", *words)),
            text=text,
            id=id,
        )

    def _canvas(self, sample: Sample, place: tuple[int, int]) -> np.ndarray:
        """The square that augmentation starts from, decoded once where all of them can be kept."""
        canvas = self._canvases.get(place)
        if canvas is None:
            image = sample.image
            if isinstance(image, bytes):
                # A photograph is decoded at a fraction of its size; twice the side is left for antialiased reduction.
                image = decode_image(image, min_side=2 * self._size)
            canvas = fit_square(image, self._size, self.settings.fit)
            if self._caches:
                self._canvases[place] = canvas
        return canvas


def batches(
    reader: BatchReader,
    *,
    start: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    last: int | None = None,
) -> Generator[Batch, None, None]:
    """This rank's rows of one contrastive batch after another. Close it to end the workers.

    Workers begin at the call, so that the first batch is under way while the caller builds its model.

    Args:
        reader: makes the rows; workers get a copy of it.
        start: position of the first row of the first batch.
        batch_size: B, rows of a contrastive batch over all ranks; this rank has rows B*rank//world to
            B*(rank+1)//world of each.
        workers: processes that read, decode and augment; 0: this process does. The batches are the same.
        last: the position to stop before: the iterator ends with the last batch that ends at or before it. None: never.

    Raises:
        RunError: from the iterator, when a source cannot be read, samples are bad 32 times in a row, or a worker died.
    """
    rows = range(batch_size * rank // world, batch_size * (rank + 1) // world)
    if not rows:
        raise UsageError(f"a batch of {batch_size} leaves nothing for process {rank} of {world}: raise --batch.size")
    pieces = -(-len(rows) // PIECE_ROWS)
    cuts = [rows.start + len(rows) * i // pieces for i in range(pieces + 1)]
    stop = None if last is None else max(last - batch_size + 1, start)
    firsts = count(start, batch_size) if stop is None else range(start, stop, batch_size)
    ranges = (range(first + a, first + b) for first in firsts for a, b in zip(cuts, cuts[1:], strict=False))
    # Two batches under way: one is made while the other is trained on.
    made = run(_Pieces(reader), ranges, workers=workers, ahead=2 * pieces)
    return _join(made, pieces, rows.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    canvas: UInt8[np.ndarray, "c c 3"]
    numbers: np.ndarray
    text: str
    id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A Batch on its way from a worker.

    Arrays, not tensors: these travel through a pipe instead of shared memory, which is 64 MB in a default container
    and one open file for each tensor. Measured no slower.
    """

    images: np.ndarray
    tokens: np.ndarray
    ids: np.ndarray
    position: int
    bad: tuple[BadRecord, ...]


class _Pieces:
    """The reader, giving what travels."""

    def __init__(self, reader: BatchReader) -> None:
        self.reader = reader

    def __call__(self, positions: range) -> _Piece:
        batch = self.reader(positions)
        return _Piece(
            images=batch.images.numpy(),
            tokens=batch.tokens.numpy(),
            ids=batch.ids.numpy(),
            position=batch.position,
            bad=batch.bad,
        )


def _join(made: Generator[_Piece, None, None], pieces: int, offset: int) -> Generator[Batch, None, None]:
    """Join `pieces` of `made` to a batch, whose first row `offset` rows of other ranks precede."""
    with closing(made):
        while parts := list(islice(made, pieces)):
            yield Batch(
                images=torch.from_numpy(np.concatenate([part.images for part in parts])),
                tokens=torch.from_numpy(np.concatenate([part.tokens for part in parts])),
                ids=torch.from_numpy(np.concatenate([part.ids for part in parts])),
                position=parts[0].position - offset,
                bad=tuple(record for part in parts for record in part.bad),
            )


def _read(source: Source, index: int, *, image: bool) -> Sample:
    """Read a sample, with its image or without; where reading fails, pause and try again."""
    for pause in RETRY_SECONDS:
        try:
            return source.read(index, image=image)
        except OSError:
            time.sleep(pause)
    try:
        return source.read(index, image=image)
    except OSError as error:
        tries = len(RETRY_SECONDS) + 1
        raise RunError(f"{source.name}: sample #{index} could not be read in {tries} tries: {error}") from error
