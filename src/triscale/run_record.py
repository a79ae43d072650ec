"""Run folders read back for pages and comparisons, without the model; and the page of a run written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from triscale.config import RunConfig, flatten, to_dict
from triscale.errors import RunError, UsageError, first_line
from triscale.evaluation.array_file import write_whole
from triscale.evaluation.datasets import open_sets
from triscale.evaluation.matches import Matches
from triscale.evaluation.predictions import Predictions, predictions_file
from triscale.evaluation.record import NO_RESULTS, Part, RunRecord
from triscale.evaluation.report import report_page
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.suite import Evaluation, Results
from triscale.run_folder import Files, evaluation_of, parts_of
from triscale.training.history import read_history
from triscale.training.log import METRICS

Report = Callable[[str], None]
MAX_BYTES = 2**28
"""Largest JSON file that is read."""
_LONGEST_LINE = 2**16


def read_record(folder: Path, report: Report) -> RunRecord:
    """All that a run folder, that of phases, or a folder of `triscale eval --output` holds.

    Args:
        report: hears of predictions or matches that are damaged; the page or comparison goes without them.

    Raises:
        UsageError: it is no run folder, or its results are damaged.
    """
    if not Files(folder).config.exists() and Files(folder).results.exists():  # of `triscale eval --output`
        return _evaluated(folder, RunRecord(name=folder.resolve().name), report)
    parts = parts_of(folder)
    recipe = _json(Files(folder).config)["recipe"]
    begun = {path: config for path, config in parts.items() if Files(path).config.exists()}
    last = list(begun or parts)[-1]
    record = RunRecord(
        name=folder.resolve().name,
        recipe=str(recipe),
        parts=tuple(_part(path, config, "" if path == folder else path.name) for path, config in begun.items()),
    )
    return _evaluated(last, record, report)


def _evaluated(folder: Path, record: RunRecord, report: Report) -> RunRecord:
    """The record with the results, predictions and matches of a folder."""
    results = _results(Files(folder).results)
    return replace(
        record,
        results=results,
        predictions=_load(results, "classification", folder, Predictions.load, report),
        matches=_load(results, "retrieval", folder, Matches.load, report),
    )


def _part(folder: Path, config: RunConfig, name: str) -> Part:
    files = Files(folder)
    return Part(
        name=name,
        settings=flatten(to_dict(config)),
        resolved=_json(files.resolved) if files.resolved.exists() else {},
        history=read_history(folder / METRICS),
        quarantine=_reasons(files.quarantine),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; UsageError where it is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {first_line(error)}") from error
    return values


def _results(path: Path) -> Results:
    """What results.json holds; no sets where there is none."""
    if not path.exists():
        return NO_RESULTS
    values = _json(path)
    sets = values.get("sets")
    keys = {"classification": "top1", "retrieval": "text_to_image_recall@1"}
    if not isinstance(sets, dict) or not all(
        isinstance(each, dict) and isinstance(each.get(keys.get(each.get("task", ""), "")), float)
        for each in sets.values()
    ):
        raise UsageError(f"{str(path)!r} holds no results")
    return Results(**{**NO_RESULTS, **values})


def _load(results: Results, task: str, folder: Path, load: Callable[[Path], Any], report: Report) -> dict[str, Any]:
    """By name, what is kept of the sets of a task; a run of an earlier version kept nothing."""
    found = {}
    for name, result in results["sets"].items():
        path = predictions_file(folder, name)
        if result["task"] == task and path.exists():
            try:
                found[name] = load(path)
            except UsageError as error:
                report(str(error))
    return found


def _reasons(path: Path) -> dict[str, int]:
    """Samples in quarantine.jsonl by reason, most frequent first."""
    counts: Counter[str] = Counter()
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and isinstance(record.get("reason"), str):
                    counts[record["reason"]] += 1
    except OSError:
        return {}
    return dict(counts.most_common())


def open_what_can_be(folder: Path) -> dict[str, EvaluationSet]:
    """The run's own evaluation sets by name, without those that cannot be opened now."""
    try:
        data, root, _ = evaluation_of(folder)
    except UsageError:  # it has none
        return {}
    found: dict[str, EvaluationSet] = {}
    for spec in data:
        try:
            found.update({each.name: each for each in open_sets([spec], root)})
        except (UsageError, RunError):  # gone since, which the page says
            continue
    return found


def write_report(
    folder: Path,
    sets: Mapping[str, EvaluationSet],
    report: Report,
    *,
    others: Sequence[Path] = (),
    output: Path | None = None,
) -> Path:
    """Write the page of a run from its folder; returns where.

    Args:
        sets: by name, those that can be read, for images and class names.
        report: as of `read_record`.
        others: folders of runs that it is held against.
        output: where; None: report.html in the folder.

    Raises:
        UsageError: as `read_record`.
        RunError: it can't be written.
    """
    record = read_record(folder, report)
    page = report_page(record, sets, [read_record(other, report) for other in others])
    path = Files(folder).report if output is None else output
    write_whole(path, page.encode(), "the page")
    return path


def write_evaluation_report(
    model: str, evaluation: Evaluation, sets: Sequence[EvaluationSet], report: Report, output: Path
) -> None:
    """Write the page of an evaluation: with how it was trained, where the model is a run folder.

    Args:
        model: what was evaluated.
        report: as of `read_record`.
    """
    try:
        record = read_record(Path(model), report)
    except UsageError:  # a model of another package
        record = RunRecord(name=Path(model).name or model)
    record = replace(record, results=evaluation.results, predictions=evaluation.predictions, matches=evaluation.matches)
    page = report_page(record, {each.name: each for each in sets})
    write_whole(output, page.encode(), "the page")
