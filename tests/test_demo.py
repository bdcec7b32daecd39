"""The demo runs by itself, its hints work, and the server's view of its pods is the pods' own."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

pytest.importorskip("kvindex_server._core")

from kvindex_server import demo
from kvindex_server.config import Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.server import Server
from kvindex_server.simulate.events import Encoding
from kvindex_server.simulate.pod import SimulatedPod
from kvindex_server.simulate.workload import Shape, Traffic, Workload, by_session

COMMAND = [sys.executable, "-m", "kvindex_server", "demo"]
ROOT = Path(__file__).resolve().parent.parent


def test_demo_ends_by_itself() -> None:
    """Three seconds: exit 0, hints, scores above 0, a real hit ratio, and an index that agrees."""
    done = subprocess.run(
        [*COMMAND, "--seconds", "3", "--rate", "40"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for hint in (
        "grpcurl -plaintext",
        "buf curl",
        "/metrics",
        "ListPods",
        "KVIndex/Score",
        "GetPodsForBlocks",
    ):
        assert hint in done.stdout
    scored = re.search(r"(\d+) requests in [\d.]+ s, (\d+) of them scored above 0", done.stdout)
    assert scored is not None
    assert int(scored[1]) > 20
    assert int(scored[2]) > 10
    ratio = re.search(r"hit ratio (0\.\d+) measured by the engines, (0\.\d+) foreseen", done.stdout)
    assert ratio is not None
    assert 0.2 < float(ratio[1]) < 1
    assert "count the same on 4 of 4 pods" in done.stdout
    assert "\x1b" not in done.stdout


def test_once_ends() -> None:
    """--once shows one round."""
    done = subprocess.run(
        [*COMMAND, "--once", "--pods", "2", "--rate", "100"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "hit ratio" in done.stdout


def test_hints_work_and_ctrl_c_ends_it() -> None:
    """Every printed buf command and the metrics URL answer; SIGINT ends with the summary and exit 0."""
    buf = shutil.which("buf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    process = subprocess.Popen([*COMMAND, "--pods", "2"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line.strip())
            if "requests=" in line and "requests=0" not in line:
                break
        text = "\n".join(lines)
        metrics = re.search(r"curl (http://\S+/metrics)", text)
        assert metrics is not None
        with urllib.request.urlopen(metrics[1], timeout=10) as answer:
            assert b"kvindex" in answer.read()
        calls = [shlex.split(line) for line in lines if line.startswith("buf curl")]
        assert len(calls) == 3
        if buf is not None:
            _check_calls(buf, calls)
        process.send_signal(2)
        rest = process.stdout.read()
        assert process.wait(timeout=30) == 0
        assert "measured by the engines" in rest
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _check_calls(buf: str, calls: list[list[str]]) -> None:
    answers = []
    for call in calls:
        done = subprocess.run([buf, *call[1:]], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    pods, scores, blocks = answers
    assert {stream["pod"] for stream in pods["streams"]} == {"pod-0", "pod-1"}
    assert scores["scores"][0]["matchedBlocks"] == 2
    assert all(block["holders"] for block in blocks["blocks"])


def test_pipe_that_closes() -> None:
    """A reader that leaves early is no error."""
    process = subprocess.Popen(
        [*COMMAND, "--seconds", "20"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        process.stderr.close()
    finally:
        process.kill()
        process.wait()


def test_runs_off_the_main_thread(capsys: pytest.CaptureFixture[str]) -> None:
    """No signal handling is needed to run it."""
    args = argparse.Namespace(pods=2, seconds=1.0, once=False, rate=50.0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(demo.run, args).result(timeout=60) == 0
    assert "count the same on 2 of 2 pods" in capsys.readouterr().out


# ---- the server against the engines' own truth -----------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on free ports."""
    server = Server(Settings(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0"))
    server.start()
    assert server.wait_ready(10)
    yield server
    server.stop(0)


def _stream(admin: rpc.KVIndexAdminStub, pod: SimulatedPod) -> pb.StreamInfo:
    streams = admin.ListPods(pb.ListPodsRequest(model="m"), timeout=10).streams
    found: pb.StreamInfo = next(stream for stream in streams if stream.pod == pod.pod)
    return found


def _caught_up(admin: rpc.KVIndexAdminStub, pod: SimulatedPod) -> pb.StreamInfo:
    deadline = time.monotonic() + 20
    while True:
        stream = _stream(admin, pod)
        published = pod.published()
        if stream.HasField("last_sequence") and stream.last_sequence + 1 == published:
            return stream
        assert time.monotonic() < deadline, f"at {stream.last_sequence} of {published}: {stream.trust_reason}"
        time.sleep(0.02)


def _register(admin: rpc.KVIndexAdminStub, pod: SimulatedPod) -> None:
    admin.RegisterPod(
        pb.RegisterPodRequest(pod=pod.pod, model="m", endpoint=pod.endpoint, replay_endpoint=pod.replay_endpoint),
        timeout=10,
    )


def _held(index: rpc.KVIndexStub, pod: SimulatedPod, hashes: list[int]) -> set[int]:
    answer = index.GetPodsForBlocks(
        pb.GetPodsForBlocksRequest(model="m", engine_hashes=pb.EngineHashes(ints=hashes), pods=[pod.pod]),
        timeout=10,
    )
    return {name for name, block in zip(hashes, answer.blocks, strict=True) if block.holders}


@pytest.mark.parametrize("encoding", list(Encoding))
def test_server_agrees_with_engines(server: Server, encoding: Encoding) -> None:
    """Hash by hash after traffic with evictions, lost messages and a restart; a late subscriber too."""
    pods = {
        name: SimulatedPod(name, "m", blocks=300, encoding=encoding, seed=number)
        for number, name in enumerate(("early", "late"))
    }
    with grpc.insecure_channel(server.grpc_address) as channel:
        index, admin = rpc.KVIndexStub(channel), rpc.KVIndexAdminStub(channel)
        try:
            for pod in pods.values():
                pod.start()
            _register(admin, pods["early"])
            traffic = Traffic(Workload(5, Shape(sessions=6)), pods, by_session(list(pods)))
            _drive(traffic, 30)
            pods["early"].lose(3)
            _drive(traffic, 60)
            _register(admin, pods["late"])
            _drive(traffic, 100)
            former = {name: list(pod.resident()) for name, pod in pods.items()}
            for name, pod in pods.items():
                stream = _caught_up(admin, pod)
                assert stream.trust == pb.TRUST_EXACT, stream.trust_reason
                assert stream.blocks == len(former[name])
                everything = sorted({*former["early"], *former["late"]})
                assert _held(index, pod, everything) == set(former[name])

            pods["early"].restart()
            pods["early"].generate(range(48), 1).result(timeout=10)
            stream = _caught_up(admin, pods["early"])
            resident = set(pods["early"].resident())
            assert len(resident) == 3
            assert (stream.blocks, stream.restarts) == (3, 1)
            assert _held(index, pods["early"], former["early"] + sorted(resident)) == resident
            score = index.Score(pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(48))), timeout=10)
            assert (score.scores[0].pod, score.scores[0].matched_blocks) == ("early", 3)
        finally:
            for pod in pods.values():
                pod.stop()


def _drive(traffic: Traffic, requests: int) -> None:
    deadline = time.monotonic() + 30
    while traffic.total.requests < requests or traffic.under_way:
        assert time.monotonic() < deadline
        if traffic.total.requests + traffic.under_way < requests:
            traffic.send()
        traffic.collect()
        time.sleep(0.001)
