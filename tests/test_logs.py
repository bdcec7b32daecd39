"""Log lines: parseable, one line each, and nothing confidential in them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kvindex_server import logs

LOGGER = logging.getLogger("kvindex_server.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root, package = logging.getLogger(), logging.getLogger(logs.PACKAGE)
    before = (list(root.handlers), root.level, package.level)
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


def lines(format: str, level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.configure(format, level, stream)
    return stream


def test_json_line() -> None:
    stream = lines("json")
    logs.event(LOGGER, logging.WARNING, "gap", pod="p:1", rank=0, level="odd")
    line = json.loads(stream.getvalue())
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "kvindex_server.test",
        "event": "gap",
        "pod": "p:1",
        "rank": 0,
        "field_level": "odd",
    }


def test_json_is_always_json() -> None:
    stream = lines("json")
    logs.event(LOGGER, logging.INFO, "odd\nname", nan=float("nan"), nested={"x": float("inf")}, thing=object())
    logs.event(LOGGER, logging.INFO, "keys", value={(1, 2): 3}, text_like="a\u2028b\ud800")
    written = stream.getvalue().splitlines()
    assert len(written) == 2
    assert json.loads(written[0])["nan"] == "nan"
    json.loads(written[1])


def test_traceback_stays_on_the_line() -> None:
    stream = lines("json")
    try:
        raise ValueError("boom")
    except ValueError:
        logs.event(LOGGER, logging.ERROR, "failed", exc_info=True)
    assert "boom" in json.loads(stream.getvalue())["traceback"]


def test_console_line_cannot_be_forged() -> None:
    stream = lines("console")
    logs.event(LOGGER, logging.INFO, "registered", pod="a\nERROR forged", model="m", empty="", count=3)
    (line,) = stream.getvalue().splitlines()
    assert line.endswith('INFO    registered pod="a\\nERROR forged" model=m empty="" count=3')


@pytest.mark.parametrize("format", ["json", "console"])
def test_what_users_typed_is_withheld(format: str) -> None:
    stream = lines(format)
    logs.event(LOGGER, logging.INFO, "scored", prompt="secret words", tokens=[4711], cache_salt="salty", messages=12)
    written = stream.getvalue()
    assert not any(word in written for word in ("secret", "4711", "salty"))
    assert "12" in written


def test_levels() -> None:
    stream = lines("json", "info")
    logs.event(LOGGER, logging.DEBUG, "quiet")
    logging.getLogger("elsewhere").info("quiet")
    assert stream.getvalue() == ""
    logging.getLogger("elsewhere").warning("a %s", "warning")
    assert json.loads(stream.getvalue())["event"] == "a warning"


def test_configuring_again_replaces() -> None:
    first = lines("json")
    second = lines("console")
    logs.event(LOGGER, logging.INFO, "once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
