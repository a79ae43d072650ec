"""Sets of real drawings whose images have a model's size already, so that two packages see the same pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from triscale.data.decode import decode_image
from triscale.data.pack import write_evaluation_set, write_shards
from triscale.data.resize import fit_square
from triscale.data.samples import Sample
from triscale.data.shards import open_shards
from triscale.evaluation.datasets import open_set
from triscale.evaluation.sets import EvaluationSet
from triscale.models.prompts import fill_templates

CLASSIFICATION, RETRIEVAL, PROBE = "wds_classification", "wds_retrieval", "wds_probe"
CAPTIONS = 3
"""Captions of each image of the retrieval set."""
VALIDATION = 5
"""Of so many images of the probe, one is for validation."""


@dataclass(frozen=True)
class Samples:
    """A source of samples in memory."""

    name: str
    samples: Sequence[Sample]

    def __len__(self) -> int:
        return len(self.samples)

    def file(self, index: int) -> str:
        """Its name: there is no file."""
        return self.name

    def read(self, index: int, *, image: bool = True) -> Sample:
        """Sample `index`."""
        return self.samples[index]


def write_sets(data: Path, folder: Path, side: int) -> None:
    """Write `folder`/wds_classification and wds_retrieval of the images of `data`/wds_val, and wds_probe.

    Images are PNG files of `side` by `side` pixels. Classes of one name are one, as we count them, where CLIP_benchmark
    counts two. The retrieval set has the first image of each class, captioned by its first prompts. The probe learns
    from the images of `data`/train, of which every fifth is for validation; its classes are the `category` of the .json
    sidecars there, or else the classes themselves.
    """
    val = open_set(str(data / "wds_val"))
    tested = list(_squares(val, side))
    write_evaluation_set(folder / CLASSIFICATION, val.classnames, val.templates, tested, len(tested))
    first_of_class: dict[int, Sample] = {}
    for sample in tested:
        first_of_class.setdefault(_label(sample), sample)
    captioned = [
        replace(
            sample, label=None, text="\n".join(fill_templates(val.classnames[label], val.templates)[:CAPTIONS]).encode()
        )
        for label, sample in first_of_class.items()
    ]
    write_split(folder / RETRIEVAL, "test", captioned)
    (folder / RETRIEVAL / "dataset_type.txt").write_text("retrieval\n")
    train = replace(val, source=open_shards("*.tar", root=data / "train"))
    _write_probe(folder / PROBE, val, list(_squares(train, side)), tested)


def write_split(folder: Path, split: str, samples: Sequence[Sample]) -> None:
    """Write `folder`/`split`/0.tar, and that it is the only shard."""
    (shard,) = write_shards(Samples(split, samples), folder / split, len(samples))
    shard.rename(shard.with_name("0.tar"))
    (folder / split / "nshards.txt").write_text("1\n")


def _write_probe(folder: Path, val: EvaluationSet, train: Sequence[Sample], tested: Sequence[Sample]) -> None:
    category = {label: name for label, name in enumerate(val.classnames)}
    for sample in train:
        found = json.loads(sample.metadata or b"{}").get("category")
        category[_label(sample)] = found or category[_label(sample)]
    learnt = [sample for number, sample in enumerate(train) if number % VALIDATION]
    names = sorted({category[_label(sample)] for sample in learnt})  # neither side knows any other

    def renamed(samples: Sequence[Sample]) -> list[Sample]:
        known = [sample for sample in samples if category[_label(sample)] in names]
        return [replace(each, label=str(names.index(category[_label(each)])).encode()) for each in known]

    splits = {"train": renamed(learnt), "val": renamed(train[::VALIDATION]), "test": renamed(tested)}
    for split, samples in splits.items():  # keys of two shards may be the same
        write_split(folder, split, [replace(each, key=f"{number:06d}") for number, each in enumerate(samples)])
    for name, lines in (("classnames", names), ("zeroshot_classification_templates", ["{c}"])):
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _label(sample: Sample) -> int:
    return int(sample.label or b"-1")


def _squares(images: EvaluationSet, side: int) -> Iterator[Sample]:
    """The samples whose label names a class, with pixels in place of the image's file."""
    for index in range(len(images)):
        sample = images.source.read(index)
        if 0 <= _label(sample) < len(images.class_of_label):
            pixels = decode_image(sample.image) if isinstance(sample.image, bytes) else sample.image
            label = str(images.class_of_label[_label(sample)]).encode()
            yield replace(sample, image=fit_square(pixels, side, "pad"), label=label, text=None)
