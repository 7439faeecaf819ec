"""The documentation site as a reader meets it: built strictly, every link followed, and opened in headless Chromium."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hang import HANG

pytestmark = pytest.mark.sweep

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
PAGES = ("index", "quickstart", "concepts", "training", "kept-sets", "results", "troubleshooting", "command-line", "api/grpo_fast")
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None:
        pytest.skip("the tools for the site are not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make docs")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (on Debian and Ubuntu: apt install chromium)")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


class Tab:
    """A tab of a fresh browser window, and what went wrong in it."""

    def __init__(self, browser: Any, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.requested: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("requestfailed", self._failed)
        self.page.on("request", lambda request: self.requested.append(request.url))

    def _failed(self, request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # by the next page
            self.errors.append(f"{request.url}: {request.failure}")

    def width(self) -> int:
        return int(self.page.evaluate("document.scrollingElement.scrollWidth"))


def test_every_link_leads_somewhere(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "docs"))
    import check_site

    assert check_site.problems(site) == []


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_pages_open_without_errors_and_fit(browser: Any, address: str, size: dict[str, int]) -> None:
    tab = Tab(browser, viewport=size)
    for name in PAGES:
        tab.page.goto(f"{address}/{name}.html", wait_until="networkidle")
        assert tab.page.locator("h1").first.is_visible(), name
        assert tab.width() <= size["width"], f"{name} scrolls sideways at {size['width']} px"
    assert tab.errors == []
    assert [url for url in tab.requested if not url.startswith((address, "data:"))] == []


def test_navigation_and_formulas(browser: Any, address: str) -> None:
    tab = Tab(browser, viewport=DESK)
    tab.page.goto(f"{address}/index.html")
    tab.page.locator(".md-nav--primary").get_by_role("link", name="GRPO in one page").click()
    tab.page.wait_for_url("**/concepts.html")
    fraction = tab.page.locator("mfrac").first.bounding_box()
    assert fraction["height"] > 20, "a fraction is drawn as one"
    tab.page.locator(".md-footer__link--next").click()
    tab.page.wait_for_url("**/trl.html")
    assert tab.errors == []


def test_search_finds_a_name(browser: Any, address: str) -> None:
    tab = Tab(browser, viewport=DESK)
    tab.page.goto(f"{address}/index.html", wait_until="networkidle")
    tab.page.locator(".md-search__input").fill("Support")
    result = tab.page.locator(".md-search-result__item a").first
    result.wait_for(state="visible")
    found = tab.page.locator(".md-search-result__item a").evaluate_all("links => links.map(link => link.href)")
    assert any("api/grpo_fast.html" in href for href in found), found
    assert tab.errors == []


def test_code_is_copied(browser: Any, address: str) -> None:
    tab = Tab(browser, viewport=DESK, permissions=["clipboard-read", "clipboard-write"])
    tab.page.goto(f"{address}/concepts.html", wait_until="networkidle")
    block = tab.page.locator("div.highlight").first
    block.scroll_into_view_if_needed()
    block.hover()
    block.locator("button, .md-clipboard").first.click()
    tab.page.wait_for_timeout(200)
    assert "gf.group_advantages(rewards, group_size=4)" in tab.page.evaluate("navigator.clipboard.readText()")
    assert tab.errors == []


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_the_page_of_a_study_runs_nothing_and_fits(browser: Any, tmp_path: Path, size: dict[str, int]) -> None:
    """Its completions try to run a script, and are long; see tests/test_study_page.py for what the page holds."""
    pytest.importorskip("matplotlib")
    from test_study_page import HOSTILE, hostile

    from grpo_fast.study.page import write_training_page

    result = hostile("truncation")
    result["completions"]["before"]["0"][0]["completion"] = HOSTILE + "x" * 2000
    write_training_page(result, tmp_path / "found.html")
    tab = Tab(browser, viewport=size)
    tab.page.on("dialog", lambda dialog: tab.errors.append(dialog.message))
    tab.page.goto((tmp_path / "found.html").as_uri(), wait_until="networkidle")
    assert tab.width() <= size["width"] and "16 steps" in tab.page.title()
    charts = tab.page.locator(".charts img")
    assert charts.count() == 6 and all(charts.nth(i).evaluate("chart => chart.naturalWidth") > 300 for i in range(6))
    assert tab.page.locator(".samples pre").first.inner_text().startswith(HOSTILE)
    assert tab.errors == [] and [url for url in tab.requested if not url.startswith(("file:", "data:"))] == []


def test_dark_mode(browser: Any, address: str) -> None:
    tab = Tab(browser, viewport=DESK, color_scheme="light")
    tab.page.goto(f"{address}/index.html", wait_until="networkidle")

    def ground() -> tuple[str, str]:
        body = tab.page.locator("body")
        return body.get_attribute("data-md-color-scheme"), body.evaluate("body => getComputedStyle(body).backgroundColor")

    light = ground()
    tab.page.locator("label[title='Switch to dark mode']").click()
    dark = ground()
    assert (light[0], dark[0]) == ("default", "slate") and light[1] != dark[1]
    tab.page.reload()
    assert ground() == dark, "the choice is kept"
    assert tab.errors == []
