"""`triscale verify`: a recipe's own step held against plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from triscale.assembly import (
    compile_towers,
    make_model,
    make_reader,
    make_tokenizer,
    open_training_data,
    prepare_towers,
    step_batch_norm,
)
from triscale.config import LANES, RunConfig, validate
from triscale.errors import UsageError
from triscale.training.settings import parse_per_lane
from triscale.training.verify import verify

MICRO_BATCH = 16
"""What `verify_run` takes for "auto"."""
DROPOUT = 0.1
"""Least dropout and stochastic depth under which `verify_run` holds the step against direct."""


def verify_run(config: RunConfig) -> dict[str, float]:
    """The error of each parameter's gradient of the step against direct, in float64, for the recipe's own towers.

    Dropout and stochastic depth are on, rows are few but make at least three micro-batches of every lane.
    """
    validate(config)
    mixture = open_training_data(config)
    reader = make_reader(config, mixture, make_tokenizer(config, mixture))
    dropout, drop_path = (max(p, DROPOUT) for p in (config.model.dropout, config.model.drop_path))
    noisy = replace(config, model=replace(config.model, dropout=dropout, drop_path=drop_path))
    try:
        model, loss = make_model(noisy, reader.tokenizer.vocabulary_size)
    except UsageError:  # an image tower without stochastic depth; dropout is on all the same
        noisy = replace(config, model=replace(config.model, dropout=dropout))
        model, loss = make_model(noisy, reader.tokenizer.vocabulary_size)
    compile_towers(config, model.towers())  # both sides: compiled towers draw other random numbers than bare ones
    wanted = parse_per_lane("--batch.micro", config.batch.micro, LANES, smallest=1)
    sizes = {lane: size if isinstance(size, int) else MICRO_BATCH for lane, size in wanted.items()}
    rows = min(config.batch.size, 2 * max(sizes.values()) + 7)
    batch = reader(range(rows))
    return verify(
        model.towers(),
        loss,
        {"image": batch.images, "text": batch.tokens},
        batch.ids,
        micro_batch={lane: min(size, math.ceil(rows / 3)) for lane, size in sizes.items()},
        batch_norm=step_batch_norm(config),
        seed=config.seed,
        prepare=partial(prepare_towers, config),
    )
