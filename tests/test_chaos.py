"""Clients that mean harm, against the real process: it stays up and small, and its answers stay what they were."""

import json
import os
import re
import resource
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import hpack
import msgpack
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub

SOAK = bool(os.environ.get("KVINDEX_SOAK"))
CONNECTIONS = 10_000 if SOAK else 2_000
MORE = 20 if SOAK else 1
SCORE = "/kvindex.v1.KVIndex/Score"
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


class Target:
    """A server process with one pod that holds a prompt of four blocks, with little patience for silent calls."""

    def __init__(self, transport: str, log: Path, **more: object) -> None:
        self.log = log
        config = {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "server": {"transport": transport, "message_seconds": 1},
            "models": [{"name": "m", "block_size": 16}],
            **more,
        }
        file = log.with_suffix(".yaml")
        file.write_text(json.dumps(config))
        command = [sys.executable, "-m", "kvindex_server", "serve", "--config", str(file)]
        with log.open("wb") as err:
            # The tests' own KVINDEX_SOAK is no setting of the server.
            env = {name: value for name, value in os.environ.items() if not name.startswith("KVINDEX_")}
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("listening"), log.read_text()
        self.address = line.split("grpc=")[1].split()[0]
        self.metrics = line.split("metrics=")[1].split()[0]
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
        made.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0))
        return made

    def assert_unharmed(self, seconds: float = 10.0) -> None:
        """It answers as it did at first, within the time, and is not much larger."""
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=["p", "q"])
        ends = time.monotonic() + seconds
        with grpc.insecure_channel(self.address) as channel:
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


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(stream: int, *more: tuple[str, str], path: str = SCORE, flags: int = 4) -> bytes:
    fields = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x")]
    fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
    return frame(1, flags, stream, hpack.Encoder().encode(fields, huffman=False))


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
                if not send(connection, headers(stream) + frame(3, 0, stream, struct.pack(">I", 8))):
                    break
    target.assert_unharmed()


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


def test_a_reader_that_never_reads(target: Target) -> None:
    """Large answers that nobody takes: they wait within the connection's windows, and the process stays small."""
    pods = [f"pod-with-a-rather-long-name-{number}" for number in range(2000)]
    message = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT), pods=pods).SerializeToString()
    body = b"\0" + struct.pack(">I", len(message)) + message
    with target.connect() as connection:
        connection.settimeout(0.5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for stream in range(1, 81, 2):
            pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)]
            data = b"".join(frame(0, int(part is pieces[-1]), stream, part) for part in pieces)
            if not send(connection, headers(stream) + data):
                break
        target.assert_unharmed()


def test_giant_headers(target: Target) -> None:
    """A megabyte of metadata, in one piece and without end: refused, connection or call."""
    with target.connect() as connection:
        send(connection, headers(1, ("x", "y" * 15_000), flags=0))
        for _ in range(200):
            if not send(connection, frame(9, 0, 1, b"\x00\x01x\x7f\x81\x7e" + b"z" * 16_000)):
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


def test_many_connections(target: Target) -> None:
    """Thousands of open connections are carried, and the next client is still served."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = []
    try:
        for _ in range(CONNECTIONS):
            kept.append(target.connect())
        target.assert_unharmed(30)
    finally:
        for each in kept:
            each.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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


def in_flight(target: Target) -> float:
    """Calls and streams that hold a permit, by the server's own count: 256 streams are the limit."""
    stub = KVIndexStub(target.channel)
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=PROMPT))
    streams = [stub.ScoreStream(iter([request]), timeout=5) for _ in range(100)]
    return float(sum(next(each).total_blocks != 4 for each in streams))


def test_a_disk_without_room(tmp_path: Path) -> None:
    """No file of the process can grow, by a limit of the system: snapshots fail and are counted, answers go on."""
    directory = tmp_path / "kept"
    directory.mkdir()
    target = Target("grpcio", tmp_path / "log", snapshot={"directory": str(directory), "interval_seconds": 1})
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
