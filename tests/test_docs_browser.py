"""The documentation in a real Chromium, opened from a directory: no page is without its search, none asks anybody."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_fleet import eventually
from test_page_browser import CHROMIUM, browser, playwright  # noqa: F401  the fixture, and what it needs

ROOT = Path(__file__).resolve().parent.parent
MKDOCS = Path(sys.executable).parent / "mkdocs"
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, and KVINDEX_CHROMIUM is not set"),
    pytest.mark.skipif(not MKDOCS.exists(), reason="pip install --group docs"),
]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    built = tmp_path / "site"
    subprocess.run(
        [MKDOCS, "build", "--strict", "--site-dir", built], cwd=ROOT, capture_output=True, check=True, timeout=120
    )
    yield built


def test_the_search_finds_pages_without_a_network(browser: Any, site: Path) -> None:  # noqa: F811
    """Nothing fails to load, nothing is fetched from elsewhere, and a word leads to its page."""
    context = browser.new_context(offline=True)
    page = context.new_page()
    asked: list[str] = []
    faults: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("requestfailed", lambda sent: faults.append(sent.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((site / "index.html").as_uri(), timeout=20_000)
    page.keyboard.press("f")
    page.keyboard.type("pushback")
    found = page.locator(".md-search-result__link")
    eventually(lambda: bool(found.count()))
    found.first.click()
    eventually(lambda: "/clients.html" in page.url)
    assert (faults, [each for each in asked if not each.startswith("file:")]) == ([], [])
    context.close()
