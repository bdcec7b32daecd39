"""Routers' placements in the store: each a claim with an end, under its stream's life, counted by every replica."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvindex_server._core import split_keys
from kvindex_server.store import scripts
from kvindex_server.store.client import Client

COUNTED = ("recorded", "renewed", "confirmed", "refused")


@dataclass(frozen=True, slots=True)
class Target:
    """The stream that a prompt was sent to."""

    life: bytes
    full: bytes
    """The numbers of its full-attention groups: a block that all of them hold needs no placement."""
    guessed: bool
    """The router did not name the rank."""


class Places:
    """Of one model; at most `most` blocks at once over all replicas."""

    def __init__(self, client: Client, tags: Sequence[str], most: int) -> None:
        self._client = client
        self._tags = tags
        self._most = most // len(tags)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def record(self, target: Target, keys: bytes, seconds: float) -> tuple[str, int]:
        """(outcome, blocks held already): "recorded", "no_room", or "over" when the life is. StoreAway, StoreFull."""
        ttl = max(1, int(seconds * 1000))
        calls = [
            (tag, (target.life, ttl, int(target.guessed), target.full, self._most, part))
            for tag, part in zip(self._tags, split_keys(keys, len(self._tags)), strict=True)
            if part
        ]
        answers = self._client.run_all(scripts.PLACE, calls) if calls else []
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        said = [held for held, _, _ in answers]
        if scripts.LIFE_IS_OVER in said:
            return "over", 0
        self.count(recorded=sum(each[1] for each in answers), renewed=sum(each[2] for each in answers))
        if scripts.NO_ROOM in said:
            self.count(refused=len(keys) // 8)
            return "no_room", 0
        return "recorded", sum(said)

    def count(self, **blocks: int) -> None:
        """What became of so many."""
        with self._lock:
            self._counts.update(blocks)

    @property
    def counts(self) -> dict[str, int]:
        """In blocks, as far as this replica has to do with them: what expires or is fenced, nobody counts."""
        return {each: self._counts[each] for each in COUNTED}
