"""The commands that evaluate: from their options to what they print and return as JSON values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from triscale.errors import UsageError
from triscale.evaluation.datasets import open_sets
from triscale.evaluation.suite import Results, guesses_table, results_table
from triscale.evaluation.suite import evaluate as evaluate_sets
from triscale.evaluation_options import ClassifyOptions, EvalOptions, parse_labels
from triscale.inference import load
from triscale.run_folder import evaluation_of

Report = Callable[[str], None]


def evaluate(options: EvalOptions, report: Report) -> Results:
    """Score a model on evaluation sets and print the table."""
    model = load(options.run, options.device, report=report)
    data, root, shifts = (options.data, "", options.shifts) if options.data else evaluation_of(Path(options.run))
    evaluation = evaluate_sets(model.encoder, open_sets(data, root), shifts)
    Console(highlight=False).print(results_table(evaluation.results))
    return evaluation.results


def classify(options: ClassifyOptions, report: Report) -> dict[str, dict[str, float]]:
    """Classify images by names and print the likeliest; by path and label the probability."""
    labels = parse_labels(options.labels)
    if not options.images:
        raise UsageError("which images? triscale classify RUN --labels a,b IMAGE...")
    model = load(options.run, options.device, report=report)
    probabilities = model.classify(list(options.images), labels, options.templates).tolist()
    Console(highlight=False).print(guesses_table(options.images, labels, probabilities))
    return {path: dict(zip(labels, row, strict=True)) for path, row in zip(options.images, probabilities, strict=True)}
