"""Clients that mean harm, against the real process: it stays up and small, and its answers stay what they were."""

import contextlib
import hashlib
import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import msgpack
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hostile_http2 import (
    ACK,
    CONTINUATION,
    PREFACE,
    RESET,
    SCORE,
    SETTINGS,
    WINDOW,
    call,
    frame,
    frames,
    headers,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub

SOAK = bool(os.environ.get("KVINDEX_SOAK"))
CONNECTIONS = 10_000
CROWDS = 4
"""Processes that open them, each from an address of its own."""
MORE = 20 if SOAK else 1
METHODS = [
    SCORE,
    "/kvindex.v1.KVIndex/GetPodsForBlocks",
    "/indexer.v1.IndexerService/GetPodScores",
    *(f"/kvindex.v1.KVIndexAdmin/{each}" for each in ("ListPods", "UnregisterPod", "ClearPod", "GetStats")),
    "/grpc.health.v1.Health/Check",
]
STREAMS = ["/kvindex.v1.KVIndex/ScoreStream", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
PROMPT = list(range(64))
GROWTH_MIB = 200
ALONE = [("grpc.use_local_subchannel_pool", 1)]
"""A connection of its own: channels of one process share them otherwise."""


def serve(
    config: dict[str, object], log: Path, files: tuple[int, int] | None = None
) -> tuple[subprocess.Popen[str], str]:
    """A server process and the line that it prints when it listens; `files` are its soft and hard limit of them."""
    file = log.with_suffix(".yaml")
    file.write_text(json.dumps({"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", **config}))
    command = [sys.executable, "-m", "kvindex_server", "serve", "--config", str(file)]
    if files is not None:
        command = ["prlimit", f"--nofile={files[0]}:{files[1]}", *command]
    with log.open("wb") as err:
        # The tests' own KVINDEX_SOAK is no setting of the server.
        env = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEX_")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening"), log.read_text()
    return process, line


def address(line: str, name: str) -> str:
    return line.split(f"{name}=")[1].split(maxsplit=1)[0]


class Target:
    """A server process with one pod that holds a prompt of four blocks, with little patience for silent calls."""

    def __init__(
        self,
        transport: str,
        log: Path,
        files: tuple[int, int] | None = None,
        server: dict[str, object] | None = None,
        **more: object,
    ) -> None:
        self.log = log
        config: dict[str, object] = {
            "server": {"transport": transport, "message_seconds": 1, **(server or {})},
            "models": [{"name": "m", "block_size": 16}],
            **more,
        }
        self.transport = transport
        self.process, line = serve(config, log, files)
        self.address = address(line, "grpc")
        self.metrics = address(line, "metrics")
        self.host, _, port = self.address.rpartition(":")
        self.port = int(port)
        self.channel = grpc.insecure_channel(self.address)
        self.publisher = wire.publisher("tcp://127.0.0.1:*")
        admin = KVIndexAdminStub(self.channel)
        admin.RegisterPod(
            pb.RegisterPodRequest(pod="p", model="m", endpoint=self.publisher.endpoint), wait_for_ready=True, timeout=10
        )
        event = {"type": "BlockStored", "block_hashes": [1, 2, 3, 4], "parent_block_hash": None, "token_ids": PROMPT}
        payload = msgpack.packb([time.time(), [event | {"block_size": 16, "medium": "GPU"}]])
        ends = time.monotonic() + 10
        for sequence in range(1000):
            self.publisher.send([b"", sequence.to_bytes(8, "big"), payload])
            time.sleep(0.05)
            if next(iter(admin.ListPods(pb.ListPodsRequest()).streams)).blocks:
                break
            assert time.monotonic() < ends
        self.at_first = self.rss()

    def rss(self) -> float:
        """MiB."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096 / 2**20

    def codes(self) -> dict[str, int]:
        """Calls of Score so far by status code, as the server counted them."""
        found = re.findall(rf'^kvindex_rpc_total{{code="(\w+)",method="{SCORE}"}} (\S+)', self.scrape(), re.MULTILINE)
        return {code: int(float(count)) for code, count in found}

    def sheds(self) -> dict[str, int]:
        """Calls of Score turned away so far, by reason, as the server counted them."""
        line = rf'^kvindex_rpc_shed_total{{method="{SCORE}",reason="(\w+)"}} (\S+)'
        return {reason: int(float(count)) for reason, count in re.findall(line, self.scrape(), re.MULTILINE)}

    def scrape(self) -> str:
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    def connect(self) -> socket.socket:
        made = socket.create_connection((self.host, self.port), 5)
        made.sendall(PREFACE + frame(SETTINGS, 0, 0))
        return made

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def assert_no_call_is_left(self, seconds: float = 10.0) -> None:
        """Every permit has been given back, by the server's own count."""
        ends = time.monotonic() + seconds
        while held := re.findall(r"^kvindex_rpc_in_flight.* (?!0\.0$)\S+$", self.scrape(), re.MULTILINE):
            assert time.monotonic() < ends, held
            time.sleep(0.1)

    def assert_unharmed(self, seconds: float = 10.0) -> None:
        """It answers as it did at first, within the time, and is not much larger."""
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=["p", "q"])
        ends = time.monotonic() + seconds
        with grpc.insecure_channel(self.address, ALONE) as channel:
            while True:
                try:
                    answer = KVIndexStub(channel).Score(request, timeout=2)
                    break
                except grpc.RpcError as error:
                    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED), (
                        error
                    )
                    assert time.monotonic() < ends, error
                    time.sleep(0.1)
        assert [(each.pod, each.matched_blocks) for each in answer.scores] == [("p", 4), ("q", 0)]
        assert self.process.poll() is None
        assert self.rss() < self.at_first + GROWTH_MIB

    def close(self) -> None:
        self.channel.close()
        self.process.terminate()
        try:
            assert self.process.wait(20) == 0
        finally:
            self.process.kill()
            self.publisher.close()
        assert "Traceback" not in self.log.read_text()
        assert "internal error" not in self.log.read_text()


@pytest.fixture(scope="module", params=["grpcio", "native"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(request.param, tmp_path_factory.mktemp("chaos") / "log")
    yield made
    made.close()


def send(connection: socket.socket, data: bytes) -> bool:
    """False when the server has had enough of this connection."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


@pytest.mark.parametrize("method", METHODS)
def test_any_bytes_to_any_method(target: Target, method: str) -> None:
    """Bytes of any kind are answered or refused for what they are, never with UNKNOWN or INTERNAL."""
    call = target.channel.unary_unary(method)
    allowed = ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")

    @settings(max_examples=60 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=300) | st.binary(max_size=40).map(lambda tail: b"\x0a\x01m" + tail))
    def fuzz(data: bytes) -> None:
        try:
            call(data, timeout=10)
        except grpc.RpcError as error:
            assert error.code().name in allowed, (data, error)

    fuzz()
    target.assert_unharmed()


@pytest.mark.parametrize("method", STREAMS)
def test_any_bytes_to_any_stream(target: Target, method: str) -> None:
    call = target.channel.stream_stream(method)

    @settings(max_examples=40 * MORE, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.binary(max_size=100), max_size=4))
    def fuzz(messages: list[bytes]) -> None:
        try:
            list(call(iter(messages), timeout=10))
        except grpc.RpcError as error:
            assert error.code().name == "INVALID_ARGUMENT", (messages, error)

    fuzz()
    target.assert_unharmed()


def test_rapid_reset(target: Target) -> None:
    """Calls opened and reset at once, thousands on a connection (CVE-2023-44487)."""
    for _ in range(3 * MORE):
        with target.connect() as connection:
            for stream in range(1, 4001, 2):
                if not send(connection, headers(stream) + frame(RESET, 0, stream, struct.pack(">I", 8))):
                    break
    target.assert_unharmed()
    target.assert_no_call_is_left()


def test_calls_that_never_send_their_message(target: Target) -> None:
    """More of them than there are threads: health is answered meanwhile, and reads are again when they are ended."""
    connections = [target.connect() for _ in range(4)]
    try:
        for connection in connections:
            for stream in range(1, 201, 2):
                send(connection, headers(stream))
        time.sleep(0.2)
        stub = health_pb2_grpc.HealthStub(target.channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=2).status == health_pb2.HealthCheckResponse.SERVING
        target.assert_unharmed()
    finally:
        for connection in connections:
            connection.close()
    target.assert_no_call_is_left()


def test_a_reader_that_never_reads(target: Target) -> None:
    """Large answers that nobody takes: they wait within the connection's windows, and the process stays small."""
    pods = [f"pod-with-a-rather-long-name-{number}" for number in range(2000)]
    message = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=pods).SerializeToString()
    with target.connect() as connection:
        connection.settimeout(0.5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for stream in range(1, 81, 2):
            if not send(connection, call(stream, message)):
                break
        target.assert_unharmed()


def test_answers_that_nobody_takes_are_bounded(tmp_path: Path) -> None:
    """400 MB of answers for clients with closed windows: the oldest calls are ended, others are served meanwhile."""
    target = Target("grpcio", tmp_path / "log", limits={"max_unread_bytes": 64 << 20})
    pods = [f"pod-with-a-rather-long-name-{number}" for number in range(2000)]
    message = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=pods).SerializeToString()
    connections = []
    try:
        for _ in range(20):
            connection = socket.create_connection((target.host, target.port), 5)
            connections.append(connection)
            closed_window = frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)) + frame(SETTINGS, ACK, 0)
            connection.sendall(PREFACE + closed_window)
            ask_within_the_window(connection, message, 70)
            target.assert_unharmed()
        assert target.sheds()["unread"] > 100
        target.assert_no_call_is_left()
    finally:
        for connection in connections:
            connection.close()
        target.close()


def ask_within_the_window(connection: socket.socket, message: bytes, calls: int) -> None:
    """So many calls, as fast as the server takes their bytes."""
    window, unread = 65535, b""
    for number in range(calls):
        while window < len(message) + 5:
            found, unread = frames(unread + connection.recv(65536))
            window += sum(int.from_bytes(each[3], "big") for each in found if each[0] == WINDOW and each[2] == 0)
        window -= len(message) + 5
        connection.sendall(call(2 * number + 1, message))


def test_giant_headers(target: Target) -> None:
    """A megabyte of metadata, in one piece and without end: refused, connection or call."""
    with target.connect() as connection:
        send(connection, headers(1, ("x", "y" * 15_000), flags=0))
        for _ in range(200):
            if not send(connection, frame(CONTINUATION, 0, 1, b"\x00\x01x\x7f\x81\x7e" + b"z" * 16_000)):
                break
    with pytest.raises(grpc.RpcError) as caught:
        target.channel.unary_unary(SCORE)(b"", timeout=5, metadata=(("x-large", "y" * 30_000),))
    # pygrpc-native says it by HTTP status 431, which gRPC clients show as UNKNOWN.
    assert caught.value.code().name in ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN")
    target.assert_unharmed()


def test_garbage_and_half_open_connections(target: Target) -> None:
    """No preface, half a preface, half a frame, frames of lengths that lie; then silence."""
    kept = []
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HT", b"\x16\x03\x01\x02\x00", os.urandom(4096), b""):
        made = socket.create_connection((target.host, target.port), 5)
        send(made, data)
        kept.append(made)
    for data in (b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", b"\x00\x40\x00\x01\x04\x00\x00\x00\x01abc"):
        made = target.connect()
        send(made, data)
        kept.append(made)
    target.assert_unharmed()
    for each in kept:
        each.close()


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_connections_without_a_client_are_closed(transport: str, tmp_path: Path) -> None:
    """Whoever does not answer a ping is gone, with or without a call; grpcio also ends what never began to speak."""
    target = Target(transport, tmp_path / "log", server={"keepalive_seconds": 1})
    begun = PREFACE + frame(SETTINGS, 0, 0)
    silent = [begun, begun + frame(SETTINGS, ACK, 0), begun + headers(1)]
    if transport == "grpcio":
        silent += [b"", PREFACE[:8], PREFACE]
    connections = []
    try:
        for data in silent:
            connections.append(socket.create_connection((target.host, target.port), 5))
            send(connections[-1], data)
        for connection, data in zip(connections, silent, strict=True):
            assert closed(connection), data
        target.assert_unharmed()
    finally:
        for connection in connections:
            connection.close()
        target.close()


def closed(connection: socket.socket) -> bool:
    """By the other side, within 15 seconds."""
    ends = time.monotonic() + 15
    connection.settimeout(15)
    try:
        while time.monotonic() < ends:
            if not connection.recv(65536):
                return True
    except TimeoutError:
        return False
    except OSError:  # reset
        return True
    return False


class Crowd:
    """Processes with many connections; see many_connections.py."""

    def __init__(self, target: Target, connections: int, processes: int = CROWDS) -> None:
        script = str(Path(__file__).with_name("many_connections.py"))
        share = connections // processes
        self._members = [
            subprocess.Popen(
                [sys.executable, script, target.address, str(share), f"127.0.0.{number + 2}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(processes)
        ]
        self.greeted = self._sum()

    def ask(self, what: str) -> int:
        """Of all of them together."""
        for each in self._members:
            assert each.stdin is not None
            each.stdin.write(what + "\n")
            each.stdin.flush()
        return self._sum()

    def leave(self) -> None:
        for each in self._members:
            assert each.stdin is not None
            each.stdin.close()
        for each in self._members:
            try:
                each.wait(20)
            finally:
                each.kill()

    def _sum(self) -> int:
        found = 0
        for each in self._members:
            assert each.stdout is not None
            found += int(each.stdout.readline() or 0)
        return found


@contextlib.contextmanager
def good_client(target: Target) -> Iterator[Callable[[], int]]:
    """Asks all the while on a connection of its own; gives how many answers were right, and fails if one was not."""
    stop = threading.Event()
    right = 0
    wrong: list[str] = []

    def ask() -> None:
        nonlocal right
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=["p", "q"])
        with grpc.insecure_channel(target.address, ALONE) as channel:
            while not stop.wait(0.01):
                try:
                    answer = KVIndexStub(channel).Score(request, timeout=20)
                except grpc.RpcError as error:
                    wrong.append(str(error))
                    continue
                if [(each.pod, each.matched_blocks) for each in answer.scores] == [("p", 4), ("q", 0)]:
                    right += 1
                else:
                    wrong.append(str(answer))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: right
    finally:
        stop.set()
        thread.join()
    assert wrong == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_ten_thousand_connections(transport: str, tmp_path: Path) -> None:
    """All are greeted, kept, answered on, and cost little memory; a good client is answered right all the while."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(CONNECTIONS, (hard * 3 // 4 - 64) // CROWDS * CROWDS)  # all of them, unless the system forbids it
    target = Target(transport, tmp_path / "log")
    files = target.open_files()
    try:
        with good_client(target) as right:
            crowd = Crowd(target, wanted)
            try:
                idle = (target.rss() - target.at_first) * 1024 / wanted
                before = right()
                assert (crowd.greeted, crowd.ask("call"), crowd.ask("open")) == (wanted, wanted, wanted)
                assert right() > before > 0
                used = (target.rss() - target.at_first) * 1024 / wanted
                assert target.open_files() >= wanted
                print(f"\n{transport}: {wanted} connections, {idle:.1f} KiB each idle, {used:.1f} after a call on each")
                assert used < 40  # KiB
                assert target.process.poll() is None
            finally:
                crowd.leave()
        ends = time.monotonic() + 20
        while target.open_files() > files + 64:
            assert time.monotonic() < ends, target.open_files()
            time.sleep(0.1)
        wait = target.rss() - target.at_first
        assert wait < 400, wait
        target.at_first = target.rss()  # what the allocator keeps for the next crowd
        target.assert_unharmed()
        target.assert_no_call_is_left()
    finally:
        target.close()


def test_connections_beyond_the_limit_are_closed_at_once(tmp_path: Path) -> None:
    """Those within it go on; when somebody leaves, the next one comes in."""
    target = Target("grpcio", tmp_path / "log", limits={"max_connections": 40})
    try:
        with good_client(target) as right:
            crowd = Crowd(target, 60, 1)
            before = right()
            # Two are this test's own.
            assert 36 <= crowd.greeted <= 39, crowd.greeted
            assert crowd.ask("open") == crowd.ask("call") == crowd.greeted
            with grpc.insecure_channel(target.address, ALONE) as late, pytest.raises(grpc.RpcError) as caught:
                KVIndexStub(late).Score(pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT)), timeout=2)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert right() > before
            crowd.leave()
        target.assert_unharmed()
    finally:
        target.close()


def test_few_descriptors_are_told_and_not_all_given_to_clients(tmp_path: Path) -> None:
    """The soft limit is raised to the hard one; a crowd leaves enough for the metrics port and for new engines."""
    target = Target("grpcio", tmp_path / "log", files=(200, 512))
    try:
        assert resource.prlimit(target.process.pid, resource.RLIMIT_NOFILE) == (512, 512)
        assert '"limit": 512, "max_connections": 12288, "allowed": 384' in target.log.read_text()
        crowd = Crowd(target, 500, 1)
        try:
            assert 350 <= crowd.greeted <= 384, crowd.greeted
            admin = KVIndexAdminStub(target.channel)
            with contextlib.closing(wire.publisher("tcp://127.0.0.1:*")) as engine:
                admin.RegisterPod(pb.RegisterPodRequest(pod="late", model="m", endpoint=engine.endpoint), timeout=5)
                ends = time.monotonic() + 10
                for sequence in range(1000):
                    engine.send([b"", sequence.to_bytes(8, "big"), msgpack.packb([time.time(), []])])
                    time.sleep(0.05)
                    heard = {
                        each.pod: each.messages for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams
                    }
                    if heard["late"]:
                        break
                    assert time.monotonic() < ends
                admin.UnregisterPod(pb.UnregisterPodRequest(pod="late", model="m"), timeout=5)
            found = [each for each in admin.Check(pb.CheckRequest(), timeout=10).checks if each.name == "descriptors"]
            assert [each.evidence.split(" of ")[1] for each in found] == ["512 file descriptors are in use"]
        finally:
            crowd.leave()
        target.assert_unharmed()
    finally:
        target.close()


def test_a_client_that_cancels_everything(target: Target) -> None:
    """Calls and streams cancelled before, while and after they are worked on: no permit is lost."""
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT * 50))
    stub = KVIndexStub(target.channel)
    for number in range(600 * MORE):
        call = stub.Score.future(request, timeout=5)
        if number % 3 == 0:
            time.sleep(0.001)
        call.cancel()
        if number % 10 == 0:
            stream = stub.ScoreStream(iter([request] * 3), timeout=5)
            if number % 20 == 0:
                next(stream, None)
            stream.cancel()
    target.assert_unharmed()
    ends = time.monotonic() + 10
    while (left := in_flight(target)) != 0.0:
        assert time.monotonic() < ends, left
        time.sleep(0.1)
    target.assert_no_call_is_left()


def in_flight(target: Target) -> float:
    """Calls and streams that hold a permit, by the server's own count: 256 streams are the limit."""
    stub = KVIndexStub(target.channel)
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT))
    streams = [stub.ScoreStream(iter([request]), timeout=5) for _ in range(100)]
    return float(sum(next(each).total_blocks != 4 for each in streams))


@pytest.mark.parametrize("transport", ["grpcio", "native"])
def test_a_disk_without_room(transport: str, tmp_path: Path) -> None:
    """No file of the process can grow, by a limit of the system: snapshots fail and are counted, answers go on."""
    directory = tmp_path / "kept"
    directory.mkdir()
    target = Target(transport, tmp_path / "log", snapshot={"directory": str(directory), "interval_seconds": 1})
    try:
        _, hard = resource.prlimit(target.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(target.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        wait_for(target, "kvindex_snapshots_failed_total", 2)
        target.assert_unharmed()
        # What was complete before stays whole, and nothing half-written stays beside it.
        left = sum(each.stat().st_size == 0 or each.name.startswith(".") for each in directory.iterdir())
        assert left <= 1, list(directory.iterdir())  # the one being tried just now
        resource.prlimit(target.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        wait_for(target, "kvindex_snapshots_written_total", 1)
        target.assert_unharmed()
    finally:
        target.close()


def wait_for(target: Target, name: str, more: float) -> None:
    """Until this counter has grown by so much."""

    def now() -> float:
        found = re.search(rf"^{name} (\S+)", target.scrape(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    first, ends = now(), time.monotonic() + 20
    while now() < first + more:
        assert time.monotonic() < ends, target.scrape()
        time.sleep(0.1)


def test_certificates_revoked_and_rotated_under_load(tmp_path: Path) -> None:
    """Two clients ask without pause: one is revoked and gets no further answer, the other one never sees a fault.

    Meanwhile the server's own certificate is replaced, first by a half-written file. The native transport has no TLS.
    """
    ca, log = trustme.CA(), tmp_path / "log"
    cert, key, client_ca, revoked = (tmp_path / name for name in ("tls.crt", "tls.key", "ca.crt", "revoked"))
    client_ca.write_bytes(ca.cert_pem.bytes())
    revoked.write_text("")

    def server_pair(of: trustme.CA) -> None:
        made = of.issue_cert("127.0.0.1")
        key.write_bytes(made.private_key_pem.bytes())
        cert.write_bytes(b"".join(each.bytes() for each in made.cert_chain_pems))

    def channel(client: trustme.LeafCert, trusted: trustme.CA = ca) -> grpc.Channel:
        chain = b"".join(each.bytes() for each in client.cert_chain_pems)
        credentials = grpc.ssl_channel_credentials(trusted.cert_pem.bytes(), client.private_key_pem.bytes(), chain)
        return grpc.secure_channel(address(line, "grpc"), credentials, ALONE)

    server_pair(ca)
    tls = {"cert_file": cert, "key_file": key, "client_ca_file": client_ca, "revoked_file": revoked}
    config: dict[str, object] = {
        "tls": {name: str(path) for name, path in tls.items()},
        "models": [{"name": "m", "block_size": 16}],
    }
    process, line = serve(config, log)
    good, bad = ca.issue_cert("good.example"), ca.issue_cert("bad.example")
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT))
    stop = threading.Event()
    codes: dict[str, list[str]] = {"good": [], "bad": []}

    def ask(name: str, client: trustme.LeafCert) -> None:
        with channel(client) as made:
            while not stop.wait(0.01):
                try:
                    KVIndexStub(made).Score(request, timeout=20, wait_for_ready=not codes[name])
                    codes[name].append("OK")
                except grpc.RpcError as error:
                    codes[name].append(error.code().name)

    threads = [threading.Thread(target=ask, args=each) for each in (("good", good), ("bad", bad))]
    try:
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        leaf = x509.load_pem_x509_certificate(bad.cert_chain_pems[0].bytes())
        revoked.write_text(hashlib.sha256(leaf.public_bytes(Encoding.DER)).hexdigest() + "\n")
        cert.write_bytes(b"half a certificate")
        time.sleep(1.5)
        with channel(good) as still:  # the old pair is in force
            assert KVIndexStub(still).Score(request, timeout=20, wait_for_ready=True).total_blocks == 4
        other = trustme.CA()
        server_pair(other)
        time.sleep(1.5)
        with channel(good, other) as rotated:
            assert KVIndexStub(rotated).Score(request, timeout=20, wait_for_ready=True).total_blocks == 4
        stop.set()
        for thread in threads:
            thread.join()
        assert set(codes["good"]) == {"OK"} and len(codes["good"]) > 10
        turned = codes["bad"].index("UNAUTHENTICATED")
        assert set(codes["bad"][:turned]) == {"OK"} and set(codes["bad"][turned:]) == {"UNAUTHENTICATED"}
        assert process.poll() is None
    finally:
        stop.set()
        process.terminate()
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
    written = log.read_text()
    assert "Traceback" not in written and "PRIVATE KEY" not in written
    assert "rotated file refused" in written and "rotated file taken over" in written


def test_silent_connections_do_not_shut_out_probes_and_scrapes(target: Target) -> None:
    """More of them than the metrics port has places: those silent longest make room, and keep-alive ones still work."""
    host, _, port = target.metrics.rpartition(":")
    kept = []
    try:
        for number in range(100):
            kept.append(socket.create_connection((host, int(port)), 5))
            if number % 2:
                send(kept[-1], b"GET /healthz HT")  # half a request
            if number % 10 == 9:
                with urllib.request.urlopen(f"http://{target.metrics}/readyz", timeout=5) as answer:
                    assert answer.status == 200
        assert "kvindex_ready 1.0" in target.scrape()
        assert closed(kept[0]) and closed(kept[1])
        kept[-1].settimeout(0.2)
        with pytest.raises(TimeoutError):  # one of the last is still there
            kept[-1].recv(1)
    finally:
        for each in kept:
            each.close()
    target.assert_unharmed()
