"""Everything at once for a while: load, churn, engine restarts and bad clients; every checkpoint against an oracle.

Seconds in ordinary runs, `KVINDEX_SOAK_MINUTES` (30) with KVINDEX_SOAK=1; then a process of its own adds calls by the
clock up to `KVINDEX_SOAK_SHARE` (0.7) of what the server was measured to do at the start.
"""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import msgpack
import pytest
from hostile_http2 import frame, headers
from test_chaos import SOAK, Target, send

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub

SECONDS = 60 * float(os.environ.get("KVINDEX_SOAK_MINUTES", "30")) if SOAK else 6.0
PODS, PROMPTS, BLOCKS, SIZE = 6, 40, 8, 16
RATE = 100
SHARE = float(os.environ.get("KVINDEX_SOAK_SHARE", "0.7"))
DICE = random.Random(11)
TOKENS = [[DICE.randrange(100_000) for _ in range(BLOCKS * SIZE)] for _ in range(PROMPTS)]


class Engine:
    """A publisher and what its pod holds, as the oracle knows it: blocks per prompt, from the front."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.socket = wire.publisher("tcp://127.0.0.1:*")
        self.endpoint = self.socket.endpoint
        self.sequence = 0
        self.held = dict.fromkeys(range(PROMPTS), 0)

    def publish(self, *events: dict[str, object]) -> None:
        self.socket.send([b"", self.sequence.to_bytes(8, "big"), msgpack.packb([time.time(), list(events)])])
        self.sequence += 1

    def store(self, prompt: int, blocks: int) -> None:
        """Up to so many blocks of it."""
        first = self.held[prompt]
        if blocks > first:
            event = {"type": "BlockStored", "block_hashes": hashes(prompt, first, blocks), "block_size": SIZE}
            event |= {"parent_block_hash": hashes(prompt, first - 1, first)[0] if first else None, "medium": "GPU"}
            self.publish(event | {"token_ids": TOKENS[prompt][first * SIZE : blocks * SIZE]})
            self.held[prompt] = blocks

    def evict(self, prompt: int, blocks: int) -> None:
        """Down to so many."""
        if blocks < self.held[prompt]:
            gone = hashes(prompt, blocks, self.held[prompt])
            self.publish({"type": "BlockRemoved", "block_hashes": gone, "medium": "GPU"})
            self.held[prompt] = blocks

    def clear(self) -> None:
        self.publish({"type": "AllBlocksCleared"})
        self.held = dict.fromkeys(range(PROMPTS), 0)

    def restart(self) -> None:
        """Another life at the same address."""
        self.socket.close()
        ends = time.monotonic() + 20
        while True:  # for as long as somebody's outgoing connection happens to have the port
            time.sleep(0.05)
            try:
                self.socket = wire.publisher(self.endpoint)
                break
            except wire.BindError:
                assert time.monotonic() < ends
        self.sequence = 0
        self.held = dict.fromkeys(range(PROMPTS), 0)


def hashes(prompt: int, begin: int, end: int) -> list[int]:
    return [1000 + prompt * BLOCKS + block for block in range(begin, end)]


class Pressure:
    """Calls by the clock from a process of its own, at a share of the server's capacity."""

    def __init__(self, target: Target, share: float) -> None:
        command = [sys.executable, str(Path(__file__).with_name("soak_load.py")), target.address, str(share), str(RATE)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.capacity, self.rate = map(float, self._process.stdout.readline().split())

    def stop(self) -> dict[str, int]:
        """Calls by their end; see soak_load."""
        out, _ = self._process.communicate("stop\n", timeout=30)
        ends: dict[str, int] = json.loads(out)
        return ends

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(5)


class Clients:
    """Load and mischief on threads of their own, until stopped."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._stop = threading.Event()
        self.answers = self.refused = 0
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=each) for each in (self._load, self._mischief)]
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()

    def _load(self) -> None:
        with grpc.insecure_channel(self._target.address) as channel:
            stub = KVIndexStub(channel)
            begun, due = time.monotonic(), 0
            while not self._stop.wait(0.005):
                while due < (time.monotonic() - begun) * RATE and not self._stop.is_set():
                    due += 1
                    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS[due % PROMPTS]))
                    try:
                        answer = stub.Score(request, timeout=5)
                        if answer.total_blocks != BLOCKS or any(each.matched_blocks > BLOCKS for each in answer.scores):
                            self.errors.append(str(answer))
                        self.answers += 1
                    except grpc.RpcError as error:
                        if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                            self.refused += 1
                        else:
                            self.errors.append(str(error.code()))

    def _mischief(self) -> None:
        while not self._stop.wait(0.2):
            with self._target.connect() as connection:
                for stream in range(1, 200, 2):
                    if not send(connection, headers(stream) + frame(3, 0, stream, struct.pack(">I", 8))):
                        break
            with socket.create_connection((self._target.host, self._target.port), 5) as made:
                send(made, os.urandom(512))
            for _ in range(20):
                KVIndexStub(self._target.channel).Score.future(pb.ScoreRequest(model="m"), timeout=1).cancel()


@pytest.fixture(params=["grpcio", "native"] if SOAK else ["grpcio"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    made = Target(request.param, tmp_path / "log")
    yield made
    made.close()


def settled(target: Target, engines: list[Engine]) -> None:
    """Every message sent has been applied."""
    admin = KVIndexAdminStub(target.channel)
    ends = time.monotonic() + 20
    while True:
        last = {each.pod: each.last_sequence for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams}
        if all(last[each.name] == each.sequence - 1 for each in engines):
            return
        assert time.monotonic() < ends, (last, [each.sequence for each in engines])
        time.sleep(0.05)


def heard(target: Target, engine: Engine, restarts: int) -> None:
    """Publish what changes nothing until the server follows this life of the engine."""
    admin = KVIndexAdminStub(target.channel)
    ends = time.monotonic() + 20
    while True:
        engine.clear()
        time.sleep(0.05)
        stream = next(
            each for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams if each.pod == engine.name
        )
        if stream.restarts >= restarts and stream.last_sequence == engine.sequence - 1:
            return
        assert time.monotonic() < ends, stream


def register(target: Target, engine: Engine) -> None:
    request = pb.RegisterPodRequest(pod=engine.name, model="m", endpoint=engine.endpoint)
    KVIndexAdminStub(target.channel).RegisterPod(request, timeout=5)
    heard(target, engine, 0)


def check(target: Target, engines: list[Engine]) -> None:
    """Each prompt's score at each pod is what the oracle says."""
    stub = KVIndexStub(target.channel)
    for prompt in range(PROMPTS):
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=TOKENS[prompt]), pods=[each.name for each in engines])
        found = {each.pod: each.matched_blocks for each in stub.Score(request, timeout=10, wait_for_ready=True).scores}
        assert found == {each.name: each.held[prompt] for each in engines}


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 2 + 120)
def test_nothing_wears_out(target: Target) -> None:
    """No wrong answer at any checkpoint, no failed call, memory flat after the first third."""
    dice = random.Random(7)
    admin = KVIndexAdminStub(target.channel)
    engines = [Engine(f"pod-{number}") for number in range(PODS)]
    restarts = dict.fromkeys(range(PODS), 0)
    for engine in engines:
        register(target, engine)
    pressure = Pressure(target, SHARE) if SOAK else None
    clients = Clients(target)
    sizes: list[tuple[float, float]] = []
    begun = time.monotonic()
    checkpoints = lives = 0
    try:
        while time.monotonic() - begun < SECONDS:
            for _ in range(300):
                engine = dice.choice(engines)
                change = engine.store if dice.random() < 0.6 else engine.evict
                change(dice.randrange(PROMPTS), dice.randint(0, BLOCKS))
                if dice.random() < 0.01:
                    engine.clear()
            settled(target, engines)
            check(target, engines)
            checkpoints += 1
            sizes.append((time.monotonic() - begun, target.rss()))
            number = dice.randrange(PODS)
            if dice.random() < 0.3:
                lives += 1
                engines[number].restart()
                restarts[number] += 1
                heard(target, engines[number], restarts[number])
            elif dice.random() < 0.1:
                admin.UnregisterPod(pb.UnregisterPodRequest(pod=engines[number].name, model="m"), timeout=5)
                lives += 1
                engines[number].restart()
                restarts[number] = 0
                registration = pb.RegisterPodRequest(
                    pod=engines[number].name, model="m", endpoint=engines[number].endpoint
                )
                admin.RegisterPod(registration, timeout=5)
                heard(target, engines[number], 0)
    finally:
        clients.stop()
        for engine in engines:
            engine.socket.close()
        pushed = pressure.stop() if pressure else {}
        if pressure:
            pressure.kill()
            print(
                f"\n{time.monotonic() - begun:.0f} s; capacity {pressure.capacity:.0f}/s, asked {pressure.rate:.0f}/s:"
                f" {pushed}; {clients.answers} looked at, {clients.refused} refused, errors {clients.errors[:3]};"
                f" {checkpoints} checkpoints of {PODS * PROMPTS} scores, {lives} restarts; RSS MiB"
                f" {[round(size) for _, size in sizes[:: max(1, len(sizes) // 8)]]}"
            )
    codes = target.codes()
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED"}, codes
    # Each refusal that somebody saw is one that the server counted, by its reason. What gRPC refuses because a
    # connection has too many streams is no shed of ours: clients send it again, and so does the pressure.
    sheds = target.sheds()
    again = pushed.pop("again", 0)
    assert pushed.keys() <= {"OK", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}, (pushed, again)
    assert pushed.get("RESOURCE_EXHAUSTED", 0) + clients.refused <= sheds.get("in_flight", 0), (pushed, sheds)
    assert pushed.get("DEADLINE_EXCEEDED", 0) <= sheds.get("silent", 0), (pushed, sheds)
    assert checkpoints >= 3 and clients.answers > 100 and clients.errors == []
    early = [size for at, size in sizes if at <= SECONDS / 3] or [sizes[0][1]]
    late = [size for at, size in sizes if at > SECONDS * 2 / 3] or [sizes[-1][1]]
    assert min(late) < max(early) + 32, sizes
