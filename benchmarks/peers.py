"""This server beside Dynamo's standalone indexer and a plain Python index: the same load, one run, one table.

Each contender is a process that subscribes to 64 publishers. A phase is over when every pod's last block is found, so
that queued writes count; its cost is the CPU time of the whole contender, ZeroMQ threads and this polling included.
Then ten prompts must be held after a store, and none after a removal.
`make bench-peers` installs Dynamo into build/peers-venv first; without it the others are compared.
"""

import argparse
import json
import os
import pickle
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from contenders.dict_index import local_keys
from contenders.loads import traffic_of
from contenders.publish import PHASES, SENTINELS
from load import BLOCK_SIZE, batch, machine, span_blocks, stored

from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

HERE = Path(__file__).parent
PEERS_PYTHON = HERE.parent / "build" / "peers-venv" / "bin" / "python"
PHASE_SECONDS = 300
POLL_SECONDS = 0.1
MATCH_BLOCKS = 512
MATCH_PROMPTS = 100


class Contender:
    """A process under test, from its start to its end."""

    def __init__(self, command: Sequence[object], **options: Any) -> None:
        self.process = subprocess.Popen([str(each) for each in command], cwd=HERE, text=True, **options)

    def follow(self, endpoints: dict[str, str]) -> None:
        """Subscribe to these pods."""
        raise NotImplementedError

    def found(self, tokens: list[int]) -> int:
        """How many pods hold all of these tokens."""
        raise NotImplementedError

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far."""
        return time.clock_gettime((~self.process.pid << 3) | 2)  # the process's own clock, as Linux numbers them

    def resident_bytes(self) -> int:
        """Its resident set."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def stop(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


class Kvindex(Contender):
    """This server, asked over gRPC."""

    def __init__(self) -> None:
        flags = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--log-level", "error")
        super().__init__((sys.executable, "-m", "kvindex_server", "serve", *flags), stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = re.search(r"grpc=(\S+)", self.process.stdout.readline())
        assert line is not None
        self._channel = grpc.insecure_channel(line[1])

    def follow(self, endpoints: dict[str, str]) -> None:
        admin = rpc.KVIndexAdminStub(self._channel)
        for pod, endpoint in endpoints.items():
            admin.RegisterPod(
                pb.RegisterPodRequest(pod=pod, model="m", endpoint=endpoint, block_size=BLOCK_SIZE),
                wait_for_ready=True,
                timeout=20,
            )

    def found(self, tokens: list[int]) -> int:
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=tokens))
        answer = rpc.KVIndexStub(self._channel).Score(request, timeout=60)
        return sum(each.matched_tokens == len(tokens) for each in answer.scores)

    def stop(self) -> None:
        self._channel.close()
        super().stop()


class Dynamo(Contender):
    """`python -m dynamo.indexer`, asked over HTTP."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "DYN_LOG": "error"}}
        super().__init__((PEERS_PYTHON, "-m", "dynamo.indexer", "--port", port), **quiet)
        ends = time.monotonic() + 20
        while True:
            try:
                self._ask("/workers")
                return
            except urllib.error.URLError:
                assert time.monotonic() < ends, "dynamo.indexer did not come up"
                time.sleep(0.05)

    def follow(self, endpoints: dict[str, str]) -> None:
        for pod, endpoint in endpoints.items():
            worker = {"instance_id": int(pod), "endpoint": endpoint, "model_name": "m", "block_size": BLOCK_SIZE}
            self._ask("/register", worker)

    def found(self, tokens: list[int]) -> int:
        scores = self._ask("/query", {"token_ids": tokens, "model_name": "m"})["scores"]
        return sum(max(ranks.values()) == len(tokens) for ranks in scores.values())

    def _ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


class Dictionaries(Contender):
    """contenders/dict_index.py, asked by lines."""

    def __init__(self) -> None:
        command = (sys.executable, "-m", "contenders.dict_index")
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)

    def follow(self, endpoints: dict[str, str]) -> None:
        assert self._tell(endpoints) == "up\n"

    def found(self, tokens: list[int]) -> int:
        return int(self._tell(tokens))

    def _tell(self, value: object) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        return self.process.stdout.readline()


CONTENDERS: dict[str, type[Contender]] = {"kvindex": Kvindex, "dynamo": Dynamo, "dict": Dictionaries}


class Publisher:
    """contenders/publish.py with one load."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "contenders.publish", *words],
            cwd=HERE,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.blocks, self.pods, self.probes = self._read()

    def tell(self, line: str) -> Any:
        """Give it a command; its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        return self._read()

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def ended(process: Any) -> Iterator[Any]:
    """Ends it, whatever happens."""
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def following(name: str, publisher: Publisher) -> Iterator[Contender]:
    """A fresh contender that is subscribed to every pod."""
    with ended(CONTENDERS[name]()) as contender:
        contender.follow(publisher.tell("open"))
        publisher.tell("subscribed")
        yield contender
    publisher.tell("close")


def complete(contender: Contender, publisher: Publisher, command: str, phase: str) -> None:
    """Publish a phase, until every pod's last block is found."""
    ends = time.monotonic() + PHASE_SECONDS
    publisher.tell(f"{command} {phase}")
    while contender.found(SENTINELS[phase]) < publisher.pods:
        assert time.monotonic() < ends, f"{type(contender).__name__} did not finish: {phase}"
        time.sleep(POLL_SECONDS)


def one_round(name: str, publisher: Publisher) -> dict[str, float]:
    """What one contender makes of all phases, and its memory: after a burst, and after a quiet load."""
    figures: dict[str, float] = {}
    with following(name, publisher) as contender:
        size = contender.resident_bytes()
        for phase in PHASES:
            begin = contender.cpu_seconds()
            complete(contender, publisher, "send", phase)
            figures[phase] = publisher.blocks / (contender.cpu_seconds() - begin)
            if phase == PHASES[0]:
                figures["bytes per claim, after a burst"] = (contender.resident_bytes() - size) / publisher.blocks
            held = [contender.found(probe) > 0 for probe in publisher.probes]
            assert held == [phase.startswith("store")] * len(held), f"{name} is wrong after: {phase}"
    with following(name, publisher) as contender:
        size = contender.resident_bytes()
        complete(contender, publisher, "pace", PHASES[0])
        figures["bytes per claim, quiet"] = (contender.resident_bytes() - size) / publisher.blocks
    return figures


def match_input(words: Sequence[str]) -> bytes:
    """What contenders/match.py asks for: every claim, and prompts of 512 blocks that some pod holds."""
    traffic = traffic_of(words)
    claims = [
        (
            each.pod,
            each.parent,
            each.hashes,
            local_keys(each.tokens),
            batch([stored(each.hashes, each.parent, each.tokens)]),
        )
        for each in traffic.chains
    ]
    prompts = [
        local_keys([token for span in spans for token in span_blocks(span)[1]])[:MATCH_BLOCKS]
        for spans in random.Random(1).sample(traffic.prompts, len(traffic.prompts))
        if len(spans) * 32 >= MATCH_BLOCKS
    ]
    return pickle.dumps({"claims": claims, "prompts": prompts[:MATCH_PROMPTS]})


def match_rounds(words: Sequence[str], names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Median µs of each round. AssertionError when the contenders' matches differ."""
    figures: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(match_input(words))
        file.flush()
        totals = set()
        for _ in range(rounds):
            for name in names:
                python = PEERS_PYTHON if name == "dynamo" else sys.executable
                command = [str(python), "-m", "contenders.match", name, file.name]
                answer = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
                median, total = json.loads(answer)
                figures[name].append(median)
                totals.add(total)
        assert len(totals) == 1, f"matches differ: {totals}"
    return figures


def figure(value: float) -> str:
    """Three digits, in thousands or millions where that is shorter."""
    for unit, suffix in ((1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def main() -> None:
    """Prints the table of all loads."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--sessions", type=int, default=6, help="chats per pod")
    arguments.add_argument("--trace", type=Path, help="a file of requests with hash_ids, one JSON object a line")
    arguments.add_argument("--requests", type=int, default=300, help="of the trace")
    arguments.add_argument("--no-match", action="store_true", help="of 10 M claims matching needs 20 GB")
    arguments.add_argument("--contenders", type=lambda text: text.split(","), default=list(CONTENDERS), help="A,B")
    given = arguments.parse_args()
    loads = {"chats": ["chats", str(given.sessions)]}
    if given.trace:
        loads["trace"] = ["trace", str(given.trace.resolve()), str(given.requests)]
    names = [name for name in given.contenders if name != "dynamo" or PEERS_PYTHON.exists()]
    print(f"{machine()}; median of {given.rounds} rounds; blocks per CPU-second, higher is better, unless said\n")
    print(f"| load | measure | {' | '.join(names)} | {' | '.join(f'kvindex / {name}' for name in names[1:])} |")
    print("|---" * (2 * len(names) + 1) + "|")
    for load, words in loads.items():
        figures: dict[str, dict[str, list[float]]] = {}
        with ended(Publisher(words)) as publisher:
            for _ in range(given.rounds):
                for name in names:
                    for measure, value in one_round(name, publisher).items():
                        figures.setdefault(measure, {}).setdefault(name, []).append(value)
            label = f"{load}: {publisher.blocks} claims"
        if not given.no_match:
            figures["match of 512 blocks, µs"] = match_rounds(words, names, given.rounds)
        for measure, by_name in figures.items():
            medians = [statistics.median(by_name[name]) for name in names]
            lower = measure.startswith(("bytes", "match"))
            ratios = " | ".join(f"{medians[0] / other:.2f}" for other in medians[1:])
            said = measure + (" (lower is better)" if lower else "")
            print(f"| {label} | {said} | {' | '.join(map(figure, medians))} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
