"""Whether two replicas hold the same of one engine, and which of them is to do what about it when they do not.

Nobody is believed silently. A stream that knows less than its sibling's takes over the sibling's state, which the
engine then has to confirm. Where both claimed to be EXACT one of them was wrong, and nobody can tell which: each
of them doubts its own and builds it anew from what the engine says.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from kvindex_server.marks import Mark
from kvindex_server.stream import Cause, Trust


class Repair(enum.StrEnum):
    """What this replica is to do about its own stream."""

    NONE = "none"
    ADOPT = "adopt"
    DOUBT = "doubt"


@dataclass(frozen=True, slots=True)
class Side:
    """One replica's view of one rank of a pod; streams are compared only when all but the last three are equal."""

    model: str
    pod: str
    rank: int
    endpoint: str
    incarnation: str
    block_size: int
    hash_seed: int
    trust: Trust
    cause: Cause | None
    """Of this replica's own streams only."""
    marks: Sequence[Mark]

    @property
    def name(self) -> tuple[str, str, int]:
        """Model, pod, rank."""
        return self.model, self.pod, self.rank


@dataclass(frozen=True, slots=True)
class Finding:
    """What a comparison says; `blocks` is by how many at least the two differ, 0 when they do not."""

    sequence: int
    blocks: int
    repair: Repair


_MENDED_BY_A_SIBLING = (Cause.JOINED_LATE, Cause.GAP)
_WORTH = {Trust.COLD: 0, Trust.STALE: 0, Trust.PARTIAL: 1, Trust.EXACT: 2}


def compare(mine: Side, theirs: Side) -> Finding | None:
    """What is to be done here; None when the two have no point in common."""
    if _identity(mine) != _identity(theirs):
        return None
    other = {(each.sequence, each.message): each for each in theirs.marks}
    common = [(mark, other[at]) for mark in mine.marks if (at := (mark.sequence, mark.message)) in other]
    if not common:
        return None
    exact = [(a, b) for a, b in common if a.trust is Trust.EXACT and b.trust is Trust.EXACT and a.held != b.held]
    last, sibling = common[-1]
    differs = last.held != sibling.held
    blocks = max(1, abs(last.claims - sibling.claims)) if differs else 0
    repair = Repair.NONE
    if differs and exact and mine.trust is Trust.EXACT:
        # Also when the sibling doubts its own by now: it was no less sure than this one.
        repair, (last, sibling) = Repair.DOUBT, exact[-1]
        blocks = max(blocks, 1, abs(last.claims - sibling.claims))
    elif differs and mine.cause in _MENDED_BY_A_SIBLING:
        ours, worth = _WORTH[mine.trust], _WORTH[min(theirs.trust, sibling.trust, key=lambda each: _WORTH[each])]
        # Late-comers are both right as far as they go, and the one that knows more has joined earlier.
        if worth > ours or (worth == ours == 1 and sibling.claims > last.claims):
            repair = Repair.ADOPT
    return Finding(last.sequence, blocks, repair)


def _identity(side: Side) -> tuple[object, ...]:
    return (*side.name, side.endpoint, side.incarnation, side.block_size, side.hash_seed)
