"""Engine and server as processes of their own, killed under load and started again at the same addresses."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import grpc
import msgpack
import pytest

from kvindex_server import wire
from kvindex_server.fleet import Fleet
from kvindex_server.ingest import Bounds
from kvindex_server.models import Models
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.pods import PodSpec
from kvindex_server.stream import StreamState, Trust
from tests.publisher import free_port

END = b"\xff" * 8

ENGINE = """
import json, sys
from kvindex_server.simulate.pod import SimulatedPod
from kvindex_server.simulate.workload import Traffic, Workload, by_session

endpoint, replay_endpoint, seed, buffer_steps = sys.argv[1:]
pod = SimulatedPod("pod", "m", blocks=600, endpoint=endpoint, replay_endpoint=replay_endpoint,
                   step_seconds=0.002, seed=int(seed), buffer_steps=int(buffer_steps))
pod.start()
traffic = Traffic(Workload(int(seed)), {"pod": pod}, by_session(["pod"]))
print("up", flush=True)
ever = set()
for line in sys.stdin:  # "load": another round of requests; "drain": until all are answered
    while traffic.under_way < 12 and traffic.send():
        pass
    traffic.collect()
    while line.strip() == "drain" and traffic.under_way:
        traffic.collect()
    resident = sorted(pod.resident())
    ever.update(resident)
    print(json.dumps({"resident": resident, "ever": sorted(ever), "published": pod.published()}), flush=True)
"""


class EngineProcess:
    """A simulated engine under load that it works off while it is asked for nothing."""

    def __init__(self, endpoint: str, replay_endpoint: str, seed: int, buffer_steps: int = 100_000) -> None:
        command = [sys.executable, "-c", ENGINE, endpoint, replay_endpoint, str(seed), str(buffer_steps)]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._popen.stdout is not None
        assert self._popen.stdout.readline() == "up\n"

    def tell(self, word: str) -> dict[str, object]:
        assert self._popen.stdin is not None and self._popen.stdout is not None
        self._popen.stdin.write(word + "\n")
        self._popen.stdin.flush()
        return dict(json.loads(self._popen.stdout.readline()))

    def load(self, published: int) -> dict[str, object]:
        """Keep it busy until it has published so many messages; requests are still open then."""
        while True:
            told = self.tell("load")
            if int(str(told["published"])) >= published:
                return told
            time.sleep(0.01)

    def kill(self) -> None:
        self._popen.send_signal(signal.SIGKILL)
        self._popen.communicate(timeout=10)


class ServerProcess:
    """`python -m kvindex_server serve` that has the engine as a configured pod, or none at all."""

    def __init__(self, listen: str, pods: list[dict[str, object]]) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "kvindex_server", "serve", "--listen", listen, "--metrics-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "KVINDEX_PODS": json.dumps(pods)},
        )
        assert self._popen.stdout is not None
        found = re.search(r"listening grpc=(\S+)", self._popen.stdout.readline())
        assert found is not None
        self._channel = grpc.insecure_channel(found[1])
        self._read, self._admin = rpc.KVIndexStub(self._channel), rpc.KVIndexAdminStub(self._channel)

    def register(self, pod: dict[str, object]) -> None:
        self._admin.RegisterPod(pb.RegisterPodRequest(**pod), wait_for_ready=True, timeout=20)

    def stream(self) -> pb.StreamInfo:
        return self._admin.ListPods(pb.ListPodsRequest(), wait_for_ready=True, timeout=20).streams[0]

    def held(self, hashes: set[int]) -> set[int]:
        """Those of these engine hashes that the pod is said to hold."""
        asked = sorted(hashes)
        request = pb.GetPodsForBlocksRequest(model="m", engine_hashes=pb.EngineHashes(ints=asked))
        try:
            answer = self._read.GetPodsForBlocks(request, wait_for_ready=True, timeout=20)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:  # not synchronised yet
                return set()
            raise
        return {block for block, found in zip(asked, answer.blocks, strict=True) if found.holders}

    def kill(self) -> None:
        self._channel.close()
        self._popen.send_signal(signal.SIGKILL)
        self._popen.communicate(timeout=10)


def blocks(told: dict[str, object], name: str) -> set[int]:
    found = told[name]
    assert isinstance(found, list)
    return set(found)


def eventually(check: Callable[[], bool], seconds: float = 30.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


@contextmanager
def running(made: EngineProcess | ServerProcess) -> Iterator[None]:
    try:
        yield
    finally:
        made.kill()


def engine_of(pod: dict[str, object], seed: int) -> EngineProcess:
    return EngineProcess(str(pod["endpoint"]), str(pod["replay_endpoint"]), seed)


def agrees(server: ServerProcess, told: dict[str, object], others: set[int]) -> bool:
    """Exact up to the last message, and of all blocks ever named it holds just what the engine does."""
    stream = server.stream()
    return (
        (stream.state, stream.trust) == (pb.STREAM_STATE_LIVE, pb.TRUST_EXACT)
        and stream.last_sequence + 1 == told["published"]
        and server.held(blocks(told, "ever") | others) == blocks(told, "resident")
    )


@pytest.mark.parametrize("lives", [2, 4])
def test_killed_engine_leaves_no_block_behind(pod: dict[str, object], lives: int) -> None:
    """After SIGKILL under load and a start on the same ports, only the new life's blocks are found."""
    dead: set[int] = set()
    server = ServerProcess("127.0.0.1:0", [pod])
    with running(server):
        for life in range(lives):
            engine = engine_of(pod, seed=100 + life)
            with running(engine):
                told = engine.load(150 if life % 2 else 300)
                mine = blocks(told, "ever")
                assert dead.isdisjoint(mine)
                if life:
                    eventually(lambda mine=mine: bool(server.held(mine)))  # type: ignore[misc]
                    assert not server.held(dead), "a dead engine's block beside a living one's"
                if life == lives - 1 or life % 2:
                    told = engine.tell("drain")
                    eventually(lambda told=told, dead=frozenset(dead): agrees(server, told, set(dead)))  # type: ignore[misc]
                else:
                    eventually(lambda mine=mine: bool(server.held(mine)))  # type: ignore[misc]
                    told = engine.load(400)
            dead |= blocks(told, "ever")
        assert server.stream().restarts >= lives - 1


@pytest.mark.parametrize("configured", [True, False])
def test_killed_server_is_exact_again_by_replay(pod: dict[str, object], configured: bool) -> None:
    """The index keeps nothing on disk: a new process asks the living engine for everything."""
    listen = f"127.0.0.1:{free_port()}"
    engine = engine_of(pod, seed=7)
    with running(engine):
        for published in (200, 500):
            server = ServerProcess(listen, [pod] if configured else [])
            with running(server):
                if not configured:
                    server.register(pod)
                told = engine.load(published)
                eventually(lambda told=told, server=server: bool(server.held(blocks(told, "ever"))))  # type: ignore[misc]
                engine.load(published + 100)  # killed in the middle of this
        server = ServerProcess(listen, [pod] if configured else [])
        with running(server):
            if not configured:
                server.register(pod)
            told = engine.load(700)
            told = engine.tell("drain")
            eventually(lambda: agrees(server, told, set()))


def serve(router: wire.Socket, bodies: list[bytes], halt: threading.Event) -> None:
    """Answer replay requests as vLLM before 0.33: in one go, and what the socket does not take is lost."""
    while not halt.is_set():
        if not router.wait(20):
            continue
        frames = router.receive()
        assert frames is not None
        identity, _, start = frames
        for sequence in range(int.from_bytes(start, "big"), len(bodies)):
            router.send([identity, b"", b"", sequence.to_bytes(8, "big"), bodies[sequence]])
        router.send([identity, b"", b"", END, b""])


def test_rebuild_from_a_router_that_drops() -> None:
    """9,000 batches of 8 KB from a replay socket with the default send mark: asked again until all are there."""
    bodies = []
    for number in range(9_000):
        event = ["BlockStored", [number + 1], None, [number] * 4, 4, None, "GPU", None, [["x" * 4_000, "y" * 4_000]]]
        bodies.append(bytes(msgpack.packb([time.time(), [event], 0])))
    assert len(bodies[0]) > 8_000
    publish, replay = f"tcp://127.0.0.1:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    fleet, halt = Fleet(Models([]), bounds=Bounds(replay_timeout=1.0)), threading.Event()
    with ExitStack() as stack:
        publisher, router = wire.publisher(publish), wire.replay_server(replay, hwm=1_000)
        stack.callback(publisher.close)
        stack.callback(router.close)
        thread = threading.Thread(target=serve, args=(router, bodies, halt))
        thread.start()
        stack.callback(thread.join)
        stack.callback(halt.set)
        stack.callback(fleet.stop)
        fleet.register(PodSpec("pod", "m", publish, replay_endpoint=replay))
        eventually(lambda: fleet.statuses()[0].state is StreamState.LIVE, 60)
        status = fleet.statuses()[0]
        assert (status.trust, status.blocks, status.last_sequence) == (Trust.EXACT, 9_000, 8_999)
        assert status.replays > 1, "nothing was lost, so nothing was shown"
        # The engine has been idle all along; its next batch follows.
        publisher.send([b"", (9_000).to_bytes(8, "big"), bodies[0]])
        eventually(lambda: fleet.statuses()[0].last_sequence == 9_000)
        assert fleet.statuses()[0].trust is Trust.EXACT and fleet.statuses()[0].gaps == 0
