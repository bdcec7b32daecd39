"""The documentation site builds without a warning, its reference is the proto's, and what it tells to run runs."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
TOOLS = Path(sys.executable).parent
BLOCK = re.compile(r"^<!-- runnable -->\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PORTS = ("50051", "9090")
LOADED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="((?:https?:)?//[^"]+)"')
"""What a browser fetches by itself; links to follow may lead anywhere."""


def _blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if _blocks(page)]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not (TOOLS / "mkdocs").exists(), reason="pip install --group docs")
def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    """No page is missing, no link or anchor leads nowhere, and no page loads anything from elsewhere."""
    site = tmp_path / "site"
    # A proxy nobody listens on: a build that fetches anything fails.
    environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [TOOLS / "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(site).with_suffix(".md").as_posix(): page for page in site.rglob("*.html")}
    assert {page.name for page in DOCS.glob("*.md")} <= set(pages)
    foreign = {name: found for name, page in pages.items() if (found := LOADED.findall(page.read_text("utf-8")))}
    assert foreign == {}


def test_every_page_is_in_the_navigation() -> None:
    """A page that nobody can reach is no documentation; two come from elsewhere and join when they are there."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    optional = {page for _, page in _script("docs_links").OPTIONAL}
    assert [page.name for page in DOCS.glob("*.md") if page.name not in navigation and page.name not in optional] == []


def test_the_api_page_is_the_protos() -> None:
    """docs/api.md is what the proto files say (scripts/api_reference.py --write)."""
    pytest.importorskip("grpc_tools")
    assert _script("api_reference").page() == (DOCS / "api.md").read_text(encoding="utf-8")


def test_pages_with_commands_are_found() -> None:
    """The pages that tell a newcomer what to type are among those that are run."""
    assert {"start.md", "concepts.md", "wire.md", "migration.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, tmp_path: Path) -> None:
    """All runnable blocks of a page, in order, in one shell; only ports and the environment's place differ."""
    pytest.importorskip("kvindex_server._core")
    script = "set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
    for language, text in _blocks(DOCS / page):
        assert language in ("sh", "python"), language
        script += text if language == "sh" else f".venv/bin/python - <<'END'\n{text}END\n"
    for port, free in zip(PORTS, _free_ports(len(PORTS)), strict=True):
        script = script.replace(port, str(free))
    # The server goes on in the background and would hold a pipe open, so what is printed goes to a file.
    printed = tmp_path / "printed"
    with printed.open("w") as out:
        done = subprocess.run(
            ["bash", "-c", script.replace(".venv/bin", str(TOOLS))],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, printed.read_text()
    if page == "start.md":
        assert "10.0.0.7:8000 holds 4 of 5 blocks; TRUST_EXACT" in printed.read_text()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
