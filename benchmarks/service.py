"""The service under load, one table: calls per second, tail latency with and without ingest, and Dynamo beside it.

Server and load share the machine. `--seconds` per cell, `--rounds` cells of each kind (the median is printed),
`--transport` as in the settings. Dynamo's standalone indexer takes part when `build/peers-venv` has
`ai-dynamo-runtime` (see `make bench-service`).
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from load import BLOCK_SIZE, Chains, batch, machine, pack, stored
from raw_load import Grpc, Http, Result, closed_loop, open_loop

from kvindex_server import _core, wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

SCORE, STREAM = "/kvindex.v1.KVIndex/Score", "/kvindex.v1.KVIndex/ScoreStream"
HOLDERS, CROWD, WRITERS = 16, 1024, 64
TOKENS = 8192
RATE, INGEST = 500, 200_000
DYNAMO = Path("build/peers-venv/bin/python")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def process(*command: str, talks: bool = True) -> Iterator["subprocess.Popen[str]"]:
    pipe = subprocess.PIPE if talks else subprocess.DEVNULL  # a pipe that nobody reads would fill up
    running = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        yield running
    finally:
        running.terminate()
        running.wait(20)


class Publishers:
    """The pods that hold one chain, each with a publisher."""

    def __init__(self) -> None:
        self.fresh = Chains(8)
        self.chain, self.hashes, self.tokens = Chains(9).payloads(TOKENS // BLOCK_SIZE, 128)
        self.holders = [wire.publisher("tcp://127.0.0.1:*") for _ in range(HOLDERS)]
        self._sequence = dict.fromkeys(self.holders, 0)

    def send(self, publisher: wire.Socket, payload: bytes) -> None:
        sequence = self._sequence[publisher]
        publisher.send([b"", sequence.to_bytes(8, "big"), payload])
        self._sequence[publisher] = sequence + 1

    def fill(self, ready: Callable[[], bool]) -> None:
        """Send the chain until the index has it: a publisher drops what comes before its subscriber."""
        ends = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < ends, "the pods were not filled"
            for publisher in self.holders:
                for payload in self.chain:
                    self.send(publisher, payload)
            time.sleep(0.5)


class Writers:
    """The pods that publish while answers are measured."""

    def __init__(self, running: "subprocess.Popen[str]") -> None:
        assert running.stdin is not None and running.stdout is not None
        self._orders, self._answers = running.stdin, running.stdout
        self.endpoints = self._answers.readline().split()

    def start(self, rate: int) -> None:
        self._orders.write(f"start {rate}\n")
        self._orders.flush()

    def stop(self) -> int:
        """Messages sent so far."""
        self._orders.write("stop\n")
        self._orders.flush()
        return int(self._answers.readline())


def median(rounds: int, run: Callable[[], Result], value: Callable[[Result], float]) -> float:
    results = [run() for _ in range(rounds)]
    assert not any(each.failed for each in results), [each.failed for each in results]
    return statistics.median(map(value, results))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--transport", default="grpcio")
    args = options.parse_args()
    print(f"{machine()}; transport {args.transport}; median of {args.rounds} x {args.seconds:g} s\n")
    serve = [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0"]
    with contextlib.ExitStack() as stack:
        if args.transport != "grpcio":
            os.environ["KVINDEX_SERVER__TRANSPORT"] = args.transport
        server = stack.enter_context(process(*serve, "--metrics-listen", "127.0.0.1:0"))
        assert server.stdout is not None
        address = server.stdout.readline().split("grpc=")[1].split()[0]
        channel = stack.enter_context(grpc.insecure_channel(address))
        admin = rpc.KVIndexAdminStub(channel)
        publishers = Publishers()
        writers = Writers(stack.enter_context(process(sys.executable, "benchmarks/writers.py", str(WRITERS))))
        for number, endpoint in enumerate([each.endpoint for each in publishers.holders] + writers.endpoints):
            admin.RegisterPod(pb.RegisterPodRequest(pod=f"pod-{number}", model="m", endpoint=endpoint))
        blocks = TOKENS // BLOCK_SIZE

        def filled() -> bool:
            return sum(each.blocks >= blocks for each in admin.ListPods(pb.ListPodsRequest()).streams) == HOLDERS

        publishers.fill(filled)
        keys = pb.Keys(values=memoryview(_core.block_keys(pack(publishers.tokens), BLOCK_SIZE)).cast("Q").tolist())
        pods = [f"pod-{number}" for number in range(HOLDERS)]
        crowd = pods + [f"10.0.{number >> 8}.{number & 255}:8000" for number in range(CROWD - HOLDERS)]
        by_keys = pb.ScoreRequest(model="m", keys=keys, pods=pods).SerializeToString()
        by_tokens = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=publishers.tokens), pods=pods).SerializeToString()
        by_crowd = pb.ScoreRequest(model="m", keys=keys, pods=crowd).SerializeToString()
        call = channel.unary_unary(SCORE)
        for request in (by_keys, by_tokens, by_crowd):
            answer = pb.ScoreResponse.FromString(call(request))
            assert all(each.matched_blocks == blocks for each in answer.scores[:HOLDERS]), answer

        def measure(path: str, request: bytes, streams: int = 0, rate: float = 0) -> Callable[[], Result]:
            def run() -> Result:
                client = Grpc(address, path, request, streams)
                try:
                    if rate:
                        return open_loop(client, rate, args.seconds)
                    return closed_loop(client, 16, args.seconds)
                finally:
                    client.close()

            return run

        def throughput(name: str, run: Callable[[], Result]) -> float:
            costs = []

            def timed() -> Result:
                before = cpu_seconds(server.pid)
                result = run()
                costs.append((cpu_seconds(server.pid) - before) / max(1, result.calls) * 1e6)
                return result

            found = median(args.rounds, timed, lambda result: result.rate)
            print(f"| {name} | {found:,.0f} | {statistics.median(costs):,.0f} |", flush=True)
            return found

        print("| closed loop, 16 in flight | calls/s | server CPU µs per call |\n|---|---|---|")
        throughput(f"Score, {blocks} keys, {HOLDERS} candidates", measure(SCORE, by_keys))
        throughput(f"Score, {TOKENS:,} tokens, {HOLDERS} candidates", measure(SCORE, by_tokens))
        throughput(f"ScoreStream, {blocks} keys, 1 stream", measure(STREAM, by_keys, 1))
        throughput(f"ScoreStream, {blocks} keys, 4 streams", measure(STREAM, by_keys, 4))
        throughput(f"Score, {blocks} keys, {CROWD:,} candidates", measure(SCORE, by_crowd))

        print(f"\n| open loop, {RATE} calls/s, {blocks} keys | p50 ms | p99 ms | answers |\n|---|---|---|---|")

        def tail(name: str) -> None:
            results = [measure(SCORE, by_keys, rate=RATE)() for _ in range(args.rounds)]
            p50, p99 = (statistics.median(each.cut(cut) for each in results) for cut in (50, 99))
            share = sum(each.calls for each in results) / (RATE * args.seconds * args.rounds)
            print(f"| {name} | {p50:.2f} | {p99:.2f} | {share:.1%} |", flush=True)

        tail("idle ingest")
        applied, begun = messages(admin), time.monotonic()
        before = cpu_seconds(server.pid)
        writers.start(INGEST)
        tail(f"{INGEST // 1000}k blocks/s from {WRITERS} pods")
        ages = [age for _ in range(args.rounds) for age in freshness(channel, publishers, args.seconds)]
        elapsed, sent = time.monotonic() - begun, writers.stop()
        cores = (cpu_seconds(server.pid) - before) / elapsed
        time.sleep(1)
        print(
            f"\n{sent * 128 / elapsed:,.0f} blocks/s sent, {messages(admin) - applied:,} of {sent:,} messages applied; "
            f"server used {cores:.2f} cores\n\nfrom an event's publication to an answer that knows it, meanwhile, "
            f"{len(ages)} events: p50 {cut(ages, 50):.1f}, p99 {cut(ages, 99):.1f}, max {max(ages):.1f} ms"
        )
        server.terminate()  # it must not take part any more
        dynamo(args, Publishers())


def freshness(channel: grpc.Channel, publishers: Publishers, seconds: float) -> list[float]:
    """Milliseconds until an answer knows a block that was just published, asked for back to back, event by event."""
    call, publisher, fresh = channel.unary_unary(SCORE), publishers.holders[0], publishers.fresh
    ages: list[float] = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        hashes, tokens = fresh.hashes(1), fresh.tokens(1)
        payload = batch([stored(hashes, None, tokens)])
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=tokens), pods=["pod-0"]).SerializeToString()
        published = time.perf_counter()
        publishers.send(publisher, payload)
        while not pb.ScoreResponse.FromString(call(request)).scores[0].matched_blocks:
            assert time.perf_counter() - published < 10, "the event never came"
        ages.append((time.perf_counter() - published) * 1000)
        time.sleep(0.005)
    return ages


def cut(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def streams(admin: rpc.KVIndexAdminStub) -> list[pb.StreamInfo]:
    return list(admin.ListPods(pb.ListPodsRequest()).streams)


def messages(admin: rpc.KVIndexAdminStub) -> int:
    return sum(each.messages for each in streams(admin))


def dynamo(args: argparse.Namespace, publishers: Publishers) -> None:
    """The same chain in 16 workers of Dynamo's standalone indexer, asked by tokens and by hashes."""
    if not DYNAMO.exists():
        print("\nDynamo: not measured, build/peers-venv has no ai-dynamo-runtime")
        return
    workers = ",".join(f"{number}={each.endpoint}" for number, each in enumerate(publishers.holders))
    port = free_port()
    command = (str(DYNAMO), "-m", "dynamo.indexer", "--block-size", str(BLOCK_SIZE), "--port", str(port))
    command = (*command, "--threads", "4", "--model-name", "m", "--workers", workers)
    with process(*command, talks=False) as running:
        address = f"127.0.0.1:{port}"
        by_tokens = json.dumps({"token_ids": publishers.tokens, "model_name": "m"}).encode()

        def matched() -> bool:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(
                    urllib.request.Request(f"http://{address}/query", by_tokens, {"Content-Type": "application/json"}),
                    timeout=2,
                ) as answer,
            ):
                return f":{TOKENS}" in answer.read().decode()
            return False

        publishers.fill(matched)
        print("\n| Dynamo, closed loop, 16 connections | calls/s | server CPU µs per call |\n|---|---|---|")

        def run(path: str, body: bytes) -> None:
            rates, costs = [], []
            for _ in range(args.rounds):
                client = Http(address, path, body)
                before = cpu_seconds(running.pid)
                result = closed_loop(client, 16, args.seconds)
                client.close()
                assert not result.failed, (path, result.failed)
                rates.append(result.rate)
                costs.append((cpu_seconds(running.pid) - before) / result.calls * 1e6)
            print(f"| {path} | {statistics.median(rates):,.0f} | {statistics.median(costs):,.0f} |", flush=True)

        run("/query", by_tokens)
        run("/query_by_hash", json.dumps({"block_hashes": hashes_of(publishers), "model_name": "m"}).encode())


def hashes_of(publishers: Publishers) -> list[int]:
    """Unchained block hashes, as that interface wants them."""
    tokens = pack(publishers.tokens)
    size = BLOCK_SIZE * 4
    hashes = [_core.xxh3_64(tokens[at : at + size], 1337) for at in range(0, len(tokens), size)]
    return [each - (1 << 64) if each >> 63 else each for each in hashes]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
