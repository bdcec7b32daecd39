"""ZeroMQ sockets and frames of KV-event streams, both ends; the only module that imports zmq."""

import contextlib
import enum
import functools
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol

import zmq
import zmq.utils.z85

from kvindex_server._core import Drained, MessageSource, Order, SocketSource, Stream, ZeroMq

_log = logging.getLogger(__name__)

END_SEQUENCE = 0xFFFF_FFFF_FFFF_FFFF
"""Sequence of the marker that ends a replay."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A larger frame is refused: no engine sends one, and a hostile one must not fill the memory.

The message is dropped and counted.
"""

FRAME_ENDS_CONNECTION = 4
"""Above so many times as much the connection is ended before the frame has been read."""

HEARTBEAT_MS = 10_000
HEARTBEAT_TIMEOUT_MS = 20_000
"""An engine's host that went away without a word is noticed after the two together, at the latest."""


class BadFrames(Exception):
    """A message that is no event message; `reason` is a metric label, `sequence` its number if that can be read."""

    def __init__(self, reason: str, sequence: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sequence = sequence


def read_event(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """(sequence, payload) of a published message [topic, seq, payload]."""
    if len(frames) != 3:
        numbered = len(frames) > 1 and len(frames[1]) == 8
        raise BadFrames("frame_count", int.from_bytes(frames[1], "big") if numbered else None)
    sequence, payload = _read(frames[1], frames[2])
    if sequence == END_SEQUENCE:  # means the end of a replay, and nothing on a live socket
        raise BadFrames("sequence_frame")
    return sequence, payload


def read_replay(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """(sequence, payload) of a replayed message: the last two frames, whatever stands before."""
    if len(frames) < 3:
        raise BadFrames("frame_count")
    # vLLM <= 0.25 ends with ["", END] + "" as [.., END, ""]; with a topic it is ["", "", END, ""].
    return _read(frames[-2], frames[-1])


def _read(sequence: bytes, payload: bytes) -> tuple[int, bytes]:
    if len(sequence) != 8:
        raise BadFrames("sequence_frame")
    number = int.from_bytes(sequence, "big")
    if len(payload) > MAX_FRAME_BYTES:
        raise BadFrames("oversized", number)
    return number, payload


class Awaited(Protocol):
    """What can be waited for: a socket, or several things that are one."""

    @property
    def pollables(self) -> Sequence[object]:
        """Sockets of ZeroMQ and file descriptors."""

    @property
    def is_pending(self) -> bool:
        """There is something to do that no pollable tells; never, of most."""
        return False


class Socket(Awaited):
    """A socket owned by the thread that uses it."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._source: SocketSource | None = None

    def receive(self) -> list[bytes] | None:
        """The next message's frames if one is there, else None."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    @property
    def source(self) -> MessageSource | None:
        """What `drain` takes messages from; None when only `receive` can."""
        if self._source is None and (zmq_api := _api()) is not None:
            self._source = SocketSource(zmq_api, self._socket.underlying)
        return self._source

    def send(self, frames: Sequence[bytes]) -> bool:
        """False when it could not be queued."""
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout_ms: int) -> bool:
        """True when a message is there."""
        return bool(self._socket.poll(timeout_ms, zmq.POLLIN))

    @property
    def pollables(self) -> Sequence[object]:
        """What `Waiter` waits for."""
        return (self._socket,)

    @property
    def endpoint(self) -> str:
        """The address really bound or connected (with the port chosen for port 0)."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def close(self) -> None:
        """Close at once, dropping what was not sent."""
        self._source = None
        self._socket.close(linger=0)

    def __enter__(self) -> "Socket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def drain(
    source: MessageSource,
    stream: Stream,
    order: Order,
    limit: int,
    others: Sequence[Awaited] = (),
    idle_ms: int = 0,
    further_ms: int = 0,
    mark_every: int = 0,
) -> Drained | None:
    """Apply published messages that are next in order, without Python; None when no library can wait for `others`.

    Waits `idle_ms` for a first one and, from then on, `further_ms` for further ones, until one of the others has
    something to do or something happens to the connection. Ends at once when something was dropped or all was cleared.
    Marks what is held after each message whose number is a multiple of `mark_every`, if that is not 0.
    """
    if (zmq_api := _api()) is None:
        return None
    pollables = [pollable for each in others for pollable in each.pollables]
    sockets = [each.underlying for each in pollables if isinstance(each, zmq.Socket)]
    descriptors = [each for each in pollables if isinstance(each, int)]
    return stream.drain(
        source, order, limit, MAX_FRAME_BYTES, mark_every, zmq_api, sockets, descriptors, idle_ms, further_ms
    )


@functools.cache
def _api() -> ZeroMq | None:
    try:
        return ZeroMq()
    except RuntimeError as error:  # a pyzmq that was built otherwise: every message goes through Python
        _log.warning("messages are read one by one", extra={"fields": {"reason": str(error)}})
        return None


class BindError(Exception):
    """An endpoint that could not be bound."""


MAX_SOCKETS = 65_535
"""Of this process; a stream has up to six, and ZeroMQ's default would end at some 170 streams."""


@functools.cache
def _context() -> "zmq.Context[zmq.Socket[bytes]]":
    context = zmq.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    return context


def encrypt(server_key: bytes, public_key: bytes, secret_key: bytes) -> None:
    """From now on every subscription and replay is CURVE-encrypted, with one server key for all engines.

    Keys in Z85, 40 characters each. ValueError when one is none. An endpoint that is bound here is the CURVE server
    of the engine that dials in, with this pair of keys.
    """
    for key in (server_key, public_key, secret_key):
        if len(key) != 40:
            raise ValueError("a CURVE key has 40 characters")
        zmq.utils.z85.decode(key)
    _curve.update(server=server_key, public=public_key, secret=secret_key)


_curve: dict[str, bytes] = {}


def is_encrypted() -> bool:
    """Whether `encrypt` was called."""
    return bool(_curve)


def _secure(socket: "zmq.Socket[bytes]", bind: bool) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, _curve["public"])
    socket.setsockopt(zmq.CURVE_SECRETKEY, _curve["secret"])
    if bind:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, _curve["server"])


def _made(kind: int, endpoint: str, *, bind: bool, hwm: int, options: Mapping[int, int | bytes]) -> "zmq.Socket[bytes]":
    """A socket that is neither bound nor connected yet: ZeroMQ takes most options over only at that moment."""
    try:
        socket: zmq.Socket[bytes] = _context().socket(kind)
    except zmq.ZMQError as error:
        raise BindError(f"{endpoint}: {error.strerror}") from error
    settings: dict[int, int | bytes] = {
        zmq.LINGER: 0,
        zmq.RCVHWM: hwm,
        zmq.SNDHWM: hwm,
        zmq.IPV6: 1 if "[" in endpoint else 0,
        **options,
    }
    if not bind:
        settings |= {zmq.RECONNECT_IVL: 50, zmq.RECONNECT_IVL_MAX: 2000}
    for option, value in settings.items():
        socket.setsockopt(option, value)
    if _curve and kind in (zmq.SUB, zmq.DEALER):
        _secure(socket, bind)
    return socket


def _attach(socket: "zmq.Socket[bytes]", endpoint: str, *, bind: bool) -> None:
    try:
        if bind:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise BindError(f"{endpoint}: {error.strerror}") from error


def _open(
    kind: int, endpoint: str, *, bind: bool, hwm: int, options: Mapping[int, int | bytes] | None = None
) -> "zmq.Socket[bytes]":
    socket = _made(kind, endpoint, bind=bind, hwm=hwm, options=options or {})
    try:
        _attach(socket, endpoint, bind=bind)
    except BindError:
        socket.close(linger=0)
        raise
    return socket


def _limit() -> dict[int, int | bytes]:
    return {zmq.MAXMSGSIZE: MAX_FRAME_BYTES * FRAME_ENDS_CONNECTION}


def _subscribing(topic: str) -> dict[int, int | bytes]:
    beats: dict[int, int | bytes] = {zmq.HEARTBEAT_IVL: HEARTBEAT_MS, zmq.HEARTBEAT_TIMEOUT: HEARTBEAT_TIMEOUT_MS}
    return _limit() | beats | {zmq.SUBSCRIBE: topic.encode()}


def subscriber(endpoint: str, topic: str, *, bind: bool, hwm: int = 100_000) -> Socket:
    """Receives published messages whose topic starts with `topic`."""
    return Socket(_open(zmq.SUB, endpoint, bind=bind, hwm=hwm, options=_subscribing(topic)))


def watched_subscriber(endpoint: str, topic: str, *, bind: bool, hwm: int = 100_000) -> "tuple[Socket, Monitor]":
    """The same, and what tells of its connection, from the first moment on."""
    socket = _made(zmq.SUB, endpoint, bind=bind, hwm=hwm, options=_subscribing(topic))
    try:
        monitor = Monitor(socket, endpoint, bind=bind)
        try:
            _attach(socket, endpoint, bind=bind)
        except BindError:
            monitor.end()
            raise
    except BindError:
        socket.close(linger=0)
        raise
    return Socket(socket), monitor


def replay_client(endpoint: str) -> Socket:
    """Asks an engine's replay socket; see `request_replay` and `read_replay`."""
    return Socket(_open(zmq.DEALER, endpoint, bind=False, hwm=0, options=_limit()))


def request_replay(socket: Socket, start_sequence: int) -> bool:
    """Ask for every buffered message from `start_sequence` on; False when it could not be sent."""
    return socket.send([b"", start_sequence.to_bytes(8, "big")])


def publisher(endpoint: str, *, bind: bool = True, hwm: int = 100_000) -> Socket:
    """An engine's side: send [topic, seq, payload]."""
    return Socket(_open(zmq.PUB, endpoint, bind=bind, hwm=hwm))


def replay_server(endpoint: str, *, hwm: int = 0) -> Socket:
    """An engine's side: receives [identity, "", start_seq], answers [identity, "", topic, seq, payload]."""
    return Socket(_open(zmq.ROUTER, endpoint, bind=True, hwm=hwm))


class Waker(Awaited):
    """Wakes a thread that waits for it; OSError when the process has no descriptor left."""

    def __init__(self) -> None:
        self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # a descriptor that was closed may be somebody else's by now

    @property
    def pollables(self) -> Sequence[object]:
        """What `Waiter` waits for."""
        return (self._descriptor,)

    def wake(self) -> None:
        """From any thread."""
        with self._lock:
            if self._descriptor >= 0:
                os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        """By the thread that was woken, before it looks what there is to do."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._descriptor)

    def close(self) -> None:
        """Nobody is woken any more."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class Waiter:
    """Waits for messages on a set of sockets at once; belongs to the thread that owns them."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._awaited: dict[object, Awaited] = {}

    def add(self, awaited: Awaited) -> None:
        """Wait for this one too."""
        for each in awaited.pollables:
            self._poller.register(each, zmq.POLLIN)
            self._awaited[each] = awaited

    def remove(self, awaited: Awaited) -> None:
        """No longer wait for this one."""
        for each in awaited.pollables:
            self._poller.unregister(each)
            del self._awaited[each]

    def wait(self, timeout_ms: int) -> list[Awaited]:
        """Those that have something to do, as soon as one has; none when the time has passed."""
        ready = [each for each in self._awaited.values() if each.is_pending]
        return ready + [self._awaited[each] for each, _ in self._poller.poll(0 if ready else timeout_ms)]


class Connection(enum.Enum):
    """What became of a socket's connections."""

    MADE = "an engine is connected"
    LOST = "no engine is connected any more"
    LEFT = "one of several went, and those that stay may be another engine"
    ENDED = "it was ended over bytes that are no message, or above the limit, and is being made anew"


_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
)
_monitors = itertools.count()
_ABANDONED_SECONDS = 1.0
_CLOSING_MS = 1_000


class Monitor:
    """Tells when an engine's connection to a socket comes and goes.

    An endpoint that is bound also meets port scans and probes, and the next engine before the last one is gone:
    only a connection over which ZeroMQ's handshake was made counts.
    """

    def __init__(self, watched: "zmq.Socket[bytes]", endpoint: str, *, bind: bool) -> None:
        """Before the socket is bound or connected."""
        self._watched = watched
        self._endpoint = endpoint
        self._bind = bind
        events = zmq.EVENT_CONNECTED | zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        events |= sum(_FAILED) | (zmq.EVENT_CLOSED if bind else zmq.EVENT_CONNECT_RETRIED)
        address = f"inproc://monitor-{next(_monitors)}"
        watched.monitor(address, events)
        try:
            # Without a bound: ZeroMQ's own thread, which serves every stream, waits where an event finds no room.
            self.socket = Socket(_open(zmq.PAIR, address, bind=False, hwm=0))
        except BindError:
            watched.disable_monitor()
            raise
        # By file descriptor, and whether it may be an engine's: the handshake's event does not say which one's it is.
        self._peers: dict[int, bool] = {}
        self._up = False
        self._failed = False
        self._ended_at: float | None = None

    def changes(self) -> list[Connection]:
        """What has happened, in order; a connection that ZeroMQ will not make anew by itself is made anew here."""
        seen: list[Connection] = []
        while (frames := self.socket.receive()) is not None:
            event, value = (int.from_bytes(frames[0][part], sys.byteorder) for part in (slice(2), slice(2, 6)))
            if event in _FAILED:
                self._failed = True  # it tells of the connection that is ended next
                continue
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._up = True
                self._peers = dict.fromkeys(self._peers, True)
                seen.append(Connection.MADE)
            elif event == zmq.EVENT_DISCONNECTED:
                seen += self._gone(value)
            elif event == zmq.EVENT_CONNECT_RETRIED:
                self._ended_at = None
            elif event in (zmq.EVENT_CONNECTED, zmq.EVENT_ACCEPTED):
                self._ended_at = None
                self._peers[value] = False
            self._failed = False
        if self.abandoned:
            self._ended_at = None
            self._connect_anew()
            seen.append(Connection.ENDED)
        return seen

    @property
    def abandoned(self) -> bool:
        """ZeroMQ has ended the connection and will not make it anew; `changes` will."""
        return self._ended_at is not None and time.monotonic() - self._ended_at > _ABANDONED_SECONDS

    def _gone(self, peer: int) -> list[Connection]:
        was_engine = self._peers.pop(peer, False) and not self._failed
        if not self._bind:
            # A lost connection is tried again, which is told at once; not one that broke the protocol.
            self._ended_at = time.monotonic()
        if self._up and not any(self._peers.values()):
            self._up = False
            return [Connection.LOST]
        return [Connection.LEFT] if was_engine else []

    def _connect_anew(self) -> None:
        try:
            self._watched.disconnect(self._endpoint)
        except zmq.ZMQError as error:
            _log.debug("nothing to disconnect", extra={"fields": {"endpoint": self._endpoint, "reason": str(error)}})
        self._watched.connect(self._endpoint)

    def close(self) -> None:
        """Stop watching; before the watched socket is closed. An endpoint that was bound is free then."""
        if self._bind:
            self._release()
        self.end()

    def end(self) -> None:
        """The same of a socket that was never bound or connected; never left to the collector."""
        self._watched.disable_monitor()
        self.socket.close()

    def _release(self) -> None:
        # ZeroMQ closes what listens on a thread of its own, and the next registration may want the same endpoint.
        try:
            self._watched.unbind(self._watched.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
        except zmq.ZMQError as error:
            _log.warning("endpoint not released", extra={"fields": {"endpoint": self._endpoint, "reason": str(error)}})
            return
        ends = time.monotonic() + _CLOSING_MS / 1000
        while self.socket.wait(max(0, int((ends - time.monotonic()) * 1000))):
            frames = self.socket.receive()
            if frames is not None and int.from_bytes(frames[0][:2], sys.byteorder) == zmq.EVENT_CLOSED:
                return
