"""The write path of one stream on one screen: order, repair by replay, apply, and what it says of trust."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvindex_server._core import Applied, Stream, xxh3_64
from kvindex_server.stream import LAG_BOUNDS, REMEMBERED, Outcome, StreamState, StreamStatus, Trust
from kvindex_server.stream import Sequence as Order

# A batch or event nobody could read may have been a removal: a claim may be wrong from then on.
_UNSOUND = ("bad_batch", "truncated", "bad_event", "bad_field")
# A store that was not taken in: the pod holds more than is known.
_INCOMPLETE = (
    "token_range",
    "token_ids",
    "tier_limit",
    "group_limit",
    "claim_limit",
    "unresolved_limit",
    "orphan_limit",
    "block_size_mismatch",
    "unknown_group_kind",
)
_UNREADABLE = (*_UNSOUND, "unknown_event", "token_range", "token_ids")

MAX_REPLAY_ASKS = 64
"""Asks of one repair; each must bring something new, so only a hostile engine gets there."""

LONG_REPLAY = 512
"""So many messages may have lost their end without a word (see `Ingest._replay_over`)."""

MAX_JUMP = 1 << 40
"""No stream loses so many messages: such a number is damage, and believing it would fence the pod for nothing."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of what is kept while a replay is under way."""

    messages: int = 100_000
    bytes: int = 256 * 1024 * 1024
    seconds: float = 30.0
    replay_timeout: float = 5.0
    disconnect_grace: float = 10.0
    drop_on_gap: bool = False


class Ingest:
    """One stream's order and trust. All calls but `status` come from the stream's own thread.

    `ask` sends a replay request from a sequence; None when the pod has no replay endpoint.
    """

    def __init__(
        self,
        stream: Stream,
        status: StreamStatus,
        bounds: Bounds,
        ask: Callable[[int], None] | None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._stream = stream
        self._bounds = bounds
        self._ask_replay = ask
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._status = status
        self._errors: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._order = Order()
        self._buffer: list[tuple[int, bytes]] = []
        self._buffered_bytes = 0
        self._syncing = False
        self._asks = 0
        self._asked_last: int | None = None
        self._hole = False
        self._heard = False
        self._evident = False
        self._unverified = False
        self._deadline = 0.0
        self._sync_ends = 0.0
        self._applied_at: float | None = None
        self._lost_at: float | None = None
        self._tried = False
        self._unanswered = False
        self._gap_open = False

    # --- what the subscriber tells ---

    def start(self) -> None:
        """Subscribed: ask for what was published before."""
        if self._ask_replay is None:
            self._tried = True
        else:
            self._sync()

    def live(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Published messages (sequence, payload), in order of arrival."""
        run: list[tuple[int, bytes, int]] = []
        for sequence, payload in messages:
            if self._syncing:
                self._keep(sequence, payload)
                continue
            digest = xxh3_64(payload)
            outcome = self._judge(sequence, digest, run)
            if outcome is Outcome.NEXT:
                run.append((sequence, payload, digest))
                continue
            if outcome is Outcome.GAP and sequence - (run[-1][0] if run else self._order.last or 0) > MAX_JUMP:
                self._errors["sequence_jump"] += 1
                continue
            self._apply(run)
            run = []
            if outcome is Outcome.DUPLICATE:
                self._status.duplicates += 1
            elif outcome is Outcome.RESTART:
                self._restart("sequence fell back")
                self._begin(sequence, payload, digest)
            elif outcome is Outcome.GAP:
                self._gap(sequence, payload, digest)
            else:
                self._begin(sequence, payload, digest)
        self._apply(run)

    def replayed(self, messages: Sequence[tuple[int, bytes]], *, ended: bool) -> None:
        """Replayed messages in order of arrival; `ended` when the end marker came behind them."""
        if not self._syncing:
            return
        self._heard = self._heard or bool(messages)
        run: list[tuple[int, bytes, int]] = []
        for sequence, payload in messages:
            digest = xxh3_64(payload)
            outcome = self._judge(sequence, digest, run)
            if outcome is Outcome.FIRST:
                self._trust(
                    *(
                        (Trust.EXACT, "in sequence from the first event")
                        if sequence == 0
                        else (Trust.PARTIAL, f"replay begins at sequence {sequence}")
                    )
                )
                run.append((sequence, payload, digest))
            elif outcome is Outcome.DUPLICATE:
                self._unverified = False
            elif outcome is Outcome.NEXT and self._unverified:
                self._another_life("engine no longer has the last applied message")
                return
            elif outcome is Outcome.NEXT and not self._hole:
                run.append((sequence, payload, digest))
            elif outcome is Outcome.RESTART:
                self._apply(run)
                self._another_life("replayed message differs from the one applied")
                return
            elif outcome is Outcome.GAP:
                self._hole = True  # engines before vLLM 0.33 lose replayed messages; ask again from here
        self._apply(run)
        self._deadline = self._clock() + self._bounds.replay_timeout
        if ended:
            self._replay_over()

    def bad_message(self, reason: str) -> None:
        """A message whose frames could not be read."""
        self._errors[reason] += 1

    def connection(self, up: bool) -> None:
        """The connection to the engine came up or was lost."""
        if not up:
            self._lost_at = self._lost_at or self._clock()
            # Another engine may answer next; if it is the same one, its replay brings these again.
            self._forget_buffer()
            return
        was_lost, self._lost_at = self._lost_at is not None, None
        self._unanswered = False
        blind = self._order.last is None
        if self._ask_replay is None:
            return
        if was_lost:
            # Another engine may answer at the same address: compare what it says it sent. A question under way
            # may have died with the old one.
            self._unverified = not blind
            self._sync()
        elif blind and not self._syncing:
            self._sync()

    def resync(self) -> None:
        """Drop every claim and begin again, as after an operator's ClearPod."""
        self._restart("cleared by request", count=False)
        if self._ask_replay is not None:
            self._sync()

    def tick(self) -> None:
        """Time has passed: deadlines."""
        now = self._clock()
        if self._syncing and (now >= self._deadline or now >= self._sync_ends):
            progressed = self._order.last is not None and self._order.last != self._asked_last
            if progressed and now < self._sync_ends:
                self._replay_over(marker=False)
            else:
                self._give_up("replay was not answered" if not progressed else "replay took too long")

    @property
    def waiting_for_replay(self) -> bool:
        """True while `tick` must be called soon."""
        return self._syncing

    @property
    def tried(self) -> bool:
        """The first synchronisation is over, whatever came of it."""
        return self._tried

    # --- what others read ---

    def status(self) -> StreamStatus:
        """A copy, safe to read from any thread."""
        with self._lock:
            status = replace(
                self._status,
                decode_errors=dict(self._errors),
                dropped=dict(self._dropped),
                lag_buckets=list(self._status.lag_buckets),
            )
            applied_at, lost_at, syncing = self._applied_at, self._lost_at, self._syncing
        status.last_sequence = self._order.last
        now = self._clock()
        if applied_at is not None:
            status.age_seconds = max(0.0, now - applied_at)
        if syncing:
            status.state = StreamState.SYNCING
        elif status.trust is Trust.STALE and self._gap_open:
            status.state = StreamState.GAP
        elif status.last_sequence is not None:
            status.state = StreamState.LIVE
        if lost_at is not None and now - lost_at > self._bounds.disconnect_grace:
            status.state = StreamState.DOWN
            if status.trust in (Trust.EXACT, Trust.PARTIAL):
                status.trust = Trust.STALE
                status.trust_reason = f"connection lost for over {self._bounds.disconnect_grace:g} s"
        return status

    # --- order ---

    def _judge(self, sequence: int, digest: int, run: Sequence[tuple[int, bytes, int]]) -> Outcome:
        if run:  # judged, but not applied yet
            last = run[-1][0]
            if sequence == last + 1:
                return Outcome.NEXT
            if sequence > last:
                return Outcome.GAP
            for other, _, other_digest in run:
                if other == sequence:
                    return Outcome.DUPLICATE if other_digest == digest else Outcome.RESTART
        return self._order.judge(sequence, digest)

    def _begin(self, sequence: int, payload: bytes, digest: int) -> None:
        """The first message of a life."""
        if sequence == 0:
            self._trust(Trust.EXACT, "in sequence from the first event")
        elif self._ask_replay is not None and not self._unanswered:
            self._sync(evident=True)
            self._keep(sequence, payload)
            return
        else:
            self._trust(Trust.PARTIAL, f"joined at sequence {sequence}, no replay of what came before")
        self._apply([(sequence, payload, digest)])

    def _gap(self, sequence: int, payload: bytes, digest: int) -> None:
        self._status.gaps += 1
        if self._ask_replay is not None:
            self._sync(evident=True)
            self._keep(sequence, payload)
            return
        self._jump(sequence, "no replay endpoint")
        self._apply([(sequence, payload, digest)])

    def _jump(self, sequence: int, why: str) -> None:
        missing = f"{sequence - (self._order.last or 0) - 1} messages missing before sequence {sequence}"
        if self._bounds.drop_on_gap:
            self._stream.clear()
            self._trust(Trust.PARTIAL, f"claims dropped: {missing}, {why}")
        else:
            self._trust(Trust.STALE, f"{missing}, {why}")
            self._gap_open = True

    def _restart(self, why: str, *, count: bool = True) -> None:
        self._stream.clear()
        self._order.restarted()
        self._asked_last = None
        self._unanswered = False
        self._unverified = False
        with self._lock:
            if count:
                self._status.restarts += 1
            self._status.epoch += 1
        self._trust(Trust.COLD, why)

    def _another_life(self, why: str) -> None:
        # What waits may be the dead engine's; the living one's comes with the replay.
        self._forget_buffer()
        self._restart(why)
        self._sync()

    # --- repair ---

    def _sync(self, *, evident: bool = False) -> None:
        """Ask; `evident` when a message that came already is what the replay has to reach."""
        now = self._clock()
        self._syncing = True
        self._asks = 0
        self._sync_ends = now + self._bounds.seconds
        self._ask(evident=evident)

    def _ask(self, *, evident: bool = False) -> None:
        assert self._ask_replay is not None
        # From the last applied one, not the next: a restarted engine has another message under its number.
        start = self._order.last or 0
        self._asks += 1
        self._asked_last = self._order.last if self._order.last is not None else -1
        self._hole = False
        self._heard = False
        self._evident = evident or bool(self._buffer)
        self._deadline = self._clock() + self._bounds.replay_timeout
        self._status.replays += 1
        self._ask_replay(start)

    def _keep(self, sequence: int, payload: bytes) -> None:
        """A live message while a replay is under way."""
        if sequence - (self._buffer[-1][0] if self._buffer else self._order.last or 0) > MAX_JUMP:
            self._errors["sequence_jump"] += 1
            return
        if self._buffer and sequence <= self._buffer[-1][0]:
            known = any(each == (sequence, payload) for each in self._buffer)
            if known or self._order.judge(sequence, xxh3_64(payload)) is Outcome.DUPLICATE:
                self._status.duplicates += 1
                return
            self._forget_buffer()
            self._restart("sequence fell back during a replay")
            self._sync(evident=True)
        if self._buffer and sequence > self._buffer[-1][0] + 1:
            self._status.gaps += 1
        self._buffer.append((sequence, payload))
        self._buffered_bytes += len(payload)
        if len(self._buffer) > self._bounds.messages or self._buffered_bytes > self._bounds.bytes:
            self._dropped["sync_buffer_full"] += 1
            self._give_up("too many messages came during the replay")

    def _replay_over(self, *, marker: bool = True) -> None:
        if marker and not self._heard and self._order.last is not None:
            # It was asked from the last applied message on, and a living engine keeps its newest ones.
            self._another_life("engine no longer has the last applied message")
            return
        before = self._asked_last
        if not self._unverified and not self._drain():
            self._another_life("published message differs from the one replayed")
            return
        last = -1 if self._order.last is None else self._order.last
        # What still waits lies behind a hole. A replay asked for before it was known may have ended before it.
        short = bool(self._buffer)
        # Engines before vLLM 0.33 can lose the end of a long replay and still send the marker.
        long = before is not None and last - before > LONG_REPLAY
        progressed = last != before
        again = self._hole or short or long or not marker
        if again and (progressed or (short and not self._evident)) and self._asks < MAX_REPLAY_ASKS:
            self._ask()
            return
        if self._hole or short:
            self._give_up("replay does not cover them")
            return
        self._end_sync()

    def _drain(self) -> bool:
        """Apply the waiting messages that follow in sequence; False when one is another engine's."""
        run: list[tuple[int, bytes, int]] = []
        done = 0
        for sequence, payload in self._buffer:
            last = run[-1][0] if run else self._order.last
            if last is None and sequence > 0:
                break
            digest = xxh3_64(payload)
            if last is None:
                self._trust(Trust.EXACT, "in sequence from the first event")
            elif sequence > last + 1:
                break
            elif sequence <= last:
                if self._foreign(sequence, digest, run):
                    return False
                done += 1
                continue
            run.append((sequence, payload, digest))
            done += 1
        self._buffered_bytes -= sum(len(payload) for _, payload in self._buffer[:done])
        self._buffer = self._buffer[done:]
        self._apply(run)
        return True

    def _foreign(self, sequence: int, digest: int, run: Sequence[tuple[int, bytes, int]]) -> bool:
        """A waiting message, not above the last applied one, is not the one applied under its number."""
        last = self._order.last
        if last is not None and sequence <= last - REMEMBERED:
            return False  # too long ago to compare: a long replay brought it
        return self._judge(sequence, digest, run) is Outcome.RESTART

    def _give_up(self, why: str) -> None:
        self._unanswered = not self._heard
        if self._order.last is None and not self._buffer:
            self._trust(Trust.COLD, why)
        elif self._order.last is not None and self._hole and not self._buffer:
            self._trust(Trust.STALE, why)
        elif self._unverified:
            self._trust(Trust.STALE, f"connection was lost, and {why}")
        self._unverified = False
        self._end_sync(why)

    def _end_sync(self, why: str = "replay does not cover them") -> None:
        self._syncing = False
        self._tried = True
        held = self._buffer
        self._forget_buffer()
        run: list[tuple[int, bytes, int]] = []
        for number, (sequence, payload) in enumerate(held):
            digest = xxh3_64(payload)
            last = run[-1][0] if run else self._order.last
            if last is not None and sequence <= last:
                if self._foreign(sequence, digest, run):
                    self._restart("sequence fell back during a replay")
                    self._sync(evident=True)
                    for each in held[number:]:
                        self._keep(*each)
                    return
                continue  # the replay brought it already
            if last is None:
                if sequence == 0:
                    self._trust(Trust.EXACT, "in sequence from the first event")
                else:
                    self._trust(Trust.PARTIAL, f"joined at sequence {sequence}: {why}")
            elif sequence > last + 1:
                self._apply(run)
                run = []
                self._jump(sequence, why)
            run.append((sequence, payload, digest))
        self._apply(run)

    def _forget_buffer(self) -> None:
        self._buffer = []
        self._buffered_bytes = 0

    # --- effect ---

    def _apply(self, run: Sequence[tuple[int, bytes, int]]) -> None:
        if not run:
            return
        applied = self._stream.apply([payload for _, payload, _ in run])
        for sequence, _, digest in run:
            self._order.applied(sequence, digest)
        self._count(applied, len(run))

    def _count(self, applied: Applied, messages: int) -> None:
        reasons = applied.reasons
        lag = max(0.0, self._wall() - applied.timestamp) if applied.timestamp > 0 else None
        with self._lock:
            status = self._status
            status.messages += messages
            status.events += applied.events
            status.blocks_stored += applied.blocks_stored
            status.blocks_removed += applied.blocks_removed
            self._applied_at = self._clock()
            if lag is not None:
                status.lag_seconds = lag
                status.lag_sum += lag
                for bucket in range(bisect_left(LAG_BOUNDS, lag), len(status.lag_buckets)):
                    status.lag_buckets[bucket] += 1
            for reason, times in reasons.items():
                (self._errors if reason in _UNREADABLE else self._dropped)[reason] += times
        if applied.clears:
            self._trust(Trust.EXACT, "in sequence since all blocks were cleared")
        self._judge_reasons(reasons)

    def _judge_reasons(self, reasons: dict[str, int]) -> None:
        if not reasons:
            return
        unsound = [reason for reason in _UNSOUND if reason in reasons]
        incomplete = [reason for reason in _INCOMPLETE if reason in reasons]
        if unsound:
            self._trust(Trust.STALE, f"could not be read: {', '.join(unsound)}")
        elif incomplete and self._status.trust is Trust.EXACT:
            self._trust(Trust.PARTIAL, f"not taken in: {', '.join(incomplete)}")

    def _trust(self, trust: Trust, reason: str) -> None:
        if trust is not Trust.STALE:
            self._gap_open = False
        with self._lock:
            self._status.trust = trust
            self._status.trust_reason = reason
