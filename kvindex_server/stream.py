"""What is known of one event stream: its state, how far it is trusted and why, its counters."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

Message = tuple[int, bytes, int]
"""A message to apply: sequence, payload, digest of the payload."""

LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds, in seconds, of the ingestion-lag histogram; a last bucket is unbounded."""


class StreamState(enum.IntEnum):
    """Where a stream stands; the values are those of the proto."""

    CONNECTING = 1
    SYNCING = 2
    LIVE = 3
    GAP = 4
    DOWN = 5


class Trust(enum.IntEnum):
    """How far a stream's claims can be believed; the values are those of the proto."""

    COLD = 1
    PARTIAL = 2
    EXACT = 3
    STALE = 4


class Cause(enum.StrEnum):
    """Why a stream is trusted as it is, in one word; `trust_reason` says it in full."""

    NOTHING_HEARD = "nothing_heard"
    IN_SEQUENCE = "in_sequence"
    CLEARED = "cleared"
    JOINED_LATE = "joined_late"
    CATCHING_UP = "catching_up"
    NOT_TAKEN_IN = "not_taken_in"
    CLAIMS_DROPPED = "claims_dropped"
    RESTARTED = "restarted"
    GAP = "gap"
    UNREADABLE = "unreadable"
    CONNECTION_LOST = "connection_lost"
    STORE = "store"
    DIVERGED = "diverged"


@dataclass(frozen=True, slots=True)
class Dialect:
    """How an engine writes its events, seen in a sample of its messages of this life."""

    pod: str
    rank: int
    looked: int
    """Messages of the sample."""
    traits: Sequence[str]
    """What was seen at least once, by the core's names."""
    shortest: int
    longest: int
    """Of a BlockStored sent as an array, its tag counted; 0 when there was none."""
    odd_tag: str
    """The first tag that nobody knows; empty when there was none."""
    root: tuple[int | bytes, Sequence[int]] | None
    """A first block of plain text: the engine's hash and its tokens."""
    adapters: Sequence[str] = ()
    """The first ones that were named in any message, not only in the sample."""
    beginnings: tuple[int, int] = (0, 0)
    """Of prompts, that were stored in any message; and those of them that a salt keeps apart."""


@dataclass
class StreamStatus:
    """What is known of one (pod, rank) for answers, lists and metrics."""

    pod: str
    rank: int
    model: str
    state: StreamState = StreamState.CONNECTING
    trust: Trust = Trust.COLD
    trust_reason: str = "nothing heard"
    trust_cause: Cause = Cause.NOTHING_HEARD
    stale_since: float = 0.0
    """Seconds since 1970, of this host's clock; 0 when not STALE."""
    endpoint: str = ""
    replay_endpoint: str = ""
    topic: str = ""
    """Under which the engine publishes; empty before the first message, too."""
    last_sequence: int | None = None
    lag_seconds: float = 0.0
    age_seconds: float = -1.0
    blocks: int = 0
    blocks_by_tier: dict[str, int] = field(default_factory=dict)
    gaps: int = 0
    restarts: int = 0
    replays: int = 0
    replay_unanswered: bool = False
    """The last replay that was asked for got no answer, whether or not anything is missing."""
    orphans: int = 0
    unresolved: int = 0
    decode_errors: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    messages: int = 0
    events: int = 0
    blocks_stored: int = 0
    blocks_removed: int = 0
    epoch: int = 0
    lag_buckets: list[int] = field(default_factory=lambda: [0] * (len(LAG_BOUNDS) + 1))
    lag_sum: float = 0.0
