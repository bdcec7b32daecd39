"""Decoding requests from raw bytes: every rejection names its field, and none of them is a crash."""

import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvindex_server.codec import (
    MAX_MM_FEATURES,
    MAX_NAME,
    decode_blocks,
    decode_placement,
    decode_pod_scores,
    decode_score,
)
from kvindex_server.config import PlacementSettings
from kvindex_server.errors import InvalidArgument
from kvindex_server.lookup import PlacementQuery
from kvindex_server.pb.indexer.v1 import indexer_pb2
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb


@dataclass(frozen=True)
class Limits:
    max_tokens: int = 100
    max_pods: int = 10
    max_keys: int = 20
    max_prompt_bytes: int = 40


LIMITS = Limits()


def request(**fields: object) -> pb.ScoreRequest:
    return pb.ScoreRequest(**{"model": "m", **fields})  # type: ignore[arg-type]


def rejected(message: pb.ScoreRequest | bytes) -> str:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(InvalidArgument) as caught:
        decode_score(data, LIMITS)
    return caught.value.message


def test_tokens_are_u32_little_endian() -> None:
    ids = [0, 1, 127, 128, 300, 2**31, 2**32 - 1]
    query = decode_score(request(tokens=pb.Tokens(ids=ids)).SerializeToString(), LIMITS)
    assert query.kind == "tokens"
    assert query.tokens == struct.pack("<7I", *ids)


def test_keys_are_u64_little_endian() -> None:
    values = [1, 2**64 - 1]
    query = decode_score(request(keys=pb.Keys(values=values)).SerializeToString(), LIMITS)
    assert query.kind == "keys"
    assert query.keys == struct.pack("<2Q", *values)


def test_every_field_arrives() -> None:
    message = request(
        prompt="hello",
        pods=["b", "a", "b"],
        lora_name="adapter",
        cache_salt="salt",
        mm_features=[pb.MmFeature(hash="h", offset=3, length=2)],
        top_k=5,
    )
    query = decode_score(message.SerializeToString(), LIMITS)
    assert (query.model, query.kind, query.text, query.pods) == ("m", "prompt", "hello", ("b", "a", "b"))
    assert (query.lora_name, query.cache_salt, query.top_k) == ("adapter", "salt", 5)
    assert query.mm_features == (("h", 3, 2),)


def test_chat() -> None:
    query = decode_score(request(chat='{"messages": []}').SerializeToString(), LIMITS)
    assert (query.kind, query.text) == ("chat", '{"messages": []}')


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.ScoreRequest(prompt="x"), "model: must not be empty"),
        (request(), "input: one of prompt, chat, tokens, keys is required"),
        (request(prompt=""), "prompt: must not be empty"),
        (request(chat=""), "chat: must not be empty"),
        (request(tokens=pb.Tokens()), "tokens.ids: must not be empty"),
        (request(keys=pb.Keys()), "keys.values: must not be empty"),
        (request(prompt="x" * 41), "prompt: 41 bytes exceed the limit of 40"),
        (request(prompt="é" * 21), "prompt: 42 bytes exceed the limit of 40"),
        (request(tokens=pb.Tokens(ids=range(101))), "tokens.ids: 101 tokens exceed the limit of 100"),
        (request(keys=pb.Keys(values=range(21))), "keys.values: 21 keys exceed the limit of 20"),
        (request(prompt="x", pods=["p"] * 11), "pods: 11 pods exceed the limit of 10"),
        (request(prompt="x", pods=["p", ""]), "pods: the name at position 1 is empty"),
        (
            request(prompt="x", lora_name="l" * (MAX_NAME + 1)),
            f"lora_name: is longer than {MAX_NAME} characters",
        ),
        (request(prompt="x", cache_salt="s" * 1025), "cache_salt: is longer than 1024 characters"),
        (request(model="m" * 1025, prompt="x"), "model: is longer than 1024 characters"),
        (
            request(prompt="x", mm_features=[pb.MmFeature(offset=1, length=1)]),
            "mm_features[0].hash: must not be empty",
        ),
        (request(prompt="x", mm_features=[pb.MmFeature(hash="h")]), "mm_features[0].length: must not be 0"),
        (
            request(prompt="x", mm_features=[pb.MmFeature(hash="h", length=1)] * (MAX_MM_FEATURES + 1)),
            f"mm_features: {MAX_MM_FEATURES + 1} features exceed the limit of {MAX_MM_FEATURES}",
        ),
    ],
)
def test_rejections_name_field_and_reason(message: pb.ScoreRequest, reason: str) -> None:
    assert rejected(message) == reason


def test_prompts_up_to_the_limit_pass() -> None:
    decode_score(request(prompt="é" * 20).SerializeToString(), LIMITS)


def test_two_inputs_are_seen_though_a_parser_keeps_only_the_last() -> None:
    both = request(prompt="a").SerializeToString() + pb.ScoreRequest(tokens=pb.Tokens(ids=[1])).SerializeToString()
    assert rejected(both) == "input: only one of prompt, chat, tokens, keys may be given"
    twice = request(tokens=pb.Tokens(ids=[1])).SerializeToString()
    twice += pb.ScoreRequest(tokens=pb.Tokens(ids=[2])).SerializeToString()
    assert decode_score(twice, LIMITS).tokens == struct.pack("<2I", 1, 2)  # the parts of one message, merged


def test_fields_unknown_to_this_version_are_ignored() -> None:
    later = request(prompt="a").SerializeToString()
    later += b"\x80\x7d\x05" + b"\x81\x7d" + bytes(8) + b"\x85\x7d" + bytes(4) + b"\x82\x7d\x02hi"
    assert decode_score(later, LIMITS).text == "a"


def test_a_token_id_above_u32_is_refused_not_truncated() -> None:
    data = request().SerializeToString() + b"\x22\x07\x0a\x05\x80\x80\x80\x80\x10"  # 2^32
    assert rejected(data) == "tokens.ids: value above 2^32-1"


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05m", b"\x0a\x02\xff\xfe", b"\x22\x02\x0a\x05", b"\x0b", b"\x00"])
def test_malformed_bytes(data: bytes) -> None:
    assert rejected(data) == "request: not a valid ScoreRequest"


@given(st.binary(max_size=64))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_answered_or_refused(data: bytes) -> None:
    for decoder in (decode_score, decode_blocks, decode_pod_scores, placement):
        try:
            decoder(data, LIMITS)
        except InvalidArgument:
            pass


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_requests_are_answered_or_refused(data: st.DataObject) -> None:
    whole = bytearray(
        request(
            tokens=pb.Tokens(ids=range(50)),
            pods=["a", "b"],
            mm_features=[pb.MmFeature(hash="h", offset=1, length=1)],
        ).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_score(bytes(whole[: data.draw(st.integers(0, len(whole)))]), LIMITS)
    except InvalidArgument:
        pass


def placement(data: bytes, limits: Limits) -> PlacementQuery:
    return decode_placement(data, limits, PlacementSettings(default_ttl_seconds=1.5, max_ttl_seconds=3))


def test_placements() -> None:
    message = pb.RecordPlacementRequest(model="m", pod="p", tokens=pb.Tokens(ids=[1, 2]), lora_name="l", cache_salt="s")
    query = placement(message.SerializeToString(), LIMITS)
    assert (query.kind, query.tokens, query.pod, query.rank) == ("tokens", struct.pack("<2I", 1, 2), "p", None)
    assert (query.lora_name, query.cache_salt, query.ttl) == ("l", "s", 1.5)
    message.keys.values.extend([7])  # takes the place of the tokens
    message.rank, message.ttl_seconds = 0, 3.0
    message.mm_features.add(hash="h", offset=1, length=2)
    query = placement(message.SerializeToString(), LIMITS)
    assert (query.keys, query.rank, query.ttl, query.mm_features) == (struct.pack("<Q", 7), 0, 3.0, (("h", 1, 2),))


def blocks(**fields: object) -> bytes:
    return pb.GetPodsForBlocksRequest(**{"model": "m", **fields}).SerializeToString()  # type: ignore[arg-type]


def test_blocks_by_engine_hashes() -> None:
    query = decode_blocks(blocks(engine_hashes=pb.EngineHashes(ints=[1, 2**64 - 1])), LIMITS)
    assert (query.kind, query.engine_ints) == ("engine_hashes", struct.pack("<2Q", 1, 2**64 - 1))
    query = decode_blocks(blocks(engine_hashes=pb.EngineHashes(bytes=[b"a", b"bc"])), LIMITS)
    assert (query.engine_ints, query.engine_bytes) == (b"", (b"a", b"bc"))


def test_blocks_by_the_other_inputs() -> None:
    assert decode_blocks(blocks(keys=pb.Keys(values=[7])), LIMITS).keys == struct.pack("<Q", 7)
    assert decode_blocks(blocks(tokens=pb.Tokens(ids=[7])), LIMITS).tokens == struct.pack("<I", 7)
    assert decode_blocks(blocks(prompt="p"), LIMITS).text == "p"
    assert decode_blocks(blocks(chat="c"), LIMITS).kind == "chat"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (blocks(), "input: one of keys, engine_hashes, tokens, prompt, chat is required"),
        (
            blocks(prompt="a") + blocks(chat="b"),
            "input: only one of keys, engine_hashes, tokens, prompt, chat may be given",
        ),
        (
            blocks(engine_hashes=pb.EngineHashes(ints=[1], bytes=[b"x"])),
            "engine_hashes: only one of ints, bytes may be filled",
        ),
        (blocks(engine_hashes=pb.EngineHashes()), "engine_hashes: must not be empty"),
        (
            blocks(engine_hashes=pb.EngineHashes(bytes=[b"x"] * 21)),
            "engine_hashes.bytes: 21 hashes exceed the limit of 20",
        ),
        (
            blocks(engine_hashes=pb.EngineHashes(ints=range(21))),
            "engine_hashes.ints: 21 hashes exceed the limit of 20",
        ),
        (b"\xff", "request: not a valid GetPodsForBlocksRequest"),
    ],
)
def test_blocks_rejections(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        decode_blocks(data, LIMITS)
    assert caught.value.message == reason


def test_pod_scores_of_indexer_v1() -> None:
    message = indexer_pb2.GetPodScoresRequest(prompt="hi", model_name="m", pod_identifiers=["a"])
    query = decode_pod_scores(message.SerializeToString(), LIMITS)
    assert (query.model, query.text, query.pods) == ("m", "hi", ("a",))
    for field, data in (
        ("model_name", indexer_pb2.GetPodScoresRequest(prompt="hi")),
        ("prompt", indexer_pb2.GetPodScoresRequest(model_name="m")),
        (
            "pod_identifiers",
            indexer_pb2.GetPodScoresRequest(model_name="m", prompt="p", pod_identifiers=[""]),
        ),
    ):
        with pytest.raises(InvalidArgument) as caught:
            decode_pod_scores(data.SerializeToString(), LIMITS)
        assert caught.value.field == field
