"""The part of a run's page that holds its scores: the figures that matter most, tables, robustness, other runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from triscale.evaluation.compare import Score, main_score, scores
from triscale.evaluation.record import RunRecord
from triscale.evaluation.suite import Results, SetResult
from triscale.evaluation.tables import COLUMNS, chance
from triscale.pages.html import Element, Node, element, name, table
from triscale.pages.plots import Row, dot_chart, strip

MAIN_WORDS = {"classification": "top-1", "retrieval": "image recall@1"}
"""What pages call a set's main score."""


def percent(fraction: float) -> str:
    """A fraction of 1 as a number of percent, without the sign."""
    return f"{100 * fraction:.1f}"


def points(difference: float) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")


def between(interval: Sequence[float] | None) -> str:
    """A 95 % interval of a fraction, in percent; "" for none."""
    return f"{percent(interval[0])}–{percent(interval[1])}" if interval else ""


def duration(seconds: float) -> str:
    """Wall time, such as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))


def count(number: int) -> str:
    """A number of samples or parameters, shortened."""
    for unit, sign in ((10**9, "G"), (10**6, "M")):
        if number >= unit:
            return f"{number / unit:.3g} {sign}"
    return f"{number:,}"


def tiles(record: RunRecord) -> Element:
    """The figures that matter most."""
    cells: list[tuple[str, Node, str]] = []
    for result_name, result in _first_of_each_task(record.results):
        value, interval = main_score(result)
        cells.append((f"{MAIN_WORDS[result['task']]} on ", name(result_name, 40), f"{percent(value)} %"))
        if interval:
            cells[-1] = (cells[-1][0], cells[-1][1], f"{percent(value)} %|95 %: {between(interval)}")
    if record.results["shift_mean"] is not None:
        cells.append(("mean top-1 on shifted sets", "", f"{percent(record.results['shift_mean'])} %"))
    if record.parts:
        last = record.parts[-1].history.curves.get("loss")
        if last is not None:
            cells.append(("loss at the end", "", f"{last.last:.3g}"))
        cells.append(("samples seen", "", count(record.samples_seen)))
        cells.append(("wall time of training", "", duration(record.seconds)))
        cells.append(("parameters", "", count(record.parameters)))
    items = []
    for what, of, value in cells:
        shown, _, more = value.partition("|")
        items.append(element("li", element("strong", shown), element("span", what, of), element("span", more)))
    return element("ul", *items, class_="tiles")


def probe_section(results: Results) -> list[Node]:
    """What the image tower's features tell about labels, as a run's online probe found."""
    if "probe" not in results:
        return []
    probe = results["probe"]
    head: list[Node] = ["set", "neighbours", "95 %", "linear", "95 %", "samples"]
    rows: list[list[Node]] = [
        [
            name(set_name, 40),
            percent(found["knn"]),
            between(found["knn_interval"]),
            percent(found["linear"]),
            between(found["linear_interval"]),
            f"{found['samples']:,}",
        ]
        for set_name, found in probe["sets"].items()
    ]
    told = f"What features of the image tower tell of {probe['label']}, in %, from {probe['train_samples']:,} samples."
    return [
        element("h2", "Features"),
        element("p", name(told, 200), class_="note"),
        table(head, rows, label="Features probed, in %", numbers=range(1, len(head))),
    ]


def _first_of_each_task(results: Results) -> list[tuple[str, SetResult]]:
    found: dict[str, tuple[str, SetResult]] = {}
    for result_name, result in results["sets"].items():
        found.setdefault(result["task"], (result_name, result))
    return list(found.values())


def scores_section(results: Results) -> list[Node]:
    """A table for each task."""
    parts: list[Node] = [element("h2", "Scores")]
    for task, columns in COLUMNS.items():
        rows = {key: result for key, result in results["sets"].items() if result["task"] == task}
        if not rows:
            continue
        tasks = {"classification": "Zero-shot classification", "retrieval": "Retrieval"}
        parts.append(element("h3", tasks[task]))
        parts.append(_classification(rows) if task == "classification" else _retrieval(rows, dict(columns)))
    parts.append(
        element(
            "p",
            "Scores in percent. The line over a bar's end is the 95 % bootstrap interval. “Samples” are those that a "
            "score rests on.",
            class_="note",
        )
    )
    return parts


def _classification(rows: Mapping[str, SetResult]) -> Element:
    optional = {"ece": "ECE", "bad": "bad", "unlabelled": "unlabelled"}
    shown = {key: word for key, word in optional.items() if any(result.get(key) for result in rows.values())}
    head = ["set", "top-1", "", "95 %", "top-5", "per class", *shown.values(), "chance", "classes", "samples"]
    body = []
    for set_name, result in rows.items():
        value, interval = main_score(result)
        more = [
            (percent(result["ece"]) if key == "ece" else f"{result[key]:,}") if result.get(key) is not None else "–"
            for key in shown
        ]
        body.append(
            [
                name(set_name),
                element("strong", percent(value)),
                strip(value, interval=interval or ()),
                element("span", between(interval) or "–", class_="aside"),
                percent(result["top5"]),
                percent(result["mean_per_class"]),
                *more,
                percent(chance(result)),
                f"{result.get('allowed_classes', result['classes']):,}",
                f"{result['samples']:,}",
            ]
        )
    numbers = [1, *range(4, len(head))]
    return table(head, body, label="Zero-shot classification, a row a set", numbers=numbers, charts=(2,))


def _retrieval(rows: Mapping[str, SetResult], columns: Mapping[str, str]) -> Element:
    ranks = {"image_to_text_median_rank": "text median rank", "text_to_image_median_rank": "image median rank"}
    shown = [key for key in ranks if any(key in result for result in rows.values())]
    head = ["set", *(f"{word}" for word in columns.values()), *(ranks[key] for key in shown), "samples"]
    body = [
        [
            name(set_name),
            *(percent(result[key]) for key in columns),
            *(f"{result[key]:,.3g}" if key in result else "–" for key in shown),
            f"{result['samples']:,}",
        ]
        for set_name, result in rows.items()
    ]
    return table(head, body, label="Retrieval, a row a set; recall", numbers=range(1, len(head)))


def robustness_section(record: RunRecord) -> list[Node]:
    """The base set, its shifts, their mean and the drop; effective robustness where it was measured. Or nothing."""
    results = record.results
    found: Mapping[str, Any] = results.get("robustness") or {}
    mean, drop = results["shift_mean"], results["drop"]
    if mean is None or drop is None:
        return []
    sets = results["sets"]
    base = found.get("base") or next(key for key, each in sets.items() if each["task"] == "classification")
    shifts: Mapping[str, Any] = found.get("shifts", {})
    named = shifts or (record.parts[-1].settings.get("data.shifts", ()) if record.parts else ())
    rows = [
        Row(
            name=f"{base} (base)",
            value=main_score(sets[base])[0],
            interval=main_score(sets[base])[1] or (),
            strong=True,
        )
    ]
    for each in (one for one in named if one in sets):
        value, interval = main_score(sets[each])
        rows.append(Row(name=each, value=value, interval=interval or ()))
    rows.append(
        Row(name="mean of the shifts", value=mean, interval=found.get("shift_mean_interval") or (), strong=True)
    )
    parts: list[Node] = [
        element("h2", "Robustness"),
        element(
            "p",
            "Top-1 falls by " if drop >= 0 else "Top-1 rises by ",
            element("strong", f"{percent(abs(drop))} points"),
            " from ",
            name(base, 40),
            " to the mean of the shifted sets",
            f" (95 %: {_points_between(found['drop_interval'])})." if found.get("drop_interval") else ".",
        ),
        element(
            "div",
            element("figure", dot_chart(rows, title="Top-1 on the base set and on shifted sets")),
            class_="narrow",
        ),
    ]
    if shifts:
        parts.append(_shift_table(found))
    return parts


def _points_between(interval: Sequence[float]) -> str:
    return f"{points(interval[0])} to {points(interval[1])}"


def _shift_table(found: Mapping[str, Any]) -> Element:
    shifts: Mapping[str, Any] = found["shifts"]
    effective = any("effective_robustness" in each for each in shifts.values())
    head = ["shifted set", "drop", "95 %"]
    head += ["expected top-1", "effective robustness", "95 %", "reference models"] if effective else []
    body = []
    for each, of in shifts.items():
        row: list[Node] = [name(each), points(of["drop"]), _points_between(of["drop_interval"])]
        if effective:
            row += [
                percent(of["predicted_top1"]),
                points(of["effective_robustness"]),
                _points_between(of["effective_robustness_interval"]),
                str(of["line"]["models"]),
            ]
        body.append(row)
    if effective and "effective_robustness" in found:
        interval = _points_between(found["effective_robustness_interval"])
        body.append(["mean", "", "", "", points(found["effective_robustness"]), interval, ""])
    return table(head, body, label="Drops and effective robustness by shifted set", numbers=range(1, len(head)))


def against_section(runs: Sequence[RunRecord], title: str = "Against other runs") -> list[Node]:
    """Every run's main score set by set, and its difference from the first run's. Nothing where there is one run."""
    found = scores(runs)
    if len(runs) < 2 or not found:
        return []
    rows: list[Element] = []
    for set_name, of_runs in found.items():
        task = next(run.results["sets"][set_name]["task"] for run in runs if set_name in run.results["sets"])
        rows.append(
            element(
                "tr",
                element(
                    "th",
                    name(set_name),
                    " ",
                    element("span", MAIN_WORDS[task], class_="aside"),
                    scope="rowgroup",
                    colspan="5",
                ),
                class_="group",
            )
        )
        rows += [_run_row(run, score, place) for place, (run, score) in enumerate(zip(runs, of_runs, strict=True))]
    cells = [
        element("th", word, scope="col", class_=of)
        for word, of in (
            ("run", None),
            ("", None),
            ("score", "number"),
            ("difference", "number"),
            ("95 %, paired", "number"),
        )
    ]
    body = element("table", element("thead", element("tr", *cells)), element("tbody", *rows))
    return [
        element("h2", title),
        element(
            "p",
            "Differences in percentage points from ",
            name(runs[0].name, 60),
            ". One whose interval leaves out zero is "
            "more than chance; a dash: not the same samples, or no predictions kept.",
            class_="note",
        ),
        element("div", body, class_="scroll", role="region", aria_label="Scores of runs, set by set", tabindex="0"),
    ]


def _run_row(run: RunRecord, score: Score | None, place: int) -> Element:
    cells: list[Node] = ["–", "–", "–"]
    bar: Node = ""
    if score is not None:
        bar = strip(score.value, interval=score.interval or (), class_="c1" if place == 0 else "c8")
        difference: Node = points(score.difference) if score.difference is not None else "–"
        if score.is_different and score.difference is not None:
            sign = "right" if score.difference > 0 else "wrong"
            difference = element("strong", "▲ " if score.difference > 0 else "▼ ", difference, class_=f"says {sign}")
        interval = score.difference_interval
        cells = [element("strong", percent(score.value)), difference, _points_between(interval) if interval else "–"]
    numbers = [element("td", cell, class_="number") for cell in cells]
    return element("tr", element("th", name(run.name, 60), scope="row"), element("td", bar, class_="chart"), *numbers)
