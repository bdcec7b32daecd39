"""What the thread of one rank waits for: its events, and what wakes it."""

from collections.abc import Sequence

from kvindex_server import wire
from kvindex_server.pods import PodSpec
from kvindex_server.subscription import subscribe


class Ears:
    """Opened by whoever registers a pod, who is told of an address in use; then owned by the stream's thread."""

    def __init__(self, spec: PodSpec, rank: int) -> None:
        self.events = subscribe(spec.endpoint_of(rank), spec.topic, bind=spec.bind)
        try:
            self.waker = wire.Waker()
        except OSError as error:
            self.events.close()
            raise wire.BindError(f"{spec.endpoint_of(rank)}: {error}") from error

    def close(self) -> None:
        """By the owner; an endpoint that was bound is free then. The waker stays, for those who would wake it."""
        self.events.close()


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
        ears.waker.close()
