"""Keeps the module map of docs/architecture.md equal to the modules' own docstrings."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- module map: begin -->", "<!-- module map: end -->"


def modules(root: Path = ROOT) -> dict[str, str]:
    """Purpose by path, of every module that a person wrote."""
    package = root / "kvindex_server"
    generated = package / "pb"
    return {
        path.relative_to(package).as_posix(): purpose(path)
        for path in sorted(package.rglob("*.py"))
        if generated not in path.parents
    }


def purpose(path: Path) -> str:
    """The first sentence of the module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first_paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", first_paragraph, maxsplit=1)[0]


def table(root: Path = ROOT) -> str:
    """The module map as Markdown."""
    rows = [f"| `{name}` | {text.replace('|', chr(92) + '|')} |" for name, text in modules(root).items()]
    return "\n".join(["| module | purpose |", "| --- | --- |", *rows])


def main() -> None:
    """Prints the table; with --write, puts it into the architecture page."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(table() + "\n")
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
