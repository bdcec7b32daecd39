"""What a query costs over HTTP: the listener's parts one by one, and calls from one connection and from eight."""

import argparse
import http.client
import json
import resource
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from event_encoding import Stored, maps
from publisher import Publisher

from kvindex_server import _core
from kvindex_server.config import Settings
from kvindex_server.pods import PodSpec
from kvindex_server.server import Server

BLOCK = 16


def median(run: Callable[[], float], rounds: int) -> float:
    return statistics.median(run() for _ in range(rounds))


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--holders", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    tokens = list(range(1000, 1000 + args.tokens))
    packed = array("I", tokens).tobytes()
    keys = _core.block_keys(packed, BLOCK, 1337, "", "", ())
    local = [_core.xxh3_64(packed[at : at + 4 * BLOCK], 1337) for at in range(0, len(packed), 4 * BLOCK)]
    bodies = {
        "/query, Dynamo's shape": ("/query", {"model_name": "m", "token_ids": tokens}),
        "/query, Mooncake's shape": ("/query", {"model": "m", "token_ids": tokens}),
        "/query_by_hash, Dynamo's shape": ("/query_by_hash", {"model_name": "m", "block_hashes": local}),
        "/query_by_hash, Mooncake's shape": (
            "/query_by_hash",
            {"model": "m", "seq_hashes": list(memoryview(keys).cast("Q"))},
        ),
        "/query, one block": ("/query", {"model_name": "m", "token_ids": tokens[:BLOCK]}),
    }
    ports = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", "http": {"listen": "127.0.0.1:0"}}
    server = Server(Settings.model_validate({**ports, "models": [{"name": "m", "block_size": BLOCK}]}))
    server.start()
    server.wait_ready(10)
    sys.setswitchinterval(0.00005)
    engines = [Publisher() for _ in range(args.holders)]
    for number, engine in enumerate(engines):
        engine.publish(maps(Stored(list(range(1, len(local) + 1)), None, tokens, BLOCK)))
        server.fleet.register(PodSpec(f"pod-{number}", "m", engine.endpoint, engine.replay_endpoint))

    def post(connection: http.client.HTTPConnection, path: str, body: bytes) -> bytes:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        return connection.getresponse().read()

    first = http.client.HTTPConnection(server.http_address)
    whole = json.dumps({"model": "m", "token_ids": tokens}).encode()
    while post(first, "/query", whole).count(f'"longest_matched":{args.tokens}'.encode()) < args.holders:
        time.sleep(0.05)

    print(f"{args.tokens} tokens, {len(local)} blocks of {BLOCK}, {args.holders} pods that hold them all, median of")
    print(f"{args.rounds} rounds; the client runs in the same process, so its cost is in the CPU time\n")
    print("| request | body, KiB | p50, ms | p99, ms | calls/s, 1 connection | calls/s, 8 | CPU, ms per call |")
    print("|---|---|---|---|---|---|---|")
    for name, (path, value) in bodies.items():
        body = json.dumps(value).encode()
        times: list[float] = []
        rates: list[float] = []
        for _ in range(args.rounds):
            ends = time.perf_counter() + args.seconds
            before, calls = time.perf_counter(), 0
            while time.perf_counter() < ends:
                began = time.perf_counter()
                post(first, path, body)
                times.append(time.perf_counter() - began)
                calls += 1
            rates.append(calls / (time.perf_counter() - before))
        many, cpu = _many(server.http_address, lambda c, p=path, b=body: post(c, p, b), args)
        times.sort()
        p50, p99 = statistics.median(times) * 1e3, times[int(len(times) * 0.99)] * 1e3
        rate = statistics.median(rates)
        print(f"| {name} | {len(body) / 1024:.1f} | {p50:.2f} | {p99:.2f} | {rate:,.0f} | {many:,.0f} | {cpu:.2f} |")

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        for _ in range(20):
            work()
        return (time.perf_counter() - began) / 20 * 1e6

    by_tokens = json.dumps(bodies["/query, Dynamo's shape"][1]).encode()
    index = server.models.get("m").index
    parts = {
        "json.loads of the tokens": lambda: json.loads(by_tokens),
        "their types and bytes": lambda: (set(map(type, tokens)), array("I", tokens).tobytes()),
        "hashing": lambda: _core.block_keys(packed, BLOCK, 1337, "", "", ()),
        "matching": lambda: index.score(keys, (), [1.0, 0.8, 0.5]),
        "all holders of every block": lambda: index.holders(keys, ()),
    }
    print("\n| part | µs |\n|---|---|")
    for part, work in parts.items():
        print(f"| {part} | {median(lambda w=work: timed(w), args.rounds):,.0f} |")
    first.close()
    server.stop(0)
    for engine in engines:
        engine.close()


def _many(
    address: str, post: Callable[[http.client.HTTPConnection], object], args: argparse.Namespace
) -> tuple[float, float]:
    rates, costs = [], []
    for _ in range(args.rounds):
        counts = [0] * 8
        ends = time.perf_counter() + args.seconds

        def run(at: int, counts: list[int] = counts, ends: float = ends) -> None:
            connection = http.client.HTTPConnection(address)
            while time.perf_counter() < ends:
                post(connection)
                counts[at] += 1
            connection.close()

        before = resource.getrusage(resource.RUSAGE_SELF)
        threads = [threading.Thread(target=run, args=(at,)) for at in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = resource.getrusage(resource.RUSAGE_SELF)
        rates.append(sum(counts) / args.seconds)
        costs.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / max(1, sum(counts)) * 1e3)
    return statistics.median(rates), statistics.median(costs)


if __name__ == "__main__":
    main()
