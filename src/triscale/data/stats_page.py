"""What a source holds, as a page: one HTML file with its pictures within, that loads and runs nothing.

All text that comes from the data is escaped, and the page's content-security policy allows inline styles and pictures
alone.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from triscale.data.stats import Statistics

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
LONGEST_TEXT = 200
_INK, _BAR, _CUT = "#1f2933", "#3b82c4", "#e2604f"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } tr { border-bottom: 1px solid #dde3e9 }
td, th { text-align: left; padding: .15rem 1.2rem .15rem 0; overflow-wrap: anywhere }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% } p.note { color: #6b7785 }
"""


def stats_page(statistics: Statistics) -> str:
    """The page, UTF-8."""
    values = statistics.values()
    parts = [
        f"<h1>{_text(statistics.name)}</h1>",
        f'<p class="note">{_read_note(statistics)}</p>',
        _table((name, value) for name, value in summary(statistics)),
    ]
    if len(statistics.sizes) or len(statistics.characters):
        parts += ["<h2>Distributions</h2>", f'<img alt="Histograms" src="data:image/png;base64,{_plots(statistics)}">']
        parts.append(_percentile_table(values))
    parts += _reasons("Bad samples by reason", statistics.bad, statistics.samples)
    if statistics.listed:
        parts += ["<h2>The first bad samples</h2>", _table(statistics.listed)]
    parts += _reasons("Entries that are never used", statistics.unused, 0)
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{_text(statistics.name)}</title><style>{_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


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


def _plots(statistics: Statistics) -> str:
    """The histograms that there is data for, as a PNG in base64."""
    draw = []
    if len(statistics.characters):
        draw.append(lambda axes: _histogram(axes, statistics.characters, "characters of a caption"))
    if len(statistics.tokens):
        draw.append(lambda axes: _tokens(axes, statistics))
    if len(statistics.captions) and statistics.captions.max() > 1:
        draw.append(lambda axes: _histogram(axes, statistics.captions, "captions of a sample"))
    if len(statistics.sizes):
        draw.append(lambda axes: _histogram(axes, statistics.sizes.min(1), "shorter side of an image, pixels"))
        draw.append(lambda axes: _histogram(axes, statistics.sizes[:, 0] / statistics.sizes[:, 1], "width / height"))
    rows = -(-len(draw) // 2)
    figure = Figure(figsize=(9.6, 2.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, plot in enumerate(draw):
        plot(figure.add_subplot(rows, 2, number + 1))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _histogram(axes: Axes, values: np.ndarray, label: str) -> None:
    """Bars up to the 99.5th percentile; what lies beyond is in the last one."""
    whole = np.issubdtype(values.dtype, np.integer)
    low, high = float(values.min()), float(np.percentile(values, 99.5))
    if high - low < 0.1 * abs(low):  # nearly all alike: a bar in the middle, not a full picture
        low, high = np.floor(0.95 * low) if whole else 0.95 * low, np.ceil(1.05 * high) if whole else 1.05 * high
    if whole and high - low < 60:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low, max(high, low + 1e-3), 41)
    axes.hist(np.minimum(values, edges[-1] - 1e-9 * max(1.0, abs(edges[-1]))), bins=edges.tolist(), color=_BAR)
    axes.set_xlabel(label, color=_INK)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _tokens(axes: Axes, statistics: Statistics) -> None:
    _histogram(axes, statistics.tokens, "tokens of a caption, with the end token")
    axes.axvline(statistics.token_length + 0.5, color=_CUT)


def _percentile_table(values: Mapping[str, Any]) -> str:
    named = {name: value for name, value in values.items() if isinstance(value, dict) and "p50" in value}
    columns = list(next(iter(named.values())))
    head = "".join(f"<th>{column}</th>" for column in ["", *columns])
    rows = "".join(
        f"<tr><td>{_text(name.replace('_', ' '))}</td>"
        + "".join(f'<td class="number">{value[column]:,.0f}</td>' for column in columns)
        + "</tr>"
        for name, value in named.items()
    )
    return f"<h2>Percentiles</h2><table><tr>{head}</tr>{rows}</table>"


def _reasons(title: str, reasons: Mapping[str, int], whole: int) -> list[str]:
    if not reasons:
        return []
    rows = [(reason, f"{count:,}" + (f" ({count / whole:.2%})" if whole else "")) for reason, count in reasons.items()]
    return [f"<h2>{title}</h2>", _table(rows)]


def _table(rows: Iterable[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _text(text: str) -> str:
    """`text` escaped, on one line, not endless; what cannot be seen or is no Unicode becomes a question mark."""
    shown = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    return html.escape("".join(c if c.isprintable() else "?" for c in shown))
