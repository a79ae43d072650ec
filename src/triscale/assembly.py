"""The parts of a run, made from its config: device, data, tokenizer, towers, loss, step, optimizer, encoder.

From here upwards code sees a whole config; everything below takes plain arguments.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from triscale import distributed
from triscale.config import LANES, RunConfig
from triscale.data.augment import Augmentation
from triscale.data.captions import CaptionRules, all_captions
from triscale.data.distinct import DistinctOrder
from triscale.data.ids import IdFile, ids_path, read_ids, write_ids
from triscale.data.lists import CLASS_MARK
from triscale.data.loader import require_batch
from triscale.data.mixture import Mixture, open_mixture
from triscale.data.named_tokenizers import read_tokenizer
from triscale.data.remote import RemoteShards
from triscale.data.rows import BatchReader
from triscale.data.samples import BadSample, Source
from triscale.data.settings import train_sources
from triscale.data.sources import needs_root
from triscale.data.text import train_tokenizer
from triscale.data.tokenizer import Tokenizer, open_tokenizer
from triscale.errors import RunError, UsageError
from triscale.evaluation.encoder import Encoder
from triscale.losses import PAIR_LOSSES
from triscale.losses.contrastive import ContrastiveLoss
from triscale.models.dual_encoder import DualEncoder, build_dual_encoder
from triscale.randomness import derive_seed
from triscale.training import optim, parallel
from triscale.training.batch_norm import synchronise_batch_norm
from triscale.training.compilation import compile_tower
from triscale.training.ema import WeightAverage
from triscale.training.lane import seeded
from triscale.training.lockstep import Lockstep
from triscale.training.memory import GIB
from triscale.training.plan import LanePlan
from triscale.training.remat import blocks_of, rematerialise
from triscale.training.schedule import BASE_BATCH, SCALES, learning_rate
from triscale.training.settings import parse_compile, parse_per_lane, parse_remat
from triscale.training.step import ContrastiveStep

TOKENIZER_SAMPLES = 20_000
"""Most samples whose captions train a tokenizer; evenly spread over each source."""
TOKENIZER_SHARDS = 8
"""Most shards that are fetched for it."""


def device_of(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "mps" means here; UsageError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise UsageError(f"--train.device {name}: there is no such device here; use auto or cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def captions_of(source: Source, rules: CaptionRules, samples: int = TOKENIZER_SAMPLES) -> Iterator[str]:
    """Captions of at most `samples` samples, evenly spread, then the templates' own words; bad samples are left out."""
    for number in _spread(source, samples):
        try:
            sample = source.read(number, image=False)
            yield from all_captions(sample, rules.fields, rules.classnames)
        except BadSample:
            continue
        except OSError as error:
            raise RunError(f"{source.name}: its captions could not be read: {error.strerror or error}") from error
    yield from (template.replace(CLASS_MARK, " ") for template in rules.templates)


def _spread(source: Source, samples: int) -> list[int]:
    """Numbers of at most `samples` samples, evenly spread; over some shards alone where all would be fetched for it."""
    if not isinstance(source, RemoteShards):
        count = min(len(source), samples)
        return [len(source) * number // count for number in range(count)]
    filled = np.flatnonzero(source.shard_counts)
    chosen = filled[np.linspace(0, len(filled) - 1, min(TOKENIZER_SHARDS, len(filled))).astype(int)]
    firsts = (np.cumsum(source.shard_counts) - source.shard_counts)[chosen].tolist()
    ranges = [range(first, first + int(n)) for first, n in zip(firsts, source.shard_counts[chosen], strict=True)]
    return list(chain.from_iterable(islice(each, math.ceil(samples / len(ranges))) for each in ranges))


def make_tokenizer(config: RunConfig, mixture: Mixture, saved: Path | None = None) -> bytes:
    """The tokenizer of a run: the saved one, the one that the config names, or one trained on the captions.

    Every rank makes the same one by itself. Sources give captions in proportion to their shares.
    """
    if saved is not None or config.data.tokenizer:
        return read_tokenizer(config.data.tokenizer if saved is None else str(saved))
    parts = zip(mixture.sources, mixture.captions, mixture.shares, strict=True)
    captions = (captions_of(source, rules, math.ceil(TOKENIZER_SAMPLES * share)) for source, rules, share in parts)
    return train_tokenizer(chain.from_iterable(captions), config.data.vocabulary)


def open_training_data(config: RunConfig) -> Mixture:
    """The training sources; UsageError where one is missing or they do not fill one batch."""
    data = config.data
    for source in train_sources(data):
        if not data.root and needs_root(source.spec):
            raise UsageError(f"this recipe reads {source.spec!r} below a folder of yours: name it with --data.root DIR")
    mixture = open_mixture(data)
    require_batch(len(mixture), config.batch.size)
    return mixture


def check_model(config: RunConfig) -> None:
    """Raise UsageError for towers that cannot be built, before any data is read; costs no memory."""
    with torch.device("meta"):
        build_dual_encoder(config.model, image_size=config.data.image_size, vocabulary=4, tokens=config.data.tokens)


def make_ids(mixture: Mixture, folder: Path, device: torch.device) -> list[IdFile]:
    """The ids of all samples, from files in `folder` or read by all ranks together. A collective."""
    files = []
    for source, rules in zip(mixture.sources, mixture.captions, strict=True):
        path = ids_path(folder, source, rules)
        if not bool(distributed.all_reduce_min(torch.tensor(int(path.exists()), device=device))):
            mine = torch.from_numpy(read_ids(source, rules, distributed.rows_of(len(source)))).to(device)
            whole = distributed.all_gather_rows(mine, distributed.row_counts(len(mine), device))
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one of every node, whose folders may be the same or not
                write_ids(path, whole.cpu().numpy())
            distributed.barrier()
        files.append(IdFile(path))
    return files


def make_reader(
    config: RunConfig, mixture: Mixture, tokenizer: bytes, ids: Sequence[IdFile] | None = None
) -> BatchReader:
    """What makes the rows of any position; with the ids of all samples, of batches in which none comes twice."""
    order = mixture.order(config.seed, config.data.window_shards)
    return BatchReader(
        mixture.sources,
        mixture.captions,
        order if ids is None else DistinctOrder(order, ids, config.batch.size),
        open_tokenizer(tokenizer, config.data.tokens),
        Augmentation(config.data.augment, config.data.image_size),
        config.data,
        config.seed,
    )


def check_tokenizer(model: DualEncoder, tokenizer: Tokenizer) -> None:
    """Raise UsageError for a tokenizer that pads with what the text tower takes for a word."""
    if tokenizer.padding != model.text.padding and model.text.pooling != "final":
        raise UsageError(
            f"--data.tokenizer pads with id {tokenizer.padding}, the text tower takes {model.text.padding} for padding"
        )


def make_model(config: RunConfig, vocabulary: int) -> tuple[DualEncoder, ContrastiveLoss]:
    """Towers and loss with the initial weights that the seed gives, on the CPU."""
    with seeded(derive_seed("weights", config.seed), torch.device("cpu")):
        model = build_dual_encoder(
            config.model, image_size=config.data.image_size, vocabulary=vocabulary, tokens=config.data.tokens
        )
    settings = config.loss
    loss = PAIR_LOSSES[settings.name](
        config.batch.size,
        tiled=settings.tiled,
        logit_scale=settings.logit_scale,
        max_logit_scale=settings.max_logit_scale,
        exchange=settings.exchange,
        products=settings.products,
        skip_negligible=settings.skip_negligible,
    )
    return model, loss


def prepare_towers(config: RunConfig, towers: Mapping[str, nn.Module]) -> None:
    """Make the towers synchronise BatchNorm and rematerialise as the config says. In place, before the first step."""
    for lane, mode in parse_remat(config.batch.remat, LANES).items():
        if config.batch.batch_norm == "synchronised":
            synchronise_batch_norm(towers[lane])
        rematerialise(towers[lane], mode)


def compile_towers(config: RunConfig, towers: Mapping[str, nn.Module]) -> None:
    """Have the towers compiled as the config says. In place; before or after `prepare_towers`."""
    for lane, mode in parse_compile(config.batch.compile, LANES).items():
        compile_tower(towers[lane], mode)


def is_sharded(config: RunConfig) -> bool:
    """Whether this run shards its towers; one process has nobody to share them with."""
    return config.parallel.shard == "full" and distributed.world_size() > 1


def check_sharding(config: RunConfig, device: torch.device) -> None:
    """Raise UsageError for a sharding that these processes or this device cannot have. Within the process group."""
    settings, world = config.parallel, distributed.world_size()
    if settings.replicas > 1 and (world % settings.replicas or world == settings.replicas):
        raise UsageError(
            f"--parallel.replicas {settings.replicas} must divide the {world} processes into groups of two or more"
        )
    if is_sharded(config) and device.type not in ("cpu", "cuda"):
        raise UsageError(f"--parallel.shard full is for cuda and cpu, not {device.type}")
    if settings.offload and device.type != "cuda":
        raise UsageError("--parallel.offload keeps what a CUDA device does not hold: there is none here")


def place_model(config: RunConfig, model: DualEncoder, loss: ContrastiveLoss, device: torch.device) -> None:
    """Make towers rematerialise, be compiled and be sharded as the config says, and move all to the device. In place.

    In this order; the optimizer is made afterwards, and checkpoints are loaded then.
    """
    towers, settings = model.towers(), config.parallel
    prepare_towers(config, towers)
    compile_towers(config, towers)
    if not is_sharded(config):
        model.to(device)
    else:
        mesh = distributed.mesh(device.type, settings.replicas, config.train.collective_timeout_seconds)
        dtype = torch.bfloat16 if settings.parameters == "bfloat16" else None
        for tower in towers.values():  # from the host, block by block: a card never holds a whole tower
            parallel.shard(tower, blocks_of(tower), mesh, gathered_dtype=dtype, offload=settings.offload)
    loss.to(device)


def describe_sharding(config: RunConfig) -> str:
    """What is sharded, for the log; empty where nothing was asked for."""
    settings, world = config.parallel, distributed.world_size()
    if settings.shard == "none":
        return ""
    if world == 1:
        return "; one process, nothing to shard"
    groups = f" in {settings.replicas} groups" if settings.replicas > 1 else ""
    return f"; towers sharded over {world} processes{groups}" + ", shards on the host" * settings.offload


def make_step(
    config: RunConfig, model: DualEncoder, loss: ContrastiveLoss, plans: Mapping[str, LanePlan] | None = None
) -> ContrastiveStep:
    """The exact step as the config, or a run's earlier resolution of "auto", has it, of towers in their place."""
    step = ContrastiveStep(
        model.towers(),
        loss,
        micro_batch=parse_per_lane("--batch.micro", config.batch.micro, LANES, smallest=1),
        keep=parse_per_lane("--batch.keep", config.batch.keep, LANES, smallest=0),
        seed=config.seed,
        batch_norm=step_batch_norm(config),
        autocast_dtype=torch.bfloat16 if config.train.precision == "bfloat16" else None,
        budget_bytes=int(config.memory.budget_gib * GIB) or None,
        reduce=config.parallel.reduce,
    )
    step.plans.update(plans or {})
    return step


def step_batch_norm(config: RunConfig) -> Literal["refuse", "per_micro_batch"]:
    """What the step is to make of towers with BatchNorm; that of synchronised ones is per micro-batch as well."""
    return "refuse" if config.batch.batch_norm == "refuse" else "per_micro_batch"


def make_optimizer(config: RunConfig, modules: Mapping[str, nn.Module]) -> torch.optim.Optimizer:
    """The optimizer over every trainable parameter of the towers and the loss."""
    settings = config.optim
    groups = optim.parameter_groups(modules, settings.weight_decay, settings.layer_decay)
    return optim.OPTIMIZERS[settings.name](groups, settings)


def make_average(config: RunConfig, modules: Mapping[str, nn.Module]) -> WeightAverage | None:
    """The moving average of the weights, from those of now; None where the config asks for none."""
    return WeightAverage(modules, config.optim.ema) if config.optim.ema else None


def peak_rate(config: RunConfig) -> float:
    """The learning rate at the end of the warmup, as the batch scales it."""
    return config.optim.learning_rate * SCALES[config.optim.scale](config.batch.size)


def make_schedule(config: RunConfig) -> Callable[[int], float]:
    """Steps done -> learning rate of the next one."""
    return partial(
        learning_rate,
        peak=peak_rate(config),
        warmup_steps=config.optim.warmup_steps,
        total_steps=config.train.steps,
        schedule=config.optim.schedule,
        cooldown_steps=config.optim.cooldown_steps,
    )


def describe_optimizer(config: RunConfig) -> str:
    """The optimizer and its peak learning rate, as the log says it."""
    settings, size = config.optim, config.batch.size
    rule = {"none": "", "linear": f" = {settings.learning_rate:g} * {size} / {BASE_BATCH}"}
    rule["sqrt"] = f" = {settings.learning_rate:g} * sqrt({size})"
    return f"{settings.name}, learning rate {peak_rate(config):g}{rule[settings.scale]}, {settings.schedule}"


@contextlib.contextmanager
def evaluating(model: nn.Module, average: WeightAverage | None = None) -> Iterator[None]:
    """Evaluation mode without gradients, with the averaged weights if any; training mode and weights come back."""
    was_training = model.training
    model.eval()
    parallel.drop_gathered(model)
    try:
        # Not in inference mode, in which FSDP2 would make what no later step can train with.
        with average.applied() if average else contextlib.nullcontext(), torch.no_grad():
            yield
    finally:
        parallel.drop_gathered(model)
        model.train(was_training)


def make_encoder(config: RunConfig, model: DualEncoder, tokenizer: Tokenizer, device: torch.device) -> Encoder:
    """The model as evaluation sees it."""
    size = config.data.image_size
    tokens = partial(_tokens, tokenizer, device)
    idle = {"image": torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device), "text": tokens([""])}
    towers = Lockstep(model.towers(), idle)
    return Encoder(
        image=lambda images: towers("image", images.to(device)),
        text=lambda texts: towers("text", tokens(texts)),
        image_size=size,
        fit=config.data.fit,
        device=str(device),
        finish=towers.finish,
    )


def _tokens(tokenizer: Tokenizer, device: torch.device, texts: Sequence[str]) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(texts)).to(device)
