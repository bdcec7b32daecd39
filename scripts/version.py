"""Prints the project's version, which stands in pyproject.toml alone; checks a tag against it and cuts the changelog.

Needs nothing but the standard library, because a release reads it before anything is installed.
"""

import argparse
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    """As pyproject.toml has it."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def changes(of: str, changelog: str) -> str:
    """The section of one version, without its heading; ValueError when there is none or it is empty."""
    _, heading, rest = changelog.partition(f"\n## [{of}]")
    section = rest.partition("\n## ")[0].partition("\n")[2].strip()
    if not heading or not section:
        raise ValueError(f"CHANGELOG.md has no section for {of}")
    return section + "\n"


def check_tag(ref: str, known: str, changelog: str) -> None:
    """ValueError when `ref`, such as `tag:v1.2.3`, is a tag of another version or of one without a changelog.

    Branches pass.
    """
    kind, _, name = ref.partition(":")
    if kind != "tag":
        return
    if name != f"v{known}":
        raise ValueError(f"the tag is {name}, but pyproject.toml has {known}")
    changes(known, changelog)


def main() -> None:
    """Prints the version, or with --changes its section of the changelog."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tag", metavar="TYPE:NAME", default="", help="fail when this is a tag of something else")
    parser.add_argument("--changes", action="store_true", help="print the changelog's section")
    args = parser.parse_args()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    try:
        check_tag(args.tag, version(), changelog)
        text = changes(version(), changelog) if args.changes else version() + "\n"
    except ValueError as error:
        sys.exit(str(error))
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
