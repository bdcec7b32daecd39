"""What to ask an engine again when a stream could not be repaired at once, and what its answer means."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from kvindex_server._core import Order, Outcome, xxh3_64


class Aim(enum.Enum):
    """What a later answer could mend."""

    VERIFY = "is the engine the one that published message `first`"
    COMPARE = "does the engine's own copy of messages `first` to `last` differ from what could not be read"
    REBUILD = "can message `first`, or one before it, be had again"


class Verdict(enum.Enum):
    """What the answer says."""

    SAME = "the engine is the one that was followed"
    OTHER = "what was applied is not what this engine published"
    COVERED = "a replay now brings what was missing"
    HOPELESS = "no replay will bring it"
    INCOMPLETE = "the answer came to an end before it said anything"


@dataclass(slots=True)
class Rearm:
    """One thing to try again, with exponential back-off. Times are those of the stream's clock, in seconds."""

    aim: Aim
    first: int
    last: int
    start: int
    """The sequence to ask from."""
    due: float
    delay: float

    def failed(self, now: float, longest: float) -> None:
        """No answer came: try again later."""
        self.delay = min(self.delay * 2, longest)
        self.due = now + self.delay

    def judge(self, messages: Sequence[tuple[int, bytes]], order: Order, *, ended: bool, heard: bool) -> Verdict | None:
        """The meaning of replayed messages, `heard` when others came before them; None when more are needed."""
        for sequence, payload in messages:
            if self.aim is Aim.REBUILD:
                return Verdict.COVERED if sequence <= self.first else Verdict.HOPELESS
            if self.aim is Aim.VERIFY:
                same = sequence == self.first and order.judge(sequence, xxh3_64(payload)) is Outcome.DUPLICATE
                return Verdict.SAME if same else Verdict.OTHER
            if sequence > self.first and not heard:
                return Verdict.HOPELESS  # older ones are forgotten
            heard = True
            if not order.remembers(sequence):
                return Verdict.HOPELESS
            if order.judge(sequence, xxh3_64(payload)) is Outcome.RESTART:
                return Verdict.OTHER
            if sequence == self.first:  # else the replay lost some: these are asked for again
                self.first = self.start = sequence + 1
            if self.first > self.last:
                return Verdict.HOPELESS
        if not ended:
            return None
        # A living engine keeps its newest messages; only one that began anew has none of these.
        return Verdict.INCOMPLETE if heard else Verdict.OTHER
