"""Log lines: parseable, one line each, and nothing confidential in them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from kvindex_server import logs
from kvindex_server.calls import CallLog

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


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_flood_is_thinned_out_and_what_is_left_out_is_counted() -> None:
    """The first lines of a second and then every third; other events are not touched; the next line tells."""
    stream, clock = io.StringIO(), Clock()
    sampler = logs.Sampler(2, 3, clock)
    logs.configure("json", "info", stream, sampler)
    for number in range(10):
        logs.event(LOGGER, logging.WARNING, "flood", number=number)
    logs.event(LOGGER, logging.WARNING, "other")
    written = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(each["event"], each.get("number"), each.get("suppressed")) for each in written] == [
        ("flood", 0, None),
        ("flood", 1, None),
        ("flood", 4, 2),
        ("flood", 7, 2),
        ("other", None, None),
    ]
    assert sampler.total == 6
    clock.now = 1.0
    logs.event(LOGGER, logging.WARNING, "flood", number=10)
    assert json.loads(stream.getvalue().splitlines()[-1])["suppressed"] == 2


def test_floods_of_other_libraries_are_told_apart_by_their_text() -> None:
    stream = io.StringIO()
    sampler = logs.Sampler(1, 0, Clock())
    logs.configure("console", "info", stream, sampler)
    for number in range(5):
        logging.getLogger("elsewhere").warning("lost %s", number)
        logging.getLogger("elsewhere").warning("found %s", number)
    assert [line.split()[-2:] for line in stream.getvalue().splitlines()] == [["lost", "0"], ["found", "0"]]
    assert sampler.total == 8


def test_events_beyond_the_limit_share_one_count() -> None:
    """Memory is bounded whatever is logged."""
    sampler = logs.Sampler(1, 0, Clock())
    logger = logging.getLogger("elsewhere")
    kept = sum(
        sampler.filter(logger.makeRecord("elsewhere", logging.WARNING, "", 0, f"text {number}", (), None))
        for number in range(logs.MAX_EVENTS + 100)
    )
    assert kept == logs.MAX_EVENTS + 1
    assert sampler.total == 99


def test_a_share_of_the_calls_gets_a_line_and_every_failed_one() -> None:
    class Measured:
        """Metrics that nobody reads."""

        def __getattr__(self, _: str) -> object:
            return lambda *_: None

    stream = lines("json")
    throws = iter([0.05, 0.5, 0.5])
    calls = CallLog(Measured(), 0.1, lambda: next(throws))  # type: ignore[arg-type]
    calls.observe_lookup("m", 3, 2)
    calls.observe_lookup("m", 4, 1)
    calls.observe_rpc("/s/Stream", "OK", 0.0015)
    calls.observe_rpc("/s/Score", "OK", 0.001)
    calls.observe_rpc("/s/Score", "UNAUTHENTICATED", 0.001)  # not all of them: strangers must not fill the log
    calls.observe_rpc("/s/Score", "NOT_FOUND", 0.001)
    first, second = [json.loads(line) for line in stream.getvalue().splitlines()]
    told = {key: first[key] for key in ("level", "event", "method", "code", "ms", "model", "lookups", "blocks")}
    assert told == {
        "level": "info",
        "event": "call",
        "method": "/s/Stream",
        "code": "OK",
        "ms": 1.5,
        "model": "m",
        "lookups": 2,
        "blocks": 7,
    }
    assert (second["level"], second["code"], "model" in second) == ("warning", "NOT_FOUND", False)
