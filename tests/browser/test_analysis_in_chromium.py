"""The page of an analysis in a real browser: light and dark, on a phone and on a desktop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from test_report_in_chromium import ARGUMENTS, CHROMIUM, OVERLAPS, SCREENS, TEXTS

import tiny
from octavo import Calibration, analyze

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    directory = tmp_path_factory.mktemp("analysis")
    samples = tiny.save_ids(directory / "samples.npy")
    windows = tiny.save_ids(directory / "windows.npy", seed=1)
    calibration = Calibration(source=str(samples))
    analyze(tiny_llama, directory / "out", calibration=calibration, data=windows, seq_len=16)
    return directory / "out" / "analysis.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_it_fits_and_nothing_goes_wrong(
    browser: Browser, page: Path, screen: str, scheme: str
) -> None:
    width, height = SCREENS[screen]
    opened = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    messages: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(page.as_uri())
    assert messages == []
    assert requests == [opened.url]
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    texts = opened.evaluate(TEXTS)
    assert texts
    for text in texts:
        assert text["size"] >= 10, text
        assert text["outside"] <= 1, text
    assert opened.evaluate(OVERLAPS) == []
    opened.close()
