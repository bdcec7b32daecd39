"""What the thread of one rank waits for: its events, and what wakes it."""

import itertools
from collections.abc import Sequence

from kvindex_server import wire
from kvindex_server.pods import PodSpec
from kvindex_server.subscription import subscribe

_names = itertools.count()


class Ears:
    """Opened by whoever registers a pod, who is told of an address in use; then owned by the stream's thread."""

    def __init__(self, spec: PodSpec, rank: int) -> None:
        self.events = subscribe(spec.endpoint_of(rank), spec.topic, bind=spec.bind)
        try:
            self.woken, self._waker = wire.wake_pair(f"wake-{next(_names)}")
        except wire.BindError:
            self.events.close()
            raise

    def wake(self) -> None:
        """From any thread, until `close_waker`: the owner is to look what there is to do."""
        self._waker.send([b""])

    def close(self) -> None:
        """By the owner; an endpoint that was bound is free then."""
        self.events.close()
        self.woken.close()

    def close_waker(self) -> None:
        """When the owner is done."""
        self._waker.close()


def open_ears(spec: PodSpec) -> list[Ears]:
    """One per rank of a pod, all of them or none: BindError when an address cannot be used."""
    opened: list[Ears] = []
    try:
        for rank in range(spec.ranks):
            opened.append(Ears(spec, rank))
    except Exception:
        close_ears(opened)
        raise
    return opened


def close_ears(opened: Sequence[Ears]) -> None:
    """Those that no stream has taken."""
    for ears in opened:
        ears.close()
        ears.close_waker()
