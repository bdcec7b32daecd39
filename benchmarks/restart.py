"""Decisions a second across SIGKILL and restart: how many are wrong, and for how long there are none.

An engine that publishes, replays and goes on evicting and storing while a server is down; callers that ask for every
prompt's score at a steady rate, whatever happens; servers that are killed one after the other and started again at the
same address. Each answer is compared with what the engine held while it was being given.
"""

import argparse
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from load import BLOCK_SIZE, batch, machine, stored

from kvindex_client import CallError, Client, Options, Query
from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexStub

PROMPTS, BLOCKS = 150, 8
CHANGES_A_SECOND = 150
SLACK = 1.0
"""Seconds an answer may lag behind the engine; what lies further back must be right."""
CALLERS = 8


class Engine:
    """One pod: what it holds of each prompt, from the front, and when that changed."""

    def __init__(self, seed: int) -> None:
        dice = random.Random(seed)
        self._dice = dice
        self.tokens = [[dice.randrange(100_000) for _ in range(BLOCKS * BLOCK_SIZE)] for _ in range(PROMPTS)]
        self._socket = wire.publisher("tcp://127.0.0.1:*")
        self._router = wire.replay_server("tcp://127.0.0.1:*")
        self.endpoint, self.replay_endpoint = self._socket.endpoint, self._router.endpoint
        self._lock = threading.Lock()
        self._bodies: list[bytes] = []
        self._held: list[list[tuple[float, int]]] = [[(0.0, 0)] for _ in range(PROMPTS)]
        self._halt = threading.Event()
        self._busy = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._replay, self._churn)]
        for each in self._threads:
            each.start()

    def change(self, times: int) -> None:
        """So many prompts become longer or shorter at once."""
        for _ in range(times):
            prompt = self._dice.randrange(PROMPTS)
            self._hold(prompt, self._dice.randrange(BLOCKS + 1))

    def churn(self, busy: bool) -> None:
        """Go on changing by itself, or stand still."""
        (self._busy.set if busy else self._busy.clear)()

    def held(self, prompt: int, begin: float, end: float) -> set[int]:
        """How many leading blocks it held at any moment between these times."""
        with self._lock:
            changes = list(self._held[prompt])
        before = [blocks for at, blocks in changes if at <= begin]
        return {before[-1], *(blocks for at, blocks in changes if begin < at <= end)}

    def close(self) -> None:
        self._halt.set()
        for each in self._threads:
            each.join()
        self._socket.close()
        self._router.close()

    def _hold(self, prompt: int, blocks: int) -> None:
        names = [1 + prompt * BLOCKS + number for number in range(BLOCKS)]
        with self._lock:
            now = self._held[prompt][-1][1]
            if blocks == now:
                return
            if blocks > now:
                tokens = self.tokens[prompt][now * BLOCK_SIZE : blocks * BLOCK_SIZE]
                event = stored(names[now:blocks], names[now - 1] if now else None, tokens)
            else:
                event = {"type": "BlockRemoved", "block_hashes": names[blocks:now], "medium": "GPU", "group_idx": 0}
            body = batch([event])
            self._held[prompt].append((time.monotonic(), blocks))
            self._socket.send([b"", len(self._bodies).to_bytes(8, "big"), body])
            self._bodies.append(body)

    def _churn(self) -> None:
        while not self._halt.wait(0.02):
            if self._busy.is_set():
                self.change(CHANGES_A_SECOND // 50)

    def _replay(self) -> None:
        while not self._halt.is_set():
            if not self._router.wait(20):
                continue
            frames = self._router.receive()
            if frames is None or len(frames) != 3:
                continue
            identity, _, start = frames
            with self._lock:
                bodies = list(enumerate(self._bodies))
            for sequence, body in bodies[int.from_bytes(start, "big") :]:
                self._router.send([identity, b"", b"", sequence.to_bytes(8, "big"), body])
            self._router.send([identity, b"", b"", b"\xff" * 8, b""])


class Server:
    """A server process at a fixed address, with the engine as its configured pod."""

    def __init__(self, engine: Engine, directory: str | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        pods = [{"pod": "pod", "model": "m", "endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}]
        self._env = {**os.environ, "KVINDEX_PODS": json.dumps(pods)}
        if directory is not None:
            self._env |= {"KVINDEX_SNAPSHOT__DIRECTORY": directory, "KVINDEX_SNAPSHOT__INTERVAL_SECONDS": "0.3"}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "kvindex_server", "serve", "--listen", self.address]
        self._process = subprocess.Popen(
            [*command, "--metrics-listen", "127.0.0.1:0"],
            env=self._env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def wait_open(self, ends: float) -> float:
        """When the port was open."""
        host, _, port = self.address.rpartition(":")
        while time.monotonic() < ends:
            try:
                socket.create_connection((host, int(port)), 1).close()
                return time.monotonic()
            except OSError:
                time.sleep(0.005)
        raise TimeoutError(f"{self.address} does not open")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Result:
    """What was asked, and how that went. Times in seconds."""

    asked: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    """More than the pod held, or less by a stream that is said to be EXACT."""
    blind: int = 0
    """Less than the pod held, and said to be not EXACT."""
    failed: list[float] = field(default_factory=list)
    """When a call without an answer was due."""
    closed: list[float] = field(default_factory=list)
    """Per kill: until the port was open again."""
    unready: list[float] = field(default_factory=list)
    """Per kill: from then to the first answer of that server."""
    stray: int = 0
    """Calls without an answer that were due at no time at which a port was closed or its server not ready."""


Ask = Callable[[int], tuple[int, int]]
"""(blocks matched, trust) of a prompt; CallError or grpc.RpcError when there was no answer."""


class Callers:
    """Asks at a steady rate on threads of its own, until stopped."""

    def __init__(self, engine: Engine, ask: Ask, rate: float, result: Result) -> None:
        self._engine = engine
        self._ask = ask
        self._rate = rate
        self._result = result
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._halt = threading.Event()
        self._begin = time.monotonic()
        self._threads = [threading.Thread(target=self._run) for _ in range(CALLERS)]
        for each in self._threads:
            each.start()

    def stop(self) -> None:
        self._halt.set()
        for each in self._threads:
            each.join()

    def _run(self) -> None:
        while not self._halt.is_set():
            number = next(self._numbers)
            due = self._begin + number / self._rate
            if self._halt.wait(max(0.0, due - time.monotonic())):
                return
            prompt, begin = number % PROMPTS, time.monotonic()
            try:
                matched, trust = self._ask(prompt)
            except (CallError, grpc.RpcError):
                with self._lock:
                    self._result.asked += 1
                    self._result.failed.append(begin)
                continue
            held = self._engine.held(prompt, begin - SLACK, time.monotonic())
            with self._lock:
                self._result.asked += 1
                self._result.answered += 1
                if matched > max(held) or (matched < min(held) and trust == pb.TRUST_EXACT):
                    self._result.wrong.append(f"prompt {prompt}: {matched}, and the pod held {held}; trust {trust}")
                elif matched < min(held):
                    self._result.blind += 1


def through_client(engine: Engine, client: Client) -> Ask:
    """By a client that retries with the other replica."""

    def ask(prompt: int) -> tuple[int, int]:
        (pod,) = client.score(Query("m", tokens=engine.tokens[prompt], pods=("pod",))).pods
        return pod.matched_blocks, pod.trust.value

    return ask


def through_stub(engine: Engine, address: str) -> Ask:
    """Once, without a second try, on a connection that is dialled anew at once."""
    options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.min_reconnect_backoff_ms", 20)]
    stub = KVIndexStub(grpc.insecure_channel(address, [*options, ("grpc.max_reconnect_backoff_ms", 20)]))

    def ask(prompt: int) -> tuple[int, int]:
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=engine.tokens[prompt]), pods=["pod"])
        (score,) = stub.Score(request, timeout=1.0).scores
        return score.matched_blocks, score.trust

    return ask


def first_answer(server: Server, ends: float) -> float:
    """When this server gave one."""
    with grpc.insecure_channel(server.address) as channel:
        stub = KVIndexStub(channel)
        while time.monotonic() < ends:
            try:
                stub.Score(pb.ScoreRequest(model="m", keys=pb.Keys(values=[1]), pods=["pod"]), timeout=1)
                return time.monotonic()
            except grpc.RpcError:
                time.sleep(0.005)
    raise TimeoutError(f"{server.address} does not answer")


def run(replicas: int, kills: int, rate: float = 500.0, *, keep: bool = False, seed: int = 1) -> Result:
    """So many servers, killed in turn; with `keep` each writes snapshots and starts from them."""
    engine, result, dice = Engine(seed), Result(), random.Random(seed)
    windows: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        servers = [Server(engine, f"{directory}/{number}" if keep else None) for number in range(replicas)]
        client = Client([each.address for each in servers], Options(timeout=1.0))
        try:
            engine.change(PROMPTS * 4)
            for each in servers:
                each.start()
            for each in servers:
                first_answer(each, time.monotonic() + 30)
            ask = through_client(engine, client) if replicas > 1 else through_stub(engine, servers[0].address)
            callers = Callers(engine, ask, rate, result)
            try:
                for number in range(kills):
                    engine.churn(True)
                    time.sleep(dice.uniform(0.5, 1.5))
                    engine.churn(False)
                    server = servers[number % replicas]
                    killed = time.monotonic()
                    server.kill()
                    engine.change(PROMPTS // 2)  # nobody but the other replica hears of it
                    server.start()
                    opened = server.wait_open(killed + 30)
                    answers = first_answer(server, killed + 30)
                    result.closed.append(opened - killed)
                    result.unready.append(answers - opened)
                    windows.append((killed - 1.0, answers + 0.1))
                    time.sleep(SLACK + 0.5)  # what it says now is compared with what stood still meanwhile
            finally:
                callers.stop()
        finally:
            for each in servers:
                each.kill()
            client.close()
            engine.close()
    result.stray = sum(not any(begin <= at <= end for begin, end in windows) for at in result.failed)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rate", type=float, default=500.0)
    arguments = parser.parse_args()
    print(
        f"{machine()}; {arguments.kills} kills, {arguments.rate:g} decisions a second, load {os.getloadavg()[0]:.1f}\n"
    )
    print("| | decisions | wrong | blind | without an answer | of them at other times | port closed | then not ready |")
    print("|---|---|---|---|---|---|---|---|")
    for name, replicas, keep in (
        ("one server, by replay", 1, False),
        ("one server, over its snapshots", 1, True),
        ("two replicas, a client that retries", 2, False),
    ):
        got = run(replicas, arguments.kills, arguments.rate, keep=keep)
        times = [f"{statistics.median(each):.2f} s, at most {max(each):.2f}" for each in (got.closed, got.unready)]
        numbers = (got.asked, len(got.wrong), got.blind, len(got.failed), got.stray)
        print(f"| {name} | {' | '.join(f'{each:,}' for each in numbers)} | {' | '.join(times)} |", flush=True)
        for each in got.wrong[:3]:
            print(f"    {each}", file=sys.stderr)


if __name__ == "__main__":
    main()
