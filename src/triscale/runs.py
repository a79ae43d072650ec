"""Runs from their beginning to their end: train and evaluate one, hold its step against plain autograd."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from rich.console import Console
from torch import device as Device

from triscale import distributed
from triscale.assembly import (
    check_model,
    device_of,
    evaluating,
    make_encoder,
    make_model,
    make_optimizer,
    make_reader,
    make_step,
    make_tokenizer,
    open_training_data,
)
from triscale.config import LANES, RunConfig, validate
from triscale.data.loader import BatchReader, batches
from triscale.data.quarantine import Quarantine
from triscale.data.samples import Source
from triscale.errors import UsageError
from triscale.evaluation.datasets import EvaluationSet, open_sets
from triscale.evaluation.encoder import Encoder
from triscale.evaluation.report import GuessRow, draw_guesses
from triscale.evaluation.suite import Results, check_shifts, evaluate, results_table, write_results
from triscale.evaluation.zeroshot import top_guesses
from triscale.losses import InfoNCE
from triscale.models.dual_encoder import DualEncoder
from triscale.run_folder import (
    Files,
    locked,
    open_run_folder,
    preprocess,
    read_plans,
    resolved,
    run_folder,
    saved_results,
    write_bytes,
    write_json,
)
from triscale.training import checkpoint, memory, optim
from triscale.training.log import RunLog
from triscale.training.loop import StopFlag, train
from triscale.training.settings import parse_per_lane
from triscale.training.verify import verify

PICTURE_IMAGES = 4
"""Test images of each set in the picture of a run."""
VERIFY_MICRO_BATCH = 16
"""What `verify_run` takes for "auto"."""
VERIFY_DROPOUT = 0.1
"""Least dropout and stochastic depth under which `verify_run` holds the step against direct."""


def train_run(config: RunConfig, recipe: str) -> int:
    """Train, or go on training, a run to its end and evaluate it. Returns the exit status: 0, 130 or 143."""
    validate(config)
    files = Files(run_folder(config, recipe))
    device = device_of(config.train.device)
    console = Console(stderr=True, highlight=False, quiet=int(os.environ.get("RANK", "0")) > 0)
    sets = open_sets(config.data.eval, config.data.root)
    check_shifts(sets, config.data.shifts)
    check_model(config)
    source = open_training_data(config)
    with distributed.process_group(device.type):
        open_run_folder(files, config, recipe)
        with locked(files.folder):
            return _train_in(files, config, recipe, source, sets, device, console)


def _train_in(
    files: Files,
    config: RunConfig,
    recipe: str,
    source: Source,
    sets: Sequence[EvaluationSet],
    device: Device,
    console: Console,
) -> int:
    """Train in an open run folder from its newest checkpoint, then evaluate; the exit status."""
    tokenizer = make_tokenizer(config, source, files.tokenizer)
    reader = make_reader(config, source, tokenizer)
    model, loss = make_model(config, reader.tokenizer.vocabulary_size)
    model.to(device)
    loss.to(device)
    done = checkpoint.latest(files.folder, report=lambda line: console.print(line, markup=False))
    if done is not None:
        checkpoint.load_into({**model.towers(), "loss": loss}, done.model())
    if done is not None and done.step >= config.train.steps:
        console.print(f"{files.folder} is finished: {done.step} steps", markup=False)
        results = saved_results(files, [each.name for each in sets])
        if results is not None:
            show(files, results)
            return 0
    else:
        write_bytes(files.tokenizer, tokenizer)
        write_json(files.preprocess, preprocess(config))
        status = _train(config, files, reader, model, loss, done, sets, device, console)
        if status:
            return status
    if sets:
        finish(config, files, sets, make_encoder(config, model, reader.tokenizer, device), model, loss, recipe)
    return 0


def _train(
    config: RunConfig,
    files: Files,
    reader: BatchReader,
    model: DualEncoder,
    loss: InfoNCE,
    done: checkpoint.Checkpoint | None,
    sets: Sequence[EvaluationSet],
    device: Device,
    console: Console,
) -> int:
    """From the last checkpoint to the last step; the exit status."""
    settings, size = config.train, config.batch.size
    modules = {**model.towers(), "loss": loss}
    optimizer = make_optimizer(config, modules)
    quarantine = Quarantine(files.quarantine if distributed.rank() == 0 else None, config.data.max_bad)
    step = make_step(config, model, loss, read_plans(files))
    if not step.plans:
        rows = reader(range(memory.PROBE_ROWS))
        own = distributed.rows_of(size)
        # Full rows of tokens: a text tower that skips padding takes its most memory on them.
        step.plans = step.resolve({"image": rows.images, "text": rows.tokens.clamp(min=1)}, rows=len(own))
        write_json(files.resolved, resolved(config, reader.tokenizer.vocabulary_size, step))
    start = 0
    if done is not None:
        start = done.step
        optim.load_optimizer(optimizer, done.optimizer())
        step.load_state_dict({"steps": done.step})
        quarantine.load_state_dict(done.state["quarantine"])

    def save(steps: int) -> None:
        checkpoint.save(
            files.folder,
            steps,
            model=checkpoint.module_tensors(modules),
            optimizer=optim.optimizer_tensors(optimizer),
            state={"position": steps * size, "quarantine": quarantine.state_dict()},
            keep=settings.keep_checkpoints,
        )

    def scores(steps: int) -> dict[str, float]:
        with evaluating(model):
            results = evaluate(make_encoder(config, model, reader.tokenizer, device), sets, config.data.shifts)
        return headline(results)

    with (
        StopFlag() as stop,
        RunLog(
            files.folder,
            total_steps=settings.steps,
            batch_size=size,
            log_every_steps=settings.log_every_steps,
            console=console,
        ) as log,
        contextlib.closing(
            batches(
                reader,
                start=start * size,
                batch_size=size,
                rank=distributed.rank(),
                world=distributed.world_size(),
                workers=config.data.workers,
                last=settings.steps * size,
            )
        ) as rows,
    ):
        log.cut(start)
        plans = ", ".join(f"{lane}: {p.micro_batch} at once, {p.keep} kept" for lane, p in step.plans.items())
        log.note(f"{files.folder}: step {start} of {settings.steps}, batch {size}; {plans}")
        outcome = train(
            step=step,
            optimizer=optimizer,
            schedule=partial(
                optim.learning_rate,
                peak=config.optim.learning_rate,
                warmup_steps=config.optim.warmup_steps,
                total_steps=settings.steps,
            ),
            batches=rows,
            start_step=start,
            total_steps=settings.steps,
            batch_size=size,
            clip_norm=config.optim.clip_norm,
            after_step=loss.clamp_,
            save=save,
            checkpoint_every_steps=settings.checkpoint_every_steps,
            checkpoint_every_minutes=settings.checkpoint_every_minutes,
            evaluate=scores if sets else None,
            eval_every_steps=settings.eval_every_steps,
            log=log,
            quarantine=quarantine,
            stop=stop,
            device=device,
        )
        quarantine.check(minimum_draws=1)
        if outcome.signal:
            log.note(f"stopped after step {outcome.step}, checkpoint written; the same command goes on from there")
    return 128 + outcome.signal if outcome.signal else 0


def headline(results: Results) -> dict[str, float]:
    """One number a set, for the log: top-1, or recall@1 of images."""
    scores = {
        name: float(result["top1"] if result["task"] == "classification" else result["text_to_image_recall@1"])
        for name, result in results["sets"].items()
    }
    return scores if results["shift_mean"] is None else {**scores, "shift_mean": results["shift_mean"]}


def finish(
    config: RunConfig,
    files: Files,
    sets: Sequence[EvaluationSet],
    encoder: Encoder,
    model: DualEncoder,
    loss: InfoNCE,
    recipe: str,
) -> None:
    """Evaluate a trained run: results.json, a picture of test images with their guesses, the table on stdout."""
    with evaluating(model):
        results = evaluate(encoder, sets, config.data.shifts)
        scale = math.exp(float(loss.logit_scale.detach()))
        if distributed.rank() == 0:
            write_results(files.results, results)
            rows = [
                GuessRow(
                    name=each.name,
                    note=f"top-1 {float(results['sets'][each.name]['top1']):.1%} of {len(each.classnames)} classes",
                    guesses=top_guesses(encoder, each, count=PICTURE_IMAGES, logit_scale=scale),
                )
                for each in sets
                if each.task == "classification"
            ]
            if rows:
                draw_guesses(files.picture, f"Triscale: {recipe}", rows)
            show(files, results)


def show(files: Files, results: Results) -> None:
    """Print the table, and where it and the picture are."""
    if distributed.rank() != 0:
        return
    console = Console(highlight=False)
    console.print(results_table(results))
    written = [path for path in (files.results, files.picture) if path.exists()]
    console.print("  ".join(str(path) for path in written), markup=False, soft_wrap=True)


def verify_run(config: RunConfig) -> dict[str, float]:
    """The error of each parameter's gradient of the step against direct, in float64, for the recipe's own towers.

    Dropout and stochastic depth are on, rows are few but make at least three micro-batches of every lane.
    """
    validate(config)
    source = open_training_data(config)
    reader = make_reader(config, source, make_tokenizer(config, source))
    dropout, drop_path = (max(p, VERIFY_DROPOUT) for p in (config.model.dropout, config.model.drop_path))
    noisy = replace(config, model=replace(config.model, dropout=dropout, drop_path=drop_path))
    try:
        model, loss = make_model(noisy, reader.tokenizer.vocabulary_size)
    except UsageError:  # an image tower without stochastic depth; dropout is on all the same
        noisy = replace(config, model=replace(config.model, dropout=dropout))
        model, loss = make_model(noisy, reader.tokenizer.vocabulary_size)
    wanted = parse_per_lane("--batch.micro", config.batch.micro, LANES, smallest=1)
    sizes = {lane: size if isinstance(size, int) else VERIFY_MICRO_BATCH for lane, size in wanted.items()}
    rows = min(config.batch.size, 2 * max(sizes.values()) + 7)
    batch = reader(range(rows))
    return verify(
        model.towers(),
        loss,
        {"image": batch.images, "text": batch.tokens},
        batch.ids,
        micro_batch={lane: min(size, math.ceil(rows / 3)) for lane, size in sizes.items()},
        batch_norm=config.batch.batch_norm,
        seed=config.seed,
    )
