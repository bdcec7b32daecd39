"""A small HTTP/1.1 server: one thread per connection, so many connections and no more, and time limits on requests."""

import email.message
import logging
import math
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

from kvindex_server import logs

logger = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""A connection that asks nothing for so long is closed; sooner when its place is needed."""
PLACE_SECONDS = 0.5
"""How long a new connection waits for the place of one that was closed for it."""
_SWEEP_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Request:
    """What a handler is given. Header names do not mind case."""

    method: str
    headers: email.message.Message
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler gives back."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Answer]
Routes = Mapping[tuple[str, str], Handler]
"""Handlers by method and path; what answers GET answers HEAD too."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one client may cost: connections at once, bytes of a body, seconds for a request to arrive."""

    connections: int = 32
    body_bytes: int = 0
    request_seconds: float = 10.0


def text(status: int, words: str) -> Answer:
    """A plain answer for people and probes."""
    return Answer(status, "text/plain; charset=utf-8", words.encode())


class WebServer:
    """A running server. Its handlers are called from many threads at once."""

    def __init__(self, name: str, host: str, port: int, routes: Routes, bounds: Bounds | None = None) -> None:
        """OSError when the address cannot be bound; port 0 picks a free one."""
        self._http = _HTTPServer(host, port, routes, bounds or Bounds())
        self.port: int = self._http.server_address[1]
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._http.serve_forever, kwargs={"poll_interval": 0.1}, name=f"{name}-http", daemon=True
            ),
            threading.Thread(target=self._sweep, name=f"{name}-sweep", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the port and every connection that waits for a request; what is at work is still answered."""
        self._stopped.set()
        self._http.stopping = True
        self._http.shutdown()
        self._http.server_close()
        self._http.end_arriving(before=math.inf, how=socket.SHUT_RD)
        for thread in self._threads:
            thread.join(timeout=5)

    def _sweep(self) -> None:
        # A time-out per read is none for a client that sends a byte now and then.
        while not self._stopped.wait(_SWEEP_SECONDS):
            now = time.monotonic()
            self._http.end_arriving(before=now)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # an idle client must not hold up the end
    request_queue_size = 64

    def __init__(self, host: str, port: int, routes: Routes, bounds: Bounds) -> None:
        host = host.strip("[]")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.routes = routes
        self.paths = {path for _, path in routes}
        self.bounds = bounds
        # When the request that is awaited must be here, and since when it is awaited.
        self.arriving: dict[socket.socket, tuple[float, float]] = {}
        self.stopping = False
        self._places = threading.BoundedSemaphore(bounds.connections)
        super().__init__((host, port), _Handler)

    def end_arriving(self, before: float, how: int = socket.SHUT_RDWR) -> None:
        """End the connections whose request should be here before this time, and is not."""
        for connection, (ends, _) in list(self.arriving.items()):
            if ends < before:
                _shut(connection, how)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False) or self._make_place():
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def _make_place(self) -> bool:
        """Close the connection that has been silent longest: else a few of them would shut out probes and scrapes."""
        silent = min(list(self.arriving.items()), key=lambda each: each[1][1], default=None)
        if silent is None:
            return False
        _shut(silent[0], socket.SHUT_RDWR)
        return self._places.acquire(timeout=PLACE_SECONDS)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.arriving.pop(request, None)
            self._places.release()

    def server_bind(self) -> None:
        # HTTPServer.server_bind asks DNS for the host's full name, which can hang and is used for nothing.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: object, client_address: object) -> None:
        logs.event(logger, logging.DEBUG, "http connection failed", exc_info=True)


def _shut(connection: socket.socket, how: int) -> None:
    try:
        connection.shutdown(how)
    except OSError:  # gone already
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "kvindex-server"
    sys_version = ""
    timeout = IDLE_SECONDS
    wbufsize = 65536  # headers and body leave in one piece
    disable_nagle_algorithm = True
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d\n"

    def handle_one_request(self) -> None:
        now = time.monotonic()
        self._server.arriving[self.connection] = now + IDLE_SECONDS, now
        if self._server.stopping:
            self.close_connection = True
            return
        super().handle_one_request()

    def parse_request(self) -> bool:
        now = time.monotonic()
        _, since = self._server.arriving.get(self.connection, (now, now))
        self._server.arriving[self.connection] = now + self._server.bounds.request_seconds, since
        return super().parse_request()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # The library's own words quote the request.
        super().send_error(code)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    @property
    def _server(self) -> _HTTPServer:
        return cast(_HTTPServer, self.server)

    def _answer(self, method: str) -> None:
        path = self.path.partition("?")[0]
        handler = self._server.routes.get((method, path))
        if handler is None:
            known = path in self._server.paths
            body: bytes | Answer = text(405, "not by this method\n") if known else text(404, "not found\n")
        else:
            body = self._body()
        self._server.arriving.pop(self.connection, None)
        if handler is None or isinstance(body, Answer):
            # A body that nobody has read would be taken for the next request.
            if handler is not None or "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
                self.close_connection = True
            self._send(cast(Answer, body))
            return
        try:
            answer = handler(Request(method, self.headers, body))
        except Exception as error:  # noqa: BLE001  it must not end the connection without an answer
            # Neither its text nor its place in the code: both may tell of the request.
            logs.event(logger, logging.ERROR, "http request failed", path=path, error=type(error).__name__)
            answer = text(500, "internal error\n")
        self._send(answer)

    def _body(self) -> bytes | Answer:
        length = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") is not None:
            return text(411, "a Content-Length is required\n")
        if length is None:
            return b"" if self.command != "POST" else text(411, "a Content-Length is required\n")
        if not (length.isascii() and length.isdigit()) or len(self.headers.get_all("Content-Length", [])) > 1:
            return text(400, "Content-Length is not a number\n")
        if len(length) > 12 or int(length) > self._server.bounds.body_bytes:
            return text(413, f"more than {self._server.bounds.body_bytes} bytes\n")
        body = self.rfile.read(int(length))
        return body if len(body) == int(length) else text(400, "the body ended early\n")

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: a scrape every few seconds is noise."""
