"""How soon a new replica is ready that takes over the index of a running one, when the engines have forgotten it all.

Two server processes and engines with real sockets. Each engine keeps its last messages only, so that what the new
replica holds can only come from its sibling; it is ready when every stream has been verified with its engine.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
from load import Chains, machine

from kvindex_server import wire
from kvindex_server._core import block_keys
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub

PODS = 64
CHAIN = 2048
KEPT = 10


class Pod:
    """An engine that has published its messages and answers replays of what it keeps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._socket = wire.publisher("tcp://127.0.0.1:*")
        self._router = wire.replay_server("tcp://127.0.0.1:*")
        self.bodies: list[bytes] = []
        self.oldest = 0
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def spec(self) -> dict[str, str]:
        """As a configured pod."""
        endpoints = {"endpoint": self._socket.endpoint, "replay_endpoint": self._router.endpoint}
        return {"pod": self.name, "model": "m", **endpoints}

    def close(self) -> None:
        self._halt.set()
        self._thread.join()
        self._socket.close()
        self._router.close()

    def _run(self) -> None:
        while not self._halt.is_set():
            if not self._router.wait(50):
                continue
            frames = self._router.receive()
            if frames is None or len(frames) != 3:
                continue
            identity, _, start = frames
            for sequence in range(max(self.oldest, int.from_bytes(start, "big")), len(self.bodies)):
                self._router.send([identity, b"", b"", sequence.to_bytes(8, "big"), self.bodies[sequence]])
            self._router.send([identity, b"", b"", b"\xff" * 8, b""])


class Process:
    """A server; `ready` returns the seconds from its start to its first answer."""

    def __init__(self, pods: list[Pod], peers: list[str]) -> None:
        self._begin = time.monotonic()
        env = {**os.environ, "KVINDEX_PODS": json.dumps([each.spec for each in pods])}
        env |= {"KVINDEX_SNAPSHOT__PEERS": json.dumps(peers), "KVINDEX_SERVER__READY_TIMEOUT_SECONDS": "600"}
        self.process = subprocess.Popen(
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
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"grpc=(\S+)", self.process.stdout.readline())
        assert found is not None
        self.address = found[1]
        self.channel = grpc.insecure_channel(self.address)

    def ready(self, keys: bytes) -> tuple[float, int]:
        """And how many blocks of this prompt were matched then."""
        stub = KVIndexStub(self.channel)
        request = pb.ScoreRequest(model="m", keys=pb.Keys(values=memoryview(keys).cast("Q").tolist()))
        while True:
            try:
                scores = stub.Score(request, timeout=30).scores
                return time.monotonic() - self._begin, max(each.matched_blocks for each in scores)
            except grpc.RpcError:
                time.sleep(0.01)

    def streams(self) -> list[pb.StreamInfo]:
        return list(KVIndexAdminStub(self.channel).ListPods(pb.ListPodsRequest(), timeout=30).streams)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--claims", type=int, default=3_700_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pods = [Pod(f"pod-{number}") for number in range(PODS)]
    chains, keys, claims = Chains(3), b"", 0
    while claims < arguments.claims:
        messages, _, tokens = chains.payloads(CHAIN, 128)
        pods[claims // CHAIN % PODS].bodies += messages
        claims += CHAIN
    keys = block_keys(b"".join(token.to_bytes(4, "little") for token in tokens[: 512 * 16]), 16)
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}; {claims / 1e6:.1f} M claims of {PODS} pods\n")
    first = Process(pods, [])
    rows = [("by replay of everything", *first.ready(keys), first.cpu_seconds())]
    for each in pods:
        each.oldest = len(each.bodies) - KEPT
    for _ in range(arguments.rounds):
        second = Process(pods, [first.address])
        seconds, matched = second.ready(keys)
        rows.append(("from the sibling", seconds, matched, second.cpu_seconds()))
        found = second.streams()
        assert sum(each.blocks for each in found) == claims and {each.trust for each in found} == {pb.TRUST_EXACT}
        second.stop()
    first.stop()
    print(
        "| start | process to first answer | blocks matched of 512 | CPU of the process till then |\n|---|---|---|---|"
    )
    for name, seconds, matched, cpu in rows:
        print(f"| {name} | {seconds:.2f} s | {matched} | {cpu:.2f} s |")
    for each in pods:
        each.close()


if __name__ == "__main__":
    main()
