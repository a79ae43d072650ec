"""Results and guesses as tables for the terminal. Names come from data: neither markup nor control characters act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from triscale.evaluation.retrieval import DEPTHS
from triscale.evaluation.robustness import RobustnessResult
from triscale.evaluation.suite import Results, SetResult

LONGEST_NAME = 40
SHOWN_LABELS = 5
WIDEST = 10_000
COUNTS = ("samples", "unlabelled", "bad")
RANKS = ("image_to_text_median_rank", "text_to_image_median_rank")
EFFECTIVE = ("predicted_top1", "effective_robustness", "effective_robustness_interval")

Column = tuple[str, str]
"""A score's key, and what the table calls it."""
COLUMNS: dict[str, list[Column]] = {
    "classification": [("top1", "top-1"), ("top5", "top-5"), ("mean_per_class", "per class")],
    "retrieval": [
        (f"{way}_recall@{depth}", f"{found if depth == 1 else ''}@{depth}")
        for way, found in (("image_to_text", "text"), ("text_to_image", "image"))
        for depth in DEPTHS
    ],
}
"""By task, the scores that its table shows."""
WIDE_COLUMNS: dict[str, list[Column]] = {
    "classification": [
        ("top1", "top-1"),
        ("top1_interval", "95 %"),
        ("top5", "top-5"),
        ("mean_per_class", "per class"),
        ("mean_per_class_interval", "95 %"),
        ("ece", "ECE"),
    ],
    "retrieval": [
        *COLUMNS["retrieval"][: len(DEPTHS)],
        ("image_to_text_median_rank", "median rank"),
        *COLUMNS["retrieval"][len(DEPTHS) :],
        ("text_to_image_median_rank", "median rank"),
    ],
}
"""The same where there is room."""


def results_table(results: Results) -> Group:
    """Results for the terminal, a table for each task: a row a set, scores in percent, and what guessing reaches.

    Intervals and calibration are shown where they fit its width.
    """
    tables: list[_FirstThatFits | Table] = []
    for task, columns in COLUMNS.items():
        rows = {name: result for name, result in results["sets"].items() if result["task"] == task}
        if rows:
            tables.append(_FirstThatFits(tables=[_table(rows, WIDE_COLUMNS[task]), _table(rows, columns)]))
    if "robustness" in results:
        tables.append(_robustness_table(results, results["robustness"]))
    if "probe" in results:
        tables.append(_probe_table(results["probe"]))
    return Group(*tables)


@dataclass(frozen=True, kw_only=True)
class _FirstThatFits:
    """Shows the first of some tables that fits the terminal's width, or else the last."""

    tables: Sequence[Table]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        unbounded = options.update(width=WIDEST)
        widths = (Measurement.get(console, unbounded, table).maximum for table in self.tables)
        fitting = (table for table, width in zip(self.tables, widths, strict=True) if width <= options.max_width)
        yield next(fitting, self.tables[-1])


def _table(rows: Mapping[str, SetResult], columns: Sequence[Column]) -> Table:
    """A row a set, and below it one a level and a slice. A column that no row has anything for is left out."""
    shown: list[Column] = [("samples", "samples"), ("unlabelled", "unlabelled"), ("bad", "bad"), *columns]
    shown = [column for column in shown if any(column[0] in result for result in rows.values())]
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("set", no_wrap=True, overflow="ellipsis", max_width=LONGEST_NAME)
    for _, header in shown:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True, style="dim")
    for name, result in rows.items():
        guessing = _percent(chance(result))
        table.add_row(printable(name, LONGEST_NAME), *(_cell(key, result.get(key)) for key, _ in shown), guessing)
        levels = {level: {"top1": score} for level, score in result.get("levels", {}).items()}
        for part, values in {**levels, **result.get("slices", {})}.items():
            table.add_row(printable(f"  {part}", LONGEST_NAME), *(_cell(key, values.get(key)) for key, _ in shown), "")
    return table


def _probe_table(probe: SetResult) -> Table:
    """A row a set of an online probe."""
    about = printable(probe["label"], LONGEST_NAME), f" from {probe['train_samples']:,} samples"
    title = Text.assemble("image features: ", *about)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("set", no_wrap=True, overflow="ellipsis", max_width=LONGEST_NAME)
    for header in ("samples", "neighbours", "95 %", "linear", "95 %"):
        table.add_column(header, justify="right", no_wrap=True)
    keys = ("samples", "knn", "knn_interval", "linear", "linear_interval")
    for name, found in probe["sets"].items():
        table.add_row(printable(name, LONGEST_NAME), *(_cell(key, found[key]) for key in keys))
    return table


def _robustness_table(results: Results, robustness: RobustnessResult) -> Table:
    """A row a shifted set and one of their mean: top-1, the drop from the base set and, with reference models, what
    these lead one to expect, what is beyond it and how far their own accuracies are off their line."""
    base = robustness["base"]
    title = Text.assemble("shifted from ", printable(base, LONGEST_NAME), f" {_percent(results['sets'][base]['top1'])}")
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    table.add_column("set", no_wrap=True, overflow="ellipsis", max_width=LONGEST_NAME)
    has_reference = "effective_robustness" in robustness
    keys = ("drop", "drop_interval", *(EFFECTIVE if has_reference else ()))
    beyond = ("expected", "effective", "95 %", "models", "off line") if has_reference else ()
    for header in ("top-1", "drop", "95 %", *beyond):
        table.add_column(header, justify="right", no_wrap=True)
    for name, shift in robustness["shifts"].items():
        line = shift.get("line", {})
        table.add_row(
            printable(name, LONGEST_NAME),
            _percent(results["sets"][name]["top1"]),
            *(_cell(key, shift.get(key)) for key in keys),
            *((str(line["models"]), _percent(line["residual_spread"])) if line else ()),
        )
    of_mean = {**robustness, "drop": results["drop"]}
    table.add_row("mean", _cell("", results["shift_mean"]), *(_cell(key, of_mean.get(key)) for key in keys))
    return table


def _cell(key: str, value: object) -> str:
    """A count, a rank, a fraction in percent, or an interval of one; empty for what is not there."""
    if isinstance(value, list):
        return "\N{EN DASH}".join(_percent(float(edge)) for edge in value)
    if key in RANKS and value is not None:
        return f"{value:,.1f}"
    if isinstance(value, int | float) and key not in COUNTS:
        return _percent(float(value))
    return f"{value:,}" if isinstance(value, int) else ""


def printable(name: str, longest: int) -> Text:
    """A user's name as plain text for the terminal: no markup, no control characters, at most `longest` long."""
    kept = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[: longest + 1])
    return Text(kept if len(kept) <= longest else kept[: longest - 1] + "…")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def chance(result: SetResult) -> float:
    """Expected top-1, or recall@1 of texts, of a model that guesses."""
    if result["task"] == "retrieval":
        return 1 / int(result["samples"])
    return 1 / int(result.get("allowed_classes", result["classes"]))


def guesses_table(images: Sequence[str], labels: Sequence[str], probabilities: Sequence[Sequence[float]]) -> Table:
    """The likeliest labels of each image, for the terminal."""
    table = Table("image", "label", "probability")
    for path, row in zip(images, probabilities, strict=True):
        best = sorted(range(len(labels)), key=row.__getitem__, reverse=True)[:SHOWN_LABELS]
        for place, index in enumerate(best):
            name = printable(path, 80) if place == 0 else ""
            table.add_row(name, printable(labels[index], 60), f"{row[index]:.1%}")
    return table
