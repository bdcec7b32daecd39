"""What a stream held after certain messages, for comparing replicas that follow the same engine."""

from collections import deque
from dataclasses import dataclass

from kvindex_server.stream import Trust

EVERY = 256
"""A mark is kept after every message whose sequence is a multiple of this, so that replicas have some in common."""

KEPT = 16


@dataclass(frozen=True, slots=True)
class Mark:
    """What was held right after one message, and how far it could be trusted then.

    Two marks can be compared when `sequence` and `message` (a digest of the payload, which carries the engine's time)
    are the same: the same life of the same engine, at the same point. `held` is a digest of the (key, group, tier).
    """

    sequence: int
    message: int
    held: int
    claims: int
    trust: Trust


class Marks:
    """The last marks of one stream; added by its own thread, read by any."""

    def __init__(self) -> None:
        self._kept: deque[Mark] = deque(maxlen=KEPT)
        self._last: Mark | None = None

    def add(self, mark: Mark) -> None:
        """After messages have been applied; an idle stream's last one is kept whatever its number is."""
        if mark.sequence % EVERY == 0:
            self._kept.append(mark)
        self._last = mark

    def clear(self) -> None:
        """Another life has begun."""
        self._last = None
        self._kept.clear()

    def all(self) -> list[Mark]:
        """Those there are, in order of sequence."""
        last = self._last
        marks = {each.sequence: each for each in self._kept.copy()}
        if last is not None:
            marks[last.sequence] = last
        return [marks[each] for each in sorted(marks)]
