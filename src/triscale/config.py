"""The tree of a run's settings, its JSON form, and what may differ when a run is resumed. Imports no torch.

Each package owns its settings; here they only come together. A recipe is a function that returns a `RunConfig`, and
every field is a command-line option `--section.field`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from triscale.data.settings import DataSettings, train_sources
from triscale.errors import UsageError
from triscale.models.presets import find_preset
from triscale.models.settings import ModelSettings
from triscale.training.settings import (
    BatchSettings,
    LossSettings,
    MemorySettings,
    OptimSettings,
    ParallelSettings,
    RunSettings,
    TrainSettings,
    parse_compile,
    parse_per_lane,
    parse_remat,
)

LANES = ("image", "text")

MAY_CHANGE = (
    "run.",
    "data.root",
    "data.eval",
    "data.shifts",
    "data.workers",
    "data.cache",
    "data.stall_seconds",
    "data.max_bad",
    "memory.",
    "parallel.shard",
    "parallel.replicas",
    "parallel.reduce",
    "parallel.offload",
    "train.checkpoint_every_",
    "train.keep_checkpoints",
    "train.eval_every_steps",
    "train.log_every_steps",
    "train.collective_timeout_seconds",
)
"""Beginnings of the names of fields that a resumed run may change: no weight depends on them, but for rounding where
they say which process computes what, as the number of processes does."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a run is made from."""

    seed: int = 0
    """Of initial weights, data order, augmentation, captions and dropout."""
    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    train: TrainSettings = field(default_factory=TrainSettings)


T = TypeVar("T")


def to_dict(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def from_dict(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """The inverse of `to_dict`.

    Raises:
        UsageError: a field is unknown, or its value is not of its type.
    """
    types = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise UsageError(f"unknown field '{where}{unknown[0]}': {kind.__name__} has {', '.join(sorted(types))}")
    return kind(**{name: _value(types[name], value, f"{where}{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """`value`, as JSON holds it, as the `kind` that a field declares."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, dict):
            return from_dict(kind, value, f"{name}.")
    elif typing.get_origin(kind) is tuple:
        kinds = [k for k in typing.get_args(kind) if k is not Ellipsis]
        open_ended = Ellipsis in typing.get_args(kind)
        if isinstance(value, list) and (open_ended or len(value) == len(kinds)):
            return tuple(_value(kinds[0 if open_ended else i], item, name) for i, item in enumerate(value))
    elif typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise UsageError(f"field '{name}' cannot be {value!r}")


def read_config(path: str | Path) -> RunConfig:
    """The config that a config.json holds; UsageError if there is none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise UsageError(f"config {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise UsageError(f"config {str(path)!r} holds no settings")
    return from_dict(RunConfig, {name: value for name, value in values.items() if name != "recipe"})


def with_preset(config: RunConfig, name: str) -> RunConfig:
    """The config with a preset's towers and what they ask of the data: size of images, tokens, vocabulary.

    A config.json then holds all of it, so that a run and its resumes do not depend on the preset's name.

    Raises:
        UsageError: there is no such preset.
    """
    preset = find_preset(name)
    data = dataclasses.replace(
        config.data, image_size=preset.image_size, canvas=0, tokens=preset.tokens, vocabulary=preset.vocabulary
    )
    return dataclasses.replace(config, model=preset.model, data=data)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as "section.field" to value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Raise UsageError naming the fields that differ though the weights depend on them."""
    old, new = flatten(to_dict(before)), flatten(to_dict(now))
    changed = [name for name in new if new[name] != old[name] and not name.startswith(MAY_CHANGE)]
    if changed:
        fields = ", ".join(f"{name} (was {old[name]}, now {new[name]})" for name in changed)
        raise UsageError(f"the run in this folder was begun with other settings: {fields}; use another --run.dir")


def validate(config: RunConfig) -> None:
    """Raise UsageError for values that cannot work, before any data or device is touched."""
    at_least = {
        "batch.size": 1,
        "train.steps": 1,
        "train.keep_checkpoints": 1,
        "train.checkpoint_every_steps": 0,
        "train.eval_every_steps": 0,
        "train.log_every_steps": 1,
        "data.workers": 0,
        "data.window_shards": 0,
        "data.cache_gib": 0,
        "data.stall_seconds": 0,
        "data.image_size": 1,
        "data.canvas": 0,
        "data.tokens": 2,
        "data.vocabulary": 1,
        "model.embedding": 1,
        "model.text_width": 1,
        "model.text_layers": 1,
        "model.text_heads": 1,
        "memory.budget_gib": 0,
        "memory.host_gib": 0,
        "parallel.replicas": 1,
        "train.collective_timeout_seconds": 1,
        "optim.learning_rate": 0,
        "optim.weight_decay": 0,
        "optim.epsilon": 0,
        "optim.warmup_steps": 0,
        "optim.cooldown_steps": 0,
        "optim.clip_norm": 0,
        "loss.max_logit_scale": 0,
    }
    values = flatten(to_dict(config))
    for name, smallest in at_least.items():
        if values[name] < smallest:
            raise UsageError(f"--{name.replace('_', '-')} is {values[name]}: it must be at least {smallest}")
    for name in ("data.max_bad", "data.caption_part_dropout"):
        if not 0 <= values[name] <= 1:
            raise UsageError(f"--{name.replace('_', '-')} is {values[name]}: it must be from 0 to 1")
    for name in ("model.dropout", "model.drop_path", "optim.beta1", "optim.beta2", "optim.momentum", "optim.ema"):
        if not 0 <= values[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {values[name]}: it must be at least 0 and below 1")
    if min(config.model.image_std) <= 0:
        raise UsageError(f"--model.image-std is {config.model.image_std}: each must be above 0")
    if not 0 < config.optim.layer_decay <= 1:
        raise UsageError(f"--optim.layer-decay is {config.optim.layer_decay}: it must be above 0 and at most 1")
    for name, largest in (("crop_area", 1.0), ("crop_aspect", math.inf)):
        low, high = values[f"data.augment.{name}"]
        if not 0 < low <= high <= largest:
            raise UsageError(
                f"--data.augment.{name.replace('_', '-')} is {low} {high}: it must be above 0, the smaller number first"
                + (f", at most {largest:g}" if largest == 1 else "")
            )
    if config.loss.logit_scale <= 0:
        raise UsageError(f"--loss.logit-scale is {config.loss.logit_scale}: it must be above 0")
    if config.model.text_width % config.model.text_heads:
        raise UsageError(
            f"--model.text-heads {config.model.text_heads} must divide --model.text-width {config.model.text_width}"
        )
    for template in config.data.caption_templates:
        if "{c}" not in template:
            raise UsageError(f"--data.caption-templates: {template!r} has no {{c}}")
    _validate_ids(config.data)
    parse_per_lane("--batch.micro", config.batch.micro, LANES, smallest=1)
    parse_per_lane("--batch.keep", config.batch.keep, LANES, smallest=0)
    _check_compilation(config.batch)
    _check_sharding(config)


def _check_compilation(batch: BatchSettings) -> None:
    """Raise UsageError for a lane that is to be compiled and, besides, to do what compiled code cannot."""
    remat = parse_remat(batch.remat, LANES)
    for lane, mode in parse_compile(batch.compile, LANES).items():
        compiled = f"--batch.compile {mode} of lane '{lane}'"
        if mode != "none" and remat[lane] == "selective":
            raise UsageError(f"{compiled} needs --batch.remat block or none there, not selective")
        if mode != "none" and batch.batch_norm == "synchronised":
            raise UsageError(f"{compiled} cannot be had with --batch.batch-norm synchronised")


def _check_sharding(config: RunConfig) -> None:
    """Raise UsageError for a way of sharding where nothing is sharded, and for half of bfloat16."""
    changed = [name for name, value in vars(config.parallel).items() if value != getattr(ParallelSettings(), name)]
    if config.parallel.shard == "none" and changed:
        raise UsageError(f"--parallel.{changed[0]} is about sharded towers: add --parallel.shard full")
    if config.parallel.parameters == "bfloat16" and config.train.precision != "bfloat16":
        raise UsageError("--parallel.parameters bfloat16 needs --train.precision bfloat16")


def _validate_ids(data: DataSettings) -> None:
    """Raise UsageError for training sources that cannot be, and for batches of distinct ids without fixed ids."""
    kinds = {source.ids for source in train_sources(data)}
    if data.distinct_ids and kinds == {"none"}:
        raise UsageError("--data.distinct-ids needs ids: add --data.ids label, or caption")
    if data.distinct_ids and "caption" in kinds and data.caption_part_dropout:
        raise UsageError(
            "--data.distinct-ids: parts are left out of captions at random, which changes their ids: "
            "take --data.caption-part-dropout 0, or --data.ids label"
        )
