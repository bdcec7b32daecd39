"""Recorded frames of real engines lead to what those engines held, in the core and in the real server."""

import base64
import json
import os
import queue
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from event_encoding import Stored, maps
from oracle import query_keys
from publisher import Publisher, free_port

from kvindex_server._core import Index
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as pb_grpc

GOLDEN = Path(__file__).parent / "golden"
BASIC = ("vllm-0.32.0/basic-cbor-seed0", "vllm-0.23.0/basic-cbor-seed0")
CASES = (*BASIC, "vllm-0.32.0/reset", "sglang-0.5.23/page16")
POD = "10.0.0.1:8000"
MODEL = "tiny"
COMMAND = (sys.executable, "-m", "kvindex_server", "serve")


@dataclass(frozen=True)
class Capture:
    """A recording, decoded."""

    name: str
    block_size: int
    frames: list[list[bytes]]
    checkpoints: list[tuple[str, int, frozenset[int]]]
    prompts: list[tuple[list[int], str, list[int] | None]]  # tokens, salt, the engine's hashes per block

    @property
    def hashes(self) -> list[int]:
        """Every hash of any checkpoint."""
        return sorted({value for _, _, resident in self.checkpoints for value in resident})


def load(name: str) -> Capture:
    """Reads tests/golden/<name>."""
    folder = GOLDEN / name
    frames = [
        [base64.b64decode(frame) for frame in json.loads(line)["frames"]]
        for line in (folder / "frames.jsonl").read_text().splitlines()
    ]
    config = json.loads((folder / "config.json").read_text())
    checkpoints = []
    if (folder / "expected.json").exists():
        for number, point in enumerate(json.loads((folder / "expected.json").read_text())["checkpoints"]):
            if name.endswith("/reset") and number == 2:
                continue  # the engine is empty but has not said so yet
            resident = frozenset(
                (entry["hash_u64"] if "hash_u64" in entry else entry["hash_i64"]) % 2**64 for entry in point["resident"]
            )
            checkpoints.append((point["label"], point["after_seq"], resident))
    prompts: list[tuple[list[int], str, list[int] | None]] = []
    if (folder / "requests.jsonl").exists():
        for line in (folder / "requests.jsonl").read_text().splitlines():
            request = json.loads(line)
            # On the wire a hash is the last 8 bytes of the digest.
            hashes = [int(digest[-16:], 16) for digest in request["block_hashes"]]
            prompts.append((request["all_token_ids"], request["cache_salt"] or "", hashes))
    if (folder / "ops.json").exists():
        for op in json.loads((folder / "ops.json").read_text()):
            if op["op"] == "insert":
                prompts.append((op["tokens"], op.get("cache_salt", ""), None))
    return Capture(name, config.get("block_size") or config.get("page_size", 0), frames, checkpoints, prompts)


def words(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def longest(keys: Sequence[int], held: set[int]) -> int:
    """Leading keys that are held."""
    return next((index for index, key in enumerate(keys) if key not in held), len(keys))


def prompt_keys(capture: Capture) -> list[list[int]]:
    return [query_keys(tokens, capture.block_size, cache_salt=salt) for tokens, salt, _ in capture.prompts]


@pytest.mark.parametrize("name", CASES)
def test_the_core_holds_what_the_engine_held(name: str) -> None:
    """At each checkpoint: the resident hashes, no other, and scores of all prompts that follow from them."""
    capture = load(name)
    index = Index()
    stream = index.add_stream(POD, 0)
    done = 0
    for label, after, resident in capture.checkpoints:
        while done < len(capture.frames) and int.from_bytes(capture.frames[done][1], "big") <= after:
            assert stream.apply([capture.frames[done][2]]).reasons == {}
            done += 1
        answers = index.holders_of_ints(words(capture.hashes), [])
        held = {value for value, (_, holders) in zip(capture.hashes, answers, strict=True) if holders}
        assert held == resident, label
        assert stream.claims == len(resident), label
        assert stream.unresolved == 0
        keys_held = {key for key, holders in answers if holders}
        for (tokens, salt, hashes), keys in zip(capture.prompts, prompt_keys(capture), strict=True):
            packed = struct.pack(f"<{len(tokens)}I", *tokens)
            answer = index.score_tokens(packed, [], [1.0], cache_salt=salt)
            expected = longest(keys, keys_held)
            assert (answer[0][2] if answer else 0) == expected, label
            if hashes is not None:  # the same by the engine's own names
                assert longest(hashes, set(resident)) == expected, label
    assert done == len(capture.frames)


def test_some_prompt_is_found() -> None:
    """The recordings do exercise matches, not only misses."""
    for name in CASES:
        capture = load(name)
        index = Index()
        stream = index.add_stream(POD, 0)
        best = 0
        for frames in capture.frames:
            stream.apply([frames[2]])
            for tokens, salt, _ in capture.prompts:
                packed = struct.pack(f"<{len(tokens)}I", *tokens)
                answer = index.score_tokens(packed, [], [1.0], cache_salt=salt)
                best = max([best, *(each[2] for each in answer)])
        assert best >= 2, name


# --- the same through the real server ---


class Server:
    """`python -m kvindex_server serve` on free ports."""

    def __init__(self, errors: Path) -> None:
        self._errors = errors.open("w+")
        self.process = subprocess.Popen(
            [*COMMAND, "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("KVINDEX_")},
        )
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        deadline = time.monotonic() + 30
        self.address = ""
        while not self.address and time.monotonic() < deadline:
            line = lines.get(timeout=30)
            if line.startswith("listening "):
                self.address = dict(part.split("=", 1) for part in line.split()[1:])["grpc"]
        assert self.address
        self.channel = grpc.insecure_channel(self.address)
        grpc.channel_ready_future(self.channel).result(timeout=10)
        self.index = pb_grpc.KVIndexStub(self.channel)
        self.admin = pb_grpc.KVIndexAdminStub(self.channel)
        self.models = 0

    def _read(self, lines: "queue.Queue[str]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lines.put(line)

    def stop(self) -> None:
        """Ends it and expects a clean end."""
        self.channel.close()
        self.process.terminate()
        assert self.process.wait(20) == 0
        self._errors.close()

    def register(self, model: str, **fields: Any) -> None:
        """RegisterPod with this test's pod."""
        self.admin.RegisterPod(pb.RegisterPodRequest(pod=POD, model=model, **fields), timeout=5)

    def stream(self, model: str, rank: int = 0) -> Any:
        """The one stream of the pod."""
        streams = self.admin.ListPods(pb.ListPodsRequest(model=model), timeout=5).streams
        return next(each for each in streams if each.rank == rank)

    def wait(self, model: str, holds: Callable[[Any], bool], seconds: float = 10.0) -> Any:
        """Polls ListPods until the stream is as wished."""
        deadline = time.monotonic() + seconds
        while True:
            seen = self.stream(model)
            if holds(seen):
                return seen
            assert time.monotonic() < deadline, f"stream never got there: {seen}"
            time.sleep(0.005)

    def wait_sequence(self, model: str, sequence: int) -> Any:
        """Until this sequence has been applied."""
        return self.wait(model, lambda seen: seen.HasField("last_sequence") and seen.last_sequence == sequence)

    def matched(self, model: str, tokens: Sequence[int], salt: str = "") -> int:
        """Matched blocks of the pod for a prompt."""
        request = pb.ScoreRequest(model=model, tokens=pb.Tokens(ids=tokens), pods=[POD], cache_salt=salt)
        (score,) = self.index.Score(request, timeout=5).scores
        assert score.pod == POD
        return int(score.matched_blocks)

    def held(self, model: str, hashes: Sequence[int]) -> dict[int, int]:
        """Engine hash -> key, of those that the pod holds."""
        request = pb.GetPodsForBlocksRequest(model=model, engine_hashes=pb.EngineHashes(ints=hashes))
        blocks = self.index.GetPodsForBlocks(request, timeout=5).blocks
        assert len(blocks) == len(hashes)
        return {value: block.key for value, block in zip(hashes, blocks, strict=True) if block.holders}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file; each uses a model of its own."""
    running = Server(tmp_path_factory.mktemp("server") / "stderr")
    yield running
    running.stop()


@pytest.fixture
def model(server: Server) -> Iterator[str]:
    """A model name nobody used, with its pod gone afterwards."""
    server.models += 1
    name = f"{MODEL}-{server.models}"
    yield name
    try:
        server.admin.UnregisterPod(pb.UnregisterPodRequest(pod=POD, model=name), timeout=5)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND


def audit(server: Server, model: str, capture: Capture, resident: frozenset[int], label: str) -> None:
    """The server's answers are what the engine held."""
    held = server.held(model, capture.hashes)
    assert set(held) == resident, label
    keys_held = set(held.values())
    for (tokens, salt, _), keys in zip(capture.prompts, prompt_keys(capture), strict=True):
        assert server.matched(model, tokens, salt) == longest(keys, keys_held), label


def play(server: Server, model: str, engine: Publisher, capture: Capture) -> None:
    """Frames up to each checkpoint, then the audit."""
    done = 0
    for label, after, resident in capture.checkpoints:
        if after < 0:
            continue
        while done < len(capture.frames) and int.from_bytes(capture.frames[done][1], "big") <= after:
            engine.publish_frames(capture.frames[done])
            done += 1
        server.wait_sequence(model, after)
        audit(server, model, capture, resident, label)
    assert done == len(capture.frames)


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("name", CASES)
def test_the_server_holds_what_the_engine_held(server: Server, model: str, name: str, layout: str) -> None:
    """Over ZeroMQ and gRPC, from the engine's first message on, with either replay layout."""
    capture = load(name)
    with Publisher(layout=layout, topic=capture.frames[0][0]) as engine:
        server.register(model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        engine.wait_subscriber()
        play(server, model, engine, capture)
        seen = server.stream(model)
        assert seen.trust == pb.TRUST_EXACT
        assert seen.state == pb.STREAM_STATE_LIVE
        assert (seen.gaps, seen.restarts, seen.orphans, dict(seen.decode_errors)) == (0, 0, 0, {})
        assert seen.blocks == len(capture.checkpoints[-1][2])


@pytest.mark.parametrize("layout", ["old", "new"])
@pytest.mark.parametrize("name", BASIC)
def test_a_late_index_catches_up_by_replay(server: Server, model: str, name: str, layout: str) -> None:
    """Registered when half of it has been said: replay from 0, then live, and the trust is exact."""
    capture = load(name)
    half = len(capture.frames) // 2
    with Publisher(layout=layout) as engine:
        for frames in capture.frames[:half]:
            engine.publish_frames(frames)
        server.register(model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        engine.wait_subscriber()
        for frames in capture.frames[half:]:
            engine.publish_frames(frames)
        seen = server.wait_sequence(model, engine.next_sequence - 1)
        audit(server, model, capture, capture.checkpoints[-1][2], "end")
        assert seen.trust == pb.TRUST_EXACT
        assert engine.replays >= 1


def test_a_hole_is_replayed(server: Server, model: str) -> None:
    """Messages that a subscriber lost are asked for, and nothing is missing in the end."""
    capture = load(BASIC[0])
    lost = {2, 3, len(capture.frames) // 2}
    with Publisher() as engine:
        server.register(model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        engine.wait_subscriber()
        server.wait(model, lambda each: each.replays == 1 and each.state == pb.STREAM_STATE_CONNECTING)
        for number, frames in enumerate(capture.frames):
            engine.publish(frames[2], lose=number in lost)
        seen = server.wait(
            model,
            lambda each: each.last_sequence == len(capture.frames) - 1 and each.state == pb.STREAM_STATE_LIVE,
        )
        audit(server, model, capture, capture.checkpoints[-1][2], "end")
        assert seen.trust == pb.TRUST_EXACT
        assert seen.gaps >= 1


def test_an_unrepaired_hole_is_visible(server: Server, model: str) -> None:
    """Without a replay socket a lost message makes the stream stale, not silently wrong."""
    capture = load(BASIC[0])
    with Publisher(replay=False) as engine:
        server.register(model, endpoint=engine.endpoint)
        engine.wait_subscriber()
        for number, frames in enumerate(capture.frames[:10]):
            engine.publish(frames[2], lose=number == 4)
        seen = server.wait(model, lambda each: each.last_sequence == 9 and each.trust == pb.TRUST_STALE, 40)
        assert seen.trust_reason
        assert seen.gaps >= 1


def test_an_engine_that_dials_in(server: Server, model: str) -> None:
    """Bind mode: the server binds, the engine connects."""
    capture = load(BASIC[0])
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    server.register(model, endpoint=endpoint, bind=True)
    with Publisher(connect=endpoint, replay=False) as engine:
        engine.wait_subscriber()
        play(server, model, engine, capture)
        # Nobody has told that nothing came before, but sequence 0 does.
        assert server.stream(model).trust == pb.TRUST_EXACT


def test_two_ranks_have_their_own_sequences(server: Server, model: str) -> None:
    """Rank r at port + r; the pod's score is its best rank's."""
    base = free_port()
    while True:
        try:
            first, second = Publisher(port=base, replay=False), Publisher(port=base + 1, replay=False)
            break
        except Exception:
            base = free_port()
    with first, second:
        server.register(model, endpoint=first.endpoint, ranks=2)
        first.wait_subscriber()
        second.wait_subscriber()
        tokens = list(range(64))
        first.publish(maps(Stored([1], None, tokens[:16], 16), rank=0))
        second.publish(maps(Stored([1, 2, 3], None, tokens[:48], 16), rank=1))
        deadline = time.monotonic() + 10
        while server.stream(model, 0).blocks != 1 or server.stream(model, 1).blocks != 3:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        request = pb.ScoreRequest(model=model, tokens=pb.Tokens(ids=tokens))
        (score,) = server.index.Score(request, timeout=5).scores
        assert (score.rank, score.matched_blocks, score.score) == (1, 3, 3.0)


@pytest.mark.parametrize("replay", [True, False])
def test_a_restarted_engine_is_fenced(server: Server, model: str, replay: bool) -> None:
    """Killed and started again on the same ports: after its first message nothing of the first life is held."""
    capture = load("vllm-0.32.0/serve-restart")
    sequences = [int.from_bytes(frames[1], "big") for frames in capture.frames]
    cut = sequences.index(0, 1)
    assert sequences == [*range(13), 0, 1]
    reference = Index()
    life = reference.add_stream(POD, 0)
    for frames in capture.frames[:cut]:
        life.apply([frames[2]])
    with Publisher(replay=replay) as engine:
        fields = {"replay_endpoint": engine.replay_endpoint} if replay else {}
        server.register(model, endpoint=engine.endpoint, **fields)
        engine.wait_subscriber()
        for frames in capture.frames[:cut]:
            engine.publish_frames(frames)
        assert server.wait_sequence(model, cut - 1).blocks == life.claims > 0
        port, replay_port = engine.port, engine.replay_port if replay else None
    with Publisher(port=port, replay_port=replay_port, replay=replay) as engine:
        engine.wait_subscriber()
        life.clear()
        for number, frames in enumerate(capture.frames[cut:]):
            engine.publish_frames(frames)
            life.apply([frames[2]])
            seen = server.wait_sequence(model, number)
            assert seen.restarts == 1
            assert seen.blocks == life.claims
        assert seen.trust == pb.TRUST_EXACT
        assert seen.epoch >= 1


def test_a_damaged_message_is_counted(server: Server, model: str) -> None:
    """Garbage between good batches costs nothing but itself, and shows in ListPods."""
    tokens = list(range(32))
    with Publisher() as engine:
        server.register(model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint)
        engine.wait_subscriber()
        engine.publish(maps(Stored([1], None, tokens[:16], 16)))
        engine.publish(b"\xc1garbage")
        engine.publish(maps(Stored([2], 1, tokens[16:], 16)))
        seen = server.wait_sequence(model, 2)
        assert sum(seen.decode_errors.values()) == 1
        assert server.matched(model, tokens) == 2


def test_a_cleared_and_an_unregistered_pod(server: Server, model: str) -> None:
    """ClearPod drops claims and synchronises again; UnregisterPod leaves nothing."""
    tokens = list(range(32))
    with Publisher() as engine:
        fields: dict[str, Any] = {"endpoint": engine.endpoint, "replay_endpoint": engine.replay_endpoint}
        server.register(model, **fields)
        engine.wait_subscriber()
        engine.publish(maps(Stored([1, 2], None, tokens, 16)))
        server.wait_sequence(model, 0)
        again = server.admin.RegisterPod(pb.RegisterPodRequest(pod=POD, model=model, **fields), timeout=5)
        assert not again.changed
        cleared = server.admin.ClearPod(pb.ClearPodRequest(pod=POD, model=model), timeout=5)
        assert cleared.claims == 2
        server.wait(model, lambda each: each.blocks == 2)  # by replay
        gone = server.admin.UnregisterPod(pb.UnregisterPodRequest(pod=POD, model=model), timeout=5)
        assert gone.claims == 2
        assert not server.admin.ListPods(pb.ListPodsRequest(model=model), timeout=5).streams
        request = pb.ScoreRequest(model=model, tokens=pb.Tokens(ids=tokens))
        try:
            assert not server.index.Score(request, timeout=5).scores
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND


def test_an_event_is_answered_for_within_50_ms(server: Server, model: str) -> None:
    """From the engine's send to a Score that sees it; the median of 20."""
    with Publisher() as engine:
        server.register(model, endpoint=engine.endpoint, replay_endpoint=engine.replay_endpoint, block_size=16)
        engine.wait_subscriber()
        engine.publish(maps(Stored([10**6], None, list(range(16)), 16)))
        server.wait_sequence(model, 0)
        took = []
        for number in range(20):
            tokens = list(range(1000 * (number + 1), 1000 * (number + 1) + 16))
            started = time.monotonic()
            engine.publish(maps(Stored([number], None, tokens, 16)))
            while server.matched(model, tokens) != 1:
                assert time.monotonic() - started < 10
            took.append(time.monotonic() - started)
        assert statistics.median(took) < 0.05, took
