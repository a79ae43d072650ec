"""The part of a run's page that shows what a model answers on each set: pictures, classes, calibration, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from triscale.evaluation.metrics import class_table, confident_mistakes, confusion_pairs, reliability
from triscale.evaluation.predictions import Predictions
from triscale.evaluation.record import RunRecord
from triscale.evaluation.report_scores import percent
from triscale.evaluation.sets import EvaluationSet
from triscale.evaluation.suite import SetResult
from triscale.evaluation.thumbnails import Thumbnails
from triscale.pages.charts import figure
from triscale.pages.html import Element, Node, element, name, table
from triscale.pages.plots import Group, legend, point_map, reliability_chart
from triscale.pages.style import SERIES
from triscale.randomness import generator

IMAGES = 9
"""Right guesses, wrong ones and confident mistakes that are shown of each set."""
MOST_CLASSES = 200
MOST_PAIRS = 20
FEWEST_POINTS = 3
"""Images that a class must have in the map of embeddings to be shown as one."""
NamesOf = Callable[[int], str]


def sets_section(record: RunRecord, sets: Mapping[str, EvaluationSet], thumbnails: Thumbnails) -> list[Node]:
    """For every classification set with predictions a part that unfolds; the first one is open."""
    if not record.predictions:
        return []
    parts: list[Node] = [element("h2", "Set by set")]
    missing = [each for each in record.predictions if not thumbnails.has(each)]
    if missing:
        which = "These sets" if len(missing) < len(record.predictions) else "The evaluation sets"
        listed = ": " + ", ".join(missing) if len(missing) < len(record.predictions) else ""
        text = f"{which} could not be opened when this page was made: no images, and classes have numbers{listed}."
        parts.append(element("p", text, class_="note"))
    for place, (set_name, predictions) in enumerate(record.predictions.items()):
        result = record.results["sets"].get(set_name)
        if result is None or not len(predictions):
            continue
        body = _set_parts(set_name, predictions, result, _names(sets.get(set_name), predictions), thumbnails)
        summary = element(
            "summary",
            name(set_name),
            element("span", f"top-1 {percent(result['top1'])} %, {result['samples']:,} samples", class_="aside"),
        )
        parts.append(element("details", summary, *body, open=place == 0))
    return parts


def _names(evaluation_set: EvaluationSet | None, predictions: Predictions) -> NamesOf:
    """The classes' names; numbers where the set is not there, or no longer that of the predictions."""
    names = evaluation_set.classnames if evaluation_set else ()
    highest = max(int(predictions.labels.max()), int(predictions.guesses.max()))
    return (lambda index: names[index]) if highest < len(names) else (lambda index: f"class {index}")


def _set_parts(
    set_name: str, predictions: Predictions, result: SetResult, names: NamesOf, thumbnails: Thumbnails
) -> list[Node]:
    parts: list[Node] = []
    if result.get("bad_reasons"):
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in result["bad_reasons"].items())
        parts.append(element("p", f"Left out of the scores: {reasons}.", class_="note"))
    right, wrong = (np.flatnonzero(chosen) for chosen in (predictions.ahead == 0, predictions.ahead > 0))
    if thumbnails.has(set_name):
        mistakes = confident_mistakes(predictions.ahead, predictions.probabilities[:, 0], IMAGES)
        for title, rows in (
            ("Right guesses", _some(right, set_name, "right")),
            ("Wrong guesses", _some(wrong, set_name, "wrong")),
            ("Most confident mistakes", mistakes),
        ):
            cards = [_card(set_name, predictions, int(row), names, thumbnails) for row in rows]
            if cards:
                parts += [element("h3", title), element("ul", *cards, class_="grid-of-images")]
    parts.append(
        element("div", _calibration(set_name, predictions), _embedding_map(predictions, names), class_="charts wide")
    )
    parts += _subsets(result)
    parts += _classes(predictions, result, names)
    return parts


def _some(rows: Int64[np.ndarray, " n"], set_name: str, what: str) -> Int64[np.ndarray, " m"]:
    """A few rows, the same in every page of the set."""
    return np.sort(generator("report", what, set_name).permutation(rows)[:IMAGES])


def _card(set_name: str, predictions: Predictions, row: int, names: NamesOf, thumbnails: Thumbnails) -> Element:
    """An image with its guess and, where that is wrong, what it is; the probability of both."""
    label, guess = int(predictions.labels[row]), int(predictions.guesses[row, 0])
    is_right = int(predictions.ahead[row]) == 0
    chances = dict(zip(predictions.guesses[row].tolist(), predictions.probabilities[row].tolist(), strict=True))
    picture = thumbnails.of(set_name, int(predictions.samples[row]), names(label))
    sign = "✓ " if is_right else "✗ "
    lines: list[Node] = [
        element("div", element("span", sign, _chance(chances.get(guess)), class_="says"), name(names(guess), 60))
    ]
    if not is_right:
        lines.append(
            element(
                "div", element("span", f"truth {_chance(chances.get(label))}", class_="aside"), name(names(label), 60)
            )
        )
    return element("li", *([picture] if picture else []), *lines, class_="right" if is_right else "wrong")


def _chance(probability: float | None) -> str:
    """A probability among the kept guesses; one that is not there is lower than all of these."""
    return "" if probability is None else f"{100 * probability:.0f} %"


def _calibration(set_name: str, predictions: Predictions) -> Element:
    bins = reliability(predictions.probabilities[:, 0], predictions.ahead == 0)
    chart = reliability_chart(
        bins.confidence.tolist(), bins.accuracy.tolist(), bins.samples.tolist(), title=f"Reliability on {set_name}"
    )
    note = f"fraction right by confidence; ECE {percent(bins.expected_error)} %"
    more = element("p", "Orange: the gap to the mean confidence. Below: how many samples.", class_="note")
    return element("div", figure("Calibration", chart, more, note=note), class_="square")


def _embedding_map(predictions: Predictions, names: NamesOf) -> Element:
    points, explained = principal_axes(predictions.embeddings)
    labels = predictions.labels[predictions.embedded]
    classes, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SERIES]
    frequent = [int(classes[place]) for place in order if counts[place] >= FEWEST_POINTS]
    if len(frequent) > 1:
        groups = [_group(points, labels == each, names(each)) for each in frequent]
        rest = _group(points, ~np.isin(labels, frequent), "others")
        what = "by class, for the most frequent ones"
    else:
        right = predictions.ahead[predictions.embedded] == 0
        groups = [_group(points, right, "right guess", "right"), _group(points, ~right, "wrong guess", "wrong")]
        rest = _group(points, np.zeros(len(points), bool), "others")
        what = "by whether the guess is right"
    note = f"{len(points):,} images on two principal axes ({percent(float(explained.sum()))} % of the variance), {what}"
    return figure(
        "Image embeddings",
        point_map(groups, rest, title="Image embeddings", labelled=len(frequent) > 1),
        legend(groups),
        note=note,
    )


def _group(points: Float64[np.ndarray, "e 2"], chosen: np.ndarray, title: str, class_: str = "") -> Group:
    kept = points[chosen]
    return Group(name=title, x=kept[:, 0].tolist(), y=kept[:, 1].tolist(), class_=class_)


def principal_axes(
    embeddings: Float32[np.ndarray, "e d"],
) -> tuple[Float64[np.ndarray, "e 2"], Float64[np.ndarray, " 2"]]:
    """Coordinates on the two axes of largest variance, and the fraction of the variance that each explains.

    An axis points to where its coordinate of largest size is positive, so that equal input gives an equal map.
    """
    centred = embeddings.astype(np.float64) - (embeddings.mean(axis=0, dtype=np.float64) if len(embeddings) else 0.0)
    if len(centred) < 2 or centred.shape[1] < 2:
        return np.zeros((len(centred), 2)), np.zeros(2)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, [-1, -2]]
    points = centred @ axes
    signs = np.sign(points[np.abs(points).argmax(axis=0), [0, 1]])
    total = max(float(variances.sum()), 1e-30)
    return points * np.where(signs == 0, 1.0, signs), variances[[-1, -2]].clip(min=0) / total


def _subsets(result: SetResult) -> list[Node]:
    """Top-1 at levels of coarser classes and on slices of the samples, where the set has any."""
    rows: list[list[Node]] = [
        ["level ", name(level, 60), percent(top1), f"{result['samples']:,}"]
        for level, top1 in result.get("levels", {}).items()
    ]
    rows += [
        ["slice ", name(each, 60), percent(of["top1"]) if of.get("top1") is not None else "–", f"{of['samples']:,}"]
        for each, of in result.get("slices", {}).items()
    ]
    if not rows:
        return []
    return [
        element("h3", "Levels and slices"),
        table(["", "", "top-1", "samples"], rows, label="Levels and slices", numbers=(2, 3)),
    ]


def _classes(predictions: Predictions, result: SetResult, names: NamesOf) -> list[Node]:
    """The classes that are guessed best and worst, and those that are taken for each other."""
    first = predictions.guesses[:, 0]
    highest = int(max(predictions.labels.max(), first.max())) + 1
    counts = class_table(predictions.labels, predictions.ahead, first, max(highest, int(result["classes"])))
    occurs = np.flatnonzero(counts.samples)
    order = occurs[np.lexsort((-counts.samples[occurs], counts.right[occurs] / counts.samples[occurs]))]
    cut = len(order) > MOST_CLASSES
    shown = np.concatenate([order[: MOST_CLASSES // 2], order[-(MOST_CLASSES // 2) :]]) if cut else order
    rows = [
        [
            name(names(int(each)), 80),
            percent(float(counts.right[each] / counts.samples[each])),
            percent(float(counts.among_five[each] / counts.samples[each])),
            f"{counts.samples[each]:,}",
            f"{counts.guessed[each]:,}",
        ]
        for each in shown
    ]
    parts: list[Node] = []
    pairs = confusion_pairs(predictions.labels, predictions.ahead, first, MOST_PAIRS)
    if pairs:
        parts.append(element("h3", "Most frequent confusions"))
        parts.append(_pairs(pairs, counts.samples, names))
    note = f"worst and best {MOST_CLASSES // 2} of {len(order):,}" if cut else f"all {len(order):,}, worst first"
    head = ["class", "top-1", "top-5", "samples", "guessed"]
    by_class = table(head, rows, label="Scores by class", numbers=range(1, 5), tall=True)
    summary = element("summary", "Scores by class", element("span", note, class_="aside"))
    return [*parts, element("details", summary, by_class)]


def _pairs(pairs: Sequence[tuple[int, int, int]], samples: Int64[np.ndarray, " k"], names: NamesOf) -> Element:
    rows = [
        [name(names(label), 80), name(names(guess), 80), f"{times:,}", percent(times / int(samples[label]))]
        for label, guess, times in pairs
    ]
    head = ["class", "taken for", "times", "% of the class"]
    return table(head, rows, label="Classes that are taken for others", numbers=(2, 3), tall=True)
