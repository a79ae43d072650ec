"""The commands that evaluate: from their options to what they print and return as JSON values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from triscale import distributed
from triscale.errors import UsageError
from triscale.evaluation.datasets import open_sets
from triscale.evaluation.robustness import Line, fit_reference
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.suite import Results, base_set, write_evaluation
from triscale.evaluation.suite import evaluate as evaluate_sets
from triscale.evaluation.tables import guesses_table, results_table
from triscale.evaluation_options import ClassifyOptions, EvalOptions, parse_labels
from triscale.inference import load
from triscale.run_folder import evaluation_of
from triscale.training.checkpoint import split_checkpoint

Report = Callable[[str], None]
COLLECTIVE_TIMEOUT_SECONDS = 600.0
"""Processes wait for each other at the end of each set alone, and one may read more slowly than another."""
MOST_WORKERS = 16


def evaluate(options: EvalOptions, report: Report) -> Results | None:
    """Score a model on evaluation sets and print the table; under torchrun all processes share the work.

    Returns:
        The results; None on all processes but the first.
    """
    if options.batch_size < 1 or (options.workers or 0) < 0:
        raise UsageError("--batch-size must be at least 1, --workers at least 0")
    device = options.device.partition(":")[0]
    with distributed.process_group(device, COLLECTIVE_TIMEOUT_SECONDS):
        first = distributed.rank() == 0
        model = load(options.run, options.device, step=options.checkpoint, report=report if first else _silent)
        workers = _default_workers(device) if options.workers is None else options.workers
        encoder = replace(model.encoder, batch_size=options.batch_size, workers=workers)
        sets, shifts = _open(options)
        base = base_set(sets, shifts, options.base)
        evaluation = evaluate_sets(encoder, sets, shifts, base, _reference(options, base, shifts))
    if not first:
        return None
    if options.output:
        write_evaluation(Path(options.output), evaluation)
    Console(highlight=False).print(results_table(evaluation.results))
    return evaluation.results


def _open(options: EvalOptions) -> tuple[list[EvaluationSet], tuple[str, ...]]:
    """The sets that are named, or else the run's own, and which of them are shifted."""
    if options.data:
        return open_sets(options.data), options.shifts
    folder, _ = split_checkpoint(Path(options.run))
    data, root, shifts = evaluation_of(folder)
    return open_sets(data, root), shifts


def _reference(options: EvalOptions, base: str, shifts: Sequence[str]) -> dict[str, Line] | None:
    """The lines through the reference models, by shifted set, where a file of them is given."""
    if not shifts and (options.base or options.reference):
        raise UsageError("--base and --reference are of shifted sets: name those with --shifts")
    if not options.reference:
        return None
    return fit_reference(Path(options.reference), options.reference_unit, base, shifts)


def _default_workers(device: str) -> int:
    """Processes that read: where the towers compute on the cores too, they are left half of them."""
    cores = distributed.cores()
    return max(1, min(cores // 2 if device == "cpu" else cores - 1, MOST_WORKERS))


def _silent(line: str) -> None:
    """What processes other than the first report."""


def classify(options: ClassifyOptions, report: Report) -> dict[str, dict[str, float]]:
    """Classify images by names and print the likeliest; by path and label the probability."""
    labels = parse_labels(options.labels)
    if not options.images:
        raise UsageError("which images? triscale classify RUN --labels a,b IMAGE...")
    model = load(options.run, options.device, report=report)
    probabilities = model.classify(list(options.images), labels, options.templates).tolist()
    Console(highlight=False).print(guesses_table(options.images, labels, probabilities))
    return {path: dict(zip(labels, row, strict=True)) for path, row in zip(options.images, probabilities, strict=True)}
