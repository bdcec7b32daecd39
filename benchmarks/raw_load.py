"""A load client that costs less than any server under test: raw HTTP/2 (gRPC) and HTTP/1.1 frames on one thread.

Closed loop: so many calls in flight. Open loop: calls are sent by the clock, and a latency counts from the time a call
was due, so that a server that stalls pays for every call that had to wait (no coordinated omission).
"""

import select
import socket
import statistics
import struct
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import hpack

FRAME = 1 << 22
RECEIVE = 1 << 16
"""Bytes at once. Of much larger ones each would be memory new from the system, page by page."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
REFUSED_STREAM = 7
HUGE = 0x7FFF_0000
CODES = {code.value[0]: code.name for code in grpc.StatusCode}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _text(value: str) -> bytes:
    data = value.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data


def header_block(path: str, *more: tuple[str, str]) -> bytes:
    """HPACK without Huffman coding and without a dynamic table."""
    block = b"\x83\x86\x04" + _text(path) + b"\x01" + _text("localhost")
    for name, value in (("content-type", "application/grpc"), ("te", "trailers"), *more):
        block += b"\x00" + _text(name) + _text(value)
    return block


@dataclass
class Result:
    """What a run measured."""

    calls: int
    seconds: float
    failed: int
    latencies: list[float] = field(default_factory=list)  # ms

    @property
    def rate(self) -> float:
        return self.calls / self.seconds

    def cut(self, percent: int) -> float:
        return statistics.quantiles(self.latencies, n=100)[percent - 1] if len(self.latencies) > 1 else 0.0


class Grpc:
    """One connection that repeats one unary call, or (`streams` > 0) one message on so many open streams.

    With `statuses` it reads the status of each unary call, at some cost, and counts calls by it in `ends`: a status
    code's name, or `reset N` (an HTTP/2 error code) where the server ended the stream without a status. A stream that
    the peer refused (REFUSED_STREAM: it worked at nothing) is sent again, as gRPC's own clients do, when calls have
    ended; such are counted in `again`. `right` judges the message of every `SAMPLED`-th unary answer: `judged` and
    `wrong` count them.
    """

    SAMPLED = 4

    def __init__(
        self,
        address: str,
        path: str,
        message: bytes,
        streams: int = 0,
        *,
        statuses: bool = False,
        right: Callable[[bytes], bool] | None = None,
    ) -> None:
        if address.startswith("unix:"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(address.removeprefix("unix:"))
        else:
            host, port = address.rsplit(":", 1)
            self._socket = socket.create_connection((host, int(port)), 5)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        body = b"\0" + len(message).to_bytes(4, "big") + message
        self._size = len(body)
        self._parts = [body[at : at + 16384] for at in range(0, len(body), 16384)]
        self._block = header_block(path)
        self._streams = streams
        self._next = 1
        self._window = 65535
        self._out = deque[bytes]()
        self._in = b""
        self._due: dict[int, deque[float]] = {}
        self._answered: set[int] = set()
        self._open: list[int] = []
        self._most = 0  # calls at once, as the server allows, which it says first of all
        self._headers = hpack.Decoder() if statuses else None
        self._room = HUGE  # and as it seems to bear: less after a refusal, one more with every call that ends
        self._right = right
        self._bodies: dict[int, bytes] = {}
        self.judged = self.wrong = 0
        self.ends = Counter[str]()
        self.again = 0
        self._waiting = deque[float]()
        self._partial: dict[int, bytes] = {}
        self.done = self.failed = 0
        self.latencies: list[float] = []
        # Large frames are welcome, as to the clients that are built on gRPC's C core.
        settings = struct.pack(">HIHIHI", 4, HUGE, 2, 0, 5, FRAME)
        self._send(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW, 0, 0, HUGE.to_bytes(4, "big")))
        for _ in range(streams):
            self._open.append(self._next)
            self._due[self._next] = deque()
            self._send(frame(HEADERS, 4, self._next, self._block))
            self._next += 2
        self._turn = 0
        self._socket.setblocking(False)

    @property
    def in_flight(self) -> int:
        return sum(map(len, self._due.values())) if self._streams else len(self._due) + len(self._waiting)

    def call(self, due: float) -> None:
        """Send one, or keep it while as many are open as the server allows; its latency counts from `due`."""
        if not self._streams and len(self._due) >= min(self._most, self._room):
            self._waiting.append(due)
            return
        if self._streams:
            stream = self._open[self._turn % self._streams]
            self._turn += 1
            self._due[stream].append(due)
            last = 0
            pieces = []
        else:
            stream, self._next = self._next, self._next + 2
            self._due[stream] = deque([due])
            last = 1
            pieces = [frame(HEADERS, 4, stream, self._block)]
        for number, part in enumerate(self._parts):
            pieces.append(frame(DATA, last if number == len(self._parts) - 1 else 0, stream, part))
        self._out.append(b"".join(pieces))
        self.flush()

    def flush(self) -> None:
        """Send what the connection's window allows."""
        while self._out and self._window >= self._size:
            self._window -= self._size
            self._send(self._out.popleft())

    def poll(self, timeout: float) -> None:
        """Take what has come within the time."""
        if not select.select([self._socket], [], [], max(0.0, timeout))[0]:
            return
        data = self._socket.recv(RECEIVE)
        assert data, "the server closed the connection"
        now = time.perf_counter()
        data = self._in + data
        at, end = 0, len(data)
        reply = b""
        while end - at >= 9:
            length = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + length:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            body = at + 9
            at = body + length
            if kind == DATA:
                if self._streams:
                    self._messages(stream, data[body:at], now)
                else:
                    self._answered.add(stream)
                    if self._right is not None and stream // 2 % self.SAMPLED == 0:
                        self._bodies[stream] = self._bodies.get(stream, b"") + data[body:at]
            elif kind == HEADERS:
                assert flags & 0x2C == 4, "headers in one frame, unpadded and without priority"
                status = self._status(data[body:at])
                if flags & 1:
                    self._ended(stream, now, status)
            elif kind == WINDOW and stream == 0:
                self._window += int.from_bytes(data[body:at], "big")
            elif kind == SETTINGS and not flags & 1:
                self._most = self._most or HUGE
                for name, value in struct.iter_unpack(">HI", data[body:at]):
                    if name == 3:
                        self._most = value
                reply += frame(SETTINGS, 1, 0)
            elif kind == PING and not flags & 1:
                reply += frame(PING, 1, 0, data[body:at])
            elif kind == RST:
                self._reset(stream, int.from_bytes(data[body:at], "big"))
            assert kind != GOAWAY, data[body:at]
        self._in = data[at:]
        if reply:
            self._send(reply)
        self.flush()
        while self._waiting and len(self._due) < min(self._most, self._room):
            self.call(self._waiting.popleft())

    def close(self) -> None:
        self._socket.close()

    def _reset(self, stream: int, error: int) -> None:
        due = self._due.pop(stream, None)
        if due is None:
            return  # of a call that has ended: nothing more need be sent
        if error == REFUSED_STREAM and not self._streams:
            self._room = max(1, len(self._due))
            self._waiting.extendleft(due)
            self.again += 1
        else:
            self.failed += 1
            self.ends[f"reset {error}"] += 1

    def _status(self, block: bytes) -> str:
        # Every block is to be decoded, for what it does to the table by which the next ones are read.
        if self._headers is None:
            return ""
        status = dict(self._headers.decode(block)).get("grpc-status")
        return "no status" if status is None else CODES[int(status)]

    def _ended(self, stream: int, now: float, status: str) -> None:
        due = self._due.pop(stream, None)
        self.ends[status] += 1
        self._room += 1
        if self._right is not None and (body := self._bodies.pop(stream, None)) is not None:
            self.judged += 1
            self.wrong += not self._right(body[5:])
        if stream in self._answered and due:
            self._answered.discard(stream)
            self.done += 1
            self.latencies.append((now - due[0]) * 1000)
        else:
            self.failed += 1

    def _messages(self, stream: int, data: bytes, now: float) -> None:
        data = self._partial.get(stream, b"") + data
        while len(data) >= 5 and len(data) >= 5 + (length := int.from_bytes(data[1:5], "big")):
            data = data[5 + length :]
            self.done += 1
            self.latencies.append((now - self._due[stream].popleft()) * 1000)
        self._partial[stream] = data

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                select.select([], [self._socket], [], 5)


class Http:
    """Connections of HTTP/1.1 that each repeat one POST."""

    def __init__(self, address: str, path: str, body: bytes, connections: int = 16) -> None:
        host, port = address.rsplit(":", 1)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
        self._idle: deque[socket.socket] = deque()
        self._due: dict[socket.socket, float] = {}
        self._in: dict[socket.socket, bytes] = {}
        self._waiting: deque[float] = deque()
        for _ in range(connections):
            made = socket.create_connection((host, int(port)), 5)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._idle.append(made)
        self._all = list(self._idle)
        self.done = self.failed = 0
        self.latencies: list[float] = []

    @property
    def in_flight(self) -> int:
        return len(self._due) + len(self._waiting)

    def call(self, due: float) -> None:
        """Send one, or keep it until a connection is free."""
        self._waiting.append(due)
        self.flush()

    def flush(self) -> None:
        while self._waiting and self._idle:
            connection = self._idle.popleft()
            self._due[connection] = self._waiting.popleft()
            self._in[connection] = b""
            connection.sendall(self._request)

    def poll(self, timeout: float) -> None:
        """Take what has come within the time."""
        if not self._due:
            time.sleep(max(0.0, timeout))
            return
        for connection in select.select(list(self._due), [], [], max(0.0, timeout))[0]:
            data = self._in[connection] + connection.recv(RECEIVE)
            self._in[connection] = data
            head, blank, body = data.partition(b"\r\n\r\n")
            if not blank:
                continue
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(body) < length:
                continue
            due = self._due.pop(connection)
            self._idle.append(connection)
            if head.startswith(b"HTTP/1.1 200"):
                self.done += 1
                self.latencies.append((time.perf_counter() - due) * 1000)
            else:
                self.failed += 1
        self.flush()

    def close(self) -> None:
        for each in self._all:
            each.close()


def closed_loop(client: Grpc | Http, in_flight: int, seconds: float) -> Result:
    """As fast as the server answers, with so many calls in flight."""
    begun = time.perf_counter()
    ends = begun + seconds
    while time.perf_counter() < ends:
        while client.in_flight < in_flight:
            client.call(time.perf_counter())
        client.poll(0.5)
    elapsed = time.perf_counter() - begun
    return Result(client.done, elapsed, client.failed, client.latencies)


def open_loop(client: Grpc | Http, rate: float, seconds: float) -> Result:
    """By the clock; a latency counts from the time a call was due."""
    begun = time.perf_counter()
    total = int(rate * seconds)
    sent = 0
    gives_up = begun + seconds + 10
    while (sent < total or client.in_flight) and time.perf_counter() < gives_up:
        now = time.perf_counter()
        while sent < total and begun + sent / rate <= now:
            client.call(begun + sent / rate)
            sent += 1
        client.poll(min(begun + sent / rate - time.perf_counter(), 0.05) if sent < total else 0.05)
    return Result(client.done, time.perf_counter() - begun, client.failed + client.in_flight, client.latencies)
