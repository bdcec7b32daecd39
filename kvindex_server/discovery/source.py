"""What every source of pods has in common: what it found, how it fares, and how long it waits after a failure."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvindex_server.pods import PodSpec

_log = logging.getLogger(__name__)

Changed = Callable[[], None]
"""Called by a source, from any thread, when `found` may answer something else than before."""


NOT_ANSWERED = "not_answered"
"""The reason why a pod is not followed while its engine has not told where it publishes."""


@dataclass(frozen=True, slots=True)
class Found:
    """One pod as a source sees it. `ready` says whether it serves already, so that readiness may wait for it."""

    spec: PodSpec
    ready: bool = True


@dataclass(frozen=True, slots=True)
class Sight:
    """All a source knows now: pods to follow, and how many it sees but cannot describe, by reason.

    `whole` says that nothing is missing because it has not been looked at yet.
    """

    found: Sequence[Found] = ()
    refused: Mapping[str, int] = field(default_factory=dict)
    whole: bool = True


class Source(Protocol):
    """A place where pods are found. What it cannot reach keeps the last known answer."""

    name: str
    progress: "Progress"

    def start(self, changed: Changed) -> None:
        """Begin to look."""

    def stop(self) -> None:
        """Look no longer; returns soon, whatever the network does."""

    def look(self) -> Sight:
        """What is known now; costs no input or output."""


class Progress:
    """Successes and failures of one source, counted by reason; a loss and its end are logged once each."""

    def __init__(self, source: str, parts: Iterable[str] = ("",)) -> None:
        """`parts` are the things the source looks at, each of which may be lost by itself."""
        self._source = source
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._last_success = dict.fromkeys(parts, time.monotonic())
        self._lost: set[str] = set()

    def succeeded(self, part: str = "") -> None:
        """A part of the source answered."""
        with self._lock:
            self._last_success[part] = time.monotonic()
            back = part in self._lost
            self._lost.discard(part)
        if back:
            _log.info("discovery works again", extra={"fields": {"source": self._source, "part": part}})

    def failed(self, reason: str, detail: str = "", part: str = "", *, lost: bool = True) -> None:
        """Something went wrong; with `lost`, the last known pods stand until the source answers again."""
        with self._lock:
            self._errors[reason] += 1
            first = lost and part not in self._lost
            if lost:
                self._lost.add(part)
        if first:
            fields = {"source": self._source, "part": part, "reason": reason, "detail": detail[:300]}
            _log.warning("discovery failed; the last known pods stay", extra={"fields": fields})

    @property
    def errors(self) -> dict[str, int]:
        """Failures so far, by reason."""
        with self._lock:
            return dict(self._errors)

    @property
    def age_seconds(self) -> float:
        """Since the part that has been silent longest last answered; before it ever has, since the start."""
        with self._lock:
            return time.monotonic() - min(self._last_success.values())


class Backoff:
    """Waits that double from `first` to `longest` seconds, each shortened by up to a half at random."""

    def __init__(self, first: float, longest: float, chance: random.Random | None = None) -> None:
        self._first, self._longest = first, longest
        self._next = first
        # Replicas that lose one API server together must not come back together.
        self._chance = chance or random.Random()

    def reset(self) -> None:
        """Begin again with the first wait."""
        self._next = self._first

    def next(self) -> float:
        """Seconds to wait now."""
        wait, self._next = self._next, min(2 * self._next, self._longest)
        return wait * self._chance.uniform(0.5, 1.0)


class Refusals:
    """Pods that a source sees and cannot use; each is logged once for as long as its reason stays the same."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._told: dict[str, str] = {}
        self._now: dict[str, str] = {}

    def begin(self) -> "Refusals":
        """Start a new look."""
        self._now = {}
        return self

    def add(self, pod: str, reason: str, detail: str) -> None:
        """`pod` cannot be used now."""
        self._now[pod] = reason
        if self._told.get(pod) != reason:
            fields = {"source": self._source, "pod": pod, "reason": reason, "detail": detail[:300]}
            # An engine that loads its model answers later; everything else somebody has to correct.
            level = logging.INFO if reason == NOT_ANSWERED else logging.WARNING
            _log.log(level, "pod found but not followed", extra={"fields": fields})

    def end(self) -> dict[str, int]:
        """How many there are, by reason."""
        self._told = self._now
        return dict(Counter(self._now.values()))
