"""The pods the server listens to: registered, listed, cleared, and taken away with all their claims."""

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from kvindex_server import wire
from kvindex_server._core import Index
from kvindex_server.divergence import Side
from kvindex_server.ears import Ears, close_ears, open_ears
from kvindex_server.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec, bind_the_same, share_an_endpoint, topics_overlap
from kvindex_server.snapshot import SavedStream
from kvindex_server.stream import Dialect, StreamState, StreamStatus, Trust
from kvindex_server.subscriber import Subscriber

_log = logging.getLogger(__name__)


class Fleet:
    """Subscribers by (model, pod). Readers take no lock: the table is replaced whole."""

    def __init__(
        self,
        models: Models,
        configured: Sequence[PodSpec] = (),
        *,
        bounds: Bounds | None = None,
        drain_messages: int = 512,
        max_pods: int = 4096,
        saved: Callable[[PodSpec, int], SavedStream | None] = lambda _spec, _rank: None,
    ) -> None:
        self._models = models
        self._configured = tuple(configured)
        self._bounds = bounds or Bounds()
        self._drain_messages = drain_messages
        self._max_pods = max_pods
        self._saved = saved
        self._lock = threading.Lock()
        # Pods that are just being registered or taken away: one call each at a time, and none waits for another pod's.
        self._changed = threading.Condition(self._lock)
        self._changing: dict[tuple[str, str], int] = {}  # their block size, once it is settled
        self._subscribers: dict[tuple[str, str], Subscriber] = {}
        self._awaited: set[tuple[str, str]] = set()
        self._discovered: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Subscribe to every configured pod. InvalidArgument when one cannot be bound."""
        for spec in self._configured:
            self.register(spec, awaited=True)

    def stop(self) -> None:
        """Take every pod away."""
        with self._lock:
            subscribers, self._subscribers = list(self._subscribers.values()), {}
        for subscriber in subscribers:
            subscriber.stop()

    @property
    def readiness(self) -> float:
        """Share of the awaited pods' streams, as far as they are still followed, that are synchronised."""
        return _share([each for key, each in self._subscribers.items() if key in self._awaited])

    def coverage(self, model: str) -> float:
        """Share of a model's streams (its real name) that are synchronised; 1 when there is none."""
        return _share([each for (of_model, _), each in self._subscribers.items() if of_model == model])

    def key_of(self, spec: PodSpec) -> tuple[str, str]:
        """(model's real name, pod): what a registration is known by, whether it stands already or not."""
        return self._models.real_name(spec.model), spec.pod

    def is_connected(self, spec: PodSpec) -> bool:
        """Whether any rank of a pod's registration is connected to its engine."""
        subscriber = self._subscribers.get(self.key_of(spec))
        return subscriber is not None and any(
            subscriber.status(rank).state not in (StreamState.CONNECTING, StreamState.DOWN)
            for rank in range(subscriber.spec.ranks)
        )

    def registrations(self) -> list[tuple[PodSpec, bool]]:
        """Every registration that stands, and whether discovery made it."""
        return [(each.spec, key in self._discovered) for key, each in self._subscribers.items()]

    def register(self, spec: PodSpec, *, discovered: bool = False, awaited: bool = False) -> bool:
        """Subscribe to a pod. False when the same registration stood already; another one is replaced.

        Discovery gives way: FailedPrecondition when a `discovered` pod stands by configuration or RPC, which in turn
        takes over what discovery has found. An `awaited` pod counts into the server's readiness.
        """
        spec = spec.validate()
        key = self.key_of(spec)
        spec = replace(spec, model=key[0])
        with self._turn(key):
            standing = self._subscribers.get(key)
            if standing is not None and discovered and key not in self._discovered:
                raise FailedPrecondition(f"pod: {spec.pod!r} is registered by configuration or RPC")
            if standing is not None and standing.spec == spec:
                if not discovered:
                    self._discovered.discard(key)
                return False
            self._check_limit()
            self._check_topic(spec)
            self._check_block_size(spec)
            subscriber = self._subscribe(spec, standing)
            self._add(subscriber, discovered=discovered)
            if awaited:
                self._awaited = self._awaited | {key}
        _log.info("pod registered", extra={"fields": {"pod": spec.pod, "model": spec.model, "ranks": spec.ranks}})
        return True

    def _check_limit(self) -> None:
        with self._lock:
            if len(self._subscribers.keys() | self._changing.keys()) > self._max_pods:
                raise ResourceExhausted(f"{self._max_pods} pods are registered, which is the limit")

    def _check_topic(self, spec: PodSpec) -> None:
        """Of two pods that share an endpoint no topic may stand for both."""
        own = self.key_of(spec)
        for key, each in self._subscribers.items():
            # Topics first: endpoints are dearer to compare, and there may be thousands.
            if key != own and topics_overlap(each.spec.topic, spec.topic) and share_an_endpoint(each.spec, spec):
                reason = f"begins as that of pod {key[1]!r} at the same endpoint, or that one as this"
                raise InvalidArgument("topic", reason)

    def _check_block_size(self, spec: PodSpec) -> None:
        """Refuses what `_settle_block_size` would refuse, before anything is changed."""
        if spec.block_size and spec.model in self._models.names:
            index = self._models.get(spec.model).index
            known = index.block_size
            with self._lock:
                if known and not (index.is_block_size_open and self._fits_others(spec)):
                    _check_fit(spec, known)

    def _settle_block_size(self, spec: PodSpec, index: Index) -> None:
        """The engine's blocks are several of the model's, or parts of one. While nothing is claimed, the model's may
        still become smaller or other ones, if they fit every other registration too."""
        with self._lock:
            known = index.learn_block_size(spec.block_size)
            if spec.block_size % known and self._fits_others(spec):
                known = index.set_block_size(spec.block_size)
            _check_fit(spec, known)
            self._changing[self.key_of(spec)] = spec.block_size

    def _fits_others(self, spec: PodSpec) -> bool:
        standing = [(key, each.spec.block_size) for key, each in self._subscribers.items()]
        return all(
            _fits(spec.block_size, size)
            for (model, pod), size in [*standing, *self._changing.items()]
            if size and model == spec.model and pod != spec.pod
        )

    def _subscribe(self, spec: PodSpec, standing: Subscriber | None) -> Subscriber:
        """A subscriber in the place of the standing one, which stays, or comes back, when that fails."""
        discovered = self.key_of(spec) in self._discovered
        in_the_way = standing is not None and bind_the_same(standing.spec, spec)
        if in_the_way:
            self._take_away(standing)
        try:
            ears = self._open(spec)
            try:
                index = self._index(spec)
                if not in_the_way:
                    self._take_away(standing)
                return Subscriber(spec, ears, index, self._bounds, self._drain_messages, self._saved)
            except Exception:
                close_ears(ears)  # nobody else would, and they must not be left unread
                raise
        except Exception:
            if in_the_way and standing is not None:
                self._bring_back(standing.spec, discovered=discovered)
            raise

    def _open(self, spec: PodSpec) -> list[Ears]:
        try:
            return open_ears(spec)
        except wire.BindError as error:
            for (_, pod), each in self._subscribers.items():
                if bind_the_same(each.spec, spec):
                    reason = f"is bound for pod {pod!r}; each pod needs its own, or each a topic"
                    raise InvalidArgument("endpoint", reason) from error
            raise InvalidArgument("endpoint", f"cannot be used: {error}") from error

    def _index(self, spec: PodSpec) -> Index:
        """Of the spec's model, which is known from now on, as is its block size."""
        index = self._models.seen(spec.model).index
        if spec.block_size:
            self._settle_block_size(spec, index)
        return index

    def _bring_back(self, spec: PodSpec, *, discovered: bool) -> None:
        try:
            index, ears = self._index(spec), self._open(spec)
        except InvalidArgument as error:
            _log.error(
                "pod lost: its place was taken meanwhile", extra={"fields": {"pod": spec.pod, "why": str(error)}}
            )
            return
        subscriber = Subscriber(spec, ears, index, self._bounds, self._drain_messages, self._saved)
        self._add(subscriber, discovered=discovered)

    def _add(self, subscriber: Subscriber, *, discovered: bool) -> None:
        key = self.key_of(subscriber.spec)
        with self._lock:
            self._subscribers = {**self._subscribers, key: subscriber}
            if discovered:
                self._discovered.add(key)
            subscriber.start()

    def _take_away(self, subscriber: Subscriber | None) -> int:
        """Returns the claims it had."""
        if subscriber is None:
            return 0
        with self._lock:
            self._replace_without(self.key_of(subscriber.spec))
        return subscriber.stop()

    @contextmanager
    def _turn(self, key: tuple[str, str]) -> Iterator[None]:
        with self._lock:
            self._changed.wait_for(lambda: key not in self._changing)
            self._changing[key] = 0
        try:
            yield
        finally:
            with self._lock:
                del self._changing[key]
                self._changed.notify_all()

    def unregister(self, pod: str, model: str, *, discovered: bool = False) -> int:
        """Take a pod away; returns the claims it had. NotFound when it is not registered.

        With `discovered`, FailedPrecondition when the registration is not discovery's own.
        """
        with self._turn(self._key(pod, model)):
            key = self._key(pod, model)  # it may have been taken away while this call waited
            if discovered and key not in self._discovered:
                raise FailedPrecondition(f"pod: {pod!r} is registered by configuration or RPC")
            dropped = self._take_away(self._subscribers[key])
        _log.info("pod unregistered", extra={"fields": {"pod": pod, "model": model, "claims": dropped}})
        return dropped

    def clear(self, pod: str, model: str) -> int:
        """Drop a pod's claims and synchronise again; returns how many. NotFound when it is not registered."""
        return self._subscribers[self._key(pod, model)].clear()

    def save(self, only: Collection[tuple[str, str, int]] | None = None) -> Iterator[SavedStream]:
        """The state of every stream, or of these (model, pod, rank), one after the other, as far as worth saving.

        One caller at a time.
        """
        for (model, pod), subscriber in self._subscribers.items():
            if only is None:
                yield from subscriber.save()
            elif ranks := {rank for of_model, of_pod, rank in only if (of_model, of_pod) == (model, pod)}:
                yield from subscriber.save(ranks)

    def sides(self) -> Iterator[tuple[Side, int]]:
        """Each stream as it is compared with a sibling's, and its epoch."""
        for (model, _), subscriber in self._subscribers.items():
            index = self._models.get(model).index
            yield from subscriber.sides(index.block_size, index.seed)

    def doubt(self, side: Side, epoch: int, why: str) -> None:
        """A sibling that is as sure holds something else of this stream."""
        subscriber = self._subscribers.get((side.model, side.pod))
        if subscriber is not None and side.rank < subscriber.spec.ranks:
            subscriber.doubt(side.rank, epoch, why)

    def adopt(self, saved: SavedStream, epoch: int) -> None:
        """Have a stream go on behind a sibling's state, if that is of the same engine."""
        if (subscriber := self._subscribers.get((saved.model, saved.pod))) is not None:
            subscriber.adopt(saved, epoch)

    @property
    def registered(self) -> list[PodSpec]:
        """Pods that are neither configured nor found by discovery: registered while the server ran."""
        others = {self.key_of(spec) for spec in self._configured} | self._discovered
        return [each.spec for key, each in self._subscribers.items() if key not in others]

    def statuses(self, model: str | None = None) -> list[StreamStatus]:
        """One per stream, in order of registration."""
        name = self._models.get(model).name if model else None
        return [
            status
            for (of_model, _), subscriber in self._subscribers.items()
            if name is None or of_model == name
            for status in subscriber.statuses()
        ]

    def dialects(self, model: str) -> list[Dialect]:
        """One per stream of a model (its real name) that is followed here."""
        followed = [each for (of_model, _), each in self._subscribers.items() if of_model == model]
        return [dialect for each in followed for dialect in each.dialects()]

    def adapters(self, model: str) -> list[str]:
        """LoRA adapters that engines of a model (its real name) have named in their events."""
        return list(dict.fromkeys(name for dialect in self.dialects(model) for name in dialect.adapters))

    def pods(self, model: str) -> list[str]:
        """The pods of a model (its real name), in order of registration."""
        return [pod for of_model, pod in self._subscribers if of_model == model]

    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        """(trust, reason, age in seconds) of a rank; without a rank, of the pod's least trusted one."""
        subscriber = self._subscribers.get((model, pod))
        if subscriber is None:
            return Trust.COLD, "pod is not registered", -1.0
        if rank is not None and rank >= subscriber.spec.ranks:  # registered anew with fewer ranks meanwhile
            return Trust.COLD, "rank is not registered", -1.0
        ranks = range(subscriber.spec.ranks) if rank is None else (rank,)
        status = min((subscriber.status(each) for each in ranks), key=lambda each: _DOUBT.index(each.trust))
        return status.trust, status.trust_reason, status.age_seconds

    def _key(self, pod: str, model: str) -> tuple[str, str]:
        key = (self._models.get(model).name, pod)
        if key not in self._subscribers:
            raise NotFound(f"pod: {pod!r} is not registered for model {model!r}")
        return key

    def _replace_without(self, key: tuple[str, str]) -> None:
        self._subscribers = {each: value for each, value in self._subscribers.items() if each != key}
        self._discovered.discard(key)


def _fits(size: int, other: int) -> bool:
    return size % other == 0 or other % size == 0


def _check_fit(spec: PodSpec, known: int) -> None:
    if not _fits(spec.block_size, known):
        reason = f"{spec.block_size} is not the model's block size {known}, and neither divides the other"
        raise InvalidArgument("block_size", reason)


def _share(subscribers: Sequence[Subscriber]) -> float:
    streams = sum(each.spec.ranks for each in subscribers)
    return sum(each.synced for each in subscribers) / streams if streams else 1.0


_DOUBT = (Trust.STALE, Trust.COLD, Trust.PARTIAL, Trust.EXACT)
