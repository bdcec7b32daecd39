"""Questions that the store cannot answer itself: each replica answers for the streams it writes.

The store keeps blocks by our keys; what engines call them only the native stream knows that decodes their events. So a
question about engines' hashes is laid down in the store, every replica that writes streams answers for those, under the
lives they have, and whoever asked puts the answers together. They are whole when they speak for every life that counts.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgpack  # type: ignore[import-untyped]

from kvindex_server._core import Index
from kvindex_server.store import scripts
from kvindex_server.store.client import Client, StoreAway

Holder = tuple[str, int, int, int, bool]
Answer = list[tuple[int, list[Holder]]]
"""Per engine hash: its key or 0, and its holders."""
Lives = dict[tuple[str, int], int]
Said = tuple[Lives, list[tuple[int | None, list[tuple[str, int, str, int]]]]]
"""One replica's part: which lives it speaks for, and per engine hash its key (0: not known, None: its streams differ)
and (pod, rank, tier, group)."""

WAIT_SECONDS = 2.0
"""For the answers of the other replicas; they look for questions every quarter of a second."""
_LOOK_SECONDS = 0.02
_REMEMBERED = 1024


class Questions:
    """Of one model. `lives` tells under which lives this replica writes which streams."""

    def __init__(self, client: Client, tag: str, own: Index, owner: str, lives: Callable[[], Lives]) -> None:
        self._client = client
        self._tag = tag
        self._own = own
        self._owner = owner
        self._lives = lives
        self._answered: dict[bytes, None] = {}
        self._answering = threading.Lock()

    def ask(
        self,
        hashes: bytes | Sequence[bytes],
        pods: Sequence[str],
        counting: Callable[[], Mapping[tuple[str, int], int]],
    ) -> Answer:
        """Who holds the blocks of these names. StoreAway when not every replica has answered in time.

        `counting` reads from the store which life of each stream counts.
        """
        number = os.urandom(8).hex()
        blob = msgpack.packb([hashes, list(pods)])
        said = [self._say(hashes, pods)]
        if self._is_whole(said, pods, counting()):
            return self._together(said, len(said[0][1]))
        ends = time.monotonic() + WAIT_SECONDS
        self._client.run(scripts.ASK, self._tag, number, blob, int(WAIT_SECONDS * 1000))
        try:
            while time.monotonic() < ends:
                time.sleep(_LOOK_SECONDS)
                answers = self._client.run(scripts.ANSWERS, self._tag, number)
                # Asked again with them: what it said first may be of a life that is over by now.
                said = [self._say(hashes, pods), *(_unpacked(each) for each in answers)]
                if self._is_whole(said, pods, counting()):
                    return self._together(said, len(said[0][1]))
        finally:
            with contextlib.suppress(StoreAway):  # it ends by itself as well
                self._client.run(scripts.FORGET, self._tag, number)
        raise StoreAway("not every replica has said what its streams hold")

    def answer(self, asked: Sequence[bytes]) -> int:
        """Answer what is new of these (number and question in turns); how many there were. StoreAway."""
        answered = 0
        with self._answering:
            for number, blob in zip(asked[::2], asked[1::2], strict=True):
                if number in self._answered:
                    continue
                self._answered[number] = None
                if len(self._answered) > _REMEMBERED:
                    del self._answered[next(iter(self._answered))]
                hashes, pods = msgpack.unpackb(blob)
                lives, found = self._say(hashes, pods)
                if lives:
                    said = msgpack.packb([[[*stream, life] for stream, life in lives.items()], found])
                    self._client.run(scripts.ANSWER, self._tag, number, self._owner, said, int(WAIT_SECONDS * 1000))
                    answered += 1
        return answered

    def _say(self, hashes: bytes | Sequence[bytes], pods: Sequence[str]) -> Said:
        """For the streams of this replica; those that begin or end a life meanwhile are not spoken for."""
        before = self._lives()
        found = (
            self._own.holders_of_ints(hashes, pods)
            if isinstance(hashes, bytes)
            else self._own.holders_of_bytes(hashes, pods)
        )
        after, tiers = self._lives(), self._own.tiers
        return dict(before.items() & after.items()), [
            (key, [(pod, rank, tiers[tier], group) for pod, rank, tier, group, _ in holders]) for key, holders in found
        ]

    @staticmethod
    def _is_whole(said: Sequence[Said], pods: Collection[str], counting: Mapping[tuple[str, int], int]) -> bool:
        spoken = set().union(*(lives.items() for lives, _ in said))
        return all(each in spoken for each in counting.items() if not pods or each[0][0] in pods)

    def _together(self, said: Sequence[Said], count: int) -> Answer:
        told: list[set[int | None]] = [set() for _ in range(count)]
        holders: list[set[Holder]] = [set() for _ in range(count)]
        for lives, found in said:
            for at, (key, held) in enumerate(found):
                if key != 0:
                    told[at].add(key)
                for pod, rank, tier, group in held:
                    if (pod, rank) in lives:
                        holders[at].add((pod, rank, self._own.tier_of(tier), group, False))
        by_group = (sorted(each, key=lambda holder: (holder[0], holder[1], holder[3], holder[2])) for each in holders)
        keys = (next(iter(each)) if len(each) == 1 else 0 for each in told)
        return list(zip((key or 0 for key in keys), by_group, strict=True))


def _unpacked(blob: bytes) -> Said:
    lives, found = msgpack.unpackb(blob)
    return {(pod, rank): life for pod, rank, life in lives}, found
