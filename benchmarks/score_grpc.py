"""What a unary Score costs over gRPC: closed-loop calls per second, and latency at a fixed open-loop rate."""

import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from load import BLOCK_SIZE, Chains, machine

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

PODS = 16
OPEN_LOOP_RATE = 500
SECONDS = 5


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def fill(admin: rpc.KVIndexAdminStub, tokens: int) -> list[int]:
    """16 pods that hold one chain, each by its own publisher; the chain's tokens."""
    blocks = tokens // BLOCK_SIZE
    messages, _, ids = Chains(9).payloads(blocks, 128)
    publishers = []
    for number in range(PODS):
        publisher = wire.publisher("tcp://127.0.0.1:*")
        publishers.append(publisher)
        admin.RegisterPod(pb.RegisterPodRequest(pod=f"pod-{number}", model="m", endpoint=publisher.endpoint))
    ends = time.monotonic() + 30
    sent = 0
    while any(stream.blocks < blocks for stream in admin.ListPods(pb.ListPodsRequest()).streams):
        assert time.monotonic() < ends, "the pods were not filled"
        for publisher in publishers:  # a publisher drops what comes before its subscriber
            for offset, message in enumerate(messages):
                publisher.send([b"", (sent + offset).to_bytes(8, "big"), message])
        sent += len(messages)
        time.sleep(0.3)
    return ids


def closed_loop(call: "grpc.UnaryUnaryMultiCallable", request: bytes) -> float:
    """Calls per second with 16 in flight on one connection."""
    done, counts = time.monotonic() + SECONDS, []

    def work() -> None:
        calls = 0
        while time.monotonic() < done:
            call(request)
            calls += 1
        counts.append(calls)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return sum(counts) / SECONDS


def open_loop(call: "grpc.UnaryUnaryMultiCallable", request: bytes) -> tuple[float, float]:
    """(p50, p99) in ms, from the scheduled time of sending."""
    latencies: list[float] = []
    begin = time.perf_counter()
    pending = []
    for number in range(OPEN_LOOP_RATE * SECONDS):
        due = begin + number / OPEN_LOOP_RATE
        time.sleep(max(0.0, due - time.perf_counter()))
        future = call.future(request)
        future.add_done_callback(lambda _, due=due: latencies.append((time.perf_counter() - due) * 1000))
        pending.append(future)
    for future in pending:
        future.result()
    cuts = statistics.quantiles(latencies, n=100)
    return cuts[49], cuts[98]


def main() -> None:
    print(machine())
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvindex_server",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().split("grpc=")[1].split()[0]
        with grpc.insecure_channel(address) as channel:
            admin = rpc.KVIndexAdminStub(channel)
            ids = fill(admin, 8192)
            call = channel.unary_unary("/kvindex.v1.KVIndex/Score")
            pods = [f"pod-{number}" for number in range(PODS)]
            print("| request | calls/s | server CPU µs per call | p50, p99 ms at 500/s |\n|---|---|---|---|")
            for tokens in (2000, 8192):
                request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=ids[:tokens]), pods=pods).SerializeToString()
                answer = pb.ScoreResponse.FromString(call(request))
                assert answer.scores[0].matched_blocks == tokens // BLOCK_SIZE, answer
                before = cpu_seconds(server.pid)
                rate = closed_loop(call, request)
                cost = (cpu_seconds(server.pid) - before) / (rate * SECONDS) * 1e6
                p50, p99 = open_loop(call, request)
                print(f"| {tokens} tokens, 16 pods | {rate:.0f} | {cost:.0f} | {p50:.2f}, {p99:.2f} |")
    finally:
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main()
