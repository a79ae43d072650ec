"""The online probe: what an image tower's features tell about labels while it is trained, without training on them.

Of a labelled set some samples are embedded as evaluation shows images, and judged on others: by their nearest
neighbours, and by one logistic regression whose penalty is not chosen. Nothing is learned from step to step, so a
resumed run goes on with the same numbers, and the towers never see a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from triscale import distributed
from triscale.data.decode import decode_image
from triscale.data.samples import REASONS, Source
from triscale.data.subset import Subset
from triscale.errors import RunError
from triscale.evaluation.encoder import Encoder, read_batches
from triscale.evaluation.linear_probe import UNCHOSEN, fit
from triscale.evaluation.probe import ProbeData, Result, probe_neighbours, scores
from triscale.evaluation.probe_rows import LabelledRows, fit_scaling, rows_in_memory
from triscale.evaluation.sets import Example

MOST_SAMPLES = 5_000
"""Samples of each set that are embedded, evenly spread over those with a label."""
NEIGHBOURS = 20
ITERATIONS = 200
"""Of the logistic regression, on features of mean 0 and deviation 1."""


class ProbeImages:
    """Some images of a source with their classes. Satisfies `encoder.Readable`.

    Args:
        name: what results call the set.
        source: whose images.
        codes: of each of its samples the number of its class, negative for none.
    """

    def __init__(self, name: str, source: Source, codes: Int64[np.ndarray, " n"]) -> None:
        labelled = np.flatnonzero(codes >= 0)
        count = min(MOST_SAMPLES, len(labelled))
        chosen = labelled[len(labelled) * np.arange(count) // max(count, 1)]
        self.name = name
        self.source: Source = Subset(source, chosen, name)
        self.codes = codes[chosen]

    def __len__(self) -> int:
        return len(self.codes)

    def read(self, index: int, *, min_side: int | None = None) -> Example:
        """Read and decode image `index`. Raises BadSample."""
        sample = self.source.read(index)
        image = sample.image
        pixels = decode_image(image, min_side=min_side) if isinstance(image, bytes) else image
        return Example(image=pixels, key=sample.key)


@dataclass(frozen=True, kw_only=True)
class OnlineProbe:
    """The sets of an online probe."""

    label: str
    """What is told apart: "class", or "json:NAME"."""
    names: Sequence[str]
    """Of the classes."""
    train: ProbeImages
    tests: Sequence[ProbeImages]

    def results(self, encoder: Encoder) -> Result:
        """The scores of what `encoder.image` gives, as results.json has them. A collective; all processes get the same.

        Returns:
            {"label", "train_samples", "sets": {NAME: {"samples", "knn", "knn_interval", "linear", "linear_interval"}},
            "bad_reasons": {NAME: {reason: n}}}, scores as fractions of 1.

        Raises:
            RunError: a set cannot be read, no image of one can, or features are not finite.
        """
        device, bad = torch.device("cpu"), dict[str, dict[str, int]]()
        train, *tests = (_rows(images, encoder, bad) for images in (self.train, *self.tests))
        data = ProbeData(names=self.names, train=train, tests={rows.name: rows for rows in tests}, device=device)
        knn = probe_neighbours(data, [min(NEIGHBOURS, len(train))])[0]["sets"]
        scaling = fit_scaling(train, "standard")
        linear = fit(train, len(self.names), UNCHOSEN, scaling, device=device, iterations=ITERATIONS)
        sets: dict[str, Any] = {}
        for rows in tests:
            linearly = scores(linear.ahead(rows, device), rows.labels, rows.name)
            sets[rows.name] = {"samples": len(rows)}
            for probe, found in (("knn", knn[rows.name]), ("linear", linearly)):
                sets[rows.name] |= {probe: found["top1"], f"{probe}_interval": found["top1_interval"]}
        return {"label": self.label, "train_samples": len(train), "sets": sets, "bad_reasons": bad}


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """The scores of `OnlineProbe.results` for the log: "NAME knn" and "NAME linear"."""
    return {
        f"{name} {probe}": float(found[probe]) for name, found in results["sets"].items() for probe in ("knn", "linear")
    }


def _rows(images: ProbeImages, encoder: Encoder, bad: dict[str, dict[str, int]]) -> LabelledRows:
    """The features of all images that can be read, of all processes, in their order; the others are counted."""
    features: list[Tensor] = []
    samples = [torch.empty(0, dtype=torch.int64)]
    unreadable: Counter[str] = Counter()
    for batch in read_batches(images, encoder):
        unreadable.update(batch.bad)
        if len(batch):
            features.append(encoder.image(torch.from_numpy(batch.pixels)).float())
            samples.append(torch.from_numpy(batch.samples))
    device = encoder.device
    width = int(distributed.all_reduce_max(torch.tensor(features[0].shape[1] if features else 0, device=device)))
    mine, places = torch.cat([torch.empty((0, width), device=device), *features]), torch.cat(samples).to(device)
    counts = distributed.row_counts(len(mine), device)
    every, order = distributed.all_gather_rows(mine, counts).cpu(), distributed.all_gather_rows(places, counts).cpu()
    totals = distributed.all_reduce_sum(torch.tensor([unreadable[reason] for reason in REASONS], device=device))
    found = {reason: count for reason, count in zip(REASONS, totals.tolist(), strict=True) if count}
    if found:
        bad[images.name] = found
    if not len(every):
        raise RunError(f"online probe: no image of {images.name} can be read")
    return rows_in_memory(images.name, every.numpy(), images.codes[order.numpy()])
