"""What messages in order do to one stream's claims and counters."""

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvindex_server._core import Applied, Left, Stream
from kvindex_server.stream import LAG_BOUNDS, Cause, Message, StreamStatus, Trust

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
    "unread_extras",
    "missing_parent",
)
_UNREADABLE = (*_UNSOUND, "unknown_event", "token_range", "token_ids", "unread_extras")


class Applier:
    """Applies one stream's messages and counts. `status` may be called from any thread, the rest from the stream's."""

    def __init__(
        self, stream: Stream, status: StreamStatus, clock: Callable[[], float], wall: Callable[[], float] = time.time
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._wall = wall
        self._lock = threading.Lock()
        self._errors: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._applied_at: float | None = None
        self.counters = status
        """Single numbers that only the stream's own thread changes; all else is changed under the lock."""

    def apply(self, run: Sequence[Message]) -> tuple[list[str], list[str], bool]:
        """Take messages in, in a row; why claims may be wrong now, why some may be missing, if all were cleared."""
        applied = self._stream.apply([payload for _, payload, _ in run], run[0][0] if run else None)
        lags = [max(0.0, self._wall() - applied.timestamp)] if applied.timestamp > 0 else []
        return self.count(applied, len(run), lags)

    def count(self, applied: Applied, messages: int, lags: Sequence[float]) -> tuple[list[str], list[str], bool]:
        """Count messages that were taken in, some of which were so many seconds old by then; answers as `apply`."""
        reasons = self._count(applied, messages, lags)
        unsound = [each for each in _UNSOUND if each in reasons]
        return unsound, [each for each in _INCOMPLETE if each in reasons], bool(applied.clears)

    def clear(self, left: Left) -> int:
        """Drop every claim, and remember why; returns how many there were."""
        return self._stream.clear(left)

    def believe(self, trust: Trust, cause: Cause, reason: str) -> None:
        """How far the claims can be believed from now on."""
        with self._lock:
            self.counters.trust = trust
            self.counters.trust_cause = cause
            self.counters.trust_reason = reason
        self.touch()

    def touch(self) -> None:
        """Answers that are written from the core's own knowledge ask for the stream's trust anew."""
        self._stream.touch()

    def bad_message(self, reason: str) -> None:
        """Count a message that was not taken in because of what it is."""
        with self._lock:
            self._errors[reason] += 1

    def drop(self, reason: str) -> None:
        """Count something readable that was not taken in."""
        with self._lock:
            self._dropped[reason] += 1

    def status(self) -> StreamStatus:
        """A copy."""
        with self._lock:
            status = replace(
                self.counters,
                decode_errors=dict(self._errors),
                dropped=dict(self._dropped),
                lag_buckets=list(self.counters.lag_buckets),
            )
            applied_at = self._applied_at
        if applied_at is not None:
            status.age_seconds = max(0.0, self._clock() - applied_at)
        return status

    def _count(self, applied: Applied, messages: int, lags: Sequence[float]) -> dict[str, int]:
        reasons = applied.reasons
        with self._lock:
            status = self.counters
            status.messages += messages
            status.events += applied.events
            status.blocks_stored += applied.blocks_stored
            status.blocks_removed += applied.blocks_removed
            self._applied_at = self._clock()
            for lag in lags:
                status.lag_seconds = lag
                status.lag_sum += lag
                for bucket in range(bisect_left(LAG_BOUNDS, lag), len(status.lag_buckets)):
                    status.lag_buckets[bucket] += 1
            for reason, times in reasons.items():
                (self._errors if reason in _UNREADABLE else self._dropped)[reason] += times
        return reasons
