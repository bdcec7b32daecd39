"""A hook of mkdocs: links that leave docs/ become names of files, and pages that exist join the navigation."""

import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")
OPTIONAL = (("Operations", "operations.md"), ("Command line", "cli.md"))
"""Joined to the section `Run it` when the page is there."""


def on_config(config: Any) -> Any:
    """The navigation gets the pages that are there."""
    section = next(each["Run it"] for each in config["nav"] if isinstance(each, dict) and "Run it" in each)
    for title, page in OPTIONAL:
        if (Path(config["docs_dir"]) / page).exists():
            section.append({title: page})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`[text](../FILE)` works on a forge and has no target in the site: there it becomes the file's name."""
    return OUTSIDE.sub(_named, markdown)


def _named(match: re.Match[str]) -> str:
    text, target = match[1], match[2]
    if not (REPOSITORY / target).exists():
        raise ValueError(f"a link leads to {target}, which does not exist")
    return f"`{target}`" if text.strip("`") == target else f"{text} (`{target}`)"
