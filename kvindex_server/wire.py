"""ZeroMQ sockets and frames of KV-event streams, both ends; the only module that imports zmq."""

import functools
import logging
import sys
from collections.abc import Sequence
from types import TracebackType

import zmq
import zmq.utils.z85

from kvindex_server._core import Drained, Order, Stream, ZeroMq

_log = logging.getLogger(__name__)

END_SEQUENCE = 0xFFFF_FFFF_FFFF_FFFF
"""Sequence of the marker that ends a replay."""

MAX_FRAME_BYTES = 64 * 1024 * 1024
"""A larger frame is refused: no engine sends one, and a hostile one must not fill the memory."""


class BadFrames(Exception):
    """A message that is no event message; `reason` is a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def read_event(frames: Sequence[bytes]) -> tuple[int, bytes]:
    """(sequence, payload) of a published message [topic, seq, payload]."""
    if len(frames) != 3:
        raise BadFrames("frame_count")
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
    if len(payload) > MAX_FRAME_BYTES:
        raise BadFrames("oversized")
    return int.from_bytes(sequence, "big"), payload


class Socket:
    """A socket owned by the thread that uses it."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket

    def receive(self) -> list[bytes] | None:
        """The next message's frames if one is there, else None."""
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def drain(
        self,
        stream: Stream,
        order: Order,
        limit: int,
        others: Sequence["Socket"] = (),
        idle_ms: int = 0,
        further_ms: int = 0,
    ) -> Drained | None:
        """Apply published messages that are next in order, without Python; None when that is not possible here.

        Waits `idle_ms` for a first one and, from then on, `further_ms` for further ones, until one of the other
        sockets has a message. Ends at once when something was dropped or all was cleared.
        """
        if (zmq_api := _api()) is None:
            return None
        sockets = [each._socket.underlying for each in others]
        return stream.drain(
            zmq_api, self._socket.underlying, order, limit, MAX_FRAME_BYTES, sockets, idle_ms, further_ms
        )

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
    def endpoint(self) -> str:
        """The address really bound or connected (with the port chosen for port 0)."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def close(self) -> None:
        """Close at once, dropping what was not sent."""
        self._socket.close(linger=0)

    def __enter__(self) -> "Socket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _secure(socket: "zmq.Socket[bytes]", bind: bool) -> None:
    socket.setsockopt(zmq.CURVE_PUBLICKEY, _curve["public"])
    socket.setsockopt(zmq.CURVE_SECRETKEY, _curve["secret"])
    if bind:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
    else:
        socket.setsockopt(zmq.CURVE_SERVERKEY, _curve["server"])


def _open(kind: int, endpoint: str, *, bind: bool, hwm: int) -> "zmq.Socket[bytes]":
    try:
        socket: zmq.Socket[bytes] = _context().socket(kind)
    except zmq.ZMQError as error:
        raise BindError(f"{endpoint}: {error.strerror}") from error
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.IPV6, 1 if "[" in endpoint else 0)
    if _curve and kind in (zmq.SUB, zmq.DEALER):
        _secure(socket, bind)
    try:
        if bind:
            socket.bind(endpoint)
        else:
            socket.setsockopt(zmq.RECONNECT_IVL, 50)
            socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.close(linger=0)
        raise BindError(f"{endpoint}: {error.strerror}") from error
    return socket


def subscriber(endpoint: str, topic: str, *, bind: bool, hwm: int = 100_000) -> Socket:
    """Receives published messages whose topic starts with `topic`."""
    socket = _open(zmq.SUB, endpoint, bind=bind, hwm=hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES * 4)
    socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.setsockopt(zmq.HEARTBEAT_IVL, 10_000)
    return Socket(socket)


def replay_client(endpoint: str) -> Socket:
    """Asks an engine's replay socket; see `request_replay` and `read_replay`."""
    socket = _open(zmq.DEALER, endpoint, bind=False, hwm=0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES * 4)
    return Socket(socket)


def request_replay(socket: Socket, start_sequence: int) -> bool:
    """Ask for every buffered message from `start_sequence` on; False when it could not be sent."""
    return socket.send([b"", start_sequence.to_bytes(8, "big")])


def publisher(endpoint: str, *, bind: bool = True, hwm: int = 100_000) -> Socket:
    """An engine's side: send [topic, seq, payload]."""
    return Socket(_open(zmq.PUB, endpoint, bind=bind, hwm=hwm))


def replay_server(endpoint: str, *, hwm: int = 0) -> Socket:
    """An engine's side: receives [identity, "", start_seq], answers [identity, "", topic, seq, payload]."""
    return Socket(_open(zmq.ROUTER, endpoint, bind=True, hwm=hwm))


def wake_pair(name: str) -> tuple[Socket, Socket]:
    """(receiver, sender) inside this process, to wake a thread that waits on sockets."""
    address = f"inproc://{name}"
    receiver = _open(zmq.PAIR, address, bind=True, hwm=16)
    return Socket(receiver), Socket(_open(zmq.PAIR, address, bind=False, hwm=16))


class Waiter:
    """Waits for messages on a set of sockets at once; belongs to the thread that owns them."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._sockets: dict[object, Socket] = {}

    def add(self, socket: Socket) -> None:
        """Wait for this one too."""
        self._poller.register(socket._socket, zmq.POLLIN)
        self._sockets[socket._socket] = socket

    def remove(self, socket: Socket) -> None:
        """No longer wait for this one."""
        self._poller.unregister(socket._socket)
        del self._sockets[socket._socket]

    def wait(self, timeout_ms: int) -> list[Socket]:
        """Those that have a message, as soon as one has; none when the time has passed."""
        return [self._sockets[each] for each, _ in self._poller.poll(timeout_ms)]


class Monitor:
    """Tells when a socket's connection comes and goes."""

    def __init__(self, socket: Socket) -> None:
        self._watched = socket._socket
        self.socket = Socket(self._watched.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED))

    def changes(self) -> list[bool]:
        """True for each connection made, False for each lost, in order."""
        seen = []
        while (frames := self.socket.receive()) is not None:
            event = int.from_bytes(frames[0][:2], sys.byteorder)
            seen.append(event == zmq.EVENT_HANDSHAKE_SUCCEEDED)
        return seen

    def close(self) -> None:
        """Stop watching; before the watched socket is closed."""
        self._watched.disable_monitor()
