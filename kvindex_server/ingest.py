"""The write path of one stream on one screen: order, repair by replay, and what it says of trust."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvindex_server._core import Drained, Left, Order, Outcome, Stream, xxh3_64
from kvindex_server.applier import Applier
from kvindex_server.marks import EVERY, Mark, Marks
from kvindex_server.rearm import Aim, Rearm, Verdict
from kvindex_server.snapshot import SavedStream
from kvindex_server.stream import Cause, Message, StreamState, StreamStatus, Trust

MAX_REPLAY_ASKS = 64
"""Asks of one repair; each must bring something new, so only a hostile engine gets there."""

LONG_REPLAY = 512
"""So many messages may have lost their end without a word (see `Ingest._replay_over`)."""

ARRIVAL_SECONDS = 1.0
"""So long the first question waits for the subscription: asked for later, nothing falls between the two."""

MAX_JUMP = 1 << 40
"""No stream loses so many messages: such a number is damage, and believing it would fence the pod for nothing."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of what is kept while a replay is under way, and of how long is waited."""

    messages: int = 100_000
    bytes: int = 256 * 1024 * 1024
    seconds: float = 30.0
    replay_timeout: float = 5.0
    disconnect_grace: float = 10.0
    rearm_seconds: float = 5.0
    rearm_max_seconds: float = 300.0
    drop_on_gap: bool = False


class Ingest:
    """One stream's order and trust. All calls but `status` come from the stream's own thread.

    `ask` sends a replay request from a sequence; None when the pod has no replay endpoint. When `watched`, `connection`
    tells of every connection of the event socket, and nothing is complete before the first one.
    """

    def __init__(
        self,
        stream: Stream,
        status: StreamStatus,
        bounds: Bounds,
        ask: Callable[[int], None] | None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        *,
        watched: bool = False,
    ) -> None:
        self._applier = Applier(stream, status, clock, wall)
        self._stream = stream
        self._counters = status
        self._bounds = bounds
        self._ask_replay = ask
        self._clock = clock
        self.order = Order()
        """Handed to the core, which moves it on with every message it applies from the socket itself."""
        self.marks = Marks()
        """What was held after certain messages; to be read from any thread."""
        self._wall = wall
        # Whether an engine was ever connected, and until when the first question waits for that.
        self._reached = not watched
        self._postponed: float | None = None
        self._begun_wall = 0.0
        self._epoch_made = 0
        self._lost_at: float | None = None
        self._lost_wall = 0.0
        self._tried = False
        # Why claims may be wrong, beside what is believed of them; and what could mend it.
        self._doubt = ""
        self._doubt_cause = Cause.GAP
        self._doubted_at = 0.0
        self._rearm: Rearm | None = None
        self._probing = False
        self._unfillable: int | None = None
        # Why the engine may be another one, and the message by which it shows to be the same.
        self._stranger = ""
        self._verify: int | None = None
        # A replay under way.
        self._syncing = False
        self._behind = False
        self._clearing = 0
        self._clearing_lock = threading.Lock()
        self._first_applied = 0
        self._unsure = False
        self._unread: int | None = None
        self._buffer: list[tuple[int, bytes]] = []
        self._buffered_bytes = 0
        self._asks = 0
        self._asked_last: int | None = None
        self._hole = False
        self._heard = False
        self._evident = False
        self._unanswered = False
        self._deadline = 0.0
        self._sync_ends = 0.0

    # --- what the subscriber tells ---

    def start(self) -> None:
        """Subscribed: ask for what was published before."""
        self._begun_wall = self._wall()
        if self._ask_replay is None:
            self._tried = True
        elif self._reached:
            self._sync()
        else:
            self._postponed = self._clock() + ARRIVAL_SECONDS

    def resume(self, saved: SavedStream) -> None:
        """Go on behind a saved state that the stream holds again; before `start`."""
        self.order.applied(saved.last_sequence, saved.digest)
        self._counters.epoch = max(self._counters.epoch, saved.epoch)
        self._applier.believe(saved.trust, saved.cause, saved.reason)
        self._verify = saved.last_sequence
        self._stranger = "restored from a snapshot, and the engine is being asked whether it is the same"
        self._date_doubt()
        if self._ask_replay is None:
            self._doubt_identity("restored from a snapshot, and no replay endpoint tells what came since")

    def save(self) -> dict[str, Any] | None:
        """Up to where the stream's state goes and how it is trusted; None when it is not worth saving."""
        status, last = self._applier.status(), self.order.last
        if (
            last is None
            or self._clearing
            or self._doubt
            or self._stranger
            or status.trust not in (Trust.EXACT, Trust.PARTIAL)
        ):
            return None
        return {
            "epoch": status.epoch,
            "last_sequence": last,
            "digest": self.order.last_digest,
            "trust": status.trust,
            "cause": status.trust_cause,
            "reason": status.trust_reason,
        }

    def live(self, messages: Sequence[tuple[int, bytes]]) -> None:
        """Published messages (sequence, payload), in order of arrival."""
        if not self._reached:
            self._arrived()  # the monitor tells it a moment later
        run: list[Message] = []
        for sequence, payload in messages:
            if self._syncing:
                self._keep(sequence, payload)
                continue
            digest = xxh3_64(payload)
            outcome = self._judge(sequence, digest, run)
            if outcome is Outcome.NEXT:
                run.append((sequence, payload, digest))
                continue
            if outcome is Outcome.GAP and sequence - (run[-1][0] if run else self.order.last or 0) > MAX_JUMP:
                self.bad_message("sequence_jump")
                continue
            self._apply(run)
            run = []
            if outcome is Outcome.DUPLICATE:
                self._counters.duplicates += 1
            elif outcome is Outcome.RESTART:
                self._restart("sequence fell back")
                self._begin(sequence, payload, digest)
            elif outcome is Outcome.GAP:
                self._gap(sequence, payload, digest)
            else:
                self._begin(sequence, payload, digest)
        self._apply(run)

    @property
    def in_order(self) -> bool:
        """True while the core may apply messages that are next in order itself; see `drained`."""
        return self._reached and not self._syncing and self.order.last is not None

    def drained(self, drained: Drained) -> None:
        """The core has applied published messages, all in order."""
        if drained.messages:
            for sequence, digest, held, claims in drained.marks:
                self.marks.add(Mark(sequence, digest, held, claims, self._marked_trust()))
            effect = self._applier.count(drained.applied, drained.messages, drained.lags)
            self._judge_effect(*effect, drained.first, drained.first + drained.messages - 1)
            if drained.withheld is not None:
                self.order.applied(*drained.withheld)
            self._mark()

    def replayed(self, messages: Sequence[tuple[int, bytes]], *, ended: bool) -> None:
        """Replayed messages in order of arrival; `ended` when the end marker came behind them."""
        if self._lost_at is not None:
            return  # it may be another engine's answer; when the connection is back, it is asked again
        if self._probing:
            self._probed(messages, ended=ended)
            return
        if not self._syncing:
            return
        self._heard = self._heard or bool(messages)
        run: list[Message] = []
        for sequence, payload in messages:
            digest = xxh3_64(payload)
            outcome = self._judge(sequence, digest, run)
            if outcome is Outcome.RESTART:
                self._apply(run)
                self._another_life("replayed message differs from the one applied")
                return
            if self._verify is not None and sequence >= self._verify:
                if sequence > self._verify:
                    self._another_life("engine no longer has the last applied message")
                    return
                self._verified()
            if outcome is Outcome.FIRST:
                self._first(sequence, f"replay begins at sequence {sequence}")
                run.append((sequence, payload, digest))
            elif outcome is Outcome.NEXT and not self._hole:
                run.append((sequence, payload, digest))
            elif outcome is Outcome.GAP:
                self._hole = True  # engines before vLLM 0.33 lose replayed messages; ask again from here
        self._apply(run)
        self._deadline = self._clock() + self._bounds.replay_timeout
        if ended:
            self._replay_over()

    def bad_message(self, reason: str) -> None:
        """Something that was no message of the stream."""
        self._applier.bad_message(reason)

    def unread(self, reason: str, sequence: int | None, *, replayed: bool = False) -> None:
        """A message that was dropped unread; `sequence` is its number if that is known."""
        self.bad_message(reason)
        last = self.order.last
        if sequence is None or sequence - (last or 0) > MAX_JUMP:
            return
        if replayed and self._probing:
            self._probe_unread(sequence)
        elif self._syncing:
            self._heard = self._heard or replayed
            self._unread = max(sequence, self._unread or 0)
        elif not replayed and last is not None and sequence > last:
            self._doubt_unread(reason)

    def ended(self) -> None:
        """The connection was ended over what came on it, perhaps a message of the stream."""
        self.bad_message("protocol")
        if self.order.last is not None:
            self._doubt_unread("connection ended by what is no message, or too large")

    def peer_left(self) -> None:
        """One of several peers of a bound endpoint went; those that stay may be another engine."""
        if self._ask_replay is None and self._epoch_made != self._counters.epoch:
            return  # the numbers have told it already: what is followed is the newcomer
        self.connection(False)
        self.connection(True)

    def connection(self, up: bool) -> None:
        """The connection to the engine came up or was lost."""
        if not up:
            if self._lost_at is None:
                self._lost_at, self._lost_wall = self._clock(), self._wall()
            # Another engine may answer next; if it is the same one, its replay brings these again.
            self._forget_buffer()
            return
        self._epoch_made = self._counters.epoch
        if not self._reached:
            self._arrived()
            return
        was_lost, self._lost_at = self._lost_at is not None, None
        self._unanswered = False
        last = self.order.last
        if was_lost and last is not None:
            # Another engine may answer at the same address: compare what it says it sent.
            self._verify = last if self._verify is None else self._verify
            if self._ask_replay is None:
                self._doubt_identity("connection was lost, and no replay endpoint tells who came back")
            else:
                self._stranger = "connection was lost, and the engine is being asked whether it is the same"
                self._date_doubt()
                self._applier.touch()
        if self._ask_replay is not None and (was_lost or (last is None and not self._syncing)):
            self._sync()  # a question under way may have died with the old engine

    def _arrived(self) -> None:
        """The first connection: from now on nothing is missed, but since an answer that came before there may be."""
        self._reached = True
        self._lost_at = None
        self._unanswered = False
        if self._ask_replay is None:
            self._applier.touch()
            return
        if self.order.last is not None and not self._stranger:
            self._verify = self.order.last if self._verify is None else self._verify
            self._stranger = "connected after the replay, and the engine is being asked whether it is the same"
            self._date_doubt()
        self._sync()

    def clearing(self) -> None:
        """From any thread: the claims are being dropped, and `resync` follows; until then nothing is known."""
        with self._clearing_lock:
            self._clearing += 1

    def resync(self) -> None:
        """Drop every claim and begin again, as after an operator's ClearPod; once for every `clearing`."""
        self._restart("cleared by request", count=False, left=Left.REQUESTED)
        with self._clearing_lock:
            self._clearing = max(0, self._clearing - 1)
        if self._ask_replay is not None:
            self._sync()

    def diverged(self, epoch: int, why: str) -> None:
        """A sibling that was as sure of the same messages holds something else; nothing to do in another epoch."""
        if epoch == self._counters.epoch and self.status().trust is Trust.EXACT:
            self._unfillable = None  # what a replay brought may be what was wrong
            self._doubt_claims(why, Aim.REBUILD, 0, cause=Cause.DIVERGED)

    def replaced(self, saved: SavedStream, epoch: int) -> bool:
        """The claims are dropped, and those of a sibling's state are to take their place; then `start`.

        False when the stream is busy, in another epoch, exact by now, or could not ask its engine whose they are.
        """
        busy = self.waiting_for_replay or self._lost_at is not None or not self._reached or self._ask_replay is None
        if busy or epoch != self._counters.epoch or self.status().trust is Trust.EXACT:
            return False
        self._restart("replaced by a sibling's state", count=False, left=Left.REBUILT)
        self.resume(saved)
        return True

    def tick(self) -> None:
        """Time has passed: deadlines."""
        now = self._clock()
        if self._postponed is not None and now >= self._postponed:
            self._sync()
        if self._syncing:
            progressed = self.order.last is not None and self.order.last != self._asked_last
            if progressed and not self._buffer and now >= self._sync_ends:
                self._sync_ends = now + self._bounds.seconds  # long, but it gets on, and nothing waits for it
            if now >= self._deadline or now >= self._sync_ends:
                if progressed and now < self._sync_ends:
                    self._replay_over(marker=False)
                else:
                    self._give_up("replay was not answered" if not progressed else "replay took too long")
        elif self._rearm is not None and self._probing and now >= self._deadline:
            self._probing = False
            self._rearm.failed(now, self._bounds.rearm_max_seconds)
        elif self._rearm is not None and not self._probing and now >= self._rearm.due:
            self._probing = True
            self._heard = False
            self._send(self._rearm.start)

    @property
    def waiting_for_replay(self) -> bool:
        """True while `tick` must be called soon."""
        return self._syncing or self._probing or self._postponed is not None

    @property
    def synced(self) -> bool:
        """The engine has told what it could of the past; without a replay endpoint there is nothing to wait for."""
        blind = not self._reached and self.order.last is not None
        return self._tried and not self._unanswered and not self._doubt and not self._stranger and not blind

    # --- what others read ---

    def status(self) -> StreamStatus:
        """A copy, safe to read from any thread."""
        status = self._applier.status()
        status.last_sequence = self.order.last
        status.replay_unanswered = self._unanswered
        doubt, lost_at = self._doubt or self._stranger, self._lost_at
        if self._clearing:
            status.trust, status.trust_cause, status.trust_reason = Trust.COLD, Cause.RESTARTED, "being cleared"
        elif doubt:
            status.stale_since = self._doubted_at
            status.trust, status.trust_reason = Trust.STALE, doubt
            status.trust_cause = self._doubt_cause if self._doubt else Cause.CONNECTION_LOST
        elif not self._reached and status.trust in (Trust.EXACT, Trust.PARTIAL):
            status.trust, status.trust_cause = Trust.STALE, Cause.CONNECTION_LOST
            status.trust_reason = "event socket not reached: what is known comes from a replay"
            status.stale_since = self._begun_wall
        elif self._behind and status.trust is Trust.EXACT:
            # Nobody knows yet how much there is still to come.
            status.trust, status.trust_cause = Trust.PARTIAL, Cause.CATCHING_UP
            status.trust_reason = "what was missed is being replayed"
        if self._syncing:
            status.state = StreamState.SYNCING
        elif self._doubt and self._doubt_cause is Cause.GAP:
            status.state = StreamState.GAP
        elif status.last_sequence is not None and self._reached:
            status.state = StreamState.LIVE
        if lost_at is not None and self._clock() - lost_at > self._bounds.disconnect_grace:
            status.state = StreamState.DOWN
            if status.trust in (Trust.EXACT, Trust.PARTIAL):
                status.trust, status.trust_cause = Trust.STALE, Cause.CONNECTION_LOST
                status.trust_reason = f"connection lost for over {self._bounds.disconnect_grace:g} s"
                status.stale_since = self._lost_wall
        return status

    # --- order ---

    def _judge(self, sequence: int, digest: int, run: Sequence[Message]) -> Outcome:
        if run:  # judged, but not applied yet
            last = run[-1][0]
            if sequence == last + 1:
                return Outcome.NEXT
            if sequence > last:
                return Outcome.GAP
            for other, _, other_digest in run:
                if other == sequence:
                    return Outcome.DUPLICATE if other_digest == digest else Outcome.RESTART
        return self.order.judge(sequence, digest)

    def _begin(self, sequence: int, payload: bytes, digest: int) -> None:
        """The first message of a life."""
        if sequence and self._ask_replay is not None and not self._unanswered:
            self._sync(evident=True)
            self._keep(sequence, payload)
            return
        self._first(sequence, f"joined at sequence {sequence}, no replay of what came before")
        self._apply([(sequence, payload, digest)])

    def _first(self, sequence: int, late: str) -> None:
        """What the first applied message says of the past; `late` when it has one."""
        self._first_applied = sequence
        if sequence == 0:
            self._believe(Trust.EXACT, Cause.IN_SEQUENCE, "in sequence from the first event")
            return
        self._believe(Trust.PARTIAL, Cause.JOINED_LATE, late)
        if self._unanswered:
            self._rearm = self._new_rearm(Aim.REBUILD, sequence - 1, sequence - 1, start=0)

    def _gap(self, sequence: int, payload: bytes, digest: int) -> None:
        self._counters.gaps += 1
        if self._ask_replay is not None:
            self._sync(evident=True)
            self._keep(sequence, payload)
            return
        self._jump(sequence, self.order.last or 0, "no replay endpoint")
        self._apply([(sequence, payload, digest)])

    def _jump(self, sequence: int, last: int, why: str) -> None:
        missing = sequence - last - 1
        self._doubt_claims(f"{missing} messages missing before sequence {sequence}, {why}", Aim.REBUILD, last + 1)

    def _restart(self, why: str, *, count: bool = True, left: Left = Left.RESTARTED) -> None:
        self._applier.clear(left)
        self.order.restarted()
        self.marks.clear()
        self._asked_last = None
        self._unanswered = False
        self._verify = None
        self._first_applied = 0
        self._unsure = False
        self._unread = None
        if count:
            self._counters.restarts += 1
        self._counters.epoch += 1
        self._believe(Trust.COLD, Cause.RESTARTED, why)

    def _another_life(self, why: str, *, count: bool = True) -> None:
        """Begin anew; `count` when the engine is another one, else it is only not known what the claims are worth."""
        # What waits may be the dead engine's; the living one's comes with the replay.
        self._forget_buffer()
        self._restart(why, count=count, left=Left.RESTARTED if count else Left.REBUILT)
        self._sync()

    # --- repair ---

    def _sync(self, *, evident: bool = False) -> None:
        """Ask; `evident` when a message that came already is what the replay has to reach."""
        self._syncing = self._behind = True
        self._postponed = None
        self._applier.touch()
        self._probing = False
        self._asks = 0
        self._sync_ends = self._clock() + self._bounds.seconds
        self._ask(evident=evident)

    def _ask(self, *, evident: bool = False) -> None:
        last = self.order.last
        self._asks += 1
        self._asked_last = last if last is not None else -1
        self._hole = False
        self._heard = False
        self._evident = evident or bool(self._buffer)
        # From the last applied one, not the next: a restarted engine has another message under its number.
        self._send(self._verify if self._verify is not None else last or 0)

    def _send(self, start: int) -> None:
        assert self._ask_replay is not None
        self._deadline = self._clock() + self._bounds.replay_timeout
        self._counters.replays += 1
        self._ask_replay(start)

    def _keep(self, sequence: int, payload: bytes) -> None:
        """A live message while a replay is under way."""
        if sequence - (self._buffer[-1][0] if self._buffer else self.order.last or 0) > MAX_JUMP:
            self.bad_message("sequence_jump")
            return
        if not self._buffer and self._foreign(sequence, xxh3_64(payload), ()):
            self._restart("sequence fell back during a replay")
            self._sync(evident=True)
        if self._buffer and sequence <= self._buffer[-1][0]:
            known = any(each == (sequence, payload) for each in self._buffer)
            if known or self.order.judge(sequence, xxh3_64(payload)) is Outcome.DUPLICATE:
                self._counters.duplicates += 1
                return
            self._forget_buffer()
            self._restart("sequence fell back during a replay")
            self._sync(evident=True)
        if self._buffer and sequence > self._buffer[-1][0] + 1:
            self._counters.gaps += 1
        self._buffer.append((sequence, payload))
        self._buffered_bytes += len(payload)
        if len(self._buffer) > self._bounds.messages or self._buffered_bytes > self._bounds.bytes:
            self._applier.drop("sync_buffer_full")
            self._give_up("too many messages came during the replay")

    def _replay_over(self, *, marker: bool = True) -> None:
        if marker and not self._heard and self.order.last is not None:
            # It was asked from the last applied message on, and a living engine keeps its newest ones.
            self._another_life("engine no longer has the last applied message")
            return
        before = self._asked_last
        if self._verify is None and self._work_off():
            self._another_life("published message differs from the one replayed")
            return
        last = -1 if self.order.last is None else self.order.last
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

    def _give_up(self, why: str) -> None:
        self._unanswered = not self._heard
        last = self.order.last
        if last is None and not self._buffer:
            self._believe(Trust.COLD, Cause.NOTHING_HEARD, why)
        elif last is not None and self._hole and not self._buffer:
            self._doubt_claims(why, Aim.REBUILD, last + 1)
        if self._verify is not None:
            self._doubt_identity(f"connection was lost, and {why}")
        self._end_sync(why)

    def _end_sync(self, why: str = "replay does not cover them") -> None:
        """Live again; messages that wait are applied over holes, for the reason given."""
        self._syncing = False
        self._tried = True
        foreign = self._work_off(why)
        if foreign:
            self._forget_buffer()
            self._restart("sequence fell back during a replay")
            self._sync(evident=True)
            for each in foreign:
                self._keep(*each)
            return
        if self._unsure and self._verify is None and self.order.last is not None:
            # Numbers that cannot be compared may be those of another life: ask whether the engine is still the same.
            self._unsure = False
            self._verify = self.order.last
            self._sync()
            return
        self._behind = self._unsure = False
        unread, self._unread = self._unread, None
        if unread is not None and self.order.last is not None and unread > self.order.last:
            self._doubt_unread("during a replay")
        self._applier.touch()

    def _work_off(self, over_holes: str = "") -> list[tuple[int, bytes]]:
        """Apply the waiting messages that follow in sequence, all of them when there is a reason for holes.

        Returns nothing, or those from the first one on that another engine published.
        """
        held, self._buffer, self._buffered_bytes = self._buffer, [], 0
        run: list[Message] = []
        for number, (sequence, payload) in enumerate(held):
            last = run[-1][0] if run else self.order.last
            digest = xxh3_64(payload)
            if last is not None and sequence <= last:
                if self._foreign(sequence, digest, run):
                    self._apply(run)
                    return held[number:]
                self._unsure = self._unsure or not self._comparable(sequence)
                continue  # the replay brought it already
            if sequence > (-1 if last is None else last) + 1:
                if not over_holes:
                    self._buffer = held[number:]
                    self._buffered_bytes = sum(len(each) for _, each in self._buffer)
                    break
                if last is not None:
                    self._apply(run)
                    run = []
                    self._jump(sequence, last, over_holes)
            if last is None:
                self._first(sequence, f"joined at sequence {sequence}: {over_holes}")
            run.append((sequence, payload, digest))
        self._apply(run)
        return []

    def _foreign(self, sequence: int, digest: int, run: Sequence[Message]) -> bool:
        """A waiting message, not above the last applied one, is not the one applied under its number."""
        return self._comparable(sequence) and self._judge(sequence, digest, run) is Outcome.RESTART

    def _comparable(self, sequence: int) -> bool:
        """False when it was too long ago, before a long replay, or before all that the replay still had."""
        last = self.order.last
        return last is None or (sequence > last - Order.REMEMBERED and sequence >= self._first_applied)

    def _forget_buffer(self) -> None:
        self._buffer = []
        self._buffered_bytes = 0

    # --- doubt, and trying again ---

    def _doubt_claims(
        self, reason: str, aim: Aim, first: int, last: int | None = None, *, cause: Cause = Cause.GAP
    ) -> None:
        """Claims may be wrong from now on; a later answer about these messages could mend it."""
        last = first if last is None else last
        hopeless = bool(self._doubt) and self._rearm is None
        self._doubt = reason
        self._date_doubt()
        self._doubt_cause = Cause.UNREADABLE if aim is Aim.COMPARE else cause
        if hopeless or first == self._unfillable:
            self._rearm = None
        elif self._rearm is None or self._rearm.aim is Aim.VERIFY:
            self._rearm = self._new_rearm(aim, first, last)
        elif self._rearm.aim is not aim or aim is Aim.REBUILD:
            # Built anew from a replay that covers the last of them, it does not matter what was wrong before.
            first = max(last, self._rearm.last)
            self._rearm.aim, self._rearm.first, self._rearm.last, self._rearm.start = Aim.REBUILD, first, first, first
        self._applier.touch()
        if aim is not Aim.COMPARE:  # one message spoils only itself
            self._drop_doubtful(reason)

    def _doubt_identity(self, reason: str) -> None:
        """The claims may be those of an engine that is gone."""
        self._stranger = reason
        self._date_doubt()
        if self._rearm is None and self._verify is not None:
            self._rearm = self._new_rearm(Aim.VERIFY, self._verify, self._verify)
        self._applier.touch()
        self._drop_doubtful(reason)

    def _doubt_unread(self, why: str) -> None:
        """A message behind the last applied one was dropped."""
        following = (self.order.last or 0) + 1
        self._doubt_claims(f"message {following} or a later one was not read: {why}", Aim.REBUILD, following)

    def _probe_unread(self, sequence: int) -> None:
        """What was asked for again cannot be read either."""
        self._heard = True
        if self._rearm is not None and self._rearm.aim is Aim.REBUILD and sequence <= self._rearm.first:
            self._probing = False
            self._unfillable, self._rearm = self._rearm.first, None

    def _date_doubt(self) -> None:
        self._doubted_at = self._doubted_at or self._wall()

    def _drop_doubtful(self, reason: str) -> None:
        if self._bounds.drop_on_gap:
            self._applier.clear(Left.DOUBTED)
            self._doubt = self._stranger = ""
            self._doubted_at = 0.0
            self._applier.believe(Trust.PARTIAL, Cause.CLAIMS_DROPPED, f"claims dropped: {reason}")

    def _new_rearm(self, aim: Aim, first: int, last: int, *, start: int | None = None) -> Rearm | None:
        if self._ask_replay is None:
            return None
        delay = self._bounds.rearm_seconds
        # What could not be read is asked for while it can still be compared.
        due = self._clock() + (0.0 if aim is Aim.COMPARE else delay)
        return Rearm(aim, first, last, first if start is None else start, due, delay)

    def _probed(self, messages: Sequence[tuple[int, bytes]], *, ended: bool) -> None:
        assert self._rearm is not None
        rearm = self._rearm
        verdict = rearm.judge(messages, self.order, ended=ended, heard=self._heard)
        self._heard = self._heard or bool(messages)
        if verdict is None:
            self._deadline = self._clock() + self._bounds.replay_timeout
            return
        self._probing = False
        if verdict is Verdict.INCOMPLETE:
            rearm.failed(self._clock(), self._bounds.rearm_max_seconds)
            return
        self._rearm = None
        if verdict is Verdict.SAME:
            self._verified()
        elif verdict is Verdict.COVERED:
            self._another_life("built anew from the engine's replay", count=False)
            self._unfillable = rearm.first
        elif verdict is Verdict.OTHER:
            unread = rearm.aim is Aim.COMPARE and self._heard
            self._another_life("what was applied is not what the engine published", count=not unread)

    def _verified(self) -> None:
        """The engine is the one that was followed before the connection was lost."""
        self._verify = None
        self._stranger = ""
        if not self._doubt:
            self._doubted_at = 0.0
        self._applier.touch()
        if self._rearm is not None and self._rearm.aim is Aim.VERIFY:
            self._rearm = None
        self._mark()  # what was restored may be all there is to compare, as long as the engine is idle

    # --- effect ---

    def _apply(self, run: Sequence[Message]) -> None:
        begin = 0
        while begin < len(run):
            end = begin + 1
            while end < len(run) and run[end - 1][0] % EVERY:
                end += 1
            part = run[begin:end]
            effect = self._applier.apply(part)
            # First how far it can be trusted, then how far it goes: nobody sees the new number beside the old trust.
            self._judge_effect(*effect, part[0][0], part[-1][0])
            for sequence, _, digest in part:
                self.order.applied(sequence, digest)
            self._mark()
            begin = end

    def _mark(self) -> None:
        last = self.order.last
        if last is not None:
            digest, stream = self.order.last_digest, self._stream
            self.marks.add(Mark(last, digest, stream.digest, stream.claims, self._marked_trust()))

    def _marked_trust(self) -> Trust:
        return Trust.STALE if self._doubt or self._stranger else self._counters.trust

    def _judge_effect(self, unsound: list[str], incomplete: list[str], cleared: bool, first: int, last: int) -> None:
        if cleared:
            self._believe(Trust.EXACT, Cause.CLEARED, "in sequence since all blocks were cleared")
        if unsound:
            self._doubt_claims(f"could not be read: {', '.join(unsound)}", Aim.COMPARE, first, last)
        elif incomplete and self._counters.trust is Trust.EXACT:
            self._applier.believe(Trust.PARTIAL, Cause.NOT_TAKEN_IN, f"not taken in: {', '.join(incomplete)}")

    def _believe(self, trust: Trust, cause: Cause, reason: str) -> None:
        """All that is held is known to be so much to be trusted; whatever was in doubt is gone."""
        self._doubt = self._stranger = ""
        self._doubted_at = 0.0
        self._rearm = None
        self._probing = False
        self._applier.believe(trust, cause, reason)
