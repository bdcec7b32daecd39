"""The fleet of a replica whose indexes are kept in a shared store: who follows what, and how far it is trusted."""

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from kvindex_server._core import Index
from kvindex_server.config import Settings
from kvindex_server.fleet import Fleet
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec
from kvindex_server.snapshot import SavedStream
from kvindex_server.store.client import Client
from kvindex_server.store.index import StoreIndex
from kvindex_server.stream import Cause, StreamStatus, Trust


class Stores:
    """The indexes of all models in one store."""

    def __init__(self, settings: Settings) -> None:
        """ConfigError when the store's settings cannot be used."""
        self._settings = settings
        self._client = Client(settings.store)
        self._lock = threading.Lock()
        self._indexes: dict[str, StoreIndex] = {}
        self._started = False
        self.fleet: SharedFleet | None = None
        """Whoever follows the streams; set once, before `start`."""

    def make(self, model: str, block_size: int) -> Index:
        """The index of a model; it has the calls of a native one."""
        index = StoreIndex(
            self._client,
            self._settings.store,
            model,
            block_size,
            self._settings.hash_seed,
            self._settings.limits.max_claims_per_model,
            self._settings.placement.max_blocks,
            max_removals=self._settings.limits.remembered_removals,
            max_claims_per_stream=self._settings.limits.max_claims_per_stream,
            trust_of=lambda pod, rank: self._trust(model, pod, rank),
            gained=lambda pod, rank: self._gained(model, pod, rank),
        )
        with self._lock:
            self._indexes[model] = index
            if self._started:
                index.start()
        return cast(Index, index)

    def get(self, model: str) -> StoreIndex | None:
        """The index of a model, by its real name."""
        return self._indexes.get(model)

    def start(self) -> None:
        """Write to the store from now on."""
        with self._lock:
            self._started = True
            for index in self._indexes.values():
                index.start()

    def stop(self) -> None:
        """Send what is left, and close the connections."""
        for index in list(self._indexes.values()):
            index.stop()
        self._client.close()

    @property
    def reachable(self) -> bool:
        """The store answers for every model."""
        return all(index.reachable for index in list(self._indexes.values()))

    def stats(self) -> list["StoreStats"]:
        """Per model what was done."""
        return [StoreStats(name, index.reachable, dict(index.counts)) for name, index in list(self._indexes.items())]

    def _trust(self, model: str, pod: str, rank: int) -> tuple[int, str, float]:
        assert self.fleet is not None
        return self.fleet.own_trust(model, pod, rank)

    def _gained(self, model: str, pod: str, rank: int) -> None:
        assert self.fleet is not None
        self.fleet.ask_anew(model, pod, rank)


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One model's part in the store, for metrics."""

    model: str
    reachable: bool
    counts: dict[str, int]


class SharedFleet(Fleet):
    """A fleet whose streams may be followed by other replicas: trust is what their replica says, or the store's."""

    def __init__(self, models: Models, configured: Sequence[PodSpec], stores: Stores, **options: Any) -> None:
        super().__init__(models, configured, **options)
        self._stores = stores
        stores.fleet = self

    def save(self, only: Collection[tuple[str, str, int]] | None = None) -> Iterator[SavedStream]:
        """Nothing: the store keeps what its streams hold."""
        return iter(())

    def own_trust(self, model: str, pod: str, rank: int) -> tuple[int, str, float]:
        """As this replica sees the stream."""
        trust, reason, age = super().trust(model, pod, rank)
        return int(trust), reason, age

    def ask_anew(self, model: str, pod: str, rank: int) -> None:
        """Have a rank synchronise again, unless its pod was taken away meanwhile."""
        subscriber = self._subscribers.get((model, pod))
        if subscriber is not None and rank < subscriber.spec.ranks:
            subscriber.clear_rank(rank)

    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        """As the replica that follows the stream sees it; STALE while the store is away."""
        index = self._stores.get(model)
        if index is None:
            return super().trust(model, pod, rank)
        trust, reason, age = index.standing(pod, rank)
        return Trust(trust), reason, age

    def statuses(self, model: str | None = None) -> list[StreamStatus]:
        """One per stream registered here, with the trust that answers have."""
        return [self._shared(status) for status in super().statuses(model)]

    def _shared(self, status: StreamStatus) -> StreamStatus:
        trust, reason, _ = self.trust(status.model, status.pod, status.rank)
        if trust is status.trust and reason == status.trust_reason:
            return status
        return replace(status, trust=trust, trust_reason=reason, trust_cause=Cause.STORE)
