"""A running server with engines in every kind of trust, for the tests of the page and of the HTTP queries."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from event_encoding import Event, Removed, Stored, as_map, batch
from publisher import Publisher, free_port
from tokenizers_at_hand import byte_level

from kvindex_server.config import Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.server import Server

MODEL = "qwen/demo-7b"
BLOCK = 8
PROMPT = "You are a careful assistant. Answer briefly, and say so when you do not know. " * 8
WHOLE, SPLIT, HOLED, PLACED, LATE, LOST = (f"10.0.0.{number}:8000" for number in range(11, 17))


def told(*events: Event) -> bytes:
    """A batch of this moment, so that its lag is real."""
    return batch([as_map(event) for event in events], timestamp=time.time())


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


def tokenizer(folder: Path) -> str:
    """A directory with a small tokenizer."""
    folder.mkdir(exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    return str(folder)


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[Server]:
    ports = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
    server = Server(Settings.model_validate({**ports, **settings}))
    server.start()
    assert server.wait_ready(10)
    try:
        yield server
    finally:
        server.stop(0)


@contextlib.contextmanager
def fleet(folder: Path, **settings: Any) -> Iterator[Server]:
    """Six pods: all blocks of PROMPT on the GPU; spread over three tiers; with a hole; placed only; late; and stale."""
    models = [{"name": MODEL, "block_size": BLOCK, "tokenizer": tokenizer(folder / "tokenizer")}]
    with (
        serving(models=models, placement={"max_ttl_seconds": 600}, **settings) as server,
        contextlib.ExitStack() as stack,
    ):
        found = server.models.get(MODEL).tokenizer
        assert found is not None
        ids = list(memoryview(found.encode_prompt(PROMPT)).cast("I"))
        blocks = len(ids) // BLOCK
        hashes = list(range(1, blocks + 1))

        def stored(first: int, end: int, medium: str = "GPU") -> Stored:
            parent = hashes[first - 1] if first else None
            return Stored(hashes[first:end], parent, ids[first * BLOCK : end * BLOCK], BLOCK, medium=medium)

        channel = stack.enter_context(grpc.insecure_channel(server.grpc_address))
        admin, index = KVIndexAdminStub(channel), KVIndexStub(channel)
        engines = {
            pod: stack.enter_context(Publisher(replay=pod not in (LATE, LOST)))
            for pod in (WHOLE, SPLIT, HOLED, LATE, LOST)
        }
        half, most = blocks // 2, blocks * 4 // 5
        engines[WHOLE].publish(told(stored(0, blocks)))
        engines[SPLIT].publish(told(stored(0, half)))
        engines[SPLIT].publish(told(stored(half, most, "CPU"), stored(most, blocks - 1, "DISK")))
        engines[HOLED].publish(told(stored(0, blocks)))
        engines[HOLED].publish(told(Removed([hashes[blocks // 3]], medium="GPU")))
        engines[LATE].next_sequence = 7
        for pod in (WHOLE, SPLIT, HOLED, PLACED, LATE, LOST):
            engine = engines.get(pod)
            request = pb.RegisterPodRequest(
                pod=pod,
                model=MODEL,
                endpoint=engine.endpoint if engine else f"tcp://127.0.0.1:{free_port()}",
                replay_endpoint=engine.replay_endpoint if engine else "",
            )
            admin.RegisterPod(request, timeout=5)
            if engine:
                engine.wait_subscriber()
        engines[LATE].publish(told(stored(0, blocks // 4)))
        engines[LOST].publish(told(stored(0, 3)))
        engines[LOST].publish(told(stored(3, 5)), lose=True)
        engines[LOST].publish(told(stored(5, 6)))
        index.RecordPlacement(
            pb.RecordPlacementRequest(model=MODEL, pod=PLACED, prompt=PROMPT, ttl_seconds=600), timeout=5
        )

        def settled() -> bool:
            trusts = {each.pod: pb.Trust.Name(each.trust) for each in admin.ListPods(pb.ListPodsRequest()).streams}
            exact = {trusts[pod] for pod in (WHOLE, SPLIT, HOLED)} == {"TRUST_EXACT"}
            return exact and trusts[LATE] == "TRUST_PARTIAL" and trusts[LOST] == "TRUST_STALE"

        eventually(settled)
        score = pb.ScoreRequest(model=MODEL, prompt=PROMPT)
        eventually(lambda: {each.pod: each.matched_blocks for each in index.Score(score).scores}[SPLIT] == blocks - 1)
        yield server
