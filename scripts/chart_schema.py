"""Keeps `config` in the chart's values.schema.json equal to the server's settings."""

import json
import sys
from pathlib import Path
from typing import Any

from kvindex_server.config import Settings

SCHEMA = Path(__file__).resolve().parent.parent / "deploy" / "helm" / "kvindex-server" / "values.schema.json"
FROM_PORTS = ("listen", "metrics_listen", "admin_listen")
_BOUNDS = {"ge": "minimum", "le": "maximum"}
_EXACT = 2**53 - 1
"""Helm reads numbers as floating-point ones and would hand larger ones on rounded."""


def config_schema() -> dict[str, Any]:
    """The settings as JSON schema without references; what follows from the chart's ports may not be given."""
    whole = Settings.model_json_schema()
    schema = _plain(whole, whole["$defs"])
    schema["description"] = "The server's settings; listen addresses follow from ports."
    schema["properties"].update(dict.fromkeys(FROM_PORTS, False))
    seed = schema["properties"]["hash_seed"]
    number = {"type": seed.pop("type"), "minimum": seed.pop("minimum"), "maximum": min(seed.pop("maximum"), _EXACT)}
    seed["anyOf"] = [number, {"type": "string", "pattern": "^[0-9]{1,20}$"}]
    return schema


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_plain(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
    plain: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            plain[key] = {name: _plain(each, definitions) for name, each in value.items()}
        elif key in _BOUNDS:
            plain.setdefault(_BOUNDS[key], value)
        elif key not in ("title", "default", "$defs"):
            plain[key] = _plain(value, definitions)
    return plain


def main() -> None:
    """Prints the schema; with --write, puts it into the chart."""
    if "--write" not in sys.argv[1:]:
        sys.stdout.write(json.dumps(config_schema(), indent=2) + "\n")
        return
    document = json.loads(SCHEMA.read_text(encoding="utf-8"))
    document["properties"]["config"] = config_schema()
    SCHEMA.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
