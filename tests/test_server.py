"""The whole process: its start line, readiness, separate admin port, metrics, and its end by signals."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from publisher import Publisher

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

LINE = re.compile(r"listening grpc=(127\.0\.0\.1:\d+) metrics=(127\.0\.0\.1:\d+)(?: admin=(127\.0\.0\.1:\d+))?\n")


class Process:
    """`kvindex-server serve` on free ports."""

    def __init__(self, *flags: str, env: dict[str, str] | None = None) -> None:
        ports = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "kvindex_server", "serve", *ports, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        found = LINE.fullmatch(line)
        assert found, (line, self.popen.communicate(timeout=10) if not line else "")
        self.grpc, self.metrics, self.admin = found.groups()

    def scrape(self, path: str = "/metrics") -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.metrics}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.popen.send_signal(number)
        _, errors = self.popen.communicate(timeout=20)
        return self.popen.returncode, errors


@pytest.fixture
def process() -> Iterator[Process]:
    made = Process()
    yield made
    if made.popen.poll() is None:
        made.popen.kill()
        made.popen.communicate()


def wait_serving(address: str, seconds: float = 10.0) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        ends = time.monotonic() + seconds
        while stub.Check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() < ends, "not serving in time"
            time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_zero(process: Process, number: int) -> None:
    """It serves, and a signal ends it in order; every log line is one JSON object."""
    wait_serving(process.grpc)
    assert process.scrape("/readyz")[0] == 200
    code, errors = process.end(number)
    assert code == 0
    events = [json.loads(line)["event"] for line in errors.splitlines()]
    assert events[0] == "ready" and events[-1] == "draining"


def test_calls_at_work_end_before_the_process_does(process: Process) -> None:
    """An open stream whose next request comes after SIGTERM is still answered within the drain time."""
    wait_serving(process.grpc)
    with grpc.insecure_channel(process.grpc) as channel:
        rpc.KVIndexAdminStub(channel).RegisterPod(
            pb.RegisterPodRequest(pod="p", model="m", endpoint="tcp://127.0.0.1:9")
        )
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1]))
        answered = threading.Event()
        answers = []

        answered = threading.Event()

        def requests() -> Iterator[pb.ScoreRequest]:
            yield request
            answered.wait(10)
            process.popen.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            yield request

        stream = rpc.KVIndexStub(channel).ScoreStream(requests())
        answers = [next(stream)]
        answered.set()
        answers += stream
    assert len(answers) == 2 and all(answer.status.code == 0 for answer in answers)
    process.popen.communicate(timeout=20)
    assert process.popen.returncode == 0


def test_old_connections_are_given_up_and_no_call_is_lost() -> None:
    """A client that calls all the time takes a new connection now and then, each of its calls is answered, and a stream
    that was open before goes on.
    """
    process = Process(env={"KVINDEX_SERVER__MAX_CONNECTION_AGE_SECONDS": "0.5"})
    try:
        wait_serving(process.grpc)
        with grpc.insecure_channel(process.grpc) as channel:
            rpc.KVIndexAdminStub(channel).RegisterPod(
                pb.RegisterPodRequest(pod="p", model="m", endpoint="tcp://127.0.0.1:9")
            )
            states: list[grpc.ChannelConnectivity] = []
            channel.subscribe(states.append)
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[1]))
            late = threading.Event()

            def requests() -> Iterator[pb.ScoreRequest]:
                yield request
                late.wait(20)
                yield request

            stream = rpc.KVIndexStub(channel).ScoreStream(requests())
            next(stream)
            ends = time.monotonic() + 20
            while states.count(grpc.ChannelConnectivity.READY) < 3:
                assert time.monotonic() < ends, states
                rpc.KVIndexStub(channel).Score(request, timeout=5)
            late.set()
            assert next(stream).status.code == 0
    finally:
        assert process.end()[0] == 0


def test_an_idle_stream_does_not_hold_the_end_up(process: Process) -> None:
    """Open streams and health watches that say nothing are ended a second after SIGTERM, not after the drain time."""
    wait_serving(process.grpc)
    with grpc.insecure_channel(process.grpc) as channel:
        silence = threading.Event()

        def nothing() -> Iterator[pb.ScoreRequest]:
            silence.wait(20)
            yield from ()

        stream = rpc.KVIndexStub(channel).ScoreStream(nothing())
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        time.sleep(0.2)
        began = time.monotonic()
        assert process.end()[0] == 0
        assert time.monotonic() - began < 4
        with pytest.raises(grpc.RpcError):
            next(stream)
        silence.set()


def test_garbage_to_reflection_and_health_is_not_logged(process: Process) -> None:
    """It is the caller's fault, and refused as such; a stranger must not be able to fill the log."""
    wait_serving(process.grpc)
    with grpc.insecure_channel(process.grpc) as channel:
        for version in ("v1", "v1alpha"):
            call = channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(iter([b"\xff\xff"]), timeout=5))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff", timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    _, errors = process.end()
    assert [json.loads(line)["event"] for line in errors.splitlines()] == ["ready", "draining"]


def test_admin_service_on_its_own_port() -> None:
    """With --admin-listen the public port does not know the admin service."""
    process = Process("--admin-listen", "127.0.0.1:0")
    try:
        request = pb.ListPodsRequest()
        with grpc.insecure_channel(process.admin) as channel:
            assert list(rpc.KVIndexAdminStub(channel).ListPods(request).streams) == []
        with grpc.insecure_channel(process.grpc) as channel, pytest.raises(grpc.RpcError) as error:
            rpc.KVIndexAdminStub(channel).ListPods(request)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        assert process.end()[0] == 0


def test_a_dead_configured_pod_delays_readiness_but_does_not_block_it() -> None:
    """Reads are UNAVAILABLE until the configured pods are synchronised or the time for it is over."""
    pod = {
        "pod": "dead:1",
        "model": "m",
        "endpoint": "tcp://127.0.0.1:9",
        "replay_endpoint": "tcp://127.0.0.1:11",
    }
    env = {
        "KVINDEX_PODS": json.dumps([pod]),
        "KVINDEX_STREAM__REPLAY_TIMEOUT_SECONDS": "0.5",
        "KVINDEX_SERVER__READY_TIMEOUT_SECONDS": "2",
    }
    process = Process(env=env)
    try:
        request = pb.ScoreRequest(model="m", keys=pb.Keys(values=[1]))
        with grpc.insecure_channel(process.grpc) as channel:
            with pytest.raises(grpc.RpcError) as error:
                rpc.KVIndexStub(channel).Score(request)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert process.scrape("/readyz")[0] == 503 and process.scrape("/healthz")[0] == 200
            wait_serving(process.grpc)
            score = rpc.KVIndexStub(channel).Score(request).scores[0]
        assert (score.pod, score.score, score.trust) == ("dead:1", 0.0, pb.TRUST_COLD)
        assert score.trust_reason == "replay was not answered"
    finally:
        assert process.end()[0] == 0


def test_readiness_can_do_without_some_pods() -> None:
    """With half of the streams asked for, one living pod of two is enough, long before the time is over."""
    with Publisher() as engine:
        living = {"pod": "a", "model": "m", "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
        dead = {**living, "pod": "b", "endpoint": "tcp://127.0.0.1:9", "replay_endpoint": "tcp://127.0.0.1:11"}
        env = {"KVINDEX_PODS": json.dumps([living, dead]), "KVINDEX_SERVER__READY_COVERAGE": "0.5"}
        process = Process(env=env)
        try:
            wait_serving(process.grpc)
            assert 'kvindex_coverage_ratio{model="m"} 0.5' in process.scrape("/metrics")[1]
        finally:
            assert process.end()[0] == 0


def test_a_pods_series_disappear_with_it(process: Process) -> None:
    """Per-stream metrics stand while the pod does, and not longer."""
    with grpc.insecure_channel(process.grpc) as channel:
        admin = rpc.KVIndexAdminStub(channel)
        admin.RegisterPod(pb.RegisterPodRequest(pod="p:1", model="m", endpoint="tcp://127.0.0.1:9", ranks=2))
        text = process.scrape()[1]
        for rank in ("0", "1"):
            assert f'kvindex_stream_gaps_total{{model="m",pod="p:1",rank="{rank}"}} 0.0' in text
        admin.UnregisterPod(pb.UnregisterPodRequest(pod="p:1", model="m"))
        assert 'pod="p:1"' not in process.scrape()[1]


def serve(*flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvindex_server", "serve", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_a_port_in_use_is_a_clear_error() -> None:
    """One line that names the setting; exit code 2."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for key, flags in (
            ("listen", ("--listen", address, "--metrics-listen", "127.0.0.1:0")),
            ("metrics_listen", ("--listen", "127.0.0.1:0", "--metrics-listen", address)),
        ):
            done = serve(*flags)
            assert done.returncode == 2
            assert done.stderr.startswith(f"kvindex-server: config: {key}: ")  # and nothing of gRPC's own before it
            assert len(done.stderr.splitlines()) == 1


def test_a_broken_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    """A directory without a tokenizer is told at the start, not at the first request."""
    done = serve("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--tokenizer", f"m={tmp_path}")
    assert done.returncode == 2 and "tokenizer" in done.stderr and len(done.stderr.splitlines()) == 1


def test_discovery_without_credentials_ends_with_one_line(tmp_path: Path) -> None:
    """A kubeconfig that is not there stops the start with code 2, named by its key."""
    settings = {"kubernetes": {"enabled": True, "kubeconfig": str(tmp_path / "none")}}
    done = subprocess.run(
        [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "KVINDEX_DISCOVERY": json.dumps(settings)},
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kvindex-server: config: discovery.kubernetes.kubeconfig: no usable credentials")
    assert len(done.stderr.splitlines()) == 1
