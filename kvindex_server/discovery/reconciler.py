"""Brings the fleet to what the sources see: registers what is missing, takes away only what discovery registered."""

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kvindex_server.discovery.source import Found, Refusals, Sight, Source
from kvindex_server.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from kvindex_server.fleet import Fleet
from kvindex_server.pods import PodSpec, split_tcp

_log = logging.getLogger(__name__)

PASS_SECONDS = 2.0
"""The fleet is compared at least this often: an RPC may have taken away what discovery wants."""
PAUSE_SECONDS = 0.1
"""Between two passes, so that a storm of changes costs few of them."""

Key = tuple[str, str]
Publisher = tuple[str, int, str]


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """What a scrape shows of one source."""

    name: str
    pods: int
    refused: Mapping[str, int]
    errors: Mapping[str, int]
    age_seconds: float


@dataclass(slots=True)
class _Seen:
    """One source in the present pass."""

    source: Source
    refusals: Refusals
    sight: Sight = field(default_factory=Sight)
    refused: Mapping[str, int] = field(default_factory=dict)


class Reconciler:
    """One thread that applies the sources' newest answer. An earlier source wins over a later one."""

    def __init__(self, fleet: Fleet, sources: Sequence[Source]) -> None:
        self._fleet = fleet
        self._seen = [_Seen(source, Refusals(source.name)) for source in sources]
        self._changed = threading.Event()
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self.listed = not sources
        """True once every source has been seen whole, and what it told has been registered."""

    def start(self) -> None:
        """Start the sources, and follow them."""
        if not self._seen:
            return
        for each in self._seen:
            each.source.start(self._changed.set)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; what is registered stays."""
        self._halt.set()
        self._changed.set()
        if self._thread.ident is not None:
            for each in self._seen:
                each.source.stop()
            self._thread.join()

    def statuses(self) -> list[SourceStatus]:
        """One per source."""
        return [
            SourceStatus(
                each.source.name,
                len(each.sight.found),
                each.refused,
                each.source.progress.errors,
                each.source.progress.age_seconds,
            )
            for each in self._seen
        ]

    def _run(self) -> None:
        while not self._halt.is_set():
            self._changed.wait(PASS_SECONDS)
            self._changed.clear()
            if self._halt.is_set():
                return
            try:
                self.reconcile()
            except Exception:  # noqa: BLE001 - one bad pass must not end discovery; the next one tries again
                _log.exception("discovery pass failed")
            self._halt.wait(PAUSE_SECONDS)

    def reconcile(self) -> None:
        """One pass: take away what no source wants any more, then register what is new or different."""
        standing = {self._fleet.key_of(spec): (spec, discovered) for spec, discovered in self._fleet.registrations()}
        wanted = self._wanted([spec for spec, discovered in standing.values() if not discovered])
        for key, (spec, discovered) in standing.items():
            if discovered and key not in wanted:
                self._take_away(spec)
        for key, (seen, found) in wanted.items():
            if self._halt.is_set():
                return
            if standing.get(key) != (replace(found.spec, model=key[0]), True):
                self._register(seen, found)
        for seen in self._seen:
            seen.refused = Counter(seen.sight.refused) + Counter(seen.refusals.end())
        self.listed = self.listed or all(each.sight.whole for each in self._seen)

    def _wanted(self, others: Sequence[PodSpec]) -> dict[Key, tuple[_Seen, Found]]:
        """Every pod once, and no publisher twice: two pods that read it would both be credited with its blocks."""
        wanted: dict[Key, tuple[_Seen, Found]] = {}
        taken: dict[Publisher, Key] = {}
        for spec in others:
            taken.update(dict.fromkeys(_publishers(spec), self._fleet.key_of(spec)))
        for seen in self._seen:
            seen.sight = seen.source.look()
            refusals = seen.refusals.begin()
            for found in seen.sight.found:
                key = self._fleet.key_of(found.spec)
                publishers = _publishers(found.spec)
                if key in wanted:
                    refusals.add(found.spec.pod, "other_source", f"{wanted[key][0].source.name} has found it too")
                elif any(taken.get(each, key) != key for each in publishers):
                    refusals.add(found.spec.pod, "publisher_taken", "another pod reads the same endpoint and topic")
                else:
                    wanted[key] = (seen, found)
                    taken.update(dict.fromkeys(publishers, key))
        return wanted

    def _take_away(self, spec: PodSpec) -> None:
        try:
            self._fleet.unregister(spec.pod, spec.model, discovered=True)
        except (NotFound, FailedPrecondition):
            pass  # an RPC was faster, either way

    def _register(self, seen: _Seen, found: Found) -> None:
        try:
            self._fleet.register(found.spec, discovered=True, awaited=found.ready and not self.listed)
        except FailedPrecondition as error:
            seen.refusals.add(found.spec.pod, "registered_otherwise", error.message)
        except ResourceExhausted as error:
            seen.refusals.add(found.spec.pod, "limit", error.message)
        except InvalidArgument as error:
            seen.refusals.add(found.spec.pod, "invalid", error.message)


def _publishers(spec: PodSpec) -> list[Publisher]:
    host, port = split_tcp(spec.endpoint, "endpoint")
    return [(host, port + rank, spec.topic) for rank in range(spec.ranks)]
