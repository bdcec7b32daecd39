"""A subscription to one engine's events: by the core itself in plain TCP, else by libzmq.

libzmq also binds endpoints that are one pod's alone, whatever the topic.
"""

import re
import socket
from collections.abc import Sequence
from typing import Protocol

from kvindex_server import listening, wire
from kvindex_server._core import MessageSource
from kvindex_server._core import Subscription as CoreSubscription
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import bound_address, is_whole, split_tcp


class Subscription(wire.Awaited, Protocol):
    """What a stream's thread needs of it; the thread owns it."""

    @property
    def source(self) -> MessageSource | None:
        """What `wire.drain` takes messages from; None when only `receive` can."""

    @property
    def beside(self) -> Sequence[wire.Awaited]:
        """What else tells of its connection."""

    def receive(self) -> list[bytes] | None:
        """The next message's frames if one is there, else None; also None while `changes` has something to tell."""

    def changes(self) -> list[wire.Connection]:
        """What has happened to the connection, in order."""

    def close(self) -> None:
        """An endpoint that was bound is free then."""


_FOUR_NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+){3}")


def subscribe(endpoint: str, topic: str, *, bind: bool) -> Subscription:
    """Whatever is published with a topic that begins so. BindError when the endpoint cannot be used.

    With a topic, an IP address that is bound may be shared with others whose topic is another one.
    """
    if wire.is_encrypted() or not endpoint.startswith("tcp://"):
        return _OfLibrary(endpoint, topic, bind=bind)
    try:
        host, port = split_tcp(endpoint, "endpoint")
        if bind:
            address = bound_address(host) if topic else None
            return _Listened(address, port, topic) if address else _OfLibrary(endpoint, topic, bind=True)
        if _FOUR_NUMBERS.fullmatch(host):
            socket.inet_aton(host)  # also what begins with zeros, as the system reads it; no name is to be looked up
        return _Connected(host.strip("[]"), port, topic)
    except (InvalidArgument, OSError, ValueError) as error:
        raise wire.BindError(f"{endpoint}: {error}") from error


class _OfCore:
    def __init__(self, source: CoreSubscription) -> None:
        self.source = source
        self.pollables: Sequence[object] = (source.fileno(),)
        self.beside: Sequence[wire.Awaited] = ()

    @property
    def is_pending(self) -> bool:
        return self.source.is_pending

    def receive(self) -> list[bytes] | None:
        return self.source.receive()

    def changes(self) -> list[wire.Connection]:
        return [wire.Connection[each] for each in self.source.changes()]

    def close(self) -> None:
        self.source.close()


class _Connected(_OfCore):
    def __init__(self, host: str, port: int, topic: str) -> None:
        most = wire.MAX_FRAME_BYTES * wire.FRAME_ENDS_CONNECTION
        super().__init__(CoreSubscription(host, port, topic.encode(), most, *_beats()))


class _Listened(_OfCore):
    """The engine of one topic, where several may dial in."""

    def __init__(self, address: str, port: int, topic: str) -> None:
        self._at: tuple[str, int] | None = (address, port)
        listener = listening.join(address, port)
        try:
            super().__init__(CoreSubscription(listener, topic.encode(), is_whole(topic), *_beats()))
        except BaseException:
            del listener
            listening.leave(address, port)
            raise

    def close(self) -> None:
        super().close()
        if self._at is not None:
            listening.leave(*self._at)
            self._at = None


def _beats() -> tuple[int, int]:
    return wire.HEARTBEAT_MS, wire.HEARTBEAT_TIMEOUT_MS


class _OfLibrary:
    def __init__(self, endpoint: str, topic: str, *, bind: bool) -> None:
        self._socket, self.monitor = wire.watched_subscriber(endpoint, topic, bind=bind)
        self.pollables: Sequence[object] = (*self._socket.pollables, *self.monitor.socket.pollables)
        self.beside: Sequence[wire.Awaited] = (self.monitor.socket,)

    @property
    def is_pending(self) -> bool:
        return self.monitor.abandoned

    @property
    def source(self) -> MessageSource | None:
        return self._socket.source

    def receive(self) -> list[bytes] | None:
        return self._socket.receive()

    def changes(self) -> list[wire.Connection]:
        return self.monitor.changes()

    def close(self) -> None:
        self.monitor.close()
        self._socket.close()
