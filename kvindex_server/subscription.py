"""A subscription to one engine's events: by the core itself where it connects in plain TCP, else by libzmq."""

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Protocol

from kvindex_server import wire
from kvindex_server._core import MessageSource
from kvindex_server._core import Subscription as CoreSubscription


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


_HOST = r"\[(?P<v6>[^\[\]]+)\]|(?P<v4>\d+(?:\.\d+){3})|(?P<name>[\w.-]+)"
_PLAIN = re.compile(rf"tcp://(?:{_HOST}):(?P<port>\d{{1,5}})", re.ASCII)


def subscribe(endpoint: str, topic: str, *, bind: bool) -> Subscription:
    """Whatever is published with a topic that begins so. BindError when the endpoint cannot be used."""
    plain = _PLAIN.fullmatch(endpoint)
    if plain and not bind and not wire.is_encrypted() and 0 < (port := int(plain["port"])) < 1 << 16:
        try:
            if plain["v6"]:
                ipaddress.IPv6Address(plain["v6"])
            elif plain["v4"]:
                socket.inet_aton(plain["v4"])  # also what begins with zeros, as the system reads it
            return _Connected(plain["v6"] or plain["v4"] or plain["name"], port, topic)
        except (ValueError, OSError) as error:
            raise wire.BindError(f"{endpoint}: {error}") from error
    return _OfLibrary(endpoint, topic, bind=bind)


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
