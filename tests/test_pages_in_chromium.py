"""Pages in a real browser: at a desk and on a phone, light and dark, whatever the names, nothing runs or sticks out.

Pictures of them are left in build/report.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chromium import Chromium, program
from report_records import SCRIPT, hostile_record, hostile_sets
from triscale.evaluation.report import comparison_page, report_page
from triscale.pages.html import document, element
from triscale.pages.style import STYLE

pytestmark = pytest.mark.skipif(program() is None, reason="there is no Chromium on the PATH")
PICTURES = Path(__file__).parents[1] / "build/report"
DESK, PHONE = 1280, 360


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages with hostile names everywhere."""
    runs = [hostile_record(), hostile_record("[/red]" + "W" * 10_000, seed=5)]
    contents = {"run": report_page(runs[0], hostile_sets(), runs[1:]), "compare": comparison_page(runs)}
    folder = tmp_path_factory.mktemp("pages")
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in contents}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("page", ["run", "compare"])
def test_a_page_shows_hostile_names_as_text_without_errors_or_overflow(
    browser: Chromium, pages: dict[str, Path], page: str, width: int, dark: bool
) -> None:
    picture = PICTURES / f"{page}-{'desk' if width == DESK else 'phone'}-{'dark' if dark else 'light'}.png"
    look = browser.look(pages[page], width=width, dark=dark, picture=picture)
    assert look.errors == [] and look.requests == []
    assert look.scroll_width <= look.client_width <= width
    assert SCRIPT in look.text and "[/red]" in look.text and "W" * 50 in look.text
    assert "\x1b" not in look.text and "\u202e" not in look.text
    assert picture.stat().st_size > 10_000


def test_the_browser_tells_of_refused_scripts_and_of_what_sticks_out(browser: Chromium, tmp_path: Path) -> None:
    page = document("t", element("p", "x"), style=STYLE)
    broken = page.replace(
        "</body>", "<script>1</script><img src='http://127.0.0.1:9/a.png'><svg><rect onclick='1'/></svg>"
    )
    (tmp_path / "broken.html").write_text(broken, encoding="utf-8")
    look = browser.look(tmp_path / "broken.html", width=PHONE, dark=False)
    assert any("script-src" in line or "inline script" in line for line in look.errors), look.errors
    assert any("image" in line or "img-src" in line for line in look.errors)
    (tmp_path / "wide.html").write_text("<body><div style='width:2000px'>x</div>", encoding="utf-8")
    look = browser.look(tmp_path / "wide.html", width=DESK, dark=False)
    assert look.scroll_width > look.client_width
