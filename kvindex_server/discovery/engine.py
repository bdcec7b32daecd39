"""Asks engines where they publish: `GET /kv_event_sources` on their HTTP port, which vLLM answers from 0.25 on."""

import http.client
import json
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kvindex_server.discovery.source import Backoff, Changed, Progress
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import MAX_RANKS, split_tcp

PATH = "/kv_event_sources"
MAX_ANSWER = 256 * 1024
RETRY_SECONDS = (1.0, 30.0)
_HERE = ("*", "0.0.0.0", "[::]")


@dataclass(frozen=True, slots=True)
class EventSources:
    """Ports of rank 0, where rank r is at port + r. `replay_port` 0 = the engine has none."""

    events_port: int
    replay_port: int
    ranks: int
    topic: str


class BadAnswer(Exception):
    """The engine's answer cannot be used; the text is a reason fit for a metric."""


def read_sources(body: bytes, address: str) -> EventSources:
    """Reads an answer: an object of ranks, or a list whose members name theirs. BadAnswer when it does not fit.

    `address` is the host that was asked, as in an endpoint: an engine that names another one dials out instead.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer("engine_bad_answer") from None
    ranks = _by_rank(document)
    if not ranks:
        raise BadAnswer("engine_without_events")
    events = [_port(ranks[rank], "endpoint", address) for rank in range(len(ranks))]
    replays = [_port(ranks[rank], "replay_endpoint", address) for rank in range(len(ranks))]
    topics = {str(each.get("topic") or "") for each in ranks.values()}
    if events[0] == 0:
        raise BadAnswer("engine_without_events")
    # A rank's ports follow from the first one's; an engine that numbers them otherwise cannot be registered.
    for ports in (events, replays):
        if ports != [ports[0] and ports[0] + rank for rank in range(len(ports))]:
            raise BadAnswer("engine_ports")
    if len(topics) > 1:
        raise BadAnswer("engine_topics")
    return EventSources(events[0], replays[0], len(ranks), topics.pop())


def _by_rank(document: object) -> dict[int, dict[str, object]]:
    ranks: dict[int, dict[str, object]] = {}
    if isinstance(document, dict):
        members = [(int(rank) if rank.isdecimal() else None, each) for rank, each in document.items()]
    elif isinstance(document, list):
        members = [(each.get("data_parallel_rank") or 0, each) for each in document if isinstance(each, dict)]
    else:
        raise BadAnswer("engine_bad_answer")
    for rank, each in members:
        if isinstance(rank, int) and isinstance(each, dict):
            ranks[rank] = each
    # Every member must count: a rank that is passed over would be a rank nobody listens to.
    if len(ranks) != len(document) or set(ranks) != set(range(len(ranks))) or len(ranks) > MAX_RANKS:
        raise BadAnswer("engine_bad_answer")
    return ranks


def _port(rank: dict[str, object], key: str, address: str) -> int:
    endpoint = rank.get(key)
    if not endpoint:
        return 0
    try:
        named, port = split_tcp(str(endpoint), key)
    except InvalidArgument:
        raise BadAnswer("engine_bad_answer") from None
    if named not in (*_HERE, address):
        raise BadAnswer("engine_dials_out")
    return port


def fetch(address: str, port: int, timeout: float) -> EventSources | None:
    """One question; None when the engine does not know it (404). OSError or BadAnswer when there is no answer."""
    ends = time.monotonic() + 5 * timeout
    connection = http.client.HTTPConnection(address.strip("[]"), port, timeout=timeout)
    try:
        connection.request("GET", PATH, headers={"Accept": "application/json"})
        response = connection.getresponse()
        if response.status in (404, 405):
            return None
        if response.status != 200:
            raise BadAnswer("engine_status")
        body = b""
        while part := response.read1(MAX_ANSWER):
            body += part
            if len(body) > MAX_ANSWER or time.monotonic() > ends:  # a trickle must not hold a thread for ever
                raise BadAnswer("engine_bad_answer")
        return read_sources(body, address)
    except (http.client.HTTPException, ValueError):
        raise BadAnswer("engine_bad_answer") from None
    finally:
        connection.close()


@dataclass(slots=True)
class _Question:
    tried: bool = False
    asking: bool = False
    done: bool = False
    answer: EventSources | None = None
    next_try: float = 0.0
    backoff: Backoff = field(default_factory=lambda: Backoff(*RETRY_SECONDS))


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an engine. `sources` is None unless it answered, and when it does not know the question."""

    asked: bool
    answered: bool
    sources: EventSources | None


Life = tuple[str, str, int]
"""What a question is about: (one life of an engine, its host as in an endpoint, its HTTP port)."""


class Engines:
    """Asks many engines at once on a few threads, again and again until each has answered."""

    def __init__(self, progress: Progress, *, timeout: float = 2.0, threads: int = 8) -> None:
        self._progress = progress
        self._timeout = timeout
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ask-engine")
        self._questions: dict[Life, _Question] = {}
        self._changed: Changed = lambda: None

    def start(self, changed: Changed) -> None:
        """Tell `changed` of every answer."""
        self._changed = changed

    def stop(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def known(self, life: Life) -> Known:
        """What is known now; asks when it is due."""
        with self._lock:
            question = self._questions.setdefault(life, _Question())
            if not question.done and not question.asking and time.monotonic() >= question.next_try:
                question.asking = True
                try:
                    self._pool.submit(self._ask, life, question)
                except RuntimeError:  # stopped meanwhile
                    question.asking = False
            return Known(question.tried, question.done, question.answer)

    def keep(self, lives: Collection[Life]) -> None:
        """Forget every engine but these."""
        with self._lock:
            for life in [each for each in self._questions if each not in lives]:
                del self._questions[life]

    def _ask(self, life: Life, question: _Question) -> None:
        _, address, port = life
        reason = ""
        answer: EventSources | None = None
        try:
            answer = fetch(address, port, self._timeout)
        except BadAnswer as bad:
            reason = str(bad)
        except OSError:
            reason = "engine_unreachable"
        with self._lock:
            question.asking, question.tried = False, True
            question.done, question.answer = not reason, answer
            question.next_try = time.monotonic() + question.backoff.next()
        if reason:
            self._progress.failed(reason, lost=False)
        self._changed()
