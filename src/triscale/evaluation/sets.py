"""Evaluation sets as a type: what a model is judged on, whatever the place it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from triscale.data.captions import all_captions, read_labels
from triscale.data.decode import decode_image
from triscale.data.lists import did_you_mean, quote
from triscale.data.samples import BadSample, Sample, Source
from triscale.errors import UsageError

LABELS_CHECKED_AT_OPENING = 256
CAPTION_FIELDS = ("txt",)
"""Where a retrieval set's captions come from: the lines of a sample's .txt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One decoded sample of an evaluation set."""

    image: UInt8[np.ndarray, "h w 3"]
    key: str
    """The sample's name within its set."""
    labels: tuple[int, ...] = ()
    """Its right classes, distinct indices into the set's class names: exactly one unless the set is multi-label; none
    in a retrieval set."""
    captions: tuple[str, ...] = ()
    """At least one in a retrieval set."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Samples with what is needed to score a model on them. May be pickled to worker processes."""

    name: str
    """What results call it: the folder's name without `wds_`."""
    task: Literal["classification", "retrieval"]
    source: Source
    classnames: tuple[str, ...] = ()
    """Distinct names; empty in a retrieval set."""
    templates: tuple[str, ...] = ()
    """Prompt templates with `{c}` where the class name goes."""
    class_of_label: tuple[int, ...] = ()
    """For each label of the class list, the index of its name in `classnames`."""
    skipped: int = 0
    """Entries of the shards that the source left out: duplicate keys, samples without an image, links."""
    allowed: tuple[int, ...] | None = None
    """Classes that may be guessed, ascending and distinct; the scores of all others are masked. None: all."""
    multi_label: bool = False
    """Whether a sample may have several right classes, or none: then it is left out of the scores and counted."""
    label_numbers: Mapping[str, int] = field(default_factory=dict)
    """Names that samples may have for labels in place of numbers."""
    right_labels: Mapping[str, tuple[int, ...]] | None = None
    """Labels of the class list by sample key, in place of the samples' own; a key that is not there has none."""
    stands_for: Mapping[int, tuple[int, ...]] | None = None
    """For labels that samples have, the labels of the class list that they stand for; one that is not there stands for
    none. None: each for itself."""
    levels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By name of a level, such as synonyms or a hierarchy's: for each class the number of its group. A guess counts at
    a level if its group is that of a right class."""
    slices: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By name of a slice, such as major errors: the keys of its samples."""

    def __len__(self) -> int:
        """The number of samples, bad ones included."""
        return len(self.source)

    @property
    def merged_classes(self) -> int:
        """The number of labels whose name an earlier label has already."""
        return len(self.class_of_label) - len(self.classnames)

    def read(self, index: int, *, min_side: int | None = None) -> Example:
        """Read and decode sample `index`.

        Args:
            index: 0 <= index < len.
            min_side: if given, a large JPEG may come out smaller, as `data.decode.decode_image` says.

        Raises:
            BadSample: the image or its captions can't be read; the reason says what is wrong.
            UsageError: the label is missing, not a number or out of range: then the whole set is in doubt.
        """
        sample = self.source.read(index)
        image = sample.image
        return Example(
            key=sample.key,
            labels=self.labels_of(sample) if self.task == "classification" else (),
            captions=tuple(all_captions(sample, CAPTION_FIELDS)) if self.task == "retrieval" else (),
            image=decode_image(image, min_side=min_side) if isinstance(image, bytes) else image,
        )

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of sample `index` of a retrieval set, without its image. Raises BadSample as `read` does."""
        return tuple(all_captions(self.source.read(index, image=False), CAPTION_FIELDS))

    def check_labels(self, samples: int = LABELS_CHECKED_AT_OPENING) -> None:
        """Raise UsageError if one of `samples` labels, evenly spread over the set, is wrong."""
        for index in range(0, len(self), max(1, len(self) // samples)):
            try:
                self.labels_of(self.source.read(index, image=False))
            except BadSample:
                continue

    def labels_of(self, sample: Sample) -> tuple[int, ...]:
        """The right classes of a sample, read with its image or without: distinct, in the order of their labels.

        Raises:
            UsageError: as `read`.
        """
        where = f"evaluation set {quote(self.name)}, sample {quote(sample.key)}"
        if self.right_labels is not None:
            labels = self.right_labels.get(sample.key, ())
        else:
            labels = self._own_labels(sample, where)
        for label in labels:
            if not 0 <= label < len(self.class_of_label):
                raise UsageError(
                    f"{where}: label {label} is out of range; {len(self.class_of_label)} class names count from 0"
                )
        if not labels and not self.multi_label and self.right_labels is None:
            raise UsageError(f"{where}: label-missing; {self._expected()}")
        if len(labels) != 1 and not self.multi_label:
            raise UsageError(f"{where}: it has {len(labels)} labels, and each sample of this set must have one")
        return tuple(dict.fromkeys(self.class_of_label[label] for label in labels))

    def _own_labels(self, sample: Sample, where: str) -> tuple[int, ...]:
        """The labels of the class list that a sample's own stand for."""
        try:
            labels = read_labels(sample, self.label_numbers)
        except BadSample as fault:
            hint = did_you_mean((sample.label or b"").decode("utf-8", "replace"), self.label_numbers)
            said = quote(sample.label or b"")
            raise UsageError(f"{where}: {fault.reason}: {said}; {hint or self._expected()}") from fault
        if self.stands_for is None:
            return labels
        return tuple(number for label in labels for number in self.stands_for.get(label, ()))

    def _expected(self) -> str:
        names = " or its name" if self.label_numbers else ""
        return f"its label (KEY.cls, or the label's column) must be the class's number, from 0{names}"
