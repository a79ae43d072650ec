"""Where a model goes wrong on a set: class by class, the classes that it takes for each other, its surest mistakes."""

from __future__ import annotations

from typing import TypedDict

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from triscale.data.samples import BadSample
from triscale.evaluation import metrics
from triscale.evaluation.predictions import Predictions
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.tables import printable

CONFUSIONS = 100
"""Pairs of classes that are kept."""
MISTAKES = 100
"""Mistakes that are kept."""
SHOWN_CLASSES = 20
SHOWN_ROWS = 10
LONGEST_NAME = 40
LONGEST_KEY = 60


class ClassRow(TypedDict):
    """Of a class: its samples, those with the right guess, and those for which it is the likeliest guess."""

    name: str
    samples: int
    right: int
    guessed: int
    top1: float | None
    """None where no sample is of the class."""


class Confusion(TypedDict):
    """A pair of classes, the first of which is taken for the second."""

    truth: str
    guess: str
    samples: int


class Mistake(TypedDict):
    """A sample that the model is wrong about."""

    key: str
    truth: str
    guess: str
    probability: float


class Details(TypedDict):
    """Of a classification set; of a sample with several right classes the one that ranks best counts."""

    per_class: list[ClassRow]
    never_occurring_classes: int
    confusions: list[Confusion]
    """The most frequent first."""
    mistakes: list[Mistake]
    """The likeliest guess first."""


def class_details(evaluation_set: EvaluationSet, predictions: Predictions) -> Details:
    """What `Details` says, of the predictions on a set."""
    names, guesses = evaluation_set.classnames, predictions.guesses[:, 0]
    counted = metrics.class_table(predictions.labels, predictions.ahead, guesses, len(names))
    columns = zip(names, counted.samples.tolist(), counted.right.tolist(), counted.guessed.tolist(), strict=True)
    pairs = metrics.confusion_pairs(predictions.labels, predictions.ahead, guesses, CONFUSIONS)
    wrong = metrics.confident_mistakes(predictions.ahead, predictions.probabilities[:, 0], MISTAKES)
    return Details(
        per_class=[
            ClassRow(
                name=name, samples=samples, right=right, guessed=guessed, top1=right / samples if samples else None
            )
            for name, samples, right, guessed in columns
        ],
        never_occurring_classes=int((counted.samples == 0).sum()),
        confusions=[Confusion(truth=names[a], guess=names[b], samples=count) for a, b, count in pairs],
        mistakes=[
            Mistake(
                key=_key(evaluation_set, int(predictions.samples[row])),
                truth=names[int(predictions.labels[row])],
                guess=names[int(guesses[row])],
                probability=float(predictions.probabilities[row, 0]),
            )
            for row in wrong.tolist()
        ],
    )


def details_tables(name: str, details: Details) -> Group:
    """Details for the terminal: the classes with the worst ones first, the first confusions and mistakes."""
    occurring = [row for row in details["per_class"] if row["top1"] is not None]
    worst = sorted(occurring, key=lambda row: row["top1"] or 0.0)
    classes = _table("class", "samples", "right", "guessed", "top-1")
    for row in worst[:SHOWN_CLASSES]:
        counts = (f"{row['samples']:,}", f"{row['right']:,}", f"{row['guessed']:,}")
        classes.add_row(printable(row["name"], LONGEST_NAME), *counts, f"{100 * (row['top1'] or 0.0):.1f}")
    confusions = _table("class", "taken for", "samples")
    for pair in details["confusions"][:SHOWN_ROWS]:
        both = (printable(pair["truth"], LONGEST_NAME), printable(pair["guess"], LONGEST_NAME))
        confusions.add_row(*both, f"{pair['samples']:,}")
    mistakes = _table("sample", "class", "taken for", "probability")
    for mistake in details["mistakes"][:SHOWN_ROWS]:
        both = (printable(mistake["truth"], LONGEST_NAME), printable(mistake["guess"], LONGEST_NAME))
        mistakes.add_row(printable(mistake["key"], LONGEST_KEY), *both, f"{mistake['probability']:.1%}")
    never, total = details["never_occurring_classes"], len(details["per_class"])
    note = f"; {never} of {total} never occur" if never else ""
    shown = f" ({SHOWN_CLASSES} of {len(worst)}, the worst first)" if len(worst) > SHOWN_CLASSES else ""
    parts: list[Table | Text] = [Text.assemble(" ", printable(name, LONGEST_NAME), f": classes{shown}{note}"), classes]
    for title, table in (("most often taken for each other", confusions), ("surest mistakes", mistakes)):
        parts += [Text(f" {title}"), table] if table.row_count else []
    return Group(*parts)


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for header in headers:
        is_number = header in ("samples", "right", "guessed", "top-1", "probability")
        table.add_column(header, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def _key(evaluation_set: EvaluationSet, sample: int) -> str:
    try:
        return evaluation_set.source.read(sample, image=False).key
    except BadSample as fault:  # which was read before
        return fault.key or f"#{sample}"
