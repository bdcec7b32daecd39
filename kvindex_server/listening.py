"""Endpoints that engines dial into: each is bound once, for all pods that are told apart there by topic."""

import threading
from dataclasses import dataclass

from kvindex_server import wire
from kvindex_server._core import Listener
from kvindex_server.pods import host


@dataclass(slots=True)
class _Shared:
    listener: Listener
    users: int = 0


_lock = threading.Lock()
_shared: dict[tuple[str, int], _Shared] = {}


def join(ip: str, port: int) -> Listener:
    """Binds an address for its first user. OSError when it cannot be bound; `leave` when it is no longer used."""
    with _lock:
        shared = _shared.get((ip, port))
        if shared is None:
            listener = Listener(ip, port, wire.MAX_FRAME_BYTES * wire.FRAME_ENDS_CONNECTION)
            shared = _shared[ip, port] = _Shared(listener)
        shared.users += 1
        return shared.listener


def leave(ip: str, port: int) -> None:
    """The address is free when its last user has left, and no longer refers to the listener."""
    with _lock:
        shared = _shared[ip, port]
        shared.users -= 1
        if shared.users == 0:
            del _shared[ip, port], shared


def unclaimed() -> dict[str, list[str]]:
    """Of each endpoint, the topics of connected engines that no pod is registered for."""
    with _lock:  # all the while: nobody else may refer to a listener when its last user leaves
        return {
            f"tcp://{host(ip)}:{port}": [topic.decode(errors="replace") for topic, _ in shared.listener.unclaimed()]
            for (ip, port), shared in _shared.items()
        }
