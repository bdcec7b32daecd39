"""Placements: a router's own decisions count at once, apart from what engines say, and never beyond their time."""

import random
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from event_encoding import Cleared, Removed, Stored, maps
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from oracle import query_keys
from prometheus_client.parser import text_string_to_metric_families
from publisher import Publisher
from test_index_oracle import BLOCK, WEIGHTS, Fleet, token_bytes, words

from kvindex_server._core import Index, block_keys
from kvindex_server.config import LimitSettings, ModelSettings, PlacementSettings, Settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.server import Server

HOUR = 3600.0
TOKENS = list(range(1, BLOCK * 6 + 1))
KEYS = words(query_keys(TOKENS, BLOCK))


class PlacingFleet(Fleet):
    """Engines as before, and a router that records where it sends its prompts. Time passes in whole hours."""

    def step(self) -> None:
        """One operation on both sides."""
        choice = self.rng.random()
        if choice < 0.3 and self.oracle.block_size:
            self.place()
        elif choice < 0.35:
            self.index.advance_clock(HOUR)
            self.oracle.now += 1
        elif choice < 0.38:
            self.index.sweep_placements()
            self.oracle.sweep()
        else:
            super().step()

    def place(self) -> None:
        """A router's decision, with or without a rank. Half an hour keeps the machine's own clock out of it."""
        rng = self.rng
        chain = rng.choice(self.chains)
        tokens = chain.tokens[: rng.randint(1, len(chain.tokens))]
        keys = query_keys(tokens, self.index.block_size, self.hash_seed, chain.lora_name, chain.salt, chain.mm)
        engine = rng.choice(self.engines).oracle
        rank = rng.choice((engine.rank, None))
        hours = rng.randint(1, 4)
        got = self.index.place(engine.pod, -1 if rank is None else rank, words(keys), hours * HOUR - HOUR / 2)
        assert got == ("recorded", *self.oracle.place(engine.pod, rank, keys, hours - 0.5))

    def audit(self) -> None:
        """Everything as before, and what became of every placed block."""
        super().audit()
        counts = self.index.placements
        live = counts.pop("blocks")
        assert counts["recorded"] == counts["confirmed"] + counts["expired"] + counts["fenced"] + live
        for what in ("recorded", "renewed", "confirmed", "fenced", "refused"):
            assert counts[what] == self.oracle.counts[what], what


@pytest.mark.parametrize("seed", range(40))
def test_random_operations_agree_with_the_oracle(seed: int) -> None:
    """Scores, holders and counts are those of the slow model, whatever is placed, stored, dropped and expired."""
    fleet = PlacingFleet(seed)
    for _ in range(150):
        fleet.step()
        fleet.audit()
    fleet.index.sweep_placements()
    fleet.oracle.sweep()
    assert fleet.index.placements["expired"] == fleet.oracle.counts["expired"]
    assert fleet.index.placements["blocks"] == sum(len(engine.oracle.placed) for engine in fleet.engines)
    for engine in fleet.engines:
        engine.native.close()
    assert fleet.index.placements["blocks"] == 0


def test_the_random_operations_reach_every_end() -> None:
    """The comparison above is worth nothing for a path that it never takes."""
    totals = dict.fromkeys(("recorded", "renewed", "confirmed", "expired", "fenced"), 0)
    lengthened = 0
    for seed in range(6):
        fleet = PlacingFleet(seed)
        for _ in range(150):
            fleet.step()
            if fleet.oracle.block_size:
                keys = query_keys(fleet.chains[0].tokens, fleet.oracle.block_size, fleet.hash_seed)
                found = fleet.oracle.matches(keys, WEIGHTS)
                lengthened += any(m.speculative > 0 and m.blocks > 0 for of in found.values() for m in of.values())
        for what in totals:
            totals[what] += fleet.oracle.counts[what]
    assert all(totals.values()) and lengthened, (totals, lengthened)


def score(index: Index, keys: bytes = KEYS) -> list[tuple[int, int, float, int]]:
    """(rank, matched, score, speculative) per pod."""
    return [
        (rank, blocks, total, speculative) for _, rank, blocks, total, _, speculative in index.score(keys, [], [1.0])
    ]


def test_a_pod_that_has_said_nothing_yet_can_be_placed_on() -> None:
    """A cold pod has no claims and no groups; what is sent there counts all the same, and only there."""
    index = Index(BLOCK)
    index_streams = [index.add_stream("cold", 0), index.add_stream("other", 0)]
    assert index.place("cold", -1, KEYS, 1000.0) == ("recorded", 0, 0)
    assert index.score(KEYS, [], [1.0]) == [("cold", 0, 0, 6.0, [0] * 8, 6)]
    assert index.score_tokens(token_bytes(TOKENS), [], [1.0]) == index.score(KEYS, [], [1.0])
    assert index.score(KEYS, ["other"], [1.0]) == []
    assert index.holders(KEYS[:8], []) == [[("cold", 0, 0, 0, True)]]
    assert index.holders(KEYS[:8], ["other"]) == [[]]
    assert index.place("nobody", -1, KEYS, 1000.0)[0] == "no_pod"
    assert index.place("cold", 1, KEYS, 1000.0)[0] == "no_rank"
    assert index_streams[0].close() == 0
    assert index.score(KEYS, [], [1.0]) == []
    assert index.place("cold", 0, KEYS, 1000.0)[0] == "no_pod"


def test_real_blocks_behind_a_placed_one_weigh_by_their_tier() -> None:
    """A hole that is about to be computed again makes the rest of the prompt reachable, and is told apart from it."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    stream.apply([maps(Stored([1, 2, 3, 4, 5], None, TOKENS[: 5 * BLOCK], BLOCK, medium="CPU"), Removed([3], "CPU"))])
    assert index.place("p", 0, KEYS[: 3 * 8], 1000.0) == ("recorded", 0, 2)
    ((_, _, blocks, total, tiers, speculative),) = index.score(KEYS, [], [1.0, 0.8])
    assert (blocks, speculative, tiers[:2]) == (2, 3, [0, 2])
    assert total == pytest.approx(2 * 0.8 + 1.0 + 2 * 0.8)
    stream.apply([maps(Stored([3], 2, TOKENS[2 * BLOCK : 3 * BLOCK], BLOCK, medium="CPU"))])
    assert [each[2:6:3] for each in index.score(KEYS, [], [1.0, 0.8])] == [(5, 0)]
    assert index.placements["confirmed"] == 1


def test_an_unknown_rank_is_the_best_matching_one_and_any_rank_confirms() -> None:
    """Where the pod's own balancer sends it nobody knows; the engine's event tells, on whichever rank it comes."""
    index = Index(BLOCK)
    ranks = [index.add_stream("p", rank) for rank in range(3)]
    ranks[2].apply([maps(Stored([1], None, TOKENS[:BLOCK], BLOCK), rank=2)])
    assert index.place("p", -1, KEYS, 1000.0) == ("recorded", 2, 1)
    assert score(index) == [(2, 1, 6.0, 5)]
    ranks[0].apply([maps(Stored([1, 2, 3], None, TOKENS[: 3 * BLOCK], BLOCK))])
    assert index.placements["confirmed"] == 2
    # A named rank is another matter: the same block on another rank does not make it come true.
    assert index.place("p", 1, KEYS, 1000.0) == ("recorded", 1, 0)
    ranks[0].apply([maps(Stored([4], 3, TOKENS[3 * BLOCK : 4 * BLOCK], BLOCK))])
    assert index.placements["confirmed"] == 3  # the guess at rank 2
    assert (1, 0, 6.0, 6) in score(index)


@pytest.mark.parametrize("ending", ["clear", "close", "cleared"])
def test_a_fence_drops_what_was_placed(ending: str) -> None:
    """The engine that was to compute it is gone, or has thrown everything away."""
    index = Index(BLOCK)
    stream, other = index.add_stream("p", 0), index.add_stream("q", 0)
    for pod in ("p", "q"):
        index.place(pod, 0, KEYS, 1000.0)
    if ending == "clear":
        stream.clear()
    elif ending == "close":
        stream.close()
    else:
        stream.apply([maps(Cleared())])
    assert [match[0] for match in index.score(KEYS, [], [1.0])] == ["q"]
    assert (index.placements["fenced"], index.placements["blocks"]) == (6, 6)
    other.close()
    assert index.placements["blocks"] == 0


def test_hybrid_models() -> None:
    """A placed block satisfies full attention and its windows; a mamba state nobody can foretell; a group of unknown
    kind fails closed with placements too."""
    stored = Stored([1, 2], None, TOKENS[: 2 * BLOCK], BLOCK, kind="full_attention", group=0)
    for kind, window, expected in (
        ("sliding_window", 9, [(0, 2, 6.0, 4)]),
        ("mamba", None, [(0, 2, 2.0, 0)]),
        ("chunked_local_attention", None, []),
    ):
        index = Index(BLOCK)
        stream = index.add_stream("p", 0)
        second = Stored([1, 2], None, TOKENS[: 2 * BLOCK], BLOCK, kind=kind, window=window, group=1)
        stream.apply([maps(stored, second)])
        assert index.place("p", 0, KEYS, 1000.0) == ("recorded", 0, 2)
        assert score(index) == expected, kind


def test_a_match_does_not_end_on_real_blocks_without_their_window() -> None:
    """Behind the last placed block full attention may reach on, but the window before its end may be gone."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    full = Stored([1, 2, 3, 4, 5, 6], None, TOKENS, BLOCK, kind="full_attention", group=0)
    tail = Stored([1], None, TOKENS[:BLOCK], BLOCK, kind="sliding_window", window=9, group=1)
    stream.apply([maps(full, tail, Removed([2], None, 0))])
    index.place("p", 0, KEYS[:16], 1000.0)
    assert score(index) == [(0, 1, 2.0, 1)]


def test_room_is_bounded() -> None:
    """A placement too many is refused whole and counted; what has expired makes room."""
    index = Index(BLOCK, max_placements=8)
    stream = index.add_stream("p", 0)
    assert index.place("p", 0, KEYS, 1000.0)[0] == "recorded"
    assert index.place("p", 0, words([1, 2, 3]), 1000.0)[0] == "no_room"
    assert index.holders(words([1, 2, 3]), []) == [[], [], []]
    assert (index.placements["refused"], index.placements["blocks"]) == (3, 6)
    assert index.place("p", 0, KEYS, 1000.0)[0] == "recorded"  # once more needs no more room
    index.advance_clock(1000.0)
    index.sweep_placements()
    assert index.place("p", 0, words([1, 2, 3]), 1000.0)[0] == "recorded"
    stream.close()


def test_memory_comes_back() -> None:
    """After its time a flood of placements costs nothing any more, with no event and no further placement."""
    index = Index(BLOCK)
    streams = [index.add_stream(f"p{number}", 0) for number in range(20)]
    empty = index.bytes
    rng = random.Random(1)
    for stream in range(len(streams)):
        index.place(f"p{stream}", 0, rng.randbytes(8 * 5000), 1000.0)
    assert index.bytes > empty + 20 * 5000 * 16
    index.advance_clock(1000.0)
    index.sweep_placements()
    assert index.bytes == empty
    assert index.placements["expired"] == 20 * 5000


# --- the whole server ---


@dataclass
class Running:
    """A server, one engine it listens to, and clients of both services."""

    server: Server
    engine: Publisher
    kv: KVIndexStub
    admin: KVIndexAdminStub

    def place(self, tokens: list[int] = TOKENS, **fields: object) -> pb.RecordPlacementResponse:
        request = {"model": "m", "pod": "p", "tokens": pb.Tokens(ids=tokens), **fields}
        return self.kv.RecordPlacement(pb.RecordPlacementRequest(**request), timeout=5)  # type: ignore[arg-type]

    def score(self, tokens: list[int] = TOKENS, **fields: object) -> pb.PodScore:
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=tokens), **fields)  # type: ignore[arg-type]
        (found,) = self.kv.Score(request, timeout=5).scores
        return found

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://{self.server.metrics_address}/metrics", timeout=5) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return {
            sample.name.removeprefix("kvindex_placement_") + sample.labels.get("reason", ""): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("kvindex_placement_")
        }

    def eventually(self, check: Callable[[], bool], seconds: float = 5.0) -> None:
        ends = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < ends, "did not come true in time"
            time.sleep(0.01)

    def register(self) -> None:
        endpoints = {"endpoint": self.engine.endpoint, "replay_endpoint": self.engine.replay_endpoint}
        self.admin.RegisterPod(pb.RegisterPodRequest(pod="p", model="m", **endpoints), timeout=5)
        self.engine.wait_subscriber()
        self.eventually(lambda: self.admin.ListPods(pb.ListPodsRequest()).streams[0].state == pb.STREAM_STATE_LIVE)


@pytest.fixture
def running() -> Iterator[Running]:
    server = Server(
        Settings(
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            models=(ModelSettings(name="m", block_size=BLOCK),),
            placement=PlacementSettings(max_ttl_seconds=10, max_blocks=50),
            limits=LimitSettings(max_tokens=1000),
        )
    )
    server.start()
    assert server.wait_ready(10)
    with Publisher() as engine, grpc.insecure_channel(server.grpc_address) as channel:
        made = Running(server, engine, KVIndexStub(channel), KVIndexAdminStub(channel))
        engine.publish(maps(Stored([1], None, TOKENS[:BLOCK], BLOCK)))
        made.register()
        made.eventually(lambda: made.score().matched_blocks == 1)
        yield made
    server.stop(0)


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_placed_then_confirmed(running: Running) -> None:
    """From the router's word to the engine's, the pod's score never falls; only what backs it changes."""
    answer = running.place()
    assert (answer.total_blocks, answer.held_blocks, answer.rank, answer.ttl_seconds) == (6, 1, 0, 2.0)
    found = running.score()
    assert (found.score, found.matched_blocks, found.matched_tokens, found.speculative_blocks) == (6.0, 1, BLOCK, 5)
    assert dict(found.tier_blocks) == {"gpu": 1}
    assert found.trust == pb.TRUST_EXACT
    assert running.metrics()["blocks"] == 5
    running.engine.publish(maps(Stored([2, 3, 4, 5, 6], 1, TOKENS[BLOCK:], BLOCK)))
    scores = []

    def confirmed() -> bool:
        scores.append(running.score())
        return scores[-1].matched_blocks == 6

    running.eventually(confirmed)
    assert {each.score for each in scores} == {6.0}
    assert scores[-1].speculative_blocks == 0
    found_metrics = running.metrics()
    assert (found_metrics["recorded_total"], found_metrics["confirmed_total"], found_metrics["blocks"]) == (5, 5, 0)
    time.sleep(0.3)
    assert running.score().matched_blocks == 6


def test_expired_by_real_time(running: Running) -> None:
    """It counts before its time is over and does not after, without any event; the owner then gives memory back."""
    started = time.monotonic()
    assert running.place(ttl_seconds=0.2).ttl_seconds == 0.2
    recorded = time.monotonic()
    seen = []
    while time.monotonic() < recorded + 0.3:
        asked = time.monotonic()
        speculative = running.score().speculative_blocks
        if asked > recorded + 0.2:
            assert speculative == 0, "outlived its time"
        if time.monotonic() < started + 0.2:
            assert speculative == 5, "ended before its time"
            seen.append(speculative)
        time.sleep(0.01)
    assert seen and running.score().score == 1.0
    running.eventually(lambda: running.metrics()["expired_total"] == 5)
    assert running.metrics()["blocks"] == 0
    assert running.metrics()["confirmed_total"] == 0


def test_a_later_event_is_no_confirmation(running: Running) -> None:
    """What the engine stores after the time counts as expired."""
    running.place(ttl_seconds=0.05)
    time.sleep(0.06)
    running.engine.publish(maps(Stored([2, 3, 4, 5, 6], 1, TOKENS[BLOCK:], BLOCK)))
    running.eventually(lambda: running.score().matched_blocks == 6)
    found = running.metrics()
    assert (found["expired_total"], found["confirmed_total"]) == (5, 0)


def test_shown_among_the_holders(running: Running) -> None:
    running.place()
    request = pb.GetPodsForBlocksRequest(model="m", tokens=pb.Tokens(ids=TOKENS))
    blocks = running.kv.GetPodsForBlocks(request, timeout=5).blocks
    holders = [[(each.pod, each.tier, each.speculative) for each in block.holders] for block in blocks]
    assert holders == [[("p", "gpu", False)], *([[("p", "gpu", True)]] * 5)]


def test_what_makes_equal_tokens_differ_counts_for_placements_too(running: Running) -> None:
    """LoRA, salt, images and bare keys name the same blocks when recorded and when asked about."""
    for fields in (
        {"lora_name": "adapter"},
        {"cache_salt": "tenant"},
        {"mm_features": [pb.MmFeature(hash="image", offset=0, length=3)]},
    ):
        assert running.place(**fields).held_blocks == 0
        assert running.score(**fields).speculative_blocks == 6
        assert running.score().speculative_blocks == 0
    tokens = [7] * BLOCK
    keys = block_keys(token_bytes(tokens), BLOCK)
    request = pb.RecordPlacementRequest(model="m", pod="p", keys=pb.Keys(values=struct.unpack("<Q", keys)))
    running.kv.RecordPlacement(request, timeout=5)
    assert running.score(tokens).speculative_blocks == 1


def test_a_restarted_engine_will_not_get_the_request(running: Running) -> None:
    """The first message of the new life ends the placements of the old one."""
    running.place(ttl_seconds=10)
    assert running.score().speculative_blocks == 5
    running.engine.next_sequence = 0
    running.engine.buffer.clear()
    running.engine.publish(maps(Stored([9], None, [9] * BLOCK, BLOCK)))
    running.eventually(lambda: running.score([9] * BLOCK).matched_blocks == 1)
    assert (running.score().score, running.score().speculative_blocks) == (0.0, 0)
    assert running.metrics()["dropped_totalfenced"] == 5


def test_clear_and_unregister_drop_placements(running: Running) -> None:
    named = {"pod": "p", "model": "m"}
    running.place(ttl_seconds=10)
    running.admin.ClearPod(pb.ClearPodRequest(**named), timeout=5)
    assert running.metrics()["dropped_totalfenced"] == 5
    running.place(ttl_seconds=10)
    running.admin.UnregisterPod(pb.UnregisterPodRequest(**named), timeout=5)
    assert running.metrics()["blocks"] == 0
    assert refused(running.place) == (grpc.StatusCode.NOT_FOUND, "pod: 'p' is not registered for model 'm'")
    running.register()
    assert running.score().speculative_blocks == 0


def test_refusals_name_field_and_reason(running: Running) -> None:
    code = grpc.StatusCode
    cases: list[tuple[dict[str, object], grpc.StatusCode, str]] = [
        ({"model": ""}, code.INVALID_ARGUMENT, "model: must not be empty"),
        ({"model": "who"}, code.NOT_FOUND, "model: 'who' is neither configured nor seen"),
        ({"pod": ""}, code.INVALID_ARGUMENT, "pod: must not be empty"),
        ({"pod": "q"}, code.NOT_FOUND, "pod: 'q' is not registered for model 'm'"),
        ({"pod": "p" * 1025}, code.INVALID_ARGUMENT, "pod: is longer than 1024 characters"),
        ({"rank": 1}, code.INVALID_ARGUMENT, "rank: the pod has no rank 1"),
        (
            {"tokens": [1] * 1001},
            code.INVALID_ARGUMENT,
            "tokens.ids: 1001 tokens exceed the limit of 1000",
        ),
        *(
            ({"ttl_seconds": ttl}, code.INVALID_ARGUMENT, "ttl_seconds: must be above 0 and at most 10")
            for ttl in (0.0, -1.0, 10.1, float("inf"), float("nan"))
        ),
    ]
    for fields, expected, message in cases:
        assert refused(lambda fields=fields: running.place(**fields)) == (expected, message)  # type: ignore[misc]
    status, message = refused(lambda: running.place([5] * BLOCK * 51))
    assert (status, message) == (
        code.RESOURCE_EXHAUSTED,
        "as many blocks are placed as the model may have: see placement.max_blocks",
    )
    prompt = pb.RecordPlacementRequest(model="m", pod="p", prompt="x")
    assert refused(lambda: running.kv.RecordPlacement(prompt))[0] is code.FAILED_PRECONDITION
    nothing = pb.RecordPlacementRequest(model="m", pod="p")
    assert refused(lambda: running.kv.RecordPlacement(nothing)) == (
        code.INVALID_ARGUMENT,
        "input: one of prompt, chat, tokens, keys is required",
    )
    found = running.metrics()
    assert (found["recorded_total"], found["dropped_totalrefused"]) == (0, 51)


def test_visible_by_reflection(running: Running) -> None:
    with grpc.insecure_channel(running.server.grpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvindex.v1.KVIndex")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    assert any(b"RecordPlacementRequest" in each for each in answer.file_descriptor_response.file_descriptor_proto)
