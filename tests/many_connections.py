"""Many HTTP/2 connections, as a process: ADDRESS COUNT SOURCE. Opens COUNT of them from the local address SOURCE.

Prints how many the server has greeted (each has sent its SETTINGS), then answers a line of input with one of its own:
`open` how many are still open, `call` how many of all answered one Score each with status 0 and a message. Ends at the
end of its input.
"""

import resource
import selectors
import socket
import sys
import time
from collections.abc import Callable

import hpack
from hostile_http2 import ACK, END_STREAM, GOAWAY, HEADERS, PING, PREFACE, SETTINGS, call, frame, frames

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

MESSAGE = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(64)), pods=["p", "q"]).SerializeToString()
AT_ONCE = 32
"""Connections opened, and calls made, before the answers to earlier ones are awaited: a listen queue has an end."""
SECONDS = 60.0


class Connection:
    """What has come over one of them."""

    def __init__(self, address: tuple[str, int], source: str) -> None:
        self.socket = socket.create_connection(address, 10, (source, 0))
        self.socket.setblocking(False)
        self.greeted = self.closed = False
        self.answers = 0
        self._in = b""
        self._headers = hpack.Decoder()
        self._next = 1
        self._send(PREFACE + frame(SETTINGS, 0, 0))

    def call(self) -> None:
        self._send(call(self._next, MESSAGE))
        self._next += 2

    def take(self) -> None:
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        found, self._in = frames(self._in + data)
        for kind, flags, _, payload in found:
            if kind == SETTINGS and not flags & ACK:
                self.greeted = True
                self._send(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self._send(frame(PING, ACK, 0, payload))
            elif kind == HEADERS:
                fields = self._headers.decode(payload)
                self.answers += bool(flags & END_STREAM) and ("grpc-status", "0") in fields
            elif kind == GOAWAY:
                self.closed = True

    def _send(self, data: bytes) -> None:
        try:
            self.socket.sendall(data)
        except OSError:
            self.closed = True


def main() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, _, port = sys.argv[1].rpartition(":")
    selector = selectors.DefaultSelector()
    connections: list[Connection] = []

    def take(done: Callable[[], bool], seconds: float = SECONDS) -> None:
        ends = time.monotonic() + seconds
        while not done() and time.monotonic() < ends:
            for key, _ in selector.select(0.05):
                key.data.take()
                if key.data.closed:
                    selector.unregister(key.fileobj)

    def all_of(part: list[Connection], said: Callable[[Connection], object]) -> Callable[[], bool]:
        return lambda: all(said(each) or each.closed for each in part)

    total = int(sys.argv[2])
    while len(connections) < total:
        part = [Connection((host, int(port)), sys.argv[3]) for _ in range(min(AT_ONCE, total - len(connections)))]
        for each in part:
            selector.register(each.socket, selectors.EVENT_READ, each)
        connections += part
        take(all_of(part, lambda each: each.greeted))
    print(sum(each.greeted for each in connections), flush=True)
    for line in sys.stdin:
        if line == "call\n":
            before = sum(each.answers for each in connections)
            for at in range(0, total, AT_ONCE):
                part = [each for each in connections[at : at + AT_ONCE] if not each.closed]
                expected = {id(each): each.answers + 1 for each in part}
                for each in part:
                    each.call()
                take(all_of(part, lambda each: each.answers >= expected[id(each)]), 20)  # noqa: B023
            print(sum(each.answers for each in connections) - before, flush=True)
        else:
            take(lambda: False, 0.3)
            print(sum(not each.closed for each in connections), flush=True)


if __name__ == "__main__":
    main()
