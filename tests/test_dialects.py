"""What a sample of an engine's messages tells: every encoding and form of hash, through the core and the doctor."""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
from event_encoding import Removed, Stored, as_array, as_map, batch, maps
from publisher import Publisher

from kvindex_server import dialects
from kvindex_server._core import Index, Left
from kvindex_server.config import ModelSettings, PodSettings, Settings
from kvindex_server.engine_hashes import block_hash, none_hash, recognised, wire_hash
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1 import kvindex_pb2_grpc as rpc
from kvindex_server.server import Server
from kvindex_server.stream import Dialect

TOKENS = list(range(1, 17))
GOLDEN = Path(__file__).parent / "golden"


def seen(*payloads: bytes) -> Dialect:
    stream = Index(16).add_stream("p", 0)
    stream.apply(list(payloads), 0)
    return Dialect("p", 0, *stream.dialect)


def under(adapter: str | None, number: int = 1, **other: Any) -> Stored:
    return Stored([number], None, TOKENS, 16, lora_id=7, lora_name=adapter, **other)


def test_every_adapter_is_named_not_only_those_of_the_sample() -> None:
    """However late it comes, wherever the engine tells it, and each once; without a name there is none."""
    batches = [maps(under(None))] + [maps(under("a"))] * 40 + [maps(under("b"))] * 2
    batches.append(maps(under(None, 2, extra_keys=[["c"]])))
    assert list(seen(*batches).adapters) == ["a", "b", "c"]
    assert seen(maps(Stored([1], None, TOKENS, 16))).adapters == []


def test_names_of_adapters_are_bounded() -> None:
    adapters = seen(*(maps(under(f"a{number}")) for number in range(100)), maps(under("x" * 300))).adapters
    assert adapters == [f"a{number}" for number in range(64)]


def test_beginnings_with_a_salt_are_counted() -> None:
    """As a field (SGLang) or as a text of the first block (vLLM); an adapter's name is none, nor is a later block."""
    plain = Stored([1], None, TOKENS, 16)
    field = Stored([2], None, TOKENS, 16, cache_salt="s")
    text = Stored([3], None, TOKENS, 16, extra_keys=[["s"]])
    lora = Stored([4], None, TOKENS, 16, lora_name="a", extra_keys=[["a"]])
    later = Stored([5], 2, TOKENS, 16, cache_salt="s")
    moved = Stored([2], None, [], 16, medium="CPU")
    assert seen(maps(plain, field, text), maps(lora, later, moved)).beginnings == (4, 2)


def test_a_cleared_stream_forgets_its_adapters() -> None:
    stream = Index(16).add_stream("p", 0)
    stream.apply([maps(under("a"))], 0)
    stream.clear()
    assert stream.dialect[-2:] == ([], (0, 0))


def first(hash_: int | bytes | str, **other: Any) -> Stored:
    return Stored([hash_], None, TOKENS, 16, **other)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("published", "told"),
    [
        (4508471921923631364, "vLLM sha256, seed '42'"),
        (16300212363532267629, "vLLM sha256_cbor, seed '42'"),
        (1403909460543360175, "vLLM sha256, seed 'vllm-none-hash'"),
        (8866452693264111234, "vLLM sha256_cbor, seed 'vllm-none-hash'"),
        (3721381939863447827, ""),  # xxhash
        (12345, ""),
    ],
)
def test_the_way_a_hash_was_made_is_found(published: int, told: str) -> None:
    """Vectors that vLLM itself gave, of blocks of 16."""
    assert recognised(published, TOKENS) == told


def test_whole_digests_and_sglang_are_found() -> None:
    digest = block_hash(none_hash("42"), TOKENS)
    assert recognised(digest, TOKENS) == "vLLM sha256_cbor, seed '42'"
    sglang = hashlib.sha256(b"".join(token.to_bytes(4, "little") for token in TOKENS)).digest()
    signed = int.from_bytes(sglang[:8], "big", signed=True)
    found = seen(batch([as_map(first(signed))]))
    assert dialects.hash_version(found).endswith(", SGLang sha256")
    assert recognised(sglang, TOKENS) == "SGLang sha256"


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        (batch([as_array(first(1), 12)]), "arrays 12 long (vLLM 0.22 and 0.23), batch an array"),
        (batch([as_array(first(1), 7)]), "arrays 7 long (vLLM 0.10.2, SGLang up to 0.5.18), batch an array"),
        (batch([as_map(first(1))]), "maps, batch an array: vLLM 0.24 or later, SGLang 0.5.20 or later"),
        (batch([as_map(first(1, kind="full_attention"))]), "maps, batch an array: vLLM 0.24 or later"),
        (batch([as_map(first(1, cache_salt="s"))]), "maps, batch an array: SGLang 0.5.20 or later"),
        (batch([{**as_map(first(1)), "locality": "LOCAL"}]), "maps, batch an array: vLLM 0.26 or later"),
        (batch([{**as_map(first(1)), "lookahead_token_ids": [[1]]}]), "maps, batch an array: vLLM 0.33 or later"),
        (batch([as_map(first(1))], shape="map"), "maps, batch a map: vLLM 0.24 or later, SGLang 0.5.20 or later"),
        (
            batch([{"event_type": "stored", "seq_hashes": [1], "token_ids": TOKENS, "block_size": 16}], shape="map"),
            "the envelope of RFC 1527, batch a map",
        ),
    ],
)
def test_encodings_tell_their_releases(payload: bytes, told: str) -> None:
    found = seen(payload)
    assert dialects.encoding(found) == told
    assert list(dialects.odd(found, "")) == []


@pytest.mark.parametrize(
    ("hashes", "form", "mixed"),
    [
        ([1], "unsigned ints", False),
        ([-1], "signed ints", False),
        ([1, -1], "signed ints", False),
        ([b"x" * 32], "32 bytes", False),
        ([b"x" * 16], "16 bytes", False),
        (["text"], "text", False),
        ([1, b"x" * 32], "unsigned ints and 32 bytes", True),
    ],
)
def test_forms_of_hashes(hashes: list[Any], form: str, mixed: bool) -> None:
    found = seen(batch([as_map(Removed(hashes))]))
    assert (dialects.hash_form(found), dialects.mixes_forms(found)) == (form, mixed)


def test_a_root_is_of_plain_text_at_token_0_only() -> None:
    """Whatever else a hash may cover beside the tokens: not taken."""
    for other in (
        Stored([1], 5, TOKENS, 16),
        first(1, lora_name="a"),
        first(1, lora_id=3),
        first(1, cache_salt="s"),
        first(1, extra_keys=[["x"]]),
        Stored([1, 2], None, TOKENS, 16),
        Stored([], None, TOKENS, 16),
        Stored([1], None, list(range(257)), 257),
    ):
        assert seen(batch([as_map(other)])).root is None
        if other.cache_salt is None:  # which an array cannot say but among its extra keys
            assert seen(batch([as_array(other, 12)])).root is None
    assert seen(batch([as_map(first(7)), as_map(first(8))])).root == (7, TOKENS)
    for plain in (first(7, extra_keys=[None]), first(7, extra_keys=[])):  # as vLLM lists them where there are none
        assert seen(batch([as_array(plain, 12)])).root == (7, TOKENS)
    envelope = {"event_type": "stored", "seq_hashes": [7], "token_ids": TOKENS, "block_size": 16}
    assert seen(batch([envelope | {"parent_hash": None, "base_block_idx": 0}])).root == (7, TOKENS)
    for other in ({"parent_hash": 5}, {"base_block_idx": 1}, {"additional_salt": "t"}, {"mm_keys": [{}]}):
        assert seen(batch([envelope | other])).root is None


def test_the_sample_is_of_this_life_and_small() -> None:
    stream = Index(16).add_stream("p", 0)
    plain = batch([as_map(Removed([1]))])
    stream.apply([plain] * 16)
    stream.apply([batch([as_map(first(7))])])
    assert (stream.dialect[0], stream.dialect[5]) == (16, None)
    stream.apply([plain] * (256 - 18) + [batch([as_map(first(7))])])
    assert (stream.dialect[0], stream.dialect[5]) == (17, (7, TOKENS))
    for _ in range(100):  # not understood: looked at, but not without end
        stream.apply([batch([{"type": "BlockPondered\n" + "x" * 100}])])
    assert stream.dialect[0] <= 17 + 64 + 1
    assert stream.dialect[4] == ("BlockPondered?" + "x" * 100)[:32]
    stream.clear(Left.DOUBTED)
    assert stream.dialect[0] > 0
    stream.clear(Left.RESTARTED)
    assert stream.dialect == (0, [], 0, 0, "", None, [], (0, 0))


@pytest.mark.parametrize(
    ("event", "engine", "evidence"),
    [
        ({"type": "BlockPondered"}, "", "events of a kind that nobody here knows: 'BlockPondered'"),
        ({**as_map(first(1)), "token_ids": [[1, 2]] * 16}, "", "token ids are pairs"),
        ({**as_map(first(1)), "token_ids": ["a"] * 16}, "", "token ids are no integers"),
        ({**as_map(first(1)), "block_hashes": [1.5]}, "", "block hashes are neither"),
        ([*as_array(first(1), 12), None], "", "a BlockStored is an array 13 long"),
        (as_map(first(-5)), "vllm", "registered as vllm, but its events and hashes are sglang's"),
        (as_map(first(4508471921923631364)), "sglang", "registered as sglang, but its events and hashes are vllm's"),
    ],
)
def test_what_is_odd_is_told(event: Any, engine: str, evidence: str) -> None:
    (found,) = dialects.odd(seen(batch([event])), engine)
    assert evidence in found[1] and found[2]


def test_recordings_of_real_engines_are_in_order() -> None:
    """Nothing of them is odd; their encodings are those of their releases."""
    told = set()
    for frames in sorted(GOLDEN.glob("*/*/frames.jsonl")):
        lines = [json.loads(line) for line in frames.read_text().splitlines()]
        payloads = [b64decode(each["frames"][2]) for each in lines if len(each.get("frames", ())) == 3]
        if not payloads:
            continue
        found = seen(*payloads)
        assert list(dialects.odd(found, "")) == [], frames
        told.add((frames.parent.parent.name, dialects.encoding(found)))
    for engine, encoding in told:
        assert ("arrays 12" in encoding) == (engine == "vllm-0.23.0"), (engine, encoding)


# --- through the door ---


@contextmanager
def serving(count: int) -> Iterator[tuple[list[Publisher], rpc.KVIndexAdminStub]]:
    engines = [Publisher() for _ in range(count)]
    pods = [
        PodSettings(pod=f"p{number}", model="m", endpoint=each.endpoint, replay_endpoint=each.replay_endpoint)
        for number, each in enumerate(engines)
    ]
    server = Server(
        Settings(
            listen="127.0.0.1:0",
            metrics_listen="127.0.0.1:0",
            models=(ModelSettings(name="m", block_size=16),),
            pods=tuple(pods),
        )
    )
    server.start()
    try:
        with grpc.insecure_channel(server.grpc_address) as channel:
            for each in engines:
                each.wait_subscriber()
            assert server.wait_ready(20)
            yield engines, rpc.KVIndexAdminStub(channel)
    finally:
        server.stop(0.5)
        for each in engines:
            each.close()


def checked(admin: rpc.KVIndexAdminStub, name: str, messages: int) -> list[pb.CheckResult]:
    for _ in range(1000):
        if sum(each.messages for each in admin.ListPods(pb.ListPodsRequest(), timeout=5).streams) == messages:
            break
    answer = admin.Check(pb.CheckRequest(model="m"), timeout=10)
    return [each for each in answer.checks if each.name == name]


def test_the_doctor_tells_encoding_and_hashes_of_a_fleet() -> None:
    cbor, plain = wire_hash(block_hash(none_hash("0"), TOKENS)), 4508471921923631364
    with serving(2) as (engines, admin):
        (nothing,) = checked(admin, "hash_version", 0)
        assert nothing.status == pb.CHECK_STATUS_SKIP
        for each in engines:
            each.publish(batch([as_map(first(cbor, kind="full_attention"))]))
        (well,) = checked(admin, "hash_version", 2)
        assert well.status == pb.CHECK_STATUS_PASS
        assert well.evidence.startswith("unsigned ints, vLLM sha256_cbor, seed '0'; block keys here")
        (encoding,) = checked(admin, "event_encoding", 2)
        assert encoding.status == pb.CHECK_STATUS_PASS
        assert encoding.evidence == "maps, batch an array: vLLM 0.24 or later; seen in 2 messages"
    with serving(2) as (engines, admin):
        engines[0].publish(batch([as_map(first(cbor))]))
        engines[1].publish(batch([as_array(first(plain), 12)]))
        (apart,) = checked(admin, "hash_version", 2)
        assert apart.status == pb.CHECK_STATUS_WARN
        assert apart.evidence == (
            "the pods name equal blocks differently: p0: unsigned ints, vLLM sha256_cbor, seed '0'; "
            "p1: unsigned ints, vLLM sha256, seed '42'"
        )
        assert "PYTHONHASHSEED" in apart.remedy
        engines[1].publish(batch([as_map(Removed([b"x" * 32]))]))
        (several, _) = checked(admin, "hash_version", 3)
        assert (several.status, several.pod) == (pb.CHECK_STATUS_FAIL, "p1")
        engines[0].publish(msgpack.packb([1.0, [{"type": "BlockPondered"}], 0]))
        odd = {each.pod: each for each in checked(admin, "event_encoding", 4)}
        assert odd["p0"].status == pb.CHECK_STATUS_FAIL and "'BlockPondered'" in odd["p0"].evidence
        assert odd["p1"].status == pb.CHECK_STATUS_WARN and "two releases" in odd["p1"].evidence
        assert [each.status for each in checked(admin, "decode_errors", 4)] == [pb.CHECK_STATUS_PASS]
