"""A TCP proxy on 127.0.0.1 that cuts connections, or lets them go silent, after so many bytes from the server."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Sequence

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: closing sends RST instead of FIN


class CuttingProxy:
    """The n-th connection passes `cuts[n]` bytes to the client and breaks; those after the last cut are whole.

    `silent` breaks them as a machine that is gone does: nothing comes any more, and nobody says so. `on_cut` runs
    before a connection breaks.
    """

    def __init__(
        self,
        port: int,
        cuts: Sequence[int],
        *,
        listen: str = "127.0.0.1:0",
        silent: bool = False,
        on_cut: Callable[[], object] = lambda: None,
    ) -> None:
        self._to = port
        self._cuts = list(cuts)
        self._silent = silent
        self._on_cut = on_cut
        host, _, at = listen.rpartition(":")
        self._listener = socket.create_server((host, int(at)))
        self.port = int(self._listener.getsockname()[1])
        self.address = f"127.0.0.1:{self.port}"
        self.passed: list[int] = []
        """Bytes from the server, by connection."""
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections, and end those that are open."""
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._open += (client, server)
            number = len(self.passed)
            self.passed.append(0)
            budget = self._cuts[number] if number < len(self._cuts) else None
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(client, server, number, budget), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _down(self, client: socket.socket, server: socket.socket, number: int, budget: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if budget is not None:
                    data = data[: budget - self.passed[number]]
                client.sendall(data)
                self.passed[number] += len(data)
                if self.passed[number] == budget:
                    self._on_cut()
                    if not self._silent:
                        for each in (client, server):
                            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                            each.close()
                    return
            client.shutdown(socket.SHUT_WR)
