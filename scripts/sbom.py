"""Writes what an environment is made of as a CycloneDX document: Python packages, Python itself, the system's packages.

Run with an interpreter that has sbom-requirements.txt. The same environment gives the same bytes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

SPEC_VERSION = "1.6"
PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def python_packages(interpreter: str) -> dict[str, Any]:
    """The document of cyclonedx-py for the environment of `interpreter`, with this project as its main component."""
    command = [
        *(sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible"),
        *("--spec-version", SPEC_VERSION, "--pyproject", str(PYPROJECT), "--of", "JSON", "-o", "-", interpreter),
    ]
    return dict(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def python_itself(interpreter: str) -> dict[str, Any]:
    """The interpreter: in the official images it is built into /usr/local, where dpkg knows nothing of it."""
    command = [interpreter, "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    purl = f"pkg:generic/python@{version}"
    cpe = f"cpe:2.3:a:python:python:{version}:*:*:*:*:*:*:*"
    return {"type": "platform", "bom-ref": purl, "name": "python", "version": version, "purl": purl, "cpe": cpe}


def system_packages(listed: str) -> list[dict[str, Any]]:
    """Components for lines of `name<TAB>version<TAB>architecture`, as dpkg-query prints them; ValueError for others."""
    components = []
    for line in sorted(set(listed.splitlines())):
        name, version, architecture = line.split("\t")
        purl = f"pkg:deb/debian/{quote(name, safe='')}@{quote(version, safe='')}?arch={quote(architecture, safe='')}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return components


def validate(text: str) -> None:
    """ValueError when `text` is not a document of the specification."""
    from cyclonedx.schema import SchemaVersion  # noqa: PLC0415  of sbom-requirements.txt; the tests do without
    from cyclonedx.validation.json import JsonStrictValidator  # noqa: PLC0415

    error = JsonStrictValidator(SchemaVersion.from_version(SPEC_VERSION)).validate_str(text)
    if error is not None:
        raise ValueError(f"not a valid CycloneDX document: {error}")


def main() -> None:
    """Writes the document to the given file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="interpreter of the environment")
    parser.add_argument(
        "--packages", type=Path, help="file with dpkg-query's name, version, architecture; tabs between"
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    document = python_packages(args.python)
    document["components"].append(python_itself(args.python))
    if args.packages is not None:
        document["components"] += system_packages(args.packages.read_text(encoding="utf-8"))
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    validate(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(document['components'])} components in {args.out}\n")


if __name__ == "__main__":
    main()
