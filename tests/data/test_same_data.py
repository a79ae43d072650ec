"""A hash over all that the step receives: the same however the rows are made, by whom, and from where on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pictures import NAMES, SETTINGS, Pictures, joined
from triscale.data import loader
from triscale.data.captions import CaptionRules
from triscale.data.distinct import DistinctOrder
from triscale.data.ids import read_ids
from triscale.data.images import Pixels
from triscale.data.loader import batches
from triscale.data.mixture import Mixture
from triscale.data.rows import Batch, BatchReader
from triscale.data.samples import Sample
from triscale.data.text import SentencePieceTokenizer, train_tokenizer

BATCH, STEPS, SEED = 10, 40, 3
MODEL = train_tokenizer([*NAMES, "a photo of it, shape 0123456789"], 60)


class Shards(Pictures):
    """Pictures in shards of uneven sizes, with labels, and captions that only some share."""

    def __init__(self, counts: tuple[int, ...], bad: Iterable[int]) -> None:
        super().__init__(sum(counts), bad)
        self.shard_counts = np.array(counts)

    def file(self, index: int) -> str:
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        sample = super().read(index, image=image)
        return replace(sample, text=f"picture {index // 2}".encode(), label=str(index % 4).encode())


COUNTS = (9, 20, 0, 31, 15, 5, 20)


def make_reader(kind: str, counts: tuple[int, ...] = COUNTS, seed: int = SEED, batch: int = BATCH) -> BatchReader:
    pairs, labelled = Shards(counts, range(0, sum(counts), 9)), Shards((30, 10), [4])
    captions = CaptionRules(ids="caption", templates=("{c}", "a photo of {c}"))
    labels = CaptionRules(fields=("cls",), classnames=tuple(NAMES), ids="label", part_dropout=0.5, source=1)
    mixed = Mixture(sources=(pairs, labelled), captions=(captions, labels), weights=(5, 1))
    alone = Mixture(sources=(pairs,), captions=(captions,), weights=None)
    mixture = alone if kind == "windowed" else mixed
    order = mixture.order(seed, window_shards=2 if kind in ("windowed", "all") else 0)
    if kind in ("distinct", "all"):
        parts = zip(mixture.sources, mixture.captions, strict=True)
        order = DistinctOrder(order, [read_ids(source, rules, range(len(source))) for source, rules in parts], batch)
    data = replace(SETTINGS, canvas=0)
    pixels = Pixels(data, len(mixture))
    tokenizer = SentencePieceTokenizer(MODEL, data.tokens)
    return BatchReader(mixture.sources, mixture.captions, order, tokenizer, pixels, seed)


def digest(received: Iterable[Batch]) -> str:
    """Of pixels after augmentation, tokens and ids, batch after batch."""
    hashed = hashlib.sha256()
    for batch in received:
        for part in (batch.images, batch.tokens, batch.ids):
            hashed.update(np.ascontiguousarray(part.numpy()).tobytes())
        hashed.update(repr(batch.bad).encode())
    return hashed.hexdigest()


def received(
    reader: BatchReader, start: int, stop: int, *, workers: int, world: int, size: int = BATCH
) -> Iterator[Batch]:
    """What the steps from `start` to before `stop` get, over all ranks."""
    options = {"start": start * size, "last": stop * size, "batch_size": size, "world": world, "workers": workers}
    ranks = [batches(reader, rank=rank, **options) for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        assert all(isinstance(part, Batch) for part in parts)
        yield joined(list(parts))


EACH = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2)]
WHOLE = [(world, workers) for world in (1, 2, 4) for workers in (0, 1, 2, 4)]


@pytest.mark.parametrize(
    ("kind", "makers"),
    [
        ("mixture", [(4, 0), (1, 2)]),
        ("distinct", [(4, 0), (2, 1)]),
        ("windowed", [(4, 0), (1, 2)]),
        ("all", EACH),
        *(pytest.param(kind, WHOLE, marks=pytest.mark.slow) for kind in ("mixture", "distinct", "windowed", "all")),
    ],
)
def test_the_step_receives_the_same_for_any_workers_and_ranks_resumed_anywhere(
    kind: str, makers: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "PIECE_ROWS", 4)
    reader = make_reader(kind)
    whole = list(received(reader, 0, STEPS, workers=0, world=1))
    assert sum(len(batch.bad) for batch in whole) > 10
    assert digest(whole) == digest(received(make_reader(kind), 0, STEPS, workers=0, world=1))
    assert digest(whole) != digest(whole[1:] + whole[:1])
    if kind in ("distinct", "all"):
        assert all(len(batch.ids.unique()) == BATCH for batch in whole)
    chosen = random.Random(kind)
    for world, workers in makers:
        first = chosen.randrange(STEPS - 4)
        stop = first + 4
        made = received(make_reader(kind), first, stop, workers=workers, world=world)
        assert digest(made) == digest(whole[first:stop]), (world, workers, first)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["mixture", "distinct", "windowed", "all"]),
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 30),
    seed=st.integers(0, 2**31),
    size=st.integers(4, 12),
    world=st.integers(1, 4),
    steps=st.tuples(st.integers(0, 60), st.integers(1, 4)),
    piece=st.integers(1, 9),
)
def test_for_any_sizes_and_seeds_ranks_receive_what_one_process_would(
    kind: str, counts: list[int], seed: int, size: int, world: int, steps: tuple[int, int], piece: int
) -> None:
    first, stop = steps[0], sum(steps)
    with pytest.MonkeyPatch.context() as patch:
        whole = list(received(make_reader(kind, tuple(counts), seed, size), 0, stop, workers=0, world=1, size=size))
        patch.setattr(loader, "PIECE_ROWS", piece)
        resumed = make_reader(kind, tuple(counts), seed, size)
        assert digest(received(resumed, first, stop, workers=0, world=world, size=size)) == digest(whole[first:])


def test_the_hash_sees_each_thing_that_the_step_receives() -> None:
    [batch] = received(make_reader("all"), 0, 1, workers=0, world=1)
    changed = [replace(batch, **{name: getattr(batch, name).flip(0)}) for name in ("images", "tokens", "ids")]
    assert len({digest([each]) for each in (batch, *changed)}) == 4
