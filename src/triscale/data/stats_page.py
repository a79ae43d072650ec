"""What a source holds, as a page: one HTML file that loads and runs nothing; names and captions in it are text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from triscale.data.stats import Statistics
from triscale.pages.charts import figure, histogram
from triscale.pages.html import Element, Node, document, element, facts, name, table
from triscale.pages.style import STYLE

LONGEST_NAME = 200


def stats_page(statistics: Statistics) -> str:
    """The page, UTF-8."""
    values = statistics.values()
    sections: list[list[Node]] = [[element("h2", "Summary"), facts(summary(statistics))]]
    charts = _charts(statistics)
    if charts:
        sections.append(
            [element("h2", "Distributions"), element("div", *charts, class_="charts"), _percentiles(values)]
        )
    sections.append(_reasons("Bad samples by reason", statistics.bad, statistics.samples))
    if statistics.listed:
        listed = [[name(key, LONGEST_NAME), name(reason)] for key, reason in statistics.listed]
        listing = table(["sample", "reason"], listed, label="The first bad samples", tall=True)
        sections.append([element("h2", "The first bad samples"), listing])
    sections.append(_reasons("Entries that are never used", statistics.unused, 0))
    header = element(
        "header",
        element("p", "Triscale · Data", class_="eyebrow"),
        element("h1", name(statistics.name, LONGEST_NAME)),
        element("p", _read_note(statistics), class_="note"),
        class_="page",
    )
    body = element("main", *(element("section", *parts) for parts in sections if parts))
    return document(statistics.name, header, body, style=STYLE)


def summary(statistics: Statistics) -> list[tuple[str, str]]:
    """The figures that matter most, as (name, text)."""
    v = statistics.values()
    rows = [
        ("samples", f"{statistics.length:,}"),
        ("read", f"{statistics.samples:,}"),
        ("bad", f"{sum(statistics.bad.values()):,} ({v['bad_fraction']:.2%})"),
        ("never used", f"{sum(statistics.unused.values()):,}"),
        ("with a label", f"{statistics.labelled:,}"),
        ("captions", f"{len(statistics.characters):,}"),
        ("duplicate captions", f"{statistics.duplicate_captions:,} ({v['duplicate_caption_fraction']:.2%})"),
        ("duplicate images", f"{statistics.duplicate_images:,} ({v['duplicate_image_fraction']:.2%})"),
    ]
    if len(statistics.characters):
        rows.append(("characters of a caption, median", f"{v['caption_characters']['p50']:,.0f}"))
    if statistics.token_length:
        share = f"{statistics.truncated:,} ({v['truncated_fraction']:.2%})"
        rows.append((f"captions cut at {statistics.token_length} tokens", share))
    if len(statistics.sizes):
        size = f"{v['image_width']['p50']:,.0f} x {v['image_height']['p50']:,.0f}"
        rows.append(("image size, median", size))
    return rows


def _read_note(statistics: Statistics) -> str:
    if statistics.samples == statistics.length:
        return f"All {statistics.length:,} samples were read and their images decoded."
    return (
        f"{statistics.samples:,} samples, evenly spread over {statistics.length:,}, were read and decoded. "
        "Duplicates are those among them, so the whole source has more."
    )


def _charts(statistics: Statistics) -> list[Element]:
    """The histograms that there is data for."""
    charts = []
    if len(statistics.characters):
        charts.append(_histogram(statistics.characters, "Characters of a caption"))
    if len(statistics.tokens):
        cut = statistics.token_length + 0.5
        note = f"with the end token; the line: cut at {statistics.token_length}"
        charts.append(_histogram(statistics.tokens, "Tokens of a caption", note, mark=cut))
    if len(statistics.captions) and statistics.captions.max() > 1:
        charts.append(_histogram(statistics.captions, "Captions of a sample"))
    if len(statistics.sizes):
        charts.append(_histogram(statistics.sizes.min(1), "Shorter side of an image", "pixels"))
        charts.append(_histogram(statistics.sizes[:, 0] / statistics.sizes[:, 1], "Width / height of an image"))
    return charts


def _histogram(values: np.ndarray, title: str, note: str = "", mark: float | None = None) -> Element:
    """Bars up to the 99.5th percentile; what lies beyond is in the last one."""
    whole = np.issubdtype(values.dtype, np.integer)
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if high - low < 0.1 * abs(low):  # nearly all alike: a bar in the middle, not a full picture
        low, high = np.floor(0.95 * low) if whole else 0.95 * low, np.ceil(1.05 * high) if whole else 1.05 * high
    if whole and high - low < 60:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, max(high, low + 1e-3), 41)
    inside = np.minimum(values, edges[-1] - 1e-9 * max(1.0, abs(edges[-1])))
    counts = np.histogram(inside, edges)[0]
    return figure(title, histogram(edges.tolist(), counts.tolist(), title=title, x_label="", mark=mark), note=note)


def _percentiles(values: Mapping[str, Any]) -> Element:
    named = {key: value for key, value in values.items() if isinstance(value, dict) and "p50" in value}
    columns = list(next(iter(named.values())))
    rows = [[key.replace("_", " "), *(f"{value[column]:,.0f}" for column in columns)] for key, value in named.items()]
    return table(["percentiles", *columns], rows, label="Percentiles", numbers=range(1, len(columns) + 1))


def _reasons(title: str, reasons: Mapping[str, int], whole: int) -> list[Node]:
    if not reasons:
        return []
    rows = ((reason, f"{count:,}" + (f" ({count / whole:.2%})" if whole else "")) for reason, count in reasons.items())
    return [element("h2", title), facts(rows)]
