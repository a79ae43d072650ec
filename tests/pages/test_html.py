"""Elements and documents: were these to fail, a page would run what a class name says."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.pages.html import LONGEST_TEXT, Element, document, element, name, number, plain, policy, table
from triscale.pages.style import SERIES, STYLE


class Read(HTMLParser):
    """What a parser makes of a page: tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onload="x',
    "'><svg/onload=1>",
    "&lt;b&gt;",
)


@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=300)))
def test_a_string_is_text_wherever_it_stands(text: str) -> None:
    page = str(element("span", text, element("b", text), title=text, aria_label=text))
    read = Read(page)
    assert [tag for tag, _ in read.tags] == ["span", "b"]
    assert read.text == 2 * plain(text)
    if text:
        attributes = read.tags[0][1]
        assert set(attributes) == {"title", "aria-label"} and attributes["title"] == plain(text)


@given(st.text(max_size=300))
def test_text_is_one_line_of_what_can_be_seen(text: str) -> None:
    shown = plain(text)
    assert len(shown) == len(text)
    assert all(c.isprintable() or c in "\u200c\u200d" for c in shown)


@pytest.mark.parametrize("hidden", ["\u202e", "\u2066", "\x1b", "\x00", "\ud800", "\ufeff", "\u2028"])
def test_what_cannot_be_seen_is_replaced(hidden: str) -> None:
    assert plain(f"a{hidden}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_emoji_keep_their_joiners_and_long_texts_end() -> None:
    assert plain("👩\u200d🚒") == "👩\u200d🚒"
    assert plain("x" * 10_000) == "x" * (LONGEST_TEXT - 1) + "…"
    assert len(name("x" * 10_000).children[0]) == 120
    assert str(name("")) == "<bdi>(empty)</bdi>"


@pytest.mark.parametrize(
    "tag", ["script", "style", "iframe", "object", "embed", "form", "meta", "link", "base", "use", "foreignObject"]
)
def test_no_element_that_runs_or_loads_can_be_made(tag: str) -> None:
    with pytest.raises(ValueError, match=tag):
        element(tag)


@pytest.mark.parametrize("attribute", ["onclick", "onload", "style", "srcset", "srcdoc", "formaction", "xlink:href"])
def test_no_attribute_that_runs_or_loads_can_be_made(attribute: str) -> None:
    with pytest.raises(ValueError, match=attribute):
        Element("p", ((attribute, "x"),), ())


@pytest.mark.parametrize(
    ("tag", "attribute", "address"),
    [("a", "href", "javascript:alert(1)"), ("a", "href", "https://example.org"), ("img", "src", "https://example.org/a"),
     ("img", "src", "data:text/html,x"), ("a", "href", "//x")],
)  # fmt: skip
def test_addresses_lead_nowhere_but_into_the_page(tag: str, attribute: str, address: str) -> None:
    with pytest.raises(ValueError, match=attribute):
        element(tag, **{attribute: address})


def test_a_document_lets_in_its_own_style_and_no_other() -> None:
    page = document("<title>", element("p", "x"), style="p{color:red}")
    read = Read(page)
    digest = base64.b64encode(hashlib.sha256(b"p{color:red}").digest()).decode()
    [content] = [found["content"] for tag, found in read.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert content == policy("p{color:red}") and f"'sha256-{digest}'" in str(content)
    assert "default-src 'none'" in str(content) and "unsafe" not in str(content) and "script-src" not in str(content)
    assert "<title>&lt;title&gt;</title>" in page and page.startswith("<!doctype html>")
    with pytest.raises(ValueError, match="markup"):
        document("x", style="</style>")


def test_a_table_has_heads_of_columns_and_rows_and_scrolls_in_its_box() -> None:
    box = str(table(["a", "b"], [["x", "1"], ["y", "2"]], label="Letters", numbers=(1,)))
    assert box.startswith('<div class="scroll" role="region" aria-label="Letters" tabindex="0">')
    assert box.count('scope="col"') == 2 and box.count('scope="row"') == 2
    assert '<td class="number">2</td>' in box and '<th scope="col" class="number">b</th>' in box


@given(st.floats(-1e6, 1e6))
def test_coordinates_are_short_and_exact_to_a_hundredth(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, abs=0.00501)
    assert re.fullmatch(r"-?\d+(\.\d{1,2})?", number(value))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        wide = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
        parts = [int(wide[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_marks_are_told_from_the_paper_in_light_and_dark(theme: int) -> None:
    blocks = re.findall(r":root\s*\{([^}]*--paper[^}]*)\}", STYLE)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z0-9]+):\s*(#[0-9a-f]{3,6})", blocks[theme]))
    for paper in ("paper", "card"):
        for text in ("ink", "muted", "link", "right", "wrong"):
            assert contrast(colours[text], colours[paper]) >= 4.5, (text, paper)
        for place in range(1, SERIES + 1):
            assert contrast(colours[f"c{place}"], colours[paper]) >= 4.0, (place, paper)  # labels are bold, too
