"""Bytes of every release decode to what the release meant, and hostile bytes spoil only themselves."""

import ast
import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import msgpack
import pytest
from event_encoding import Cleared, Removed, Stored, as_array, as_map, batch, maps, read
from oracle import ModelOracle, StreamOracle, chain_keys

from kvindex_server._core import Applied, Index, Stream

GOLDEN = Path(__file__).parent / "golden"
VECTORS = [json.loads(line) for line in (GOLDEN / "wire-vectors.jsonl").read_text().splitlines()]
TOKENS = list(range(100, 108))
GOOD = Stored([1, 2], None, TOKENS, 4)
GOOD_KEYS = chain_keys([TOKENS[:4], TOKENS[4:]], [b"", b""], 1337)


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def agree(index: Index, stream: Stream, oracle: StreamOracle) -> None:
    """Claims, tiers and holders, by engine hash and by key."""
    tiers = index.tiers
    assert stream.claims == len(oracle.counts)
    assert stream.unresolved == oracle.unresolved
    assert index.block_size == oracle.model.block_size
    for bit, count in enumerate(stream.claims_by_tier[: len(tiers)]):
        assert count == sum(tier == tiers[bit] for _, tier, _ in oracle.counts)
    for value in {value for _, _, value in oracle.counts}:
        if isinstance(value, bytes):
            ((key, found),) = index.holders_of_bytes([value], [])
        else:
            ((key, found),) = index.holders_of_ints(words(value), [])
        assert key == oracle.key_of(value)
        named = {(pod, rank, tiers[bit], *rest) for pod, rank, bit, *rest in found}
        assert named == oracle.model.holders_of_hash(value)
    holders = oracle.model.holders()
    for key, named in holders.items():
        (found,) = index.holders(words(key), [])
        assert {(pod, rank, tiers[bit], *rest) for pod, rank, bit, *rest in found} == named


def fresh(block_size: int = 0, rank: int = 0) -> tuple[Index, Stream, StreamOracle]:
    index, model = Index(block_size), ModelOracle(block_size)
    return index, index.add_stream("pod", rank), model.add_stream("pod", rank)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['engine']}-{v['version']}-{v['case']}")
def test_a_release_is_understood(vector: dict[str, str]) -> None:
    """Each vector has the effect of its decoded value, alone and after its engine stored something."""
    decoded = ast.literal_eval(vector["decoded"])
    timestamp, events, rank = decoded if isinstance(decoded, list) else tuple(decoded.values())
    payload = base64.b64decode(vector["payload_b64"])
    read_events = [read(event) for event in events]
    signed = vector["engine"] == "sglang"
    hashes = [-1, -2, -4] if signed else [2**64 - 1, 2**64 - 2, 2**64 - 4]
    seeds: list[Any] = [Stored(hashes, None, [0] * 12, 4)]
    seeds += [
        Removed([5]),
        Stored([1, 2], None, [3] * 8, 4, group=1),
        Stored([2**64 - 1], None, [], 0, "CPU"),
    ]
    for before in ([], seeds):
        stores = any(isinstance(event, Stored) for event in read_events)
        if before and stores and vector["case"] != "mixed_rank1":
            continue  # its hashes would name other tokens
        index, stream, oracle = fresh(rank=rank or 0)
        stream.apply([maps(event, rank=rank) for event in before])
        oracle.apply(before)
        applied = stream.apply([payload])
        oracle.apply(read_events)
        agree(index, stream, oracle)
        assert set(applied.reasons) <= {"unknown_removal"}
        assert applied.messages == 1
        assert applied.events == len(events)
        assert applied.timestamp == timestamp
        assert applied.clears == sum(isinstance(event, Cleared) for event in read_events)


@pytest.mark.parametrize("release", sorted({(v["engine"], v["version"]) for v in VECTORS}))
def test_a_child_finds_its_parent(release: tuple[str, str]) -> None:
    """The child's vector, before and after the root's, ends in the same keys."""
    own = [vector for vector in VECTORS if (vector["engine"], vector["version"]) == release]
    cases = {vector["case"]: base64.b64decode(vector["payload_b64"]) for vector in own}
    want = chain_keys([[1, 2, 3, 4], [5, 6, 7, 70000], [9, 8, 7, 6]], [b""] * 3, 1337)
    for order in (("stored_root", "stored_child"), ("stored_child", "stored_root")):
        index, stream, _ = fresh()
        stream.apply([cases[name] for name in order])
        found = index.holders_of_ints(words(2**64 - 1, 2**64 - 2, 7), [])
        assert [key for key, _ in found] == want
        assert (stream.unresolved, stream.orphans) == (0, 0)


def test_salt_and_images_of_all_releases_agree() -> None:
    """Arrays, maps and SGLang's own field lead to the keys of a query."""
    from oracle import query_keys

    tokens = [1, 2, 3, 4, 5, 6, 7, 70000]
    salted = query_keys(tokens, 4, cache_salt="tenant-A")
    imaged = query_keys(tokens, 4, cache_salt="tenant-A", mm_features=[("mmhash0", 2, 4)])
    for vector in VECTORS:
        if vector["case"] != "stored_mm_and_salt" or vector["version"] in ("0.10.2", "0.5.12"):
            continue
        index, stream, _ = fresh()
        stream.apply([base64.b64decode(vector["payload_b64"])])
        keys = [key for key, _ in index.holders_of_ints(words(2**64 - 1, 2**64 - 2), [])]
        assert keys == (salted if vector["engine"] == "sglang" else imaged)


@pytest.mark.parametrize("shape", ["array3", "array2", "map"])
@pytest.mark.parametrize("encode", [as_array, as_map])
def test_every_batch_shape(shape: str, encode: Any) -> None:
    """Array or map batch, array or map events, nil or absent rank."""
    index, stream, oracle = fresh()
    applied = stream.apply([batch([encode(GOOD), encode(Removed([2]))], None, shape=shape)])
    oracle.apply([GOOD, Removed([2])])
    assert applied.reasons == {}
    agree(index, stream, oracle)


def test_the_future_is_tolerated() -> None:
    """Longer arrays, unknown keys and short arrays of old releases cost nothing."""
    deep: Any = {"a": [1, {"b": [None, 2.5, b"x", -7, "é"]}]}
    variants: list[Any] = [
        [*as_array(GOOD), "new", deep, None],
        as_map(GOOD) | {"novel": deep, "session_id": "s", "lookahead_token_ids": [[1], [2]]},
        as_map(GOOD, spare_nils=False) | {"locality": "LOCAL", "ownership": None},
        as_array(GOOD, 6),
        dict(reversed(as_map(GOOD).items())),
    ]
    for event in variants:
        index, stream, oracle = fresh()
        applied = stream.apply([batch([event])])
        oracle.apply([GOOD])
        assert applied.reasons == {}, event
        agree(index, stream, oracle)
    index, stream, oracle = fresh()
    body = [1.0, [as_map(GOOD)], 0, "new", deep]
    assert stream.apply([msgpack.packb(body)]).reasons == {}
    oracle.apply([GOOD])
    agree(index, stream, oracle)


def test_tokens_without_a_block_size_are_not_guessed() -> None:
    """The hashes are claims all the same; their keys come with another event."""
    for event in (as_map(GOOD) | {"block_size": None}, as_array(GOOD, 4)):
        index, stream, oracle = fresh()
        stream.apply([batch([event])])
        assert (stream.claims, stream.unresolved, index.blocks) == (2, 2, 0)
        stream.apply([maps(GOOD)])
        oracle.apply([GOOD, GOOD])
        agree(index, stream, oracle)


def test_signed_and_unsigned_name_the_same_block() -> None:
    """-1 and 2^64-1 are one hash; its 8 bytes are another."""
    index, stream, _ = fresh()
    stream.apply([maps(Stored([-1], None, TOKENS[:4], 4), Removed([2**64 - 1]))])
    assert stream.claims == 0
    stream.apply([maps(Stored([-1], None, TOKENS[:4], 4), Removed([b"\xff" * 8]))])
    assert stream.claims == 1
    assert len(index.holders_of_ints(words(2**64 - 1), [])[0][1]) == 1


BAD_EVENTS: list[Any] = [
    None,
    7,
    "BlockStored",
    b"\x00",
    [],
    {},
    [[]],
    [None],
    ["BlockStored"],
    ["BlockRemoved"],
    ["NeverHeardOf", [1], "GPU"],
    {"type": "NeverHeardOf", "block_hashes": [1]},
    {"type": None},
    {"block_hashes": [1]},
    {"type": "BlockStored"},
    {"type": "BlockRemoved"},
    as_map(GOOD) | {"token_ids": [1, 2, 3, 4, 5, 6, 7, 2**32]},
    as_map(GOOD) | {"token_ids": [1, 2, 3, 4, 5, 6, 7, -1]},
    as_map(GOOD) | {"token_ids": ["a"] * 8},
    as_map(GOOD) | {"token_ids": "tokens"},
    as_map(GOOD) | {"token_ids": [[1, 2]] * 8},
    as_map(GOOD) | {"block_hashes": "hashes"},
    as_map(GOOD) | {"block_hashes": [None]},
    as_map(GOOD) | {"block_hashes": [1.5, 2.5]},
    as_map(GOOD) | {"block_hashes": 7},
    as_map(GOOD) | {"parent_block_hash": [1]},
    as_map(GOOD) | {"parent_block_hash": 1.5},
    as_map(GOOD) | {"block_size": "4"},
    as_map(GOOD) | {"block_size": -4},
    as_map(GOOD) | {"medium": 3},
    as_map(GOOD) | {"lora_name": 3},
    as_map(GOOD) | {"group_idx": -1},
    as_map(GOOD) | {"group_idx": "0"},
    as_map(GOOD) | {"group_idx": 2**40},
    as_map(GOOD) | {"kv_cache_spec_kind": 5},
    ["BlockRemoved", "hash"],
    {"type": "BlockRemoved", "block_hashes": None},
    msgpack.ExtType(5, b"event"),
    msgpack.Timestamp(1, 2),
]


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("bad", BAD_EVENTS, ids=range(len(BAD_EVENTS)))
def test_one_bad_event_spoils_only_itself(bad: Any, position: int) -> None:
    """Whatever stands among good events is counted, and they are applied."""
    index, stream, _ = fresh()
    events: list[Any] = [as_map(GOOD), as_array(Stored([3], 2, TOKENS[:4], 4))]
    events.insert(position, bad)
    applied = stream.apply([batch(events)])
    assert sum(applied.reasons.values()) >= 1
    assert applied.messages == 1
    found = index.holders_of_ints(words(1, 2, 3), [])
    keys = chain_keys([TOKENS[:4], TOKENS[4:], TOKENS[:4]], [b""] * 3, 1337)
    assert [key for key, _ in found] == keys
    assert all(("pod", 0, 0, 0, False) in holders for _, holders in found)
    stream.apply([maps(Removed([1, 2, 3]))])


def _works_after(index: Index, stream: Stream) -> None:
    assert index.claims == stream.claims
    assert stream.clear() >= 0
    assert (index.claims, index.blocks, stream.orphans, stream.unresolved) == (0, 0, 0, 0)
    applied = stream.apply([maps(GOOD)])
    assert applied.reasons == {}
    if index.block_size == 4:
        assert index.holders(words(*GOOD_KEYS), []) == [[("pod", 0, 0, 0, False)]] * 2
        assert index.score(words(*GOOD_KEYS), [], [1.0])[0][:4] == ("pod", 0, 2, 2.0)


SAMPLES = [
    base64.b64decode(vector["payload_b64"]) for vector in VECTORS if vector["version"] in ("0.32.0", "0.23.0", "0.5.23")
]


def test_truncated_anywhere() -> None:
    """A payload cut at any byte is counted and changes nothing that it should not."""
    index, stream, _ = fresh(4)
    for sample in SAMPLES:
        for end in range(len(sample) - 1):
            applied = stream.apply([sample[:end]])
            assert sum(applied.reasons.values()) >= 1, (sample.hex(), end)
        stream.apply([sample[:-1]])  # only the rank is missing: the events are whole
    _works_after(index, stream)


def test_flipped_bits() -> None:
    """Thousands of damaged payloads: no crash, no exception, claims stay consistent."""
    rng = random.Random(5)
    index, stream, _ = fresh(4)
    for _ in range(12_000):
        data = bytearray(rng.choice(SAMPLES))
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        assert isinstance(stream.apply([bytes(data)]), Applied)
    assert sum(stream.claims_by_tier) == stream.claims
    _works_after(index, stream)


def test_garbage() -> None:
    """Random bytes, and bytes that look like msgpack for a while."""
    rng = random.Random(6)
    index, stream, _ = fresh(4)
    heads = (b"", b"\x93", b"\x92\xcb\x41\xda\x49\x20\x40\x10\x00\x00", b"\x83\xa2ts", SAMPLES[0][:12])
    bad = 0
    for _ in range(6000):
        applied = stream.apply([rng.choice(heads) + rng.randbytes(rng.randrange(80))])
        bad += sum(applied.reasons.values())
    assert bad > 4000
    _works_after(index, stream)


HOSTILE = {
    "deep arrays": b"\x91" * 200_000,
    "deep maps": b"\x81\xa1a" * 200_000,
    "deep unknown value": b"\x93\x01\x91\x82\xa4type\xabBlockStored\xa1x" + b"\x91" * 500_000,
    "huge array": b"\xdd\xff\xff\xff\xff",
    "huge array of events": b"\x93\x01\xdd\xff\xff\xff\xff",
    "huge map": b"\xdf\xff\xff\xff\xff",
    "huge string": b"\xdb\xff\xff\xff\xff",
    "huge binary": b"\x93\x01\x91\x93\xacBlockRemoved\x91\xc6\xff\xff\xff\xff",
    "huge hashes": b"\x93\x01\x91\x92\xacBlockRemoved\xdd\xff\xff\xff\xff\x01",
    "huge tokens": b"\x93\x01\x91\x95\xabBlockStored\x91\x01\xc0\xdd\xff\xff\xff\xff",
    "huge ext": b"\xc9\xff\xff\xff\xff\x05",
    "never used": b"\xc1",
    "nothing": b"",
    "nil": b"\xc0",
    "number": b"\x05",
    "nil events": b"\x93\x01\xc0\x00",
    "map without events": b"\x81\xa2ts\x01",
    "text": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_crafted_payloads(name: str) -> None:
    """Depth and lengths that lie are counted, never a crash or a huge allocation."""
    index, stream, _ = fresh(4)
    applied = stream.apply([HOSTILE[name]])
    assert sum(applied.reasons.values()) >= 1
    assert stream.claims == 0
    applied = stream.apply([HOSTILE[name], maps(GOOD), HOSTILE[name]])
    assert stream.claims == 2
    _works_after(index, stream)


def test_a_foreign_rank_is_counted() -> None:
    """A batch of another rank on this rank's stream is a misconfiguration worth seeing."""
    _, stream, _ = fresh(rank=1)
    assert stream.apply([maps(GOOD, rank=0)]).reasons == {"rank_mismatch": 1}
