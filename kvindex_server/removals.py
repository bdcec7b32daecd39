"""What is remembered of blocks that left a pod: how, by which message and when, from where on, and in words."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from kvindex_server._core import Index, Left
from kvindex_server.stream import Cause, StreamStatus, Trust

_LATEST = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


class Reach(enum.IntEnum):
    """From where on every block that left is remembered; the values are those of the proto's RemovalReach."""

    OFF = 1
    NOTHING = 2
    START = 3
    RESTORED = 4
    FULL = 5


@dataclass(frozen=True, slots=True)
class Moment:
    """A message of the stream; no sequence and a time of 0 when not told. Seconds since 1970."""

    sequence: int | None
    time: float

    def __str__(self) -> str:
        message = "a message of unknown sequence" if self.sequence is None else f"message {self.sequence}"
        return f"{message} ({shown(self.time)})"


@dataclass(frozen=True, slots=True)
class Departure:
    """How a block left one (group, tier bit). `earlier`: in a life of the stream before its last restart."""

    how: Left
    group: int
    tier: int
    at: Moment
    earlier: bool

    def words(self, block: int, tier: str) -> str:
        """Of block number `block`; `tier` by its name."""
        where = tier if not self.group else f"{tier}, KV-cache group {self.group}"
        life = " of an earlier life of the engine" if self.earlier else ""
        when, of = shown(self.at.time), f"{self.at}{life}"
        if self.how is Left.REMOVED:
            return f"block {block} was removed from {where} by {of}, by the engine's clock"
        if self.how is Left.CLEARED:
            return f"block {block} left {where} when all blocks were cleared by {of}, by the engine's clock"
        why = {
            Left.RESTARTED: "when the engine was found to have restarted",
            Left.REQUESTED: "as the pod's claims were dropped by request",
            Left.REBUILT: "as the pod's claims were dropped to be built anew",
            Left.DOUBTED: "as it was doubted after a hole, or told without extra keys; the engine may hold it still",
        }[self.how]
        behind = "" if self.at.sequence is None else f", behind message {self.at.sequence}"
        return f"block {block} left {where} at {when}{behind}, {why}"


@dataclass(frozen=True, slots=True)
class Memory:
    """What one rank remembers: from where on it is whole, and per key asked for, latest first, how it left."""

    rank: int
    reach: Reach
    since: Moment
    cleared: Moment | None
    """The last time all blocks were cleared in this life."""
    unnamed: int
    """Blocks of this life that left before anyone had told their tokens."""
    left: Sequence[Sequence[Departure]]

    def words(self) -> str:
        """From where on nothing is forgotten."""
        if self.reach is Reach.OFF:
            return "removals are not remembered (limits.remembered_removals is 0)"
        if self.reach is Reach.NOTHING:
            return "no message came yet whose removals could be remembered"
        if self.reach is Reach.FULL:
            return f"removals are remembered behind {self.since}, older ones had to give way"
        from_where = "since a saved state was restored, " if self.reach is Reach.RESTORED else ""
        return f"removals are remembered {from_where}from {self.since} on"

    def never_since(self, status: StreamStatus) -> str:
        """From where on all that was stored is known, and all that left is remembered; empty when neither is sure."""
        known = status.trust is Trust.EXACT and not (status.unresolved or status.orphans or self.unnamed)
        begun = self.reach in (Reach.START, Reach.RESTORED, Reach.FULL) and self.since.sequence is not None
        if not known or not begun:
            return ""
        assert self.since.sequence is not None
        if self.cleared is not None and self.cleared.sequence is not None:
            whole = self.since.sequence <= self.cleared.sequence
            return f"since all blocks were cleared by {self.cleared}" if whole else ""
        whole = self.reach is Reach.START and self.since.sequence == 0 and status.trust_cause is Cause.IN_SEQUENCE
        return "since the engine's first event" if whole else ""


def remembered(index: Index, pod: str, keys: bytes) -> list[Memory]:
    """Of each rank of a pod that is followed here, and of these keys (u64 little-endian); it takes some microseconds
    per key."""
    return [
        Memory(
            rank,
            Reach[reach.upper()],
            Moment(sequence, time),
            None if cleared is None else Moment(*cleared),
            unnamed,
            [
                [Departure(how, group, tier, Moment(at, when), earlier) for group, tier, how, at, when, earlier in left]
                for left in found
            ],
        )
        for rank, reach, sequence, time, cleared, unnamed, found in index.removals(pod, keys)
    ]


def shown(time: float) -> str:
    """A time in UTC, to the second; engines say what they like."""
    if not 0 < time < _LATEST:
        return "at an unknown time"
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
