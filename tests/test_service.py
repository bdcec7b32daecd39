"""The gRPC services over real connections: answers, status codes, limits, health and reflection."""

import json
import logging
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import msgpack
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tokenizers_at_hand import byte_level

from kvindex_server import _core, admin, compat, health, reflection, service
from kvindex_server._core import Index
from kvindex_server.config import LimitSettings, PlacementSettings
from kvindex_server.direct import Direct
from kvindex_server.errors import InvalidArgument
from kvindex_server.fleet import Fleet
from kvindex_server.health import Health
from kvindex_server.interceptors import MAX_MESSAGE, Bounds, Guard
from kvindex_server.keeper import Keeper
from kvindex_server.lookup import BlocksQuery, Lookup
from kvindex_server.metrics import Metrics
from kvindex_server.models import Model, Models
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.indexer.v1.indexer_pb2_grpc import IndexerServiceStub
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.stream import Trust
from kvindex_server.tokenize import tokenizer as tokenizer_module
from kvindex_server.tokenize.chat import ChatTemplates
from kvindex_server.tokenize.tokenizer import Body, Keyed, Tokenizer, text_of

TIER_WEIGHTS = {"gpu": 1.0, "cpu": 0.8, "disk": 0.5}
LIMITS = LimitSettings(max_tokens=1000, max_pods=8, max_keys=100, max_prompt_bytes=1000)


class FakeTokenizer:
    """One token per byte."""

    def encode_prompt(self, text: str, *, max_tokens: int, seconds: float) -> bytes:
        return self.limited("prompt", text, max_tokens)

    def encode_chat(self, body: str, *, max_tokens: int, seconds: float) -> bytes:
        try:
            return self.limited("chat", json.loads(body)["messages"][0]["content"], max_tokens)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            raise InvalidArgument("chat", "is not valid JSON") from None

    def keys(self, kind: str, body: Body, *context: object, max_tokens: int, seconds: float) -> Keyed:
        encode = self.encode_chat if kind == "chat" else self.encode_prompt
        ids = encode(text_of(body), max_tokens=max_tokens, seconds=seconds)
        return Keyed(_core.block_keys(ids, *context), len(ids) // 4)  # type: ignore[arg-type]

    def limited(self, field: str, text: str, max_tokens: int) -> bytes:
        data = text.encode()
        if len(data) > max_tokens:
            raise InvalidArgument(field, f"its tokens exceed the limit of {max_tokens}")
        return struct.pack(f"<{len(data)}I", *data)


@dataclass
class FakeFleet:
    """Three pods, of which one is trusted exactly."""

    names: list[str] = field(default_factory=lambda: ["a", "b", "c"])
    asked: list[tuple[str, int | None]] = field(default_factory=list)

    def pods(self, model: str) -> list[str]:
        return self.names if model == "m" else []

    def trust(self, model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        self.asked.append((pod, rank))
        if pod == "a":
            return Trust.EXACT, "every event applied", 1.5
        return Trust.COLD, "nothing heard", -1.0


@dataclass
class Recorder:
    """Metrics that remember what they were told."""

    rpcs: list[tuple[str, str]] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    lookups: list[tuple[str, int, int]] = field(default_factory=list)
    tiers: list[tuple[str, str]] = field(default_factory=list)
    usage: list[tuple[str, int, int]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    in_flight: dict[str, Callable[[], int]] = field(default_factory=dict)
    native: Metrics = field(default_factory=Metrics)
    heard: None = None  # nobody listens to lookups that are counted natively

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.rpcs.append((method, code))

    def shed(self, method: str, reason: str) -> None:
        self.refused.append((method, reason))

    def watch_in_flight(self, method: str, read: Callable[[], int]) -> None:
        self.in_flight[method] = read

    def observe_stage(self, stage: str, seconds: float) -> None:
        assert seconds >= 0
        self.stages.append(stage)

    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None:
        self.lookups.append((model, blocks, best_match))

    def lookup_tallies(self, model: str) -> _core.LookupTallies:
        return self.native.lookup_tallies(model)

    def counted(self, name: str, **labels: str) -> float:
        """What the native core counted."""
        return self.native.registry.get_sample_value(name, labels) or 0

    def unknown_tier(self, model: str, tier: str) -> None:
        self.tiers.append((model, tier))

    def observe_usage(self, model: str, predicted: int, cached: int) -> None:
        self.usage.append((model, predicted, cached))


class Served:
    """Every service on one real server; the index knows pod a (3 blocks) and b (rank 1: 1 block)."""

    def __init__(self, **bounds: float) -> None:
        self.index = Index(4)
        self.streams: list[_core.Stream] = []  # a stream that nobody keeps takes its claims with it
        self.stored("a", 0, list(range(12)))
        self.stored("b", 1, [0, 1, 2, 3], "CPU")
        self.models = Models(
            [
                Model("m", self.index, FakeTokenizer(), ("alias",), ("adapter",)),  # type: ignore[arg-type]
                Model("bare", Index(4)),
                Model("new", Index()),
            ]
        )
        self.ready = True
        self.metrics = Recorder()
        self.fleet = FakeFleet()
        self.admin_fleet = Fleet(self.models, max_pods=3)
        self.guard = Guard(self.metrics, lambda: self.ready, Bounds(**bounds))  # type: ignore[arg-type]
        self.lookup = Lookup(self.models, self.fleet, TIER_WEIGHTS, self.metrics, LIMITS.max_tokens)
        self.direct = Direct(self.lookup, self.models, self.fleet, TIER_WEIGHTS, self.metrics, LIMITS)
        self.health = Health((service.SERVICE, compat.SERVICE), always=(admin.SERVICE,))
        self.server = grpc.server(self.guard.pool, options=[("grpc.so_reuseport", 0)])
        service.register(self.server, self.lookup, self.direct, self.guard, LIMITS, PlacementSettings())
        compat.register(self.server, self.direct, self.guard)
        keeper = Keeper(None, 1, 60.0, 60.0)
        admin.register(self.server, self.admin_fleet, self.models, self.lookup, LIMITS, keeper, "instance", self.guard)
        self.health.register(self.server, self.guard)
        names = (service.SERVICE, compat.SERVICE, admin.SERVICE, health.SERVICE)
        reflection.register(self.server, names, self.guard)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self.kv = KVIndexStub(self.channel)
        self.admin = KVIndexAdminStub(self.channel)

    def stored(self, pod: str, rank: int, tokens: list[int], medium: str = "GPU", **more: object) -> None:
        """One more stream, holding these tokens' blocks of 4; engine hashes are 100 + the first token and on."""
        hashes = [100 + tokens[0] + each for each in range(len(tokens) // 4)]
        event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": tokens}
        event |= {"block_size": 4, "medium": medium, **more}
        self.streams.append(self.index.add_stream(pod, rank))
        assert self.streams[-1].apply([msgpack.packb([1.0, [event]])]).events == 1

    def close(self) -> None:
        self.channel.close()
        self.server.stop(0).wait(5)
        self.guard.close()
        self.admin_fleet.stop()

    def score(self, **fields: object) -> pb.ScoreResponse:
        return self.kv.Score(pb.ScoreRequest(**{"model": "m", **fields}), timeout=5)  # type: ignore[arg-type]


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served()
    yield running
    running.close()


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def tokens(*ids: int) -> pb.Tokens:
    return pb.Tokens(ids=ids)


def test_score_by_tokens(served: Served) -> None:
    answer = served.score(tokens=tokens(*range(14)))
    assert (answer.total_blocks, answer.block_size, answer.total_tokens) == (3, 4, 14)
    assert [each.pod for each in answer.scores] == ["a", "b", "c"]
    a, b, c = answer.scores
    assert (a.score, a.matched_blocks, a.matched_tokens, a.rank) == (3.0, 3, 12, 0)
    assert (a.trust, a.trust_reason) == (pb.TRUST_EXACT, "every event applied")
    assert a.age_seconds == pytest.approx(1.5, abs=0.1)
    assert dict(a.tier_blocks) == {"gpu": 3}
    assert (b.score, b.matched_blocks, b.rank, dict(b.tier_blocks)) == (0.8, 1, 1, {"cpu": 1})
    assert (c.score, c.matched_blocks, c.trust, c.age_seconds) == (0.0, 0, pb.TRUST_COLD, -1.0)
    assert served.fleet.asked == [("a", 0), ("b", 1)]  # c has no stream
    assert served.metrics.native.lookups() == {"m": (3, 3)}
    for stage in ("match", "total"):
        assert served.metrics.counted("kvindex_score_stage_seconds_count", stage=stage) == 1
    assert served.metrics.rpcs == [("/kvindex.v1.KVIndex/Score", "OK")]


def test_every_form_of_prompt_scores_the_same(served: Served) -> None:
    text = "abcdefghij"
    ids = list(text.encode())
    served.stored("c", 0, ids[:8])
    keys = _core.block_keys(struct.pack("<10I", *ids), 4)
    chat = json.dumps({"messages": [{"role": "user", "content": text}]})
    forms: list[dict[str, object]] = [
        {"prompt": text},
        {"chat": chat},
        {"tokens": tokens(*ids)},
        {"keys": pb.Keys(values=struct.unpack("<2Q", keys))},
    ]
    answers = [served.score(**form) for form in forms]
    assert [(each.scores[0].pod, each.scores[0].matched_blocks) for each in answers] == [("c", 2)] * 4
    assert [each.total_tokens for each in answers] == [10, 10, 10, 8]
    assert "tokenize" in served.metrics.stages


def test_candidates_and_top_k(served: Served) -> None:
    request = tokens(*range(12))
    answer = served.score(tokens=request, pods=["x", "b", "x", "a"])
    assert [each.pod for each in answer.scores] == ["a", "b", "x"]
    assert [each.pod for each in served.score(tokens=request, top_k=1).scores] == ["a"]


def test_a_candidate_named_twice_is_answered_once(served: Served) -> None:
    """At its first place, natively and by the reference path."""
    for fields in ({"tokens": tokens(90, 91, 92, 93)}, {"prompt": "wxyz"}):
        answer = served.score(**fields, pods=["c", "x", "c", "a", "x"])
        assert [each.pod for each in answer.scores] == ["c", "x", "a"]


def test_alias_and_adapter_names(served: Served) -> None:
    assert served.score(model="alias", tokens=tokens(*range(12))).scores[0].matched_blocks == 3
    by_model_name = served.score(model="adapter", tokens=tokens(*range(12)))
    by_lora_name = served.score(lora_name="adapter", tokens=tokens(*range(12)))
    assert [each.matched_blocks for each in (by_model_name.scores[0], by_lora_name.scores[0])] == [0, 0]
    served.stored("c", 0, [0, 1, 2, 3], lora_name="adapter")
    for answer in (
        served.score(model="adapter", tokens=tokens(*range(12))),
        served.score(lora_name="adapter", tokens=tokens(*range(12))),
    ):
        assert (answer.scores[0].pod, answer.scores[0].matched_blocks) == ("c", 1)


def test_salt_and_media_make_equal_tokens_differ(served: Served) -> None:
    for fields in (
        {"cache_salt": "tenant"},
        {"mm_features": [pb.MmFeature(hash="image", offset=0, length=2)]},
    ):
        answer = served.score(tokens=tokens(*range(12)), **fields)
        assert answer.scores[0].matched_blocks == 0
    later = served.score(tokens=tokens(*range(12)), mm_features=[pb.MmFeature(hash="image", offset=8, length=2)])
    assert later.scores[0].matched_blocks == 2


def test_a_text_meets_the_blocks_of_a_prompt_with_an_image(served: Served) -> None:
    """The template writes one placeholder, the engine as many as the image takes."""
    engine = list(b"ab" + b"?" * 6 + b"cd")
    served.stored("c", 0, engine[:8], extra_keys=[[["img", 2]], [["img", -2]]])
    image = [pb.MmFeature(hash="img", offset=2, length=6)]
    chat = json.dumps({"messages": [{"role": "user", "content": "ab?cd"}]})
    for form in ({"prompt": "ab?cd"}, {"chat": chat}, {"tokens": tokens(*engine)}, {"prompt": "ab??????cd"}):
        answer = served.score(**form, mm_features=image)
        assert (answer.total_tokens, answer.scores[0].pod, answer.scores[0].matched_blocks) == (10, "c", 2)
    assert served.score(prompt="ab??????cd").scores[0].matched_blocks == 0
    code, message = refused(lambda: served.score(prompt="ab", mm_features=image))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "mm_features: offset 2 is beyond the 2 tokens")


def test_an_unknown_tier_weighs_as_the_lowest_and_is_counted(served: Served) -> None:
    served.stored("c", 0, [50, 51, 52, 53], "LMCACHE")
    answer = served.score(tokens=tokens(50, 51, 52, 53))
    assert (answer.scores[0].pod, answer.scores[0].score) == ("c", 0.5)
    assert dict(answer.scores[0].tier_blocks) == {"lmcache": 1}
    assert served.metrics.tiers == [("m", "lmcache")]


def test_a_model_without_a_block_size_yet_scores_zeros(served: Served) -> None:
    answer = served.score(model="new", tokens=tokens(*range(12)), pods=["p"])
    assert (answer.total_blocks, answer.block_size, answer.total_tokens) == (0, 0, 12)
    assert [(each.pod, each.score, each.trust) for each in answer.scores] == [("p", 0.0, pb.TRUST_COLD)]


def test_score_refusals(served: Served) -> None:
    code = grpc.StatusCode
    mm = [pb.MmFeature(hash="h", offset=2, length=3)]
    long = pb.MmFeature(hash="h" * 1024, offset=0, length=1000)
    cases: list[tuple[dict[str, object], grpc.StatusCode, str]] = [
        ({"model": ""}, code.INVALID_ARGUMENT, "model: must not be empty"),
        ({}, code.INVALID_ARGUMENT, "input: one of prompt, chat, tokens, keys is required"),
        ({"chat": "{"}, code.INVALID_ARGUMENT, "chat: is not valid JSON"),
        ({"model": "who", "prompt": "x"}, code.NOT_FOUND, "model: 'who' is neither configured nor seen"),
        (
            {"tokens": tokens(1, 2, 3, 4), "mm_features": mm},
            code.INVALID_ARGUMENT,
            "mm_features: offset + length is beyond the 4 tokens",
        ),
        (
            {"tokens": tokens(*range(1000)), "mm_features": [long] * 1024},
            code.INVALID_ARGUMENT,
            "mm_features: too many long features over too many blocks",
        ),
    ]
    for fields, expected, message in cases:
        assert refused(lambda fields=fields: served.score(**fields)) == (expected, message)  # type: ignore[misc]
    status, message = refused(lambda: served.score(model="bare", prompt="x"))
    assert status is code.FAILED_PRECONDITION
    assert "--tokenizer" in message and "tokens or keys" in message
    assert served.metrics.rpcs[-1] == ("/kvindex.v1.KVIndex/Score", "FAILED_PRECONDITION")


def test_bytes_that_are_no_message(served: Served) -> None:
    for method, name in (
        ("/kvindex.v1.KVIndex/Score", "ScoreRequest"),
        ("/kvindex.v1.KVIndex/GetPodsForBlocks", "GetPodsForBlocksRequest"),
        ("/kvindex.v1.KVIndexAdmin/RegisterPod", "RegisterPodRequest"),
        ("/indexer.v1.IndexerService/GetPodScores", "GetPodScoresRequest"),
    ):
        call = served.channel.unary_unary(method)
        assert refused(lambda call=call: call(b"\xff\xff", timeout=5)) == (  # type: ignore[misc]
            grpc.StatusCode.INVALID_ARGUMENT,
            f"request: not a valid {name}",
        )


def test_a_long_name_in_an_error_does_not_break_the_headers(served: Served) -> None:
    code, message = refused(lambda: served.score(model="é" * 1000, prompt="x"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert len(message) == MAX_MESSAGE


def test_score_stream_goes_on_after_a_bad_request(served: Served) -> None:
    def requests() -> Iterator[pb.ScoreRequest]:
        yield pb.ScoreRequest(model="m", tokens=tokens(*range(4)))
        yield pb.ScoreRequest(model="who", prompt="x")
        yield pb.ScoreRequest(model="m")
        yield pb.ScoreRequest(model="m", tokens=tokens(*range(12)))

    answers = list(served.kv.ScoreStream(requests(), timeout=5))
    assert [each.total_blocks for each in answers] == [1, 0, 0, 3]
    assert not answers[0].HasField("status") and not answers[3].HasField("status")
    assert answers[1].status.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert answers[2].status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answers[2].status.message == "input: one of prompt, chat, tokens, keys is required"
    eventually(lambda: ("/kvindex.v1.KVIndex/ScoreStream", "OK") in served.metrics.rpcs)


def test_idle_streams_do_not_use_up_the_workers() -> None:
    served = Served(workers=1, max_streams=4)
    release = threading.Event()

    def quiet() -> Iterator[pb.ScoreRequest]:
        yield pb.ScoreRequest(model="m", tokens=tokens(*range(4)))
        release.wait(10)

    try:
        streams = [served.kv.ScoreStream(quiet(), timeout=10) for _ in range(4)]
        assert all(next(stream).total_blocks == 1 for stream in streams)
        assert served.score(tokens=tokens(*range(4))).total_blocks == 1
        assert refused(lambda: next(served.kv.ScoreStream(quiet(), timeout=5))) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many calls of this kind in flight",
        )
        streams[0].cancel()
        # Ended as OK or as CANCELLED: to the server, the end of the requests may come before the cancellation.
        ended = [("/kvindex.v1.KVIndex/ScoreStream", code) for code in ("OK", "CANCELLED")]
        eventually(lambda: any(each in served.metrics.rpcs for each in ended))
        assert next(served.kv.ScoreStream(quiet(), timeout=5)).total_blocks == 1
    finally:
        release.set()
        served.close()


def test_not_ready(served: Served) -> None:
    served.ready = False
    code = grpc.StatusCode.UNAVAILABLE
    assert refused(lambda: served.score(tokens=tokens(1)))[0] is code
    assert refused(lambda: served.kv.GetPodsForBlocks(pb.GetPodsForBlocksRequest(), timeout=5))[0] is code
    assert refused(lambda: list(served.kv.ScoreStream(iter(()), timeout=5)))[0] is code
    assert refused(lambda: served.kv.RecordPlacement(pb.RecordPlacementRequest(), timeout=5))[0] is code
    old = IndexerServiceStub(served.channel)
    assert refused(lambda: old.GetPodScores(indexer_pb2.GetPodScoresRequest(), timeout=5))[0] is code
    served.admin.GetStats(pb.GetStatsRequest(), timeout=5)


def test_too_many_in_flight_are_refused_and_operators_are_not() -> None:
    served = Served(workers=1, max_in_flight=2)
    entered, release = threading.Event(), threading.Event()
    pods = served.fleet.pods

    def slow(model: str) -> list[str]:
        entered.set()
        release.wait(10)
        return pods(model)

    served.fleet.pods = slow  # type: ignore[method-assign]
    request = pb.ScoreRequest(model="m", tokens=tokens(*range(12)))
    try:
        calls = [served.kv.Score.future(request, timeout=10)]
        assert entered.wait(5)
        calls += [served.kv.Score.future(request, timeout=10) for _ in range(5)]
        refusals = [call.exception(timeout=5) for call in calls[2:]]  # one works, one waits: these are refused at once
        assert {each.code() for each in refusals} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        trailers = dict(refusals[0].trailing_metadata())
        assert trailers["grpc-retry-pushback-ms"] == "100"
        status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
        info = error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info) and info.retry_delay.ToMilliseconds() == 100
        assert (status.code, status.message) == (8, refusals[0].details())
        assert served.metrics.refused == [("/kvindex.v1.KVIndex/Score", "in_flight")] * 4
        assert served.metrics.in_flight["/kvindex.v1.KVIndex/Score"]() == 2
        served.admin.GetStats(pb.GetStatsRequest(), timeout=5)
        health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        blocks = pb.GetPodsForBlocksRequest(model="m", keys=pb.Keys(values=[1]))
        assert len(served.kv.GetPodsForBlocks(blocks, timeout=5).blocks) == 1  # permits are per RPC
        release.set()
        assert [call.result(timeout=5).total_blocks for call in calls[:2]] == [3, 3]
        assert served.score(tokens=tokens(*range(12))).total_blocks == 3
    finally:
        release.set()
        served.close()


def test_a_deadline_that_passed_while_waiting_costs_no_work() -> None:
    served = Served(workers=1)
    entered, release = threading.Event(), threading.Event()
    pods = served.fleet.pods

    def slow(model: str) -> list[str]:
        entered.set()
        release.wait(10)
        return pods(model)

    served.fleet.pods = slow  # type: ignore[method-assign]
    try:
        request = pb.ScoreRequest(model="m", tokens=tokens(*range(12)))
        first = served.kv.Score.future(request, timeout=10)
        assert entered.wait(5)
        second = served.kv.Score.future(request, timeout=0.05)
        assert second.exception(timeout=5).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        release.set()
        assert first.result(timeout=5).total_blocks == 3
        assert served.score(tokens=tokens(*range(12))).total_blocks == 3
        assert served.metrics.counted("kvindex_best_match_blocks_count", model="m") == 2
    finally:
        release.set()
        served.close()


def test_a_text_that_cannot_be_tokenized_in_time_is_refused_at_once(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call's own deadline reaches the reference encoder, which knows how fast it is."""
    monkeypatch.setattr(tokenizer_module, "RATED_BYTES", 100)
    tokenizer = Tokenizer(byte_level(add_prefix_space=True), ChatTemplates({}, {}), self_test_texts=10)
    assert tokenizer.mode == "reference"
    served.lookup._models = Models([Model("slow", Index(4), tokenizer)])
    request = pb.ScoreRequest(model="slow", prompt="a " * 200)
    assert served.kv.Score(request, timeout=5).total_tokens > 100
    started = time.monotonic()
    monkeypatch.setattr(tokenizer_module, "_reference_ids", lambda *_: time.sleep(3))
    reference = tokenizer_module._Reference(byte_level())
    reference._bytes_per_second = 100.0
    text = _core.Text(_core.TextCache(1 << 20), None, 1, (), (), reference.plain)
    monkeypatch.setattr(tokenizer, "_added", text)
    request = pb.ScoreRequest(model="slow", prompt="b " * 200)
    code, message = refused(lambda: served.kv.Score(request, timeout=2))
    assert (code, "cannot be tokenized" in message) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
    assert time.monotonic() - started < 1


def test_a_deadline_is_honoured_between_stages(served: Served) -> None:
    class Slow(FakeTokenizer):
        def encode_prompt(self, text: str, *, max_tokens: int, seconds: float) -> bytes:
            assert 0 < seconds < 10, seconds
            time.sleep(0.15)
            return super().encode_prompt(text, max_tokens=max_tokens, seconds=seconds)

    model = Model("slow", Index(4), Slow())  # type: ignore[arg-type]
    served.lookup._models = Models([model])
    request = pb.ScoreRequest(model="slow", prompt="abcdefgh")
    code, _ = refused(lambda: served.kv.Score(request, timeout=0.05))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: bool(served.metrics.rpcs))
    assert served.metrics.rpcs == [("/kvindex.v1.KVIndex/Score", "DEADLINE_EXCEEDED")]
    assert served.metrics.stages == ["tokenize"]
    stream = model.index.add_stream("a", 0)
    placement = pb.RecordPlacementRequest(model="slow", pod="a", prompt="abcdefgh")
    assert refused(lambda: served.kv.RecordPlacement(placement, timeout=0.05))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    eventually(lambda: len(served.metrics.rpcs) == 2)
    assert served.metrics.rpcs[1] == ("/kvindex.v1.KVIndex/RecordPlacement", "DEADLINE_EXCEEDED")
    assert model.index.placements["recorded"] == 0
    assert served.kv.RecordPlacement(placement, timeout=5).total_blocks == 2
    stream.close()


def test_nothing_internal_leaks(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    secret = "what the user typed"

    def broken(model: str) -> list[str]:
        raise RuntimeError(secret)

    served.fleet.pods = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR, logger="kvindex_server"):
        answer = refused(lambda: served.score(tokens=tokens(*range(4))))
        (streamed,) = served.kv.ScoreStream(iter([pb.ScoreRequest(model="m", tokens=tokens(1))]), timeout=5)
    assert answer == (grpc.StatusCode.INTERNAL, "internal error")
    assert (streamed.status.code, streamed.status.message) == (13, "internal error")
    assert len(caplog.records) == 2
    fields = caplog.records[0].fields  # type: ignore[attr-defined]
    assert fields["error"] == "RuntimeError" and "in broken" in fields["trace"]
    assert secret not in str(fields)
    assert ("/kvindex.v1.KVIndex/Score", "INTERNAL") in served.metrics.rpcs


def test_pods_for_blocks(served: Served) -> None:
    def ask(**fields: object) -> pb.GetPodsForBlocksResponse:
        request = pb.GetPodsForBlocksRequest(**{"model": "m", **fields})  # type: ignore[arg-type]
        return served.kv.GetPodsForBlocks(request, timeout=5)

    answer = ask(tokens=tokens(*range(14)))
    keys = struct.unpack("<3Q", _core.block_keys(struct.pack("<12I", *range(12)), 4))
    assert answer.block_size == 4
    assert tuple(block.key for block in answer.blocks) == keys
    holders = [[(h.pod, h.rank, h.tier) for h in block.holders] for block in answer.blocks]
    assert holders == [[("a", 0, "gpu"), ("b", 1, "cpu")], [("a", 0, "gpu")], [("a", 0, "gpu")]]
    by_keys = ask(keys=pb.Keys(values=[keys[1], 12345]), pods=["a"])
    assert [(b.key, [h.pod for h in b.holders]) for b in by_keys.blocks] == [(keys[1], ["a"]), (12345, [])]
    by_hash = ask(engine_hashes=pb.EngineHashes(ints=[101, 999]))
    assert [(b.key, [h.pod for h in b.holders]) for b in by_hash.blocks] == [(keys[1], ["a"]), (0, [])]
    unknown = ask(engine_hashes=pb.EngineHashes(bytes=[b"nobody"]))
    assert [(b.key, len(b.holders)) for b in unknown.blocks] == [(0, 0)]
    filtered = ask(tokens=tokens(*range(4)), pods=["b"])
    assert [h.pod for h in filtered.blocks[0].holders] == ["b"]


def test_a_hash_by_which_pods_know_different_blocks_has_no_key(served: Served) -> None:
    """Engines number their blocks as they like: a pod's block is never answered under another pod's key."""
    for pod, ids in (("d", [7, 1, 1, 1]), ("e", [7, 2, 2, 2])):
        served.stored(pod, 0, ids)
    keys = [_core.block_keys(struct.pack("<4I", *ids), 4) for ids in ([7, 1, 1, 1], [7, 2, 2, 2])]
    of_d, of_e = (struct.unpack("<Q", key)[0] for key in keys)

    def ask(*pods: str) -> tuple[int, list[str]]:
        request = pb.GetPodsForBlocksRequest(model="m", engine_hashes=pb.EngineHashes(ints=[107]), pods=pods)
        (block,) = served.kv.GetPodsForBlocks(request, timeout=5).blocks
        query = BlocksQuery("m", "engine_hashes", pods=pods, engine_ints=struct.pack("<Q", 107))
        lookup = served.lookup.blocks(query, lambda: None)
        assert lookup.blocks[0][0] == block.key
        return block.key, [each.pod for each in block.holders]

    assert ask() == (0, ["d", "e"])
    assert (ask("d"), ask("e"), ask("d", "e"), ask("a")) == ((of_d, ["d"]), (of_e, ["e"]), (0, ["d", "e"]), (0, []))
    served.stored("f", 0, [7, 1, 1, 1])
    assert ask("d", "f") == (of_d, ["d", "f"])


def test_indexer_v1_leaves_out_pods_without_a_hit(served: Served) -> None:
    served.stored("c", 0, list(b"abcd"))
    old = IndexerServiceStub(served.channel)
    request = indexer_pb2.GetPodScoresRequest(prompt="abcdefgh", model_name="m", pod_identifiers=["a", "c"])
    assert [(each.pod, each.score) for each in old.GetPodScores(request, timeout=5).scores] == [("c", 1.0)]
    placement = pb.RecordPlacementRequest(model="m", pod="a", prompt="abcdefgh")
    served.kv.RecordPlacement(placement, timeout=5)
    assert [(each.pod, each.score) for each in old.GetPodScores(request, timeout=5).scores] == [("a", 2.0), ("c", 1.0)]
    unknown = indexer_pb2.GetPodScoresRequest(prompt="x", model_name="who")
    assert refused(lambda: old.GetPodScores(unknown, timeout=5))[0] is grpc.StatusCode.NOT_FOUND


def test_admin_registers_lists_clears_and_unregisters(served: Served) -> None:
    request = pb.RegisterPodRequest(pod="p1", model="m", endpoint="tcp://127.0.0.1:1", ranks=2)
    assert served.admin.RegisterPod(request, timeout=5).changed
    assert not served.admin.RegisterPod(request, timeout=5).changed
    streams = served.admin.ListPods(pb.ListPodsRequest(), timeout=5).streams
    assert [(each.pod, each.rank, each.model, each.endpoint) for each in streams] == [
        ("p1", 0, "m", "tcp://127.0.0.1:1"),
        ("p1", 1, "m", "tcp://127.0.0.1:2"),
    ]
    assert streams[0].state == pb.STREAM_STATE_CONNECTING and streams[0].trust == pb.TRUST_COLD
    assert not streams[0].HasField("last_sequence") and streams[0].age_seconds == -1
    assert not served.admin.ListPods(pb.ListPodsRequest(model="bare"), timeout=5).streams
    assert served.admin.ClearPod(pb.ClearPodRequest(pod="p1", model="m"), timeout=5).claims == 0
    stats = served.admin.GetStats(pb.GetStatsRequest(), timeout=5)
    model = stats.models[0]
    assert (model.model, model.block_size, model.blocks, model.claims) == ("m", 4, 3, 4)
    assert (model.pods, model.streams, model.has_tokenizer) == (1, 2, True)
    assert not stats.models[1].has_tokenizer and stats.version
    served.admin.UnregisterPod(pb.UnregisterPodRequest(pod="p1", model="m"), timeout=5)
    assert not served.admin.ListPods(pb.ListPodsRequest(), timeout=5).streams


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pod": ""}, "pod: must not be empty"),
        ({"model": ""}, "model: must not be empty"),
        ({"endpoint": ""}, "endpoint: must not be empty"),
        ({"endpoint": "127.0.0.1:5557"}, "endpoint: must have the form tcp://host:port"),
        ({"endpoint": "tcp://h:70000"}, "endpoint: port must be in 1..65535"),
        ({"replay_endpoint": "nonsense"}, "replay_endpoint: must have the form tcp://host:port"),
        ({"ranks": 1025}, "ranks: must be in 1..1024"),
    ],
)
def test_admin_refuses_a_wrong_registration(served: Served, fields: dict[str, object], message: str) -> None:
    good = {"pod": "p", "model": "m", "endpoint": "tcp://127.0.0.1:1"}
    request = pb.RegisterPodRequest(**{**good, **fields})  # type: ignore[arg-type]
    answer = refused(lambda: served.admin.RegisterPod(request, timeout=5))
    assert answer == (grpc.StatusCode.INVALID_ARGUMENT, message)


def test_admin_of_pods_and_models_nobody_knows(served: Served) -> None:
    code = grpc.StatusCode
    for call, expected in (
        (lambda: served.admin.UnregisterPod(pb.UnregisterPodRequest(pod="p", model="m")), code.NOT_FOUND),
        (lambda: served.admin.ClearPod(pb.ClearPodRequest(pod="p", model="who")), code.NOT_FOUND),
        (lambda: served.admin.ListPods(pb.ListPodsRequest(model="who")), code.NOT_FOUND),
        (lambda: served.admin.ClearPod(pb.ClearPodRequest(model="m")), code.INVALID_ARGUMENT),
    ):
        assert refused(call)[0] is expected


def test_health_per_service(served: Served) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)

    def status(name: str) -> int:
        return int(stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert [status(name) for name in ("", service.SERVICE, compat.SERVICE)] == [not_serving] * 3
    assert status(admin.SERVICE) == serving
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=service.SERVICE), timeout=5)
    assert next(watch).status == not_serving
    served.health.set_serving(True)
    assert next(watch).status == serving
    assert [status(name) for name in ("", service.SERVICE, compat.SERVICE)] == [serving] * 3
    assert refused(lambda: status("who"))[0] is grpc.StatusCode.NOT_FOUND
    served.health.stop()
    assert next(watch).status == not_serving
    assert [status(name) for name in ("", service.SERVICE, admin.SERVICE)] == [not_serving] * 3


def test_watches_are_bounded_and_given_back(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no credential, so there is an end to what they may cost; one that ends makes room."""
    monkeypatch.setattr(health, "MAX_WATCHES", 2)
    stub = health_pb2_grpc.HealthStub(served.channel)
    watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(2)]
    assert [next(each).status for each in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
    code, message = refused(lambda: next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)))
    assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watches are open")
    stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    watches[0].cancel()
    ends = time.monotonic() + 5
    while served.health._watches == 2:
        assert time.monotonic() < ends
        time.sleep(0.005)
    assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)).status


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
def test_buf_curl_finds_its_way_by_reflection(served: Served, protocol: str) -> None:
    buf = Path(sys.executable).parent / "buf"
    body = json.dumps({"model": "m", "tokens": {"ids": list(range(12))}, "topK": 1})
    done = subprocess.run(
        [
            *(str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge"),
            *("--reflect-protocol", protocol, "--data", body),
            f"http://127.0.0.1:{served.port}/kvindex.v1.KVIndex/Score",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["scores"][0]["pod"], answer["scores"][0]["matchedBlocks"]) == ("a", 3)


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until it holds."""
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not become true in time"
        time.sleep(0.01)
