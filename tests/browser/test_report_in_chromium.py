"""The page in a real browser: light and dark, on a phone and on a desktop."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

import report_example
from octavo.reporting import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}
PLOTS = ("sqnr", "inputs", "cache", "underflow", "divergence")

# Every text of the visible pictures: its colour, its size on the screen, how far it sticks out.
TEXTS = """
[...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].map(text => {
    const box = text.getBoundingClientRect();
    return {
      text: text.textContent,
      fill: getComputedStyle(text).fill,
      size: parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a,
      outside: Math.max(frame.left - box.left, box.right - frame.right,
                        frame.top - box.top, box.bottom - frame.bottom),
    };
  });
})
"""
# Pairs of texts that lie on one another.
OVERLAPS = """
[...document.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).flatMap(svg => {
  const texts = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()]);
  return texts.flatMap(([one, a], index) => texts.slice(index + 1)
    .filter(([_, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                     && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4)
    .map(([other]) => [one, other]));
})
"""
LINES = """
[...document.querySelectorAll('#inputs svg, #cache svg')].filter(svg => svg.checkVisibility())
  .flatMap(svg => [...svg.querySelectorAll('path[style*="--series"]')])
  .map(path => getComputedStyle(path).stroke)
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


class View(NamedTuple):
    """The page as one visitor sees it, and what the browser had to say about it."""

    page: Page
    messages: list[str]
    requests: list[str]
    width: int


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[30, 126], ids=["30 layers", "126 layers"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "an-edition-with-a-long-name" * (request.param // 30)
    results = report_example.results(layers=request.param, name=name)
    return write_report(results, tmp_path_factory.mktemp("report"))[1]


@pytest.fixture(scope="module", params=SCREENS)
def screen(request: pytest.FixtureRequest) -> tuple[int, int]:
    return SCREENS[request.param]


@pytest.fixture(scope="module", params=["light", "dark"])
def view(
    request: pytest.FixtureRequest,
    browser: Browser,
    report: Path,
    screen: tuple[int, int],
) -> Iterator[View]:
    width, height = screen
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=request.param, offline=True
    )
    page = context.new_page()
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report.as_uri())
    yield View(page, messages, requests, width)
    context.close()


def test_nothing_goes_wrong_and_nothing_is_fetched(view: View) -> None:
    assert view.messages == []
    assert view.requests == [view.page.url]


def test_it_fits_the_screen(view: View) -> None:
    view.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert view.page.evaluate("document.documentElement.scrollWidth") <= view.width


def test_one_drawing_of_each_plot_is_shown(view: View) -> None:
    shown = "[...document.querySelectorAll('figure')].map(figure => [figure.id, \
        [...figure.querySelectorAll('svg')].filter(svg => svg.checkVisibility()).length])"
    assert view.page.evaluate(shown) == [[name, 1] for name in PLOTS]


@pytest.mark.parametrize("plot", PLOTS)
def test_plots_are_not_blank(view: View, plot: str) -> None:
    picture = view.page.locator(f"#{plot} svg:visible").screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    # Text and curves are smoothed, so even the plainest drawing has dozens of shades.
    assert len(colours) > 60
    assert counts.max() < 0.97 * len(pixels)
    assert pixels.std(axis=0).max() > 12


def test_texts_can_be_read(view: View) -> None:
    texts = view.page.evaluate(TEXTS)
    assert len(texts) > 50
    paper = background(view)
    for text in texts:
        assert text["size"] >= 10, text
        assert text["outside"] <= 1, text
        assert contrast(rgb(text["fill"]), paper) >= 4.5, text


def test_no_text_lies_on_another(view: View) -> None:
    assert view.page.evaluate(OVERLAPS) == []


def test_lines_stand_out(view: View) -> None:
    strokes = set(view.page.evaluate(LINES)) - {"none"}
    assert len(strokes) == 4
    assert min(contrast(rgb(stroke), background(view)) for stroke in strokes) >= 3


def test_light_and_dark_differ(browser: Browser, report: Path) -> None:
    papers = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(report.as_uri())
        papers.append(luminance(background(View(page, [], [], 0))))
        page.close()
    light, dark = papers
    assert light > 0.9
    assert dark < 0.05


def background(view: View) -> tuple[float, ...]:
    return rgb(view.page.evaluate("getComputedStyle(document.body).backgroundColor"))


def rgb(css: str) -> tuple[float, ...]:
    """``rgb(27, 31, 36)`` as numbers from 0 to 1."""
    return tuple(float(part) / 255 for part in css.removeprefix("rgb(").rstrip(")").split(","))


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast ratio of two colours, 1 to 21, as WCAG 2 defines it."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
