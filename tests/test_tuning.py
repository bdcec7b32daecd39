"""What the process does for its tail: switch interval, frozen collector, few wake-ups; from inside and outside."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack
from test_chaos import Target

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub

LOOK = """
import gc, json, os, signal, sys, threading, time
from kvindex_server import cli
def look():
    ends = time.monotonic() + 30
    while not gc.get_freeze_count() and time.monotonic() < ends:
        time.sleep(0.01)
    seen = {"interval": sys.getswitchinterval(), "frozen": gc.get_freeze_count(), "looked_at": len(gc.get_objects())}
    print(json.dumps(seen), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=look, daemon=True).start()
sys.exit(cli.main(["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]))
"""


def test_the_process_is_tuned_after_its_start() -> None:
    """What was built by then is no longer looked at by collections, and waiting threads get the GIL soon."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=60, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert abs(seen["interval"] - 50e-6) < 1e-9
    assert seen["frozen"] > 20_000 and seen["looked_at"] < seen["frozen"] / 10, seen


def wake_ups(pid: int) -> int:
    """How often a thread of it has waited and was woken."""
    found = 0
    for each in Path(f"/proc/{pid}/task").iterdir():
        text = (each / "status").read_text()
        found += int(text.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return found


def test_an_idle_server_sleeps_and_a_burst_wakes_it_seldom(tmp_path: Path) -> None:
    """32 silent streams wake nobody by turns; what piled up is taken in batches, not one wake-up per message."""
    target = Target("grpcio", tmp_path / "log")
    admin = KVIndexAdminStub(target.channel)
    engines = [wire.publisher("tcp://127.0.0.1:*") for _ in range(32)]
    try:
        for number, engine in enumerate(engines):
            request = pb.RegisterPodRequest(pod=f"pod-{number}", model="m", endpoint=engine.endpoint)
            admin.RegisterPod(request, timeout=5)
        time.sleep(1)
        before = wake_ups(target.process.pid)
        time.sleep(3)
        idle = (wake_ups(target.process.pid) - before) / 3
        print(f"\n{idle:.0f} wake-ups per second with {len(engines)} idle streams")
        assert idle < 300
        # The server stands still while the burst comes, so that it does pile up, however fast the machine is.
        empty = msgpack.packb([time.time(), []])
        sent = 800  # fits into the queues between the two
        os.kill(target.process.pid, signal.SIGSTOP)
        try:
            for sequence in range(sent):
                target.publisher.send([b"", (1000 + sequence).to_bytes(8, "big"), empty])
            time.sleep(0.2)
            before = wake_ups(target.process.pid)
        finally:
            os.kill(target.process.pid, signal.SIGCONT)
        ends = time.monotonic() + 20
        while True:
            last = {each.pod: each.last_sequence for each in admin.ListPods(pb.ListPodsRequest(), timeout=10).streams}
            if last["p"] == 1000 + sent - 1:
                break
            assert time.monotonic() < ends, last["p"]
            time.sleep(0.1)
        woken = wake_ups(target.process.pid) - before
        print(f"{woken} wake-ups for {sent} messages")
        assert woken < sent / 2
    finally:
        for engine in engines:
            engine.close()
        target.close()
