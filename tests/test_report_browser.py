"""The report in a real browser: headless Chromium at desktop and phone width, light, dark and printed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import PLANS, PROVENANCE, RECIPE, identity
from tests.test_report_sections import CALIBRATED, FRONT, full

pytestmark = pytest.mark.slow
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is installed, or the one that playwright has downloaded ($KVCC_CHROMIUM names another)."""
    api = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("KVCC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    with api.sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: install one, or run `playwright install chromium`")
        # Containers and CI run as root, where Chromium has no sandbox. The page is our own and fetches nothing.
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", params=["full", "unmeasured"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kvcc.report import report_facts, report_html

    facts = PLANS["thirty layers"], identity(), RECIPE, PROVENANCE
    everything = request.param == "full"
    extras: dict[str, Any] = {"calibration": CALIBRATED, "front": FRONT} if everything else {}
    path = tmp_path_factory.mktemp("report") / f"{request.param}.html"
    path.write_text(
        report_html(report_facts(*facts, full() if everything else None, **extras)), encoding="utf-8"
    )
    return path


def opened(browser: Any, report: Path, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The page, what its console says, and what it asks for."""
    page = browser.new_page(**options)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    return page, said, asked


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_plots_are_there_and_nothing_complains(
    browser: Any, report: Path, width: int, scheme: str, tmp_path: Path
) -> None:
    page, said, asked = opened(browser, report, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert said == []
    assert asked == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # no sideways scrolling
    boxes = [plot.bounding_box() for plot in page.query_selector_all("figure svg")]
    assert len(boxes) == (12 if report.stem == "full" else 4)
    assert all(box["width"] > 250 and box["height"] > 60 and box["x"] >= 0 for box in boxes)
    assert all(box["x"] + box["width"] <= width for box in boxes)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(13, 17, 23)")
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 30_000
    page.close()


def test_open_tables_scroll_by_themselves_on_a_phone(browser: Any, report: Path) -> None:
    page, _, _ = opened(browser, report, viewport={"width": 390, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.querySelectorAll('.scroll')].some(t => t.scrollWidth > t.clientWidth)")
    page.close()


def test_text_in_plots_does_not_leave_them(browser: Any, report: Path) -> None:
    page, _, _ = opened(browser, report, viewport={"width": 1280, "height": 900})
    outside = page.evaluate("""() => [...document.querySelectorAll('figure svg text:not(.tip)')].filter(text => {
        const a = text.getBoundingClientRect(), b = text.ownerSVGElement.getBoundingClientRect();
        return a.left < b.left - 4 || a.right > b.right + 4 || a.top < b.top - 4 || a.bottom > b.bottom + 4;
    }).map(text => text.textContent)""")
    assert outside == []
    page.close()


def test_hover_shows_values(browser: Any, report: Path) -> None:
    page, _, _ = opened(browser, report, viewport={"width": 1280, "height": 900})
    mark = page.locator("#k-bits .m").nth(10)
    assert not mark.locator(".tip").is_visible()
    mark.hover()
    assert mark.locator(".tip").is_visible()
    assert mark.locator(".tip").text_content().startswith("layer ")
    dot = page.locator("#cache .m").first
    dot.hover()
    assert "this artifact, 32: " in dot.locator(".tip").text_content()
    assert not mark.locator(".tip").is_visible()
    page.close()


def test_keyboard_reaches_every_number(browser: Any, report: Path) -> None:
    page, _, _ = opened(browser, report, viewport={"width": 1280, "height": 900})
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert (
        page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    )  # shown when it has focus
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('details:not([open]) > summary')"):
            page.keyboard.press("Enter")
    assert page.evaluate("[...document.querySelectorAll('figure details')].every(d => d.open)")
    assert all(table.is_visible() for table in page.query_selector_all("figure table"))
    page.close()


def test_screen_readers_get_names_and_numbers(browser: Any, report: Path) -> None:
    page, _, _ = opened(browser, report)
    tree = page.locator("body").aria_snapshot()
    for wanted in ("- main", "- banner", 'navigation "Sections"', 'heading "Memory" [level=2]'):
        assert wanted in tree
    assert 'img "Cache bytes against context length, logarithmic axes"' in tree
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))
    unnamed = page.evaluate("[...document.querySelectorAll('svg:not([aria-label])')].length")
    assert unnamed == 0
    page.close()


def test_print_is_light_and_whole(browser: Any, report: Path, tmp_path: Path) -> None:
    page, _, _ = opened(browser, report, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.locator("#cache svg").is_visible()
    ink = page.evaluate("getComputedStyle(document.querySelector('#cache svg .name')).fill")
    assert ink == "rgb(27, 31, 36)"
    page.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.close()
