"""A key is computed only when all that makes equal tokens differ was told; else a block is held and matches nothing."""

import struct
from typing import Any

import msgpack
import pytest
from event_encoding import Cleared, Removed, Stored, as_map, batch, maps
from oracle import query_keys

from kvindex_server._core import Index, Stream

TOKENS = list(range(1, 33))
PLAIN = query_keys(TOKENS, 16)


def words(values: list[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def stored(extra_keys: list[Any] | None, medium: str = "GPU", **fields: Any) -> Stored:
    return Stored([11, 12], None, TOKENS, 16, medium, extra_keys=extra_keys, **fields)


def fresh() -> tuple[Index, Stream]:
    index = Index(16)
    return index, index.add_stream("p", 0)


def blocks(index: Index, keys: list[int]) -> tuple[int, float]:
    """(blocks, score) of the only pod."""
    found = index.score(words(keys), [], [1.0, 0.8, 0.5])
    return (found[0][2], found[0][3]) if found else (0, 0.0)


CASES = pytest.mark.parametrize(
    ("extra_keys", "query"),
    [
        ([["tenant-A"], None], {"cache_salt": "tenant-A"}),
        ([[["img", 3]], [["img", -13]]], {"mm_features": [("img", 3, 20)]}),
    ],
    ids=["salt", "image"],
)


@CASES
def test_an_offload_event_without_extra_keys_is_not_plain_text(extra_keys: list[Any], query: dict[str, Any]) -> None:
    """vLLM's connectors send all tokens and no list: the key comes from the event that had one."""
    index, stream = fresh()
    own = query_keys(TOKENS, 16, **query)
    stream.apply([maps(stored(extra_keys)), maps(stored(None, "CPU"))])
    assert (blocks(index, PLAIN), blocks(index, own)) == ((0, 0.0), (2, 2.0))
    stream.apply([maps(Removed([11, 12], "GPU"))])
    assert (blocks(index, PLAIN), blocks(index, own)) == ((0, 0.0), (2, 1.6))
    assert stream.unresolved == 0


@CASES
def test_an_offload_event_before_any_list_is_doubted_then(extra_keys: list[Any], query: dict[str, Any]) -> None:
    """Nobody can know before: but from the first list on, no key counts that was told without one."""
    index, stream = fresh()
    own = query_keys(TOKENS, 16, **query)
    stream.apply([maps(stored(None, "CPU")), maps(stored(None, "CPU")), maps(Stored([22], 21, TOKENS[:16], 16))])
    assert (blocks(index, PLAIN), stream.orphans) == ((2, 1.6), 1)
    stream.apply([maps(Stored([31], None, TOKENS[16:], 16, extra_keys=[None]))])
    assert (blocks(index, PLAIN), stream.unresolved, stream.orphans) == ((0, 0.0), 3, 0)
    stream.apply([maps(stored(extra_keys)), maps(Removed([11, 12])), maps(Removed([11, 12], "CPU"))])
    assert (blocks(index, PLAIN), blocks(index, own), stream.claims) == ((0, 0.0), (2, 1.6), 4)
    stream.apply([maps(Removed([11, 12], "CPU"))])
    assert (blocks(index, own), stream.claims) == ((0, 0.0), 2)
    assert stream.clear() == 2
    assert (index.claims, index.blocks) == (0, 0)


def test_that_an_engine_lists_extra_keys_survives_a_move_but_not_another_life() -> None:
    index, stream = fresh()
    stream.apply([maps(Stored([31], None, TOKENS[16:], 16, extra_keys=[None])), maps(Cleared())])
    moved = index.add_stream("q", 0)
    assert moved.restore(stream.snapshot())
    for each in (stream, moved):
        each.apply([maps(stored(None, "CPU"))])
        assert (blocks(index, PLAIN), each.unresolved) == ((0, 0.0), 2)
        each.clear()
        each.apply([maps(stored(None))])
        assert blocks(index, PLAIN) == (2, 2.0)
        each.close()


def test_an_engine_without_lists_is_believed() -> None:
    """SGLang has none: its salt is a field."""
    index, stream = fresh()
    stream.apply([maps(stored(None, cache_salt="t")), maps(Stored([1, 2], None, TOKENS, 16))])
    assert (blocks(index, PLAIN), blocks(index, query_keys(TOKENS, 16, cache_salt="t"))) == ((2, 2.0), (2, 2.0))
    assert stream.unresolved == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"extra_keys": 5},
        {"extra_keys": [["s"]]},
        {"extra_keys": [["s"], None, ["x"]]},
        {"extra_keys": [[["future", "x"]], None]},
        {"extra_keys": [[["img", None]], None]},
        {"extra_keys": [[None], None]},
        {"extra_keys": [[5], None]},
        {"extra_keys": [["x" * 4097], None]},
        {"extra_keys": [[b"x" * 4097], None]},
        {"extra_keys": [[["x" * 4097, 1]], None]},
        {"extra_keys": [[["cache_salt", "x" * 4097]], None]},
        {"cache_salt": "x" * 4097},
        {"lora_name": "x" * 4097},
        {"mm_keys": [{"type": "mm_key", "hash": "ab", "start_offset": 0}]},
        {"mm_keys": 7},
        {"additional_salt": "tenant"},
        {"additional_salt": 7},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_what_cannot_be_read_of_a_block_leaves_it_without_a_key(fields: dict[str, Any]) -> None:
    """The next kind of extra key costs keys, not the event: its copies are counted, and the rest is applied."""
    index, stream = fresh()
    event = as_map(stored(None)) | fields
    child = as_map(Stored([13], 12, TOKENS[:16], 16))
    applied = stream.apply([batch([event, child, as_map(Stored([5], None, TOKENS[16:], 16, extra_keys=[None]))])])
    assert applied.reasons == {"unread_extras": 2}
    assert (stream.claims, stream.unresolved, blocks(index, PLAIN)) == (4, 3, (0, 0.0))
    assert blocks(index, query_keys(TOKENS[16:], 16)) == (1, 1.0)
    assert stream.apply([maps(Removed([11, 12, 13]))]).reasons == {}
    assert (stream.claims, stream.unresolved) == (1, 0)


@pytest.mark.parametrize(
    "fields", [{"mm_keys": []}, {"mm_keys": None}, {"additional_salt": None}, {"additional_salt": ""}], ids=str
)
def test_what_is_empty_makes_no_difference(fields: dict[str, Any]) -> None:
    index, stream = fresh()
    assert stream.apply([batch([as_map(stored(None)) | fields])]).reasons == {}
    assert blocks(index, PLAIN) == (2, 2.0)


def test_names_as_long_as_clients_may_send_them_count() -> None:
    """1,024 characters, which may take 4 bytes each."""
    index, stream = fresh()
    name = "\N{GRINNING FACE}" * 1024
    stream.apply([maps(stored([[name], [name]], lora_name=name))])
    assert blocks(index, query_keys(TOKENS, 16, lora_name=name)) == (2, 2.0)


def envelope(hashes: list[int], tokens: list[int], **fields: Any) -> dict[str, Any]:
    return {"event_type": "stored", "seq_hashes": hashes, "token_ids": tokens, "block_size": 16, **fields}


@pytest.mark.parametrize(
    "parent",
    [
        {"parent_hash": 1},
        {"parent_hash": 1, "parent_block_hash": None},
        {"parent_block_hash": 1, "parent_hash": None, "base_block_idx": 1},
    ],
    ids=str,
)
def test_the_envelopes_parent_is_read(parent: dict[str, Any]) -> None:
    """RFC 1527 calls it `parent_hash`; a nil under one name leaves what the other says."""
    index, stream = fresh()
    root = envelope([1], TOKENS[:16], parent_hash=None, base_block_idx=0)
    applied = stream.apply([msgpack.packb([1.0, [root, envelope([2], TOKENS[16:], **parent)], 0])])
    assert applied.reasons == {}
    assert blocks(index, PLAIN) == (2, 2.0)
    assert blocks(index, query_keys(TOKENS[16:], 16)) == (0, 0.0)


def test_blocks_from_the_middle_of_a_prompt_are_never_its_first() -> None:
    index, stream = fresh()
    applied = stream.apply([batch([envelope([2], TOKENS[16:], base_block_idx=1)])])
    assert applied.reasons == {"missing_parent": 1}
    assert (blocks(index, query_keys(TOKENS[16:], 16)), stream.unresolved) == ((0, 0.0), 1)


@pytest.mark.parametrize(
    "event",
    [
        {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "extra_keys": [5], "token_ids": [[1, 2]]},
        {"lora_name": 5, "block_hashes": [11], "parent_block_hash": [1], "type": "BlockRemoved"},
        {"event_type": "a name of its own", "type": "BlockRemoved", "block_hashes": [11], "block_size": "x"},
        {"type": "AllBlocksCleared", "medium": 5, "block_hashes": "x", "extra_keys": [[5]]},
    ],
    ids=range(4),
)
def test_fields_of_no_concern_do_not_spoil_an_event(event: dict[str, Any]) -> None:
    """A removal needs hashes, medium and group; a clear needs nothing."""
    index, stream = fresh()
    stream.apply([maps(stored(None))])
    assert stream.apply([batch([event])]).reasons == {}
    assert blocks(index, PLAIN) == (0, 0.0)


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        ("Local NVMe", "local_nvme"),
        ("ÄÖ", "____"),
        ("X" * 65, "x" * 64),
        ("with space", "with_space"),
        ("new\nline", "new_line"),
    ],
)
def test_any_medium_is_a_tier_with_a_plain_name(medium: str, tier: str) -> None:
    """It becomes a metric label: what may not stand there is replaced, and the block counts."""
    index, stream = fresh()
    assert stream.apply([maps(stored(None, medium))] * 2).reasons == {}
    assert index.tiers[3:] == [tier]
    assert stream.apply([maps(Removed([11, 12], medium))] * 2).reasons == {}
    assert stream.claims == 0


@pytest.mark.parametrize("timestamp", [1_764_000_000.25, 1_764_000_000_250, 1_764_000_000_250_000])
@pytest.mark.parametrize("shape", ["array3", "map"])
def test_timestamps_are_seconds_whatever_their_unit(timestamp: float, shape: str) -> None:
    """The Mooncake master's are milliseconds."""
    _, stream = fresh()
    assert stream.apply([batch([], timestamp=timestamp, shape=shape)]).timestamp == 1_764_000_000.25
