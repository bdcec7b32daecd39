"""The page in a real Chromium: what a person sees, by mouse and by keyboard, in light and in dark.

Needs the package playwright and a Chromium: $KVINDEX_CHROMIUM, or one on the PATH.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_fleet import HOLED, LOST, MODEL, PLACED, PROMPT, SPLIT, WHOLE, eventually, fleet, serving

from kvindex_server.server import Server

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("KVINDEX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH, and KVINDEX_CHROMIUM is not set")

SCREENSHOTS = os.environ.get("KVINDEX_SCREENSHOTS")
"""Folder for pictures of the page, to be looked at; none are taken without it."""
READER = "reader-token-0123456789"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        # In containers there is often no sandbox and no /dev/shm to speak of.
        flags = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = running.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with fleet(tmp_path_factory.mktemp("browser"), page={"prompt": True}) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    with opened(browser, server) as page:
        yield page


class opened:
    """The page as loaded; at the end there was no error in it, and it had asked nobody but its server."""

    def __init__(self, browser: Any, server: Server, **context: Any) -> None:
        self._own = f"http://{server.metrics_address}"
        self._context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self._faults: list[str] = []

    def __enter__(self) -> Any:
        page = self._context.new_page()
        page.on("console", self._said)
        page.on("pageerror", lambda error: self._faults.append(str(error)))
        page.on("request", lambda sent: None if sent.url.startswith(self._own) else self._faults.append(sent.url))
        page.goto(self._own, timeout=20_000)
        until(page, "document.querySelector('#connection').textContent.startsWith('Live')")
        return page

    def _said(self, message: Any) -> None:
        # A refused question is shown in the page; Chromium notes it besides.
        refused = message.text.startswith("Failed to load resource") and "400" in message.text
        if message.type in ("error", "warning") and not refused:
            self._faults.append(message.text)

    def __exit__(self, kind: object, *_: object) -> None:
        self._context.close()
        if kind is None:
            assert self._faults == []


def until(page: Any, condition: str, seconds: float = 20.0) -> None:
    """Waits from outside: the page's own policy forbids playwright to do so inside."""
    eventually(lambda: bool(page.evaluate(condition)), seconds)


def ask(page: Any, text: str = PROMPT) -> None:
    page.fill("#text", text)
    with page.expect_response("**/api/score"):
        page.click("#ask")
    until(page, "!document.querySelector('#ask').disabled")


def pods(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all("#rows tr td.pod", "cells => cells.map(cell => cell.textContent)")
    return found


def test_fleet_table(page: Any) -> None:
    """Every stream with its trust, cause, state and blocks by tier; what is in doubt first."""
    rows = page.locator("#rows tr")
    assert rows.count() == 6
    first = rows.nth(0).inner_text()
    assert LOST in first and "STALE" in first and "gap" in first and "gpu" in first
    split = page.locator("#rows tr", has_text=SPLIT).inner_text()
    assert re.search(r"gpu \d+ · cpu \d+ · disk \d+", split)
    never = page.locator("#rows tr", has_text=PLACED).inner_text()
    assert "COLD" in never and "never" in never and "–" in never
    assert page.locator("#streams-total").inner_text() == "6"
    assert page.locator("#ready").inner_text() == "ready"
    assert page.locator("#coverage-models").inner_text() == MODEL


def test_sorting_and_filtering(page: Any) -> None:
    page.click("[data-sort=pod]")
    assert pods(page) == sorted(pods(page))
    page.click("[data-sort=pod]")
    assert pods(page) == sorted(pods(page), reverse=True)
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Pod")
    assert page.locator("th[aria-sort]").count() == 1
    page.fill("#filter", "exact live")
    assert set(pods(page)) == {WHOLE, SPLIT, HOLED}
    assert page.locator("#shown").inner_text() == "3 of 6 streams"
    page.fill("#filter", "nothing like it")
    assert page.locator("#empty").is_visible()


def test_charts_are_live(page: Any) -> None:
    """A prompt asked about moves the hit ratio at the next answer; the picture says in words what it shows."""
    ask(page)
    until(page, "document.querySelector('#hit-now').textContent === '100 %'")
    assert page.locator("#hit-chart polyline").count() >= 1
    assert "Hit ratio: now 100 %" in page.locator("#hit-chart svg").get_attribute("aria-label")
    assert page.locator("#lag-chart polyline.second").count() >= 1


def test_prompt_box_shows_blocks(page: Any) -> None:
    """As many cells as blocks, coloured by where the block lies, pale behind a hole, outlined when only placed."""
    ask(page)
    total = int(re.search(r"(\d+) blocks", page.locator("#told").inner_text()).group(1))
    assert total > 20
    assert page.locator("#pods li").count() == 6

    def row(pod: str) -> Any:  # others may name it in their sentence
        return page.locator("#pods li").filter(has=page.locator("strong", has_text=pod))

    def cells(pod: str, kind: str) -> int:
        return row(pod).locator(f"svg rect{kind}").count()

    assert cells(WHOLE, ".gpu") == total
    assert (cells(SPLIT, ".gpu"), cells(SPLIT, ".hole")) == (total // 2, 1)
    assert cells(SPLIT, ".cpu") + cells(SPLIT, ".disk") == total - 1 - total // 2
    assert (cells(HOLED, ".gpu:not(.past)"), cells(HOLED, ".hole"), cells(HOLED, ".gpu.past")) == (
        total // 3,
        1,
        total - total // 3 - 1,
    )
    assert cells(PLACED, ".placed") == total
    assert f"{total} of {total} blocks" in page.locator("#pods li").nth(0).inner_text()
    assert page.locator("#match-legend span").count() == 7
    why = row(HOLED).locator(".why").inner_text()
    assert why.startswith(f"block {total // 3} was removed from gpu by message 1 (20")
    title = row(HOLED).locator("svg rect.gone title").text_content()
    assert re.match(r"removed from gpu, .+, message 1$", title)
    assert page.locator("#pods rect.gone").count() == 1
    assert not page.locator("#shown-keys").is_visible()
    page.click("#lookup summary")
    assert re.match(r"0x[0-9a-f]{16} 0x", page.locator("#shown-keys").inner_text())
    assert re.match(r"\d+ \d+ ", page.locator("#shown-tokens").inner_text())
    ask(page, "{")
    page.select_option("#kind", "chat")
    ask(page, "{")
    page.wait_for_selector("#told.bad")
    assert "chat:" in page.locator("#told").inner_text()
    assert not page.locator("#matches").is_visible()


def test_a_salt_sets_equal_prompts_apart(page: Any) -> None:
    """With one nobody holds anything, and the page says that without it somebody does."""
    page.fill("#salt", "tenant-1")
    ask(page)
    assert page.locator("#told").inner_text().endswith("the best holds 0 blocks.")
    assert "with no salt the pod holds 55 blocks of the same tokens" in page.locator("#pods").inner_text()
    page.fill("#salt", "")
    ask(page)
    assert page.locator("#told").inner_text().endswith("the best holds 55 blocks.")


def test_text_from_outside_stays_text(page: Any) -> None:
    """Markup in an error or a filter is shown, not run; the policy would forbid it besides."""
    page.fill("#lora", "<img src=x onerror=alert(1)>")
    ask(page, "<script>alert(1)</script>")
    assert page.locator("#told img, #told script").count() == 0
    assert page.evaluate("document.querySelectorAll('script:not([src]), [style]').length") == 0


def test_by_keyboard_alone(page: Any) -> None:
    """Tab goes through everything that can be used, in the order it is seen; a question can be asked and answered."""
    order = []
    for _ in range(30):
        page.keyboard.press("Tab")
        order.append(page.evaluate("(e => e.id || e.dataset.sort || e.className || e.tagName)(document.activeElement)"))
        visible = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert visible != "none", order[-1]
        if order[-1] == "ask":
            break
    sorts = ["pod", "rank", "model", "trust", "cause", "state", "lag_seconds", "age_seconds", "total", "lost"]
    assert order == [
        "skip",
        "pause",
        "theme",
        "filter",
        "scroll",
        *sorts,
        "model",
        "kind",
        "lora",
        "salt",
        "text",
        "ask",
    ]
    page.focus("#text")
    page.keyboard.type("hello world " * 8)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#pods li")
    page.focus("[data-sort=rank]")
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("Rank")
    page.wait_for_timeout(2500)  # an answer has come meanwhile, and the table was drawn anew
    assert page.evaluate("document.activeElement.dataset.sort") == "rank"


def test_everything_has_a_name(page: Any) -> None:
    """Controls have labels, pictures have words, what changes by itself is a polite live region."""
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea, svg[role=img]')].filter(each =>
            !each.getAttribute('aria-label') && !(each.labels && each.labels.length) && !each.textContent.trim()
        ).map(each => each.outerHTML)"""
    )
    assert unnamed == []
    assert page.locator("[aria-live=polite]").count() == 3
    assert page.locator("html[lang=en]").count() == 1
    assert [each.inner_text() for each in page.locator("h1").all()] == ["kvindex"]
    assert page.locator("svg:not([role=img]):not([aria-hidden=true])").count() == 0


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map(c => linear(c / 255))
    .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const ground = (each) => {
    for (; each; each = each.parentElement) {
      const colour = parse(getComputedStyle(each).backgroundColor);
      if (colour.length && colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const worst = [];
  for (const each of document.querySelectorAll('body *')) {
    const own = [...each.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !each.getClientRects().length || each.closest('noscript, script')) continue;
    const style = getComputedStyle(each);
    const ink = each instanceof SVGElement ? style.fill : style.color;
    const found = ratio(parse(ink), ground(each));
    if (found < 4.5) worst.push(`${each.tagName} ${each.textContent.slice(0, 30)}: ${found.toFixed(2)}`);
  }
  for (const each of document.querySelectorAll('#pods rect:not(.hole):not(.past), .tiers rect:not(.hole)')) {
    const style = getComputedStyle(each);
    const ink = style.fill === 'none' ? style.stroke : style.fill;
    const found = ratio(parse(ink), ground(each));
    if (found < 3) worst.push(`block ${each.className.baseVal}: ${found.toFixed(2)}`);
  }
  return [...new Set(worst)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(browser: Any, server: Server, scheme: str) -> None:
    """Follows the system, can be told otherwise, remembers it; text is readable (4.5:1) and blocks are seen (3:1)."""
    other = {"light": "dark", "dark": "light"}[scheme]
    with opened(browser, server, color_scheme=scheme, device_scale_factor=1) as page:
        ask(page)
        page.click("#lookup summary")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme
        assert page.evaluate(CONTRAST) == []
        if SCREENSHOTS:
            page.wait_for_timeout(8000)
            page.evaluate("window.scrollTo(0, 0)")
            page.screenshot(path=f"{SCREENSHOTS}/page-{scheme}.png", full_page=True)
        page.select_option("#theme", other)
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == other
        page.reload()
        page.wait_for_selector("#rows tr")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == other
        assert page.input_value("#theme") == other


def test_narrow_screen_does_not_scroll_sideways(browser: Any, server: Server) -> None:
    with opened(browser, server, viewport={"width": 360, "height": 740}) as page:
        ask(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/page-narrow.png", full_page=True)


def test_a_server_that_is_gone_is_said(browser: Any) -> None:
    """What is shown stays, and the page says that it is old."""
    with serving() as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{server.metrics_address}", timeout=20_000)
        page.wait_for_selector("#ready.good", timeout=20_000)
        assert page.locator("#empty").inner_text().startswith("No pod is registered")
        assert page.locator("#prompt-off").is_visible() and not page.locator("#prompt").is_visible()
        server.stop(0)
        until(page, "document.querySelector('#connection').textContent.includes('does not answer')")
        assert page.locator("#ready.bad").inner_text() == "no answer"
    context.close()


def test_pause(page: Any) -> None:
    page.click("#pause")
    assert page.locator("#connection").inner_text() == "Paused."
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    page.wait_for_timeout(3000)
    assert asked == []
    page.click("#pause")
    with page.expect_request("**/api/fleet", timeout=5000):
        pass


def test_token(browser: Any, tmp_path: Path) -> None:
    """With auth the box asks for a token, says when it is not known, and forgets it with the page."""
    (tmp_path / "tokens").write_text(READER + "\n")
    (tmp_path / "admins").write_text("operator-token-0123456789\n")
    auth = {"tokens_file": str(tmp_path / "tokens"), "admin_tokens_file": str(tmp_path / "admins")}
    models = [{"name": "m", "block_size": 4}]
    with serving(page={"prompt": True}, auth=auth, models=models) as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{server.metrics_address}", timeout=20_000)
        page.wait_for_selector("#token", timeout=20_000)
        assert page.get_attribute("#token", "type") == "password"
        ask(page, "x")
        assert "bearer token is required" in page.locator("#told").inner_text()
        page.fill("#token", READER)
        ask(page, "x")
        assert "no tokenizer" in page.locator("#told").inner_text()
        assert READER not in page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        context.close()
