"""Logging to stderr, one line per event, as JSON for machines or as text for people; floods are thinned out."""

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import IO

PACKAGE = "kvindex_server"

# What users typed is never logged; a count under the same name may be.
_CONFIDENTIAL = frozenset(
    {"prompt", "chat", "tokens", "token_ids", "messages", "text", "cache_salt", "authorization", "api_key"}
)


MAX_EVENTS = 1024
"""Events told apart by the sampling; ours are a few dozen."""
WINDOW_SECONDS = 1.0


class Sampler(logging.Filter):
    """Lets `first` lines of one event through per second, and then every `thereafter`-th, or none when that is 0.

    The next line of an event that is let through says with `suppressed` how many before it were not. `total` counts
    them all.
    """

    def __init__(self, first: int, thereafter: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._first, self._thereafter, self._clock = first, thereafter, clock
        self._lock = threading.Lock()
        self._events: dict[tuple[str, str], list[float]] = {}  # window's begin, lines in it, suppressed since told
        self.total = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """As of logging: False drops the line."""
        # An event's name is an argument of ours; of others what stays equal is the text without its arguments.
        key = (record.name, record.getMessage() if record.msg == "%s" else str(record.msg))
        with self._lock:
            if key not in self._events and len(self._events) >= MAX_EVENTS:
                key = ("", "")
            now = self._clock()
            seen = self._events.setdefault(key, [now, 0, 0])
            if now - seen[0] >= WINDOW_SECONDS:
                seen[0], seen[1] = now, 0
            seen[1] += 1
            beyond = int(seen[1]) - self._first
            if beyond > 0 and (not self._thereafter or beyond % self._thereafter):
                seen[2] += 1
                self.total += 1
                return False
            suppressed, seen[2] = int(seen[2]), 0
        if suppressed:
            record.fields = {**_given(record), "suppressed": suppressed}
        return True


_none: Mapping[str, str] = {}
_correlation: Callable[[], Mapping[str, str]] = lambda: _none  # noqa: E731


def correlate(read: Callable[[], Mapping[str, str]] | None) -> None:
    """From now on every line has these fields too, as they are on the thread that logs; None ends it."""
    global _correlation  # noqa: PLW0603  the formatters belong to logging, which is one per process
    _correlation = read or (lambda: _none)


def configure(
    format: str = "json", level: str = "info", stream: IO[str] | None = None, sampler: Sampler | None = None
) -> None:
    """Send every log record to `stream` (stderr); our own from `level` on, other libraries' warnings."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else ConsoleFormatter())
    if sampler is not None:
        handler.addFilter(sampler)
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
    # A record is formatted by the thread that made it.
    return {str(key): _shown(str(key), value) for key, value in {**_given(record), **_correlation()}.items()}


def _given(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, dict) else {}


def _shown(key: str, value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if key.lower() in _CONFIDENTIAL and not isinstance(value, int | float):
        return "[withheld]"
    return value


def _console(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and text and not any(c in text for c in ' "=') else json.dumps(text)
