"""Logging to stderr, one line per event, as JSON for machines or as text for people."""

import json
import logging
import math
import sys
from datetime import UTC, datetime
from typing import IO

PACKAGE = "kvindex_server"

# What users typed is never logged; a count under the same name may be.
_CONFIDENTIAL = frozenset(
    {"prompt", "chat", "tokens", "token_ids", "messages", "text", "cache_salt", "authorization", "api_key"}
)


def configure(format: str = "json", level: str = "info", stream: IO[str] | None = None) -> None:
    """Send every log record to `stream` (stderr); our own from `level` on, other libraries' warnings."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, JsonFormatter | ConsoleFormatter):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(PACKAGE).setLevel(level.upper())


def event(logger: logging.Logger, level: int, name: str, /, *, exc_info: bool = False, **fields: object) -> None:
    """Log `name` with its fields. Names are fixed strings; whatever varies is a field."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", name, exc_info=exc_info, extra={"fields": fields}, stacklevel=2)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        for key, value in _fields(record).items():
            line[f"field_{key}" if key in line else key] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except (ValueError, TypeError):  # a nested NaN, a key that is not a string, a cycle
            return json.dumps({key: v if isinstance(v, str) else repr(v) for key, v in line.items()})


class ConsoleFormatter(logging.Formatter):
    """`12:00:00.000 INFO    event key=value`; values cannot break the line."""

    def format(self, record: logging.LogRecord) -> str:
        parts = [
            _time(record).astimezone().strftime("%H:%M:%S.%f")[:-3],
            f"{record.levelname:<7}",
            " ".join(record.getMessage().split()),
        ]
        parts += [f"{key}={_console(value)}" for key, value in _fields(record).items()]
        line = " ".join(parts)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", None)
    if not isinstance(fields, dict):
        return {}
    return {str(key): _shown(str(key), value) for key, value in fields.items()}


def _shown(key: str, value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if key.lower() in _CONFIDENTIAL and not isinstance(value, int | float):
        return "[withheld]"
    return value


def _console(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and not any(c in text for c in ' "=') else json.dumps(text)
