"""A TCP proxy on 127.0.0.1 that can delay or hold back what it passes on."""

import contextlib
import socket
import ssl
import threading
import time


class SlowProxy:
    """Passes bytes to a port; `delay` seconds before each piece to the server, and none while `held`. May end TLS."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._to = port
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self.delay = 0.0
        self.held = threading.Event()
        self._ends = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and let go of what is held."""
        self._ends.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._ends.is_set():
            try:
                inside, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._tls is not None:
                    inside = self._tls.wrap_socket(inside, server_side=True)
                outside = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                inside.close()
                continue
            for source, sink, slow in ((inside, outside, True), (outside, inside, False)):
                threading.Thread(target=self._pass, args=(source, sink, slow), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, slow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if slow and self.delay:
                    time.sleep(self.delay)
                while slow and self.held.is_set() and not self._ends.is_set():
                    time.sleep(0.005)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
