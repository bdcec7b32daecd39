"""What a check gets and what it gives: facts of one model, and findings."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvindex_server.pods import PodSpec
from kvindex_server.stream import Dialect, StreamStatus

NO_SALT = "no salt"
"""Among `Probe.other_contexts`: the same prompt without its salt."""
NOR_SALT = " and no salt"
"""At the end of one of them: another adapter, and without the salt."""


class Status(enum.IntEnum):
    """The values are those of the proto."""

    PASS = 1
    WARN = 2
    FAIL = 3
    SKIP = 4


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement; without pod or rank it is about the model as a whole."""

    status: Status
    evidence: str
    remedy: str = ""
    pod: str = ""
    rank: int | None = None
    name: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt looked up as the router would; `blocks` are per pod, of the match."""

    kind: str
    error: str = ""
    tokens: Sequence[int] = ()
    engine_tokens: Sequence[int] = ()
    total_blocks: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)
    lora_name: str = ""
    salted: bool = False
    other_contexts: Mapping[str, int] = field(default_factory=dict)
    """Best match of any pod for the same tokens under another adapter, without the salt, or both."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one model."""

    model: str
    block_size: int
    seed: int
    coverage: float
    streams: Sequence[StreamStatus]
    specs: Mapping[str, PodSpec]
    dialects: Sequence[Dialect] = ()
    loras: Sequence[str] = ()
    aliases: Sequence[str] = ()
    tokenizer: tuple[str, str, bool] | None = None  # mode, reason, has a chat template
    candidates: Sequence[str] = ()
    pods_of_others: Mapping[str, str] = field(default_factory=dict)  # pod -> another model it is registered for
    reached: Mapping[str, str] = field(default_factory=dict)  # endpoint -> "" or why not; of streams not heard
    probe: Probe | None = None
    descriptors: tuple[int, int] = (0, 0)  # in use (-1: none is left), and how many there may be
    unclaimed: Mapping[str, Sequence[str]] = field(default_factory=dict)  # endpoint -> topics of engines of no pod


def of_stream(stream: StreamStatus, status: Status, evidence: str, remedy: str = "") -> Finding:
    return Finding(status, evidence, remedy, stream.pod, stream.rank)


def passed(evidence: str) -> Finding:
    return Finding(Status.PASS, evidence)


def counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
