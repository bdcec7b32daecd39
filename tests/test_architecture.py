"""The architecture page and the modules tell the same story."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| `([^`]+\.py)` \| (.+) \|$", re.MULTILINE)


def _module_map() -> ModuleType:
    spec = importlib.util.spec_from_file_location("module_map", ROOT / "scripts" / "module_map.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES: dict[str, str] = _module_map().modules()


def _rows() -> dict[str, str]:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    return {name: purpose.replace("\\|", "|") for name, purpose in ROW.findall(page)}


def test_every_module_has_its_row() -> None:
    """A module that the page does not know, or knows otherwise, is found (scripts/module_map.py --write)."""
    rows = _rows()
    assert {name: rows.get(name) for name in MODULES} == MODULES


def test_every_row_has_its_module() -> None:
    """A row that outlived its module is found."""
    assert set(_rows()) - set(MODULES) == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstring_is_one_sentence_on_the_first_line(name: str) -> None:
    """Each module says in its first line, in one sentence, what it is for."""
    text = ast.get_docstring(ast.parse((ROOT / "kvindex_server" / name).read_text(encoding="utf-8"))) or ""
    first_line = text.splitlines()[0] if text else ""
    assert first_line == MODULES[name]
    assert first_line.endswith(".")


@pytest.mark.parametrize(("package", "door"), [("zmq", ("wire.py",)), ("tokenizers", ("tokenize/",))])
def test_a_foreign_package_has_one_door(package: str, door: tuple[str, ...]) -> None:
    """ZeroMQ and the tokenizers are imported in one place each."""
    guests = [
        name for name in MODULES if package in _imported(ROOT / "kvindex_server" / name) and not name.startswith(door)
    ]
    assert guests == []


def _imported(path: Path) -> set[str]:
    """Top-level packages that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found
