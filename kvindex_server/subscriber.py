"""One pod's subscription: a thread per data-parallel rank that owns its sockets and feeds the index."""

import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

from kvindex_server import wire
from kvindex_server._core import Drained, Index, Stream
from kvindex_server.divergence import Side
from kvindex_server.ears import Ears
from kvindex_server.ingest import Bounds, Ingest
from kvindex_server.marks import EVERY
from kvindex_server.pods import PodSpec
from kvindex_server.snapshot import SavedStream
from kvindex_server.stream import Dialect, StreamStatus

_log = logging.getLogger(__name__)

SYNC_WAIT_MS = 50
IDLE_WAIT_MS = 5_000
MOST_MESSAGES = 1 << 20
"""Of one wait: no bound, as the clock ends it first."""
FURTHER_WAIT_MS = 100
"""So long after a message its effect is counted at the latest. What it says of claims and order holds at once."""


class Subscriber:
    """All ranks of one registered pod."""

    def __init__(
        self,
        spec: PodSpec,
        ears: Sequence[Ears],
        index: Index,
        bounds: Bounds,
        drain_messages: int,
        saved: Callable[[PodSpec, int], SavedStream | None] = lambda _spec, _rank: None,
    ) -> None:
        """`ears` of all ranks are its own from now on; `saved` gives the state in which a rank was left, if any."""
        self.spec = spec
        self._index = index
        self._ranks = [_Rank(spec, rank, each, index, bounds, drain_messages, saved) for rank, each in enumerate(ears)]

    def start(self) -> None:
        """Begin to listen."""
        for rank in self._ranks:
            rank.start()

    def stop(self) -> int:
        """Stop listening and drop every claim; returns how many there were."""
        for rank in self._ranks:
            rank.signal_stop()
        return sum(rank.join() for rank in self._ranks)

    def clear(self) -> int:
        """Drop every claim and synchronise again; returns how many there were."""
        return sum(rank.clear() for rank in self._ranks)

    def clear_rank(self, rank: int) -> int:
        """The same of one rank."""
        return self._ranks[rank].clear()

    @property
    def synced(self) -> int:
        """How many ranks are synchronised."""
        return sum(rank.ingest.synced for rank in self._ranks)

    def save(self, ranks: Collection[int] | None = None) -> Iterator[SavedStream]:
        """Each rank's state, or that of these ones, one after the other, as far as it is worth saving."""
        for number, rank in enumerate(self._ranks):
            if (ranks is None or number in ranks) and (saved := rank.save()) is not None:
                yield saved

    def sides(self, block_size: int, hash_seed: int) -> Iterator[tuple[Side, int]]:
        """Each rank as it is compared with a sibling's, and its epoch."""
        for number, rank in enumerate(self._ranks):
            status, spec = rank.ingest.status(), self.spec
            marks = rank.ingest.marks.all()
            side = Side(
                model=spec.model,
                pod=spec.pod,
                rank=number,
                endpoint=spec.endpoint_of(number),
                incarnation=spec.incarnation,
                block_size=block_size,
                hash_seed=hash_seed,
                trust=status.trust,
                cause=status.trust_cause,
                marks=marks,
            )
            yield side, status.epoch

    def doubt(self, rank: int, epoch: int, why: str) -> None:
        """Say that a sibling holds something else; nothing happens when the rank is in another epoch by then."""
        self._ranks[rank].doubt(epoch, why)

    def adopt(self, saved: SavedStream, epoch: int) -> None:
        """Have a rank go on behind a sibling's state, unless it is in another epoch by then."""
        if saved.fits(self.spec):
            self._ranks[saved.rank].adopt(saved, epoch)

    def statuses(self) -> list[StreamStatus]:
        """One per rank."""
        tiers = self._index.tiers
        return [rank.status(tiers) for rank in self._ranks]

    def dialects(self) -> list[Dialect]:
        """How each rank's engine writes its events."""
        return [Dialect(self.spec.pod, rank, *each.stream.dialect) for rank, each in enumerate(self._ranks)]

    def status(self, rank: int) -> StreamStatus:
        """Trust, state and counters of one rank, without its block counts."""
        return self._ranks[rank].ingest.status()


MAX_TOPIC_BYTES = 1024


class _Rank(threading.Thread):
    def __init__(
        self,
        spec: PodSpec,
        rank: int,
        ears: Ears,
        index: Index,
        bounds: Bounds,
        drain_messages: int,
        saved: Callable[[PodSpec, int], SavedStream | None],
    ) -> None:
        super().__init__(name=f"stream-{spec.pod}-{rank}", daemon=True)
        self._spec = spec
        self._rank = rank
        self._saved = saved
        self._save_asked = threading.Event()
        self._saves: queue.SimpleQueue[SavedStream | None] = queue.SimpleQueue()
        self._drain_messages = drain_messages
        self._replay_endpoint = spec.replay_endpoint_of(rank)
        self._halt = threading.Event()
        self._told: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._ears = ears
        self._replay: wire.Socket | None = None
        self._topic: str | None = None
        self._waiter = wire.Waiter()
        for each in (ears.events, ears.waker):
            self._waiter.add(each)
        self.stream: Stream = index.add_stream(spec.pod, rank)
        self.ingest = Ingest(
            self.stream,
            StreamStatus(
                spec.pod,
                rank,
                spec.model,
                endpoint=spec.endpoint_of(rank),
                replay_endpoint=self._replay_endpoint,
            ),
            bounds,
            self._ask if self._replay_endpoint else None,
            watched=True,
        )

    def status(self, tiers: list[str]) -> StreamStatus:
        by_tier = dict(zip(tiers, self.stream.claims_by_tier, strict=False))
        return replace(
            self.ingest.status(),
            blocks=self.stream.claims,
            blocks_by_tier={tier: blocks for tier, blocks in by_tier.items() if blocks},
            topic=self._topic or "",
            orphans=self.stream.orphans,
            unresolved=self.stream.unresolved,
        )

    def signal_stop(self) -> None:
        self._halt.set()
        self._ears.waker.wake()

    def join(self, timeout: float | None = None) -> int:  # type: ignore[override]
        if self.ident is not None:
            super().join(timeout)
        else:
            self._close_sockets()
        self._ears.waker.close()
        return self.stream.close()

    def clear(self) -> int:
        self.ingest.clearing()
        dropped = self.stream.clear()
        self._told.put(self.ingest.resync)
        self._ears.waker.wake()
        return dropped

    def save(self, timeout: float = 30.0) -> SavedStream | None:
        """The state, taken by the stream's own thread between two messages; None when it is not worth saving.

        One caller at a time.
        """
        while not self._saves.empty():  # of a question that was given up
            self._saves.get()
        self._save_asked.set()
        self._ears.waker.wake()
        try:
            return self._saves.get(timeout=timeout)
        except queue.Empty:
            return None

    def doubt(self, epoch: int, why: str) -> None:
        self._told.put(lambda: self.ingest.diverged(epoch, why))
        self._ears.waker.wake()

    def adopt(self, saved: SavedStream, epoch: int) -> None:
        self._told.put(lambda: self._replace(saved, epoch))
        self._ears.waker.wake()

    def _replace(self, saved: SavedStream, epoch: int) -> None:
        if not self.ingest.replaced(saved, epoch):
            return
        if self.stream.restore(saved.state):
            self.ingest.start()
        else:
            self.ingest.resync()
            _log.warning("sibling's stream does not fit this server", extra={"fields": {"stream": self.name}})

    def _save(self) -> SavedStream | None:
        known = self.ingest.save()
        if known is None:
            return None
        claims, state = self.stream.claims, self.stream.snapshot()
        if self.ingest.save() != known:
            return None  # a ClearPod of another thread has begun to drop what was read
        spec, rank = self._spec, self._rank
        return SavedStream(
            model=spec.model,
            pod=spec.pod,
            rank=rank,
            endpoint=spec.endpoint_of(rank),
            replay_endpoint=self._replay_endpoint,
            incarnation=spec.incarnation,
            claims=claims,
            state=state,
            **known,
        )

    def _restore(self) -> None:
        saved = self._saved(self._spec, self._rank)
        if saved is None:
            return
        fields = {"pod": self._spec.pod, "rank": self._rank, "claims": saved.claims}
        self.ingest.resume(saved)  # first: no claim is seen before it is marked for what it is
        if self.stream.restore(saved.state):
            _log.info("stream restored", extra={"fields": fields})
        else:
            self.ingest.resync()
            _log.warning("saved stream does not fit this server", extra={"fields": fields})

    def run(self) -> None:
        if not self._guarded(self._restore):
            self._guarded(self.ingest.resync)  # nothing, or a part, was restored
        self._guarded(self.ingest.start)
        while not self._halt.is_set():
            self._guarded(lambda: self._turn(self._wait()))
        self._close_sockets()

    def _guarded(self, step: Callable[[], None]) -> bool:
        """One bad step must not end the stream; it is logged and counted, and False."""
        try:
            step()
        except Exception:  # noqa: BLE001
            self.ingest.bad_message("internal")
            _log.exception("stream turn failed", extra={"fields": {"stream": self.name}})
            return False
        return True

    def _wait(self) -> Sequence[wire.Awaited]:
        """Until something is to be done here. While all is in order, the core applies what comes by itself."""
        if self.ingest.waiting_for_replay:
            return self._waiter.wait(SYNC_WAIT_MS)
        drained = None
        if isinstance(self.stream, Stream) and self._is_in_order():  # one of a shared store does not wait by itself
            drained = self._drain(MOST_MESSAGES, IDLE_WAIT_MS, FURTHER_WAIT_MS)
        if drained is None:
            return self._waiter.wait(IDLE_WAIT_MS)
        return self._waiter.wait(0) if drained.others else ()

    def _is_in_order(self) -> bool:
        # The first message is read in Python, as the core passes topics over.
        return self.ingest.in_order and self._topic is not None

    def _turn(self, ready: Sequence[wire.Awaited]) -> None:
        if self._ears.waker in ready:
            self._ears.waker.clear()
        if self._save_asked.is_set():
            self._save_asked.clear()
            self._saves.put(self._save())
        while not self._told.empty():
            self._told.get()()
        for change in self._ears.events.changes():
            self._connection(change)
        # A replay is worked off before live messages, which wait in the buffer for its end.
        if self._replay is not None and self._replay in ready:
            self._read_replay(self._replay)
        if self._ears.events in ready:
            self._read_events()
        self.ingest.tick()
        if self._replay is not None and not self.ingest.waiting_for_replay:
            self._close_replay()

    def _connection(self, change: wire.Connection) -> None:
        if change is wire.Connection.LEFT:
            self.ingest.peer_left()
        elif change is wire.Connection.ENDED:
            self.ingest.ended()
            fields = {"stream": self.name, "endpoint": self._spec.endpoint_of(self._rank)}
            _log.warning(
                "connection ended over what is no message of this stream, or too large", extra={"fields": fields}
            )
        else:
            self.ingest.connection(change is wire.Connection.MADE)

    def _drain(self, most: int, idle_ms: int = 0, further_ms: int = 0) -> Drained | None:
        events, order = self._ears.events, self.ingest.order
        if events.source is None:
            return None
        others = (self._ears.waker, *events.beside)
        drained = wire.drain(events.source, self.stream, order, most, others, idle_ms, further_ms, EVERY)
        if drained is not None:
            self.ingest.drained(drained)
            if odd := drained.odd:
                self._take([odd])
        return drained

    def _read_events(self) -> None:
        left = self._drain_messages
        while left > 0 and self._is_in_order():
            drained = self._drain(left)
            if drained is None:
                break
            if drained.empty or drained.others:
                return
            left -= drained.messages + 1
        received: list[list[bytes]] = []
        while len(received) < left and (frames := self._ears.events.receive()) is not None:
            received.append(frames)
        self._take(received)

    def _take(self, received: Sequence[list[bytes]]) -> None:
        messages: list[tuple[int, bytes]] = []
        for frames in received:
            try:
                messages.append(wire.read_event(frames))
                self._topic = _shown(frames[0])
            except wire.BadFrames as bad:
                if messages:
                    self.ingest.live(messages)
                    messages = []
                self.ingest.unread(bad.reason, bad.sequence)
        if messages:
            self.ingest.live(messages)

    def _read_replay(self, replay: wire.Socket) -> None:
        messages: list[tuple[int, bytes]] = []
        ended = False
        for _ in range(self._drain_messages):
            frames = replay.receive()
            if frames is None:
                break
            try:
                sequence, payload = wire.read_replay(frames)
            except wire.BadFrames as bad:
                self.ingest.unread(bad.reason, bad.sequence, replayed=True)
                continue
            if sequence == wire.END_SEQUENCE:
                ended = True
                break
            messages.append((sequence, payload))
            if self._topic is None and len(frames) == 4:
                self._topic = _shown(frames[1])
        if messages or ended:
            self.ingest.replayed(messages, ended=ended)

    def _ask(self, start_sequence: int) -> None:
        # A fresh socket has a fresh identity: late answers to an earlier question cannot mix in.
        self._close_replay()
        self._replay = wire.replay_client(self._replay_endpoint)
        self._waiter.add(self._replay)
        wire.request_replay(self._replay, start_sequence)

    def _close_replay(self) -> None:
        if self._replay is not None:
            self._waiter.remove(self._replay)
            self._replay.close()
            self._replay = None

    def _close_sockets(self) -> None:
        self._close_replay()
        self._ears.close()


def _shown(topic: bytes) -> str:
    return topic[:MAX_TOPIC_BYTES].decode("utf-8", "replace")
