"""The native read path and the reference path say the same, whatever the request; trust is never older than it may."""

import json
import random
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_service import LIMITS, TIER_WEIGHTS, Served, tokens

from kvindex_server import _core
from kvindex_server.errors import KvindexError
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.stream import Trust

PODS = [f"pod-{number}" for number in range(8)]
BYTE_HASHES = [b"first block", b"second block"]
ALPHABET = 3
"""So few token ids that random prompts share prefixes."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    running = Served()
    dice = random.Random(5)
    for number, pod in enumerate(PODS):
        for rank in range(1 + number % 2):
            for medium in dice.sample(["GPU", "CPU", "DISK", "FAR"], 2):
                prompt = [dice.randrange(ALPHABET) for _ in range(24)]
                more: dict[str, object] = {"lora_name": "adapter"} if dice.random() < 0.2 else {}
                running.stored(pod, rank, prompt, medium, **more)
    running.stored("b", 2, [0, 1, 2, 0, 1, 1, 1, 1], block_hashes=BYTE_HASHES)
    assert running.index.place("a", 0, keys_of([2, 2, 2, 2]).SerializeToString()[-8:], 3600.0)[0] == "recorded"
    running.fleet.names = [*PODS, "a", "b", "c"]
    yield running
    running.close()


def outcome(call: object, data: bytes) -> object:
    """The answer without its ages, which pass; or the error as a client would see it."""
    try:
        answer = pb.ScoreResponse.FromString(call(data, lambda: None))  # type: ignore[operator]
    except KvindexError as error:
        return error.code, error.message
    for score in answer.scores:
        score.age_seconds = -1 if score.age_seconds < 0 else 1
    return answer


def told(served: Served) -> None:
    """Both paths know a pod without a stream by the same words."""

    def trust(model: str, pod: str, rank: int | None = None) -> tuple[Trust, str, float]:
        if model != "m" or pod not in served.fleet.names or pod == "c":
            return Trust.COLD, "pod is not registered", -1.0
        number = sum(pod.encode())
        return Trust(1 + number % 4), f"reason {number}", float(number % 3 - 1)

    if not hasattr(served.fleet.trust, "told"):
        trust.told = True  # type: ignore[attr-defined]
        served.fleet.trust = trust  # type: ignore[method-assign]
        time.sleep(0.12)  # what was told before by another test is no longer good


ids = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=30)
names = st.sampled_from([*PODS, "a", "b", "c", "stranger", "péd"])
requests = st.builds(
    lambda model, source, pods, extras, top_k: pb.ScoreRequest(model=model, pods=pods, top_k=top_k, **source, **extras),
    st.sampled_from(["m", "m", "m", "alias", "adapter", "bare", "new", "who", ""]),
    st.one_of(
        ids.map(lambda each: {"tokens": pb.Tokens(ids=each)}),
        ids.map(lambda each: {"keys": keys_of(each)}),
        st.text(max_size=20).map(lambda each: {"prompt": each}),
        st.text(max_size=9).map(lambda each: {"chat": json.dumps({"messages": [{"content": each}]})}),
        st.just({}),
    ),
    st.lists(names, max_size=10),
    st.fixed_dictionaries(
        {},
        optional={
            "lora_name": st.sampled_from(["", "adapter", "x" * 1025]),
            "cache_salt": st.sampled_from(["", "salt"]),
            "mm_features": st.lists(
                st.builds(
                    pb.MmFeature, hash=st.sampled_from(["", "h"]), offset=st.integers(0, 20), length=st.integers(0, 9)
                ),
                max_size=3,
            ),
        },
    ),
    st.integers(0, 4),
)


def keys_of(prompt: list[int]) -> pb.Keys:
    keys = _core.block_keys(struct.pack(f"<{len(prompt)}I", *prompt), 4)
    return pb.Keys(values=struct.unpack(f"<{len(keys) // 8}Q", keys))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests)
def test_both_paths_answer_alike(served: Served, request: pb.ScoreRequest) -> None:
    """Any message: the same answer, or the same error word for word."""
    told(served)
    data = request.SerializeToString()
    assert outcome(served.direct.score, data) == outcome(served.direct.reference, data)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests, st.data())
def test_both_paths_treat_damaged_bytes_alike(served: Served, request: pb.ScoreRequest, data: st.DataObject) -> None:
    """Cut, flipped, spliced, repeated bytes: never a crash, never two opinions."""
    told(served)
    damaged = bytearray(request.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged)))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "twice"])):
            case "flip" if at < len(damaged):
                damaged[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, 5))]
            case "insert":
                damaged[at:at] = data.draw(st.binary(max_size=12))
            case _:
                damaged += damaged[at:]
    assert outcome(served.direct.score, bytes(damaged)) == outcome(served.direct.reference, bytes(damaged))


pod_scores = st.builds(
    lambda model, prompt, pods: indexer_pb2.GetPodScoresRequest(
        model_name=model, prompt=prompt, pod_identifiers=pods
    ).SerializeToString(),
    st.sampled_from(["m", "m", "alias", "adapter", "bare", "new", "who", ""]),
    st.text(max_size=20) | st.text("\0\1\2", max_size=30),
    st.lists(names, max_size=10),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pod_scores, st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=6)), max_size=2))
def test_pod_scores_alike_on_both_paths(served: Served, data: bytes, damage: list[tuple[int, bytes]]) -> None:
    """Byte for byte, or the same error; of any message, damaged or not."""
    for at, more in damage:
        data = data[:at] + more + data[at + len(more) // 2 :]
    assert pods_outcome(served.direct.pod_scores, data) == pods_outcome(served.direct.pod_scores_reference, data)


def pods_outcome(call: object, data: bytes) -> object:
    try:
        return call(data, lambda: None)  # type: ignore[operator]
    except KvindexError as error:
        return error.code, error.message


hashed = st.one_of(
    st.builds(pb.EngineHashes, ints=st.lists(st.integers(100, 110) | st.integers(0, 2**64 - 1), max_size=30)),
    st.builds(pb.EngineHashes, bytes=st.lists(st.binary(max_size=9) | st.sampled_from(BYTE_HASHES), max_size=9)),
    st.builds(pb.EngineHashes, ints=st.just([100]), bytes=st.just([b"a"])),
)
blocks_requests = st.builds(
    lambda model, source, pods, extras: pb.GetPodsForBlocksRequest(model=model, pods=pods, **source, **extras),
    st.sampled_from(["m", "m", "m", "alias", "adapter", "bare", "new", "who", ""]),
    st.one_of(
        ids.map(lambda each: {"keys": keys_of(each)}),
        st.lists(st.integers(0, 2**64 - 1), max_size=5).map(lambda each: {"keys": pb.Keys(values=each)}),
        hashed.map(lambda each: {"engine_hashes": each}),
        ids.map(lambda each: {"tokens": pb.Tokens(ids=each)}),
        st.text(max_size=20).map(lambda each: {"prompt": each}),
        st.just({}),
    ),
    st.lists(names | st.just(""), max_size=10),
    st.fixed_dictionaries(
        {},
        optional={
            "lora_name": st.sampled_from(["", "adapter", "x" * 1025, "é" * 600]),
            "cache_salt": st.sampled_from(["", "salt"]),
            "mm_features": st.just([pb.MmFeature(hash="h", offset=0, length=2)]),
        },
    ),
)


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks_requests,
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), st.binary(max_size=6)), max_size=3),
    st.booleans(),
)
def test_blocks_alike_on_both_paths(
    served: Served, request: pb.GetPodsForBlocksRequest, damage: list[tuple[int, int, bytes]], twice: bool
) -> None:
    """Byte for byte, or the same error; of any message, whole, damaged, or sent in two halves that a parser joins."""
    data = request.SerializeToString()
    if twice:
        data += request.SerializeToString()
    for at, gone, more in damage:
        data = data[:at] + more + data[at + gone :]
    assert blocks_outcome(served.direct.blocks, data) == blocks_outcome(served.direct.blocks_reference, data)


def blocks_outcome(call: object, data: bytes) -> object:
    try:
        return call(data, lambda: None)  # type: ignore[operator]
    except KvindexError as error:
        return error.code, error.message


@pytest.mark.parametrize(
    "source",
    [
        {"keys": keys_of([0, 1, 2, 0, 1, 1, 1, 1])},
        {"keys": keys_of([2, 2, 2, 2])},
        {"engine_hashes": pb.EngineHashes(ints=[100, 101, 5])},
        {"engine_hashes": pb.EngineHashes(bytes=[*BYTE_HASHES, b"never heard of"])},
    ],
)
def test_the_native_path_really_answers_blocks(
    served: Served, monkeypatch: pytest.MonkeyPatch, source: dict[str, object]
) -> None:
    """With holders in the answer, a placement's among them."""
    request = pb.GetPodsForBlocksRequest(model="alias", cache_salt="s", **source)  # type: ignore[arg-type]
    for pods in ([], ["a"], ["a", "a", "stranger"]):
        del request.pods[:]
        request.pods.extend(pods)
        data = request.SerializeToString()
        expected = served.direct.blocks_reference(data, lambda: None)
        assert pods or pb.GetPodsForBlocksResponse.FromString(expected).blocks[0].holders
        with monkeypatch.context() as patched:
            patched.setattr(served.direct, "blocks_reference", None)
            assert served.direct.blocks(data, lambda: None) == expected


def test_the_native_path_really_answers_pod_scores(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    request = indexer_pb2.GetPodScoresRequest(model_name="m", prompt="\0\1\2\3" * 3)
    expected = served.direct.pod_scores_reference(request.SerializeToString(), lambda: None)
    monkeypatch.setattr(served.direct, "pod_scores_reference", None)
    assert served.direct.pod_scores(request.SerializeToString(), lambda: None) == expected
    assert [each.pod for each in indexer_pb2.GetPodScoresResponse.FromString(expected).scores][:1] == ["a"]


def test_the_native_path_really_takes_ordinary_requests(served: Served) -> None:
    """Else the two tests above would compare the reference with itself."""
    told(served)
    served.direct.reference = None  # type: ignore[assignment,method-assign]
    try:
        for source in ({"tokens": tokens(0, 1, 2, 0)}, {"keys": keys_of([0, 1, 2, 0])}, {"prompt": "abcd"}):
            for pods in ([], PODS):
                request = pb.ScoreRequest(model="m", pods=pods, cache_salt="s", top_k=3, **source)  # type: ignore[arg-type]
                assert served.direct.score(request.SerializeToString(), lambda: None)
    finally:
        del served.direct.reference


@pytest.mark.parametrize("field", range(1, 11))
def test_a_field_of_another_wire_type_is_refused(served: Served, field: int) -> None:
    """It would otherwise be passed over, and another question answered than was asked."""
    good = pb.ScoreRequest(model="m", tokens=tokens(1, 2, 3, 4)).SerializeToString()
    for wire, body in ((0, b"\x01"), (1, b"12345678"), (2, b"\x01a"), (5, b"1234")):
        if wire == (0 if field == 10 else 2):
            continue
        bad = good + bytes([field << 3 | wire]) + body
        for path in (served.direct.score, served.direct.reference):
            assert outcome(path, bad)[1] == "request: not a valid ScoreRequest"  # type: ignore[index]


def test_nested_fields_of_another_wire_type_are_refused(served: Served) -> None:
    model = b"\x0a\x01m"
    for nested, message in (
        (b"\x22\x05\x0d1234", "tokens.ids: has another wire type than its own"),
        (b"\x2a\x02\x08\x01", "keys.values: has another wire type than its own"),
        (b"\x22\x03\x0a\x01\x05" + b"\x4a\x08\x0a\x01h\x15\x01\x00\x00\x00", "request: not a valid ScoreRequest"),
    ):
        for path in (served.direct.score, served.direct.reference):
            assert outcome(path, model + nested)[1] == message  # type: ignore[index]


@pytest.mark.parametrize("zeros", range(9))
def test_a_tag_or_length_in_more_bytes_than_parsers_take_is_refused(served: Served, zeros: int) -> None:
    """Up to five are good, if needless."""
    long = bytes([0x8A, *[0x80] * zeros, 0]), bytes([0x81, *[0x80] * zeros, 0])
    keys = keys_of([0, 1, 2, 0]).SerializeToString()
    for tag, length in ((long[0], b"\1"), (b"\x0a", long[1])):
        model = tag + length + b"m"
        paths = served.direct.blocks, served.direct.blocks_reference
        native, expected = (blocks_outcome(path, model + b"\x12\x0a" + keys) for path in paths)
        assert native == expected and isinstance(expected, bytes) is (zeros <= 3)
        paths = served.direct.score, served.direct.reference
        native, expected = (outcome(path, model + b"\x2a\x0a" + keys) for path in paths)
        assert native == expected and isinstance(expected, tuple) is (zeros > 3)


def test_trust_is_read_anew_after_every_event(served: Served) -> None:
    """A stream that was touched is never answered with what was known of it before."""
    told(served)
    request = pb.ScoreRequest(model="m", tokens=tokens(0), pods=["a"]).SerializeToString()
    served.direct.score(request, lambda: None)
    served.fleet.trust = lambda *_: (Trust.STALE, "just now", 0.5)  # type: ignore[method-assign,assignment,misc]
    served.streams[0].apply([b"\x90"])  # pod a's; what it says does not matter
    (score,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    assert (score.trust, score.trust_reason) == (pb.TRUST_STALE, "just now")


def test_trust_is_read_anew_after_a_while(served: Served) -> None:
    """And without any event within 100 ms, because some of it changes with time alone; its age grows meanwhile."""
    request = pb.ScoreRequest(model="m", tokens=tokens(0), pods=["a"]).SerializeToString()
    served.fleet.trust = lambda *_: (Trust.EXACT, "first", 1.0)  # type: ignore[method-assign,assignment,misc]
    time.sleep(0.12)
    (before,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    served.fleet.trust = lambda *_: (Trust.STALE, "later", 1.0)  # type: ignore[method-assign,assignment,misc]
    (meanwhile,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    time.sleep(0.12)
    (after,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    assert (before.trust_reason, after.trust_reason) == ("first", "later")
    assert meanwhile.age_seconds > 1.0


def test_a_closed_stream_is_not_registered(served: Served) -> None:
    served.stored("gone", 0, [0, 1, 2, 0])
    request = pb.ScoreRequest(model="m", tokens=tokens(0, 1, 2, 0), pods=["gone"]).SerializeToString()
    (score,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    assert score.matched_blocks == 1
    served.streams[-1].close()
    (score,) = pb.ScoreResponse.FromString(served.direct.score(request, lambda: None)).scores
    assert (score.matched_blocks, score.trust_reason) == (0, "pod is not registered")


def test_limits_are_those_of_the_reference(served: Served) -> None:
    """At the limit both take a request, above it both refuse it with the same words."""
    told(served)
    for count in (LIMITS.max_tokens, LIMITS.max_tokens + 1):
        data = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[0] * count)).SerializeToString()
        assert outcome(served.direct.score, data) == outcome(served.direct.reference, data)
    assert set(TIER_WEIGHTS) == {"gpu", "cpu", "disk"}  # "FAR" has no weight of its own in what was compared
