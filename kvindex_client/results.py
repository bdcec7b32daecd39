"""What is answered, as frozen dataclasses."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grpc

from kvindex_client.errors import CallError, Try
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb


class Trust(enum.Enum):
    """How far a pod's claims can be believed; the proto's `Trust`, UNKNOWN for a level this client does not know."""

    UNKNOWN = 0
    COLD = 1
    PARTIAL = 2
    EXACT = 3
    STALE = 4

    @classmethod
    def _missing_(cls, value: object) -> "Trust":
        return cls.UNKNOWN


@dataclass(frozen=True, slots=True)
class PodScore:
    """One candidate. Zero blocks with trust COLD means that nothing is known of the pod, not that it holds nothing."""

    pod: str
    score: float
    matched_blocks: int
    matched_tokens: int
    rank: int
    tier_blocks: Mapping[str, int]
    speculative_blocks: int
    trust: Trust
    trust_reason: str
    age_seconds: float
    """Since the stream's last applied message; -1 when there was none."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Answer to `score`: best first, ties in the candidates' order, zeros included."""

    pods: tuple[PodScore, ...]
    total_blocks: int
    block_size: int
    total_tokens: int
    endpoint: str
    """The replica that answered."""
    failed: tuple[Try, ...] = ()
    """Tries that failed before."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A rank that holds a block."""

    pod: str
    rank: int
    tier: str
    speculative: bool
    group: int


@dataclass(frozen=True, slots=True)
class BlockHolders:
    """One block: its key (0 when known by its engine hash alone) and who holds it."""

    key: int
    holders: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class BlockPods:
    """Answer to `pods_for_blocks`: one entry per block, in order."""

    blocks: tuple[BlockHolders, ...]
    block_size: int
    endpoint: str
    failed: tuple[Try, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Answer to `record_placement`, of the first replica that recorded it."""

    total_blocks: int
    """0 while the model's block size is not known; then nothing was recorded."""
    held_blocks: int
    rank: int
    ttl_seconds: float
    recorded_by: tuple[str, ...] = ()
    """Replicas that recorded it."""
    failed: tuple[Try, ...] = ()
    """Replicas that did not, and why: they do not see this placement."""


def scores(answer: pb.ScoreResponse, endpoint: str, failed: tuple[Try, ...] = ()) -> Scores:
    """A response as a result."""
    pods = tuple(
        PodScore(
            pod=each.pod,
            score=each.score,
            matched_blocks=each.matched_blocks,
            matched_tokens=each.matched_tokens,
            rank=each.rank,
            tier_blocks=dict(each.tier_blocks),
            speculative_blocks=each.speculative_blocks,
            trust=Trust(each.trust),
            trust_reason=each.trust_reason,
            age_seconds=each.age_seconds,
        )
        for each in answer.scores
    )
    return Scores(pods, answer.total_blocks, answer.block_size, answer.total_tokens, endpoint, failed)


def block_pods(answer: pb.GetPodsForBlocksResponse, endpoint: str, failed: tuple[Try, ...]) -> BlockPods:
    """A response as a result."""
    blocks = tuple(
        BlockHolders(
            block.key,
            tuple(Holder(each.pod, each.rank, each.tier, each.speculative, each.group) for each in block.holders),
        )
        for block in answer.blocks
    )
    return BlockPods(blocks, answer.block_size, endpoint, failed)


def placement(names: Sequence[str], told: Sequence[pb.RecordPlacementResponse | CallError]) -> Placement:
    """What each replica answered, as one result; CallError when none of them recorded it."""
    failed = tuple(each for error in told if isinstance(error, CallError) for each in error.tries[-1:])
    answers = {name: each for name, each in zip(names, told, strict=True) if not isinstance(each, CallError)}
    if not answers:
        raise CallError(failed)
    first = next(iter(answers.values()))
    return Placement(first.total_blocks, first.held_blocks, first.rank, first.ttl_seconds, tuple(answers), failed)


def refused(answer: pb.ScoreResponse, endpoint: str) -> Try:
    """The status that stands in a stream's answer for one bad request."""
    code = next((each for each in grpc.StatusCode if each.value[0] == answer.status.code), grpc.StatusCode.UNKNOWN)
    return Try(endpoint, code, answer.status.message)
