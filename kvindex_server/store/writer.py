"""One stream's way into the store: decoded here, its changes sent in batches that only its current life may write."""

import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence

import msgpack  # type: ignore[import-untyped]

from kvindex_server._core import Applied, Drained, Index, Left, MessageSource, Order, ZeroMq
from kvindex_server.store import scripts
from kvindex_server.store.client import Argument, Client, StoreAway, StoreFull

ROW = 11
"""Bytes of one changed block, as `Stream.take_changes` gives them."""


class StoreStream:
    """Takes the place of a native `Stream`: the same calls, and the writer's, which come from one thread at a time.

    While another replica has the lease the stream stands by: it takes messages without applying them. When it gets the
    lease after that, it knows nothing, and `gained` is called to have the engine asked anew.
    """

    def __init__(
        self,
        index: Index,
        pod: str,
        rank: int,
        *,
        batch_blocks: int,
        max_changes: int,
        dirty: Callable[[], None],
        gained: Callable[[str, int], None],
    ) -> None:
        self.pod = pod
        self.rank = rank
        self.name = f"{rank} {pod}"
        self._index = index
        self._batch = batch_blocks * ROW
        self._max_changes = max_changes
        self._dirty = dirty
        self._gained = gained
        self._lock = threading.Lock()
        self._native = index.add_stream(pod, rank)
        self._gone = False
        self._asking = 0
        self.behind = False
        """What was held at the begin of the life is not in the store yet."""
        self.standby = False
        self.life = 0
        """The number under which the stream writes; 0 when it has to begin anew."""
        self.full = False
        """The store had no room for something that is held."""
        self.looked: tuple[bytes, ...] = ()
        """The eras of the partitions but the first in which they were found to have everything."""
        self._numbers: list[int] = []
        self._waiting: list[deque[bytes]] = []
        self._under_way: dict[int, tuple[str, Sequence[Argument]]] = {}
        self._described = b""
        self._description = b""

    # --- as of a native stream ---

    def apply(self, payloads: Sequence[bytes], first_sequence: int | None = None) -> Applied:
        """Take events in; they are in the store a moment later."""
        with self._lock:
            applied = self._native.apply(payloads, first_sequence)
        self._dirty()
        return applied

    def drain(
        self,
        source: MessageSource,
        order: Order,
        limit: int,
        max_payload: int,
        mark_every: int,
        zmq: ZeroMq,
        sockets: Sequence[int],
        descriptors: Sequence[int],
        idle_ms: int,
        further_ms: int,
    ) -> Drained:
        """The same from a source, without waiting: what was applied is to be sent."""
        with self._lock:
            drained = self._native.drain(source, order, limit, max_payload, mark_every, zmq, (), (), 0, 0)
        if drained.messages:
            self._dirty()
        return drained

    def clear(self, left: Left = Left.REQUESTED) -> int:
        """Drop all claims; returns how many. The store is told by a new life, however many they are."""
        with self._lock:
            dropped = self._native.clear(left)
            self._asking = max(self._asking - 1, min(self._asking, 1))
        self._dirty()
        return dropped

    def close(self) -> int:
        """The same, and the stream is taken out of the store."""
        with self._lock:
            dropped = self._native.close()
            self._gone = True
        self._dirty()
        return dropped

    def touch(self) -> None:
        """What is known beside the claims has changed: the store is told within moments."""
        if self._asking == 1:
            self._asking = 0

    def snapshot(self) -> bytes:
        """The whole state, as of a native stream."""
        with self._lock:
            return self._native.snapshot()

    def restore(self, snapshot: bytes) -> bool:
        """A saved state is not for a shared store: what it says may have been overtaken by another replica."""
        return False

    @property
    def claims(self) -> int:
        return self._native.claims

    @property
    def digest(self) -> int:
        return self._native.digest

    @property
    def claims_by_tier(self) -> list[int]:
        return self._native.claims_by_tier

    @property
    def orphans(self) -> int:
        return self._native.orphans

    @property
    def unresolved(self) -> int:
        return self._native.unresolved

    @property
    def dialect(
        self,
    ) -> tuple[int, list[str], int, int, str, tuple[int | bytes, list[int]] | None, list[str], tuple[int, int]]:
        return self._native.dialect

    @property
    def closed(self) -> bool:
        return self._gone

    # --- for the writer ---

    def begin(self, client: Client, tags: Sequence[str], owner: str, lease_ms: int) -> float:
        """Get the lease and a new life, which ends the one before in O(1); all that is held is to be sent.

        Seconds to wait when another replica has the lease, else 0. StoreAway.
        """
        life, wait_ms = client.run(scripts.OPEN, tags[0], self.name, b"", owner, lease_ms)
        if not life:
            self.stand_by()
            return float(wait_ms) / 1000
        for tag in tags[1:]:
            taken, _ = client.run(scripts.OPEN, tag, self.name, packed(life), owner, lease_ms)
            if not taken:
                raise StoreAway("the shared store is about to change hands")
        with self._lock:
            came_back, self.standby = self.standby, False
            # Until whoever follows the stream has cleared it, by request and then on its own thread, and says so: what
            # it believes until then is of the time when another replica applied the messages.
            self._asking = 3 if came_back else self._asking
            if came_back and not self._gone:
                self._native = self._index.add_stream(self.pod, self.rank)
            self._native.follow_changes(self._max_changes)
            self.life = life
            self.full = False
            self.behind = True
            self.looked = ()
            self._numbers = [0] * len(tags)
            self._waiting = [deque() for _ in tags]
            self._under_way = {}
            self._described = b""
        if came_back:
            self._gained(self.pod, self.rank)
        return 0.0

    def stand_by(self) -> None:
        """Another replica writes the stream: hold nothing and apply nothing."""
        with self._lock:
            self.standby = True
            self.life = 0
            if not self._native.closed:
                self._native.close()

    def take(self, *, anew: bool = False) -> None:
        """Line up what has changed; `anew`, because some of it did not fit, the next time all that is held."""
        partitions = len(self._numbers)
        with self._lock:
            dropped, lost, rows, groups = self._native.take_changes(partitions)
            if anew:  # in the same moment: a removal in between would be forgotten
                self._native.follow_changes(self._max_changes)
                self.full = False
            block_size, tiers = self._index.block_size, self._index.tiers
        if dropped or lost:
            self.life = 0
            return
        self._description = msgpack.packb([self.pod, self.rank, self.life, block_size, tiers, groups])
        for waiting, of_partition in zip(self._waiting, rows, strict=True):
            waiting.extend(of_partition[at : at + self._batch] for at in range(0, len(of_partition), self._batch))

    def next_batches(self, tags: Sequence[str]) -> list[tuple[int, tuple[str, Sequence[Argument]]]]:
        """(partition, call) of what can be sent now; the description goes first and alone.

        What has no answer yet goes again as it was: the store may have it, and takes nothing else under its number.
        """
        if not self.life:
            return []
        if not self._under_way:
            if self._described != self._description:
                self._under_way = {0: self._call(0, tags[0], self._description)}
            else:
                self._under_way = {at: self._call(at, tag, b"") for at, tag in enumerate(tags) if self._waiting[at]}
        return list(self._under_way.items())

    def _call(self, at: int, tag: str, description: bytes) -> tuple[str, Sequence[Argument]]:
        rows = self._waiting[at][0] if self._waiting[at] else b""
        number = self._numbers[at] + 1
        return tag, (self.name, self.life, packed(self.life), number, description, rows)

    @staticmethod
    def confirmed(answer: object) -> int:
        """How many placed blocks a batch has confirmed."""
        return int(answer[3:] or 0) if isinstance(answer, bytes) and answer.startswith(b"OK") else 0

    def settle(self, at: int, call: tuple[str, Sequence[Argument]], answer: object, client: Client) -> bool:
        """What became of a batch; True when it did not fit into the store. StoreAway."""
        refused = isinstance(answer, StoreFull)
        if refused:
            answer = client.run(scripts.RELEASE, call[0], *call[1])
            self.full = True
        if isinstance(answer, StoreAway):
            raise answer
        if isinstance(answer, bytes) and answer.startswith(b"OK"):
            self._numbers[at] += 1
            self._under_way.pop(at, None)
            *_, description, rows = call[1]
            if rows:
                self._waiting[at].popleft()
            if description:
                self._described = bytes(description)  # type: ignore[arg-type]
            self.behind = self.behind and not self.idle
        else:
            # Another replica has the lease, or the store has lost something: asking for the lease shows which.
            self.life = 0
        return refused

    @property
    def blind(self) -> bool:
        """Taken over a moment ago, and the engine has not been asked yet."""
        return self._asking > 0

    @property
    def idle(self) -> bool:
        """Everything taken is in the store."""
        sent = not self._under_way and not any(self._waiting)
        return bool(self.life) and sent and self._described == self._description

    @property
    def numbers(self) -> list[int]:
        """Of the last batch of each partition."""
        return self._numbers

    def end(self, client: Client, tags: Sequence[str]) -> None:
        """Take a closed stream out of the store. StoreAway."""
        for tag in tags:
            if self.life:
                client.run(scripts.CLOSE, tag, self.name, self.life, packed(self.life))
        self.life = 0


def packed(life: int) -> bytes:
    """A life as holders name it."""
    return struct.pack("<Q", life)[:6]
