"""A subscription to one engine's events: by the core itself where it connects in plain TCP, else by libzmq."""

import re
import socket
from collections.abc import Sequence
from typing import Protocol

from kvindex_server import wire
from kvindex_server._core import MessageSource
from kvindex_server._core import Subscription as CoreSubscription
from kvindex_server.errors import InvalidArgument
from kvindex_server.pods import split_tcp


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
    """Whatever is published with a topic that begins so. BindError when the endpoint cannot be used."""
    if bind or wire.is_encrypted() or not endpoint.startswith("tcp://"):
        return _OfLibrary(endpoint, topic, bind=bind)
    try:
        host, port = split_tcp(endpoint, "endpoint")
        if _FOUR_NUMBERS.fullmatch(host):
            socket.inet_aton(host)  # also what begins with zeros, as the system reads it; no name is to be looked up
        return _Connected(host.strip("[]"), port, topic)
    except (InvalidArgument, OSError) as error:
        raise wire.BindError(f"{endpoint}: {error}") from error


class _Connected:
    def __init__(self, host: str, port: int, topic: str) -> None:
        most = wire.MAX_FRAME_BYTES * wire.FRAME_ENDS_CONNECTION
        beats = wire.HEARTBEAT_MS, wire.HEARTBEAT_TIMEOUT_MS
        self.source = CoreSubscription(host, port, topic.encode(), most, *beats)
        self.pollables: Sequence[object] = (self.source.fileno(),)
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
