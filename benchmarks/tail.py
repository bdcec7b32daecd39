"""What keeps the tail short, each taken away in turn: calls by the clock while events come, wake-ups, collections.

One server process per row, over the same pods: as it is; with CPython's own switch interval; with the collector not
frozen. `--seconds` per cell, `--rounds` cells of each kind, interleaved by round; the median is printed.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
from load import BLOCK_SIZE, machine, pack
from raw_load import Grpc, open_loop
from service import HOLDERS, INGEST, RATE, SCORE, TOKENS, WRITERS, Publishers, Writers, messages, process

from kvindex_server import _core
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc

SERVER = """
import gc, json, sys, time
from kvindex_server import cli
interval, freeze = float(sys.argv[1]), sys.argv[2] == "yes"
if interval:
    setting = sys.setswitchinterval
    sys.setswitchinterval = lambda _: setting(interval)
if not freeze:
    gc.freeze = lambda: None
pauses, begun = [], 0.0
def collected(phase, _):
    global begun
    if phase == "start":
        begun = time.thread_time()  # of this thread: what other processes take is no pause of ours
    else:
        pauses.append((time.thread_time() - begun) * 1000)
def serve():
    from kvindex_server import server
    run = server.Server.start
    def start(self):
        run(self)
        gc.callbacks.append(collected)
    server.Server.start = start
    code = cli.main(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"])
    print(json.dumps(pauses[1:]))  # but for the one at the start
    return code
sys.exit(serve())
"""
VARIANTS = {"as it is": ("0", "yes"), "switch interval 5 ms": ("0.005", "yes"), "collector not frozen": ("0", "no")}


def wake_ups(pid: int) -> int:
    """How often a thread of the process has waited for something and was woken."""
    found = 0
    for each in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            text = (each / "status").read_text()
            found += int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return found


class Variant:
    """A server under test with its pods."""

    def __init__(self, running: "subprocess.Popen[str]", publishers: Publishers, writers: Writers) -> None:
        assert running.stdout is not None
        self.running, self.writers = running, writers
        self.address = running.stdout.readline().split("grpc=")[1].split()[0]
        self.channel = grpc.insecure_channel(self.address)
        admin = self.admin = rpc.KVIndexAdminStub(self.channel)
        for number, endpoint in enumerate([each.endpoint for each in publishers.holders] + writers.endpoints):
            admin.RegisterPod(pb.RegisterPodRequest(pod=f"pod-{number}", model="m", endpoint=endpoint))
        blocks = TOKENS // BLOCK_SIZE
        publishers.fill(
            lambda: sum(each.blocks >= blocks for each in admin.ListPods(pb.ListPodsRequest()).streams) == HOLDERS
        )
        self.quiet: list[tuple[float, float]] = []
        self.busy: list[tuple[float, float]] = []
        self.idle_wake_ups: list[float] = []
        self.wake_ups_per_message: list[float] = []

    def round(self, message: bytes, seconds: float) -> None:
        before = wake_ups(self.running.pid)
        time.sleep(1)
        self.idle_wake_ups.append(wake_ups(self.running.pid) - before)
        self.quiet.append(self._calls(message, seconds))
        self.writers.start(INGEST)
        applied, before = messages(self.admin), wake_ups(self.running.pid)
        time.sleep(1)
        woken, taken = wake_ups(self.running.pid) - before, messages(self.admin) - applied
        self.wake_ups_per_message.append(woken / max(1, taken))
        self.busy.append(self._calls(message, seconds))
        self.writers.stop()

    def _calls(self, message: bytes, seconds: float) -> tuple[float, float]:
        client = Grpc(self.address, SCORE, message)
        result = open_loop(client, RATE, seconds)
        client.close()
        assert not result.failed
        return result.cut(99), max(result.latencies)

    def row(self, name: str) -> str:
        """And the end of the server."""
        self.channel.close()
        self.running.terminate()
        assert self.running.stdout is not None
        pauses = json.loads(self.running.stdout.readline())

        def middle(values: list[float]) -> float:
            return statistics.median(values)

        cells = [name]
        for results in (self.quiet, self.busy):
            cells.append(f"{middle([each[0] for each in results]):.2f}, {middle([each[1] for each in results]):.1f}")
        cells += [f"{middle(self.idle_wake_ups):,.0f}", f"{middle(self.wake_ups_per_message):.2f}"]
        cells += [f"{len(pauses)}, {max(pauses, default=0):.2f}, {sum(pauses):.1f}"]
        return f"| {' | '.join(cells)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seconds", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    print(f"{machine()}; {RATE} calls/s of {TOKENS // BLOCK_SIZE} keys, {HOLDERS} candidates; {args.rounds} rounds\n")
    with contextlib.ExitStack() as stack:
        publishers = Publishers()
        keys = memoryview(_core.block_keys(pack(publishers.tokens), BLOCK_SIZE)).cast("Q").tolist()
        pods = [f"pod-{number}" for number in range(HOLDERS)]
        message = pb.ScoreRequest(model="m", keys=pb.Keys(values=keys), pods=pods).SerializeToString()
        variants = {}
        for name, options_of in VARIANTS.items():
            running = stack.enter_context(process(sys.executable, "-c", SERVER, *options_of))
            writers = Writers(stack.enter_context(process(sys.executable, "benchmarks/writers.py", str(WRITERS))))
            variants[name] = Variant(running, publishers, writers)
        turns = list(variants.values())
        for _ in range(args.rounds):
            for each in turns:
                each.round(message, args.seconds)
            turns = turns[1:] + turns[:1]  # nobody comes first always
        print(
            f"| | p99, max ms, no events | p99, max ms, {INGEST // 1000}k blocks/s | wake-ups/s, idle"
            " | wake-ups per message | collections, longest, all ms of CPU |\n|---|---|---|---|---|---|"
        )
        for name, each in variants.items():
            print(each.row(name), flush=True)


if __name__ == "__main__":
    main()
