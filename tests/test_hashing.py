"""Keys are XXH3-64 chains that a client can compute without us."""

import random
import struct
from collections.abc import Sequence

import pytest
import xxhash
from event_encoding import Stored, maps
from oracle import event_extras, item, query_keys

from kvindex_server._core import Index, block_keys, xxh3_64


def tokens_of(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def keys_of(packed: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(packed) // 8}Q", packed))


def test_golden_keys_of_the_contract() -> None:
    """Seed 1337, block 16, tokens 1..16 then 17..32."""
    first, second = tokens_of(range(1, 17)), tokens_of(range(17, 33))
    assert xxh3_64(first, 1337) == 16863443419780771464
    assert xxh3_64(second, 1337) == 2287610619914608821
    assert keys_of(block_keys(first + second, 16)) == [16863443419780771464, 12466389667045779788]
    assert query_keys(range(1, 33), 16) == [16863443419780771464, 12466389667045779788]


@pytest.mark.parametrize("seed", [0, 1, 1337, 2**32, 2**63 + 5, 2**64 - 1])
def test_xxh3_equals_the_reference_for_every_length(seed: int) -> None:
    """All code paths of the hash: 0..1100 bytes and some long ones."""
    data = random.Random(seed).randbytes(20_001)
    for length in [*range(1101), 2047, 2048, 2049, 4096, 5000, 8191, 10_240, 16_385, 19_999, 20_000]:
        assert xxh3_64(data[:length], seed) == xxhash.xxh3_64_intdigest(data[:length], seed), length
        assert xxh3_64(data[1 : length + 1], seed) == xxhash.xxh3_64_intdigest(data[1 : length + 1], seed)


def test_only_full_blocks_have_keys() -> None:
    """A partial last block adds nothing; no block, no key."""
    tokens = tokens_of(range(40))
    assert block_keys(tokens, 16) == block_keys(tokens[: 32 * 4], 16)
    assert block_keys(tokens[: 15 * 4], 16) == b""
    assert block_keys(b"", 16) == b""


@pytest.mark.parametrize("block_size", [1, 2, 3, 16, 32, 64, 100])
@pytest.mark.parametrize("seed", [0, 1337])
def test_keys_equal_the_reference(block_size: int, seed: int) -> None:
    """Every mix of LoRA, salt and multimodal items, at any block size."""
    rng = random.Random(block_size)
    for _ in range(40):
        tokens = [rng.randrange(2**32) for _ in range(rng.randrange(400))]
        lora = rng.choice(("", "a", "sql-adapter", "é" * 40))
        salt = rng.choice(("", "tenant-A", "x" * 300))
        mm = [
            (rng.choice(("h", "hash-" + "f" * 64)), rng.randrange(420), rng.randint(1, 90))
            for _ in range(rng.randrange(4))
        ]
        mm.sort(key=lambda feature: feature[1])
        expected = query_keys(tokens, block_size, seed, lora, salt, mm)
        assert keys_of(block_keys(tokens_of(tokens), block_size, seed, lora, salt, mm)) == expected


def test_multimodal_items_count_in_order_of_position() -> None:
    """A client may list them in any order."""
    mm = [("late", 9, 2), ("early", 1, 9)]
    tokens = tokens_of(range(16))
    assert block_keys(tokens, 4, mm_features=mm) == block_keys(tokens, 4, mm_features=mm[::-1])
    assert keys_of(block_keys(tokens, 4, mm_features=mm)) == query_keys(range(16), 4, mm_features=mm)


def test_length_prefixes_keep_neighbours_apart() -> None:
    """What is LoRA, salt or image can not be moved from one to the other."""
    tokens = tokens_of(range(4))
    keys = {
        block_keys(tokens, 4, lora_name="ab"),
        block_keys(tokens, 4, cache_salt="ab"),
        block_keys(tokens, 4, lora_name="a", cache_salt="b"),
        block_keys(tokens, 4, mm_features=[("ab", 0, 1)]),
        block_keys(tokens, 4, mm_features=[("a", 0, 1), ("b", 1, 1)]),
        block_keys(tokens, 4),
    }
    assert len(keys) == 6


def _key(event: Stored) -> list[int]:
    index = Index(4)
    stream = index.add_stream("p", 0)
    applied = stream.apply([maps(event)])
    assert applied.reasons == {}
    hashes = struct.pack(f"<{len(event.hashes)}Q", *(int(value) for value in event.hashes))
    return [key for key, _ in index.holders_of_ints(hashes, [])]


TOKENS = list(range(8))


@pytest.mark.parametrize(
    ("fields", "query"),
    [
        ({}, {}),
        ({"extra_keys": [None, None]}, {}),
        ({"lora_name": "sql", "lora_id": 3}, {"lora_name": "sql"}),
        ({"lora_name": "sql", "extra_keys": [["sql"], ["sql"]]}, {"lora_name": "sql"}),
        ({"lora_id": 3, "extra_keys": [["sql"], ["sql"]]}, {"lora_name": "sql"}),
        ({"extra_keys": [[["lora", "sql", "/p"]], [["lora", "sql", "/p"]]]}, {"lora_name": "sql"}),
        (
            {"lora_name": "sql", "extra_keys": [[["lora", "sql", "/p"]], [["lora", "sql", "/p"]]]},
            {"lora_name": "sql"},
        ),
        ({"extra_keys": [["tenant"], None]}, {"cache_salt": "tenant"}),
        ({"extra_keys": [[["cache_salt", "tenant"]], None]}, {"cache_salt": "tenant"}),
        ({"cache_salt": "tenant"}, {"cache_salt": "tenant"}),
        (
            {"lora_name": "sql", "extra_keys": [["sql", "tenant"], ["sql"]]},
            {"lora_name": "sql", "cache_salt": "tenant"},
        ),
        ({"extra_keys": [[["m", 2], "t"], [["m", -2]]]}, {"cache_salt": "t", "mm_features": [("m", 2, 4)]}),
        (
            {"extra_keys": [[["mm", "m", 2], ["cache_salt", "t"]], [["mm", "m", -2]]]},
            {"cache_salt": "t", "mm_features": [("m", 2, 4)]},
        ),
        ({"extra_keys": [["m", "t"], ["m"]]}, {"cache_salt": "t", "mm_features": [("m", 2, 4)]}),
        ({"extra_keys": [["m"], ["m"]]}, {"mm_features": [("m", 2, 4)]}),
        ({"extra_keys": [None, ["m"]]}, {"mm_features": [("m", 5, 1)]}),
    ],
)
def test_events_and_queries_meet(fields: dict[str, object], query: dict[str, object]) -> None:
    """The engine's words for LoRA, salt and images lead to the key of a client's words."""
    event = Stored([1, 2], None, TOKENS, 4, **fields)  # type: ignore[arg-type]
    expected = query_keys(TOKENS, 4, **query)  # type: ignore[arg-type]
    assert _key(event) == expected
    assert keys_of(block_keys(tokens_of(TOKENS), 4, **query)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "event",
    [
        Stored([1, 2], None, TOKENS, 4, lora_id=3),
        Stored([1, 2], None, TOKENS, 4, extra_keys=[[b"digest"], [b"digest"]]),
        Stored([1, 2], None, TOKENS, 4, extra_keys=[[["prompt_embeds", b"digest"]], None]),
        Stored([1, 2], None, TOKENS, 4, lora_name="l", extra_keys=[["l", ["m", 0], "salt", b"digest"], ["l"]]),
    ],
)
def test_what_only_events_know_keeps_keys_apart(event: Stored) -> None:
    """A LoRA without a name, or embeddings instead of tokens, never answer for the plain prompt."""
    from oracle import chain_keys

    extras = [event_extras(event, 0), event_extras(event, 1)]
    assert extras[0]
    assert _key(event) == chain_keys([TOKENS[:4], TOKENS[4:]], extras, 1337)
    assert not set(_key(event)) & set(query_keys(TOKENS, 4))


def test_extras_are_documented_bytes() -> None:
    """kind u8, length u32 little-endian, bytes."""
    assert item(1, b"sql") == b"\x01\x03\x00\x00\x00sql"
    local = xxhash.xxh3_64_intdigest(tokens_of(range(4)) + b"\x01\x03\x00\x00\x00sql", 1337)
    assert keys_of(block_keys(tokens_of(range(4)), 4, lora_name="sql")) == [local]
