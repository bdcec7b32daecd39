"""The optional transport with real gRPC clients: answers, codes, metadata, deadlines, limits; the rest behind it."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvindex_server.config import ConfigError, Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.server import Server

TOKEN = "operator-token-0123456789"


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    ports = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "models": [{"name": "m", "block_size": 4}]}
    server = Server(Settings.model_validate({**ports, **settings, "server": {"transport": "native"}}))
    server.start()
    assert server.wait_ready(10)
    try:
        yield server
    finally:
        server.stop(0)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(limits={"max_message_bytes": 100_000, "max_tokens": 50_000}) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address, options=[("grpc.max_send_message_length", -1)]) as opened:
        yield opened


def request(**fields: Any) -> pb.ScoreRequest:
    return pb.ScoreRequest(**{"model": "m", "tokens": pb.Tokens(ids=range(9)), "pods": ["p"], **fields})


def refused(channel: grpc.Channel, message: pb.ScoreRequest, **call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        KVIndexStub(channel).Score(message, **{"timeout": 5, **call})
    return caught.value


def test_the_same_answers_and_errors(channel: grpc.Channel) -> None:
    answer = KVIndexStub(channel).Score(request(), timeout=5)
    assert (answer.total_blocks, answer.total_tokens, answer.scores[0].pod) == (2, 9, "p")
    for fields, code, words in (
        ({"model": "who"}, "NOT_FOUND", "model: 'who' is neither configured nor seen"),
        ({"model": ""}, "INVALID_ARGUMENT", "model: must not be empty"),
        ({"tokens": pb.Tokens(ids=[1] * 50_001)}, "INVALID_ARGUMENT", "tokens.ids: 50001 tokens exceed the limit"),
        ({"tokens": pb.Tokens(ids=[1] * 100_001)}, "RESOURCE_EXHAUSTED", "the message is larger than 100000 bytes"),
        ({"tokens": None, "prompt": "x"}, "FAILED_PRECONDITION", "model 'm' has no tokenizer"),
    ):
        error = refused(channel, request(**fields))
        assert (error.code().name, words in error.details()) == (code, True), error


def test_everything_else_is_served_behind_it(server: Server, channel: grpc.Channel) -> None:
    assert [each.total_blocks for each in KVIndexStub(channel).ScoreStream(iter([request()] * 3), timeout=5)] == [2] * 3
    assert KVIndexAdminStub(channel).GetStats(pb.GetStatsRequest(), timeout=5).models[0].model == "m"
    stub = health_pb2_grpc.HealthStub(channel)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == health_pb2.HealthCheckResponse.SERVING
    assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/no.Such/Method")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_go_client_finds_its_way_by_reflection(server: Server) -> None:
    buf = Path(sys.executable).parent / "buf"
    body = json.dumps({"model": "m", "tokens": {"ids": list(range(9))}, "pods": ["p"]})
    command = [str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", body]
    url = f"http://{server.grpc_address}/kvindex.v1.KVIndex/Score"
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totalBlocks"] == 2


def test_overload_and_deadlines(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a burst, what is beyond the permits is refused with retry info, and what came too late is not worked on."""
    front = server._front
    assert front is not None
    monkeypatch.setattr(front, "_max_in_flight", 4)
    worked = []
    plain = front._direct.plain
    monkeypatch.setattr(front._direct, "plain", lambda data: worked.append(1) or time.sleep(0.3) or plain(data))
    with grpc.insecure_channel(server.grpc_address) as channel:
        stub = KVIndexStub(channel)
        calls = [stub.Score.future(request(), timeout=10)]
        time.sleep(0.1)
        calls += [stub.Score.future(request(), timeout=10) for _ in range(8)]
        errors = [error for call in calls if (error := call.exception(timeout=10))]
        assert len(errors) == 4 and {each.code().name for each in errors} == {"RESOURCE_EXHAUSTED"}
        trailers = dict(errors[0].trailing_metadata())
        info = error_details_pb2.RetryInfo()
        assert status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details[0].Unpack(info)
        assert info.retry_delay.ToMilliseconds() == 100
        worked.clear()
        first = stub.Score.future(request(), timeout=10)
        time.sleep(0.1)
        assert refused(channel, request(), timeout=0.1).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert first.result().total_blocks == 2
        time.sleep(0.1)
        assert len(worked) == 1
    text = server.metrics.registry.get_sample_value(
        "kvindex_rpc_shed_total", {"method": "/kvindex.v1.KVIndex/Score", "reason": "in_flight"}
    )
    assert text == 4


def test_tokens_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "t").write_text(TOKEN)
    auth = {"tokens_file": str(tmp_path / "t"), "admin_tokens_file": str(tmp_path / "t")}
    with serving(auth=auth) as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert refused(channel, request()).code() is grpc.StatusCode.UNAUTHENTICATED
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        assert KVIndexStub(channel).Score(request(), timeout=5, metadata=metadata).total_blocks == 2
        assert KVIndexAdminStub(channel).GetStats(pb.GetStatsRequest(), timeout=5, metadata=metadata).models


def test_a_unix_socket(tmp_path: Path) -> None:
    with serving(listen=f"unix:{tmp_path}/kv.sock") as server, grpc.insecure_channel(server.grpc_address) as channel:
        assert KVIndexStub(channel).Score(request(), timeout=5).total_blocks == 2
    with pytest.raises(ConfigError), serving(listen=f"unix:{tmp_path}/none/kv.sock"):
        pass


def test_what_it_cannot_do_is_refused_at_the_start() -> None:
    for more in ({"tls": {"cert_file": "c", "key_file": "k"}}, {"auth": {"review": {"url": "https://k"}}}):
        with pytest.raises(ValueError, match="native does not go with"):
            Settings.model_validate({"server": {"transport": "native"}, **more})
    with pytest.raises(ValueError, match=r"native does not go with server\.max_connection_age_seconds"):
        Settings.model_validate({"server": {"transport": "native", "max_connection_age_seconds": 60}})
