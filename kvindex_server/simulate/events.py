"""KV events and their two msgpack encodings, field for field as vLLM 0.23 and 0.32 send them."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

MEDIUM = "GPU"
GROUP = 0
KIND = "full_attention"


@dataclass(frozen=True, slots=True)
class Stored:
    """Consecutive blocks now lie in the cache, one more physical copy of each."""

    hashes: tuple[int, ...]
    parent: int | None
    tokens: tuple[int, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class Removed:
    """One physical copy of a block is gone."""

    block: int


@dataclass(frozen=True, slots=True)
class Cleared:
    """The whole cache was reset."""


Event = Stored | Removed | Cleared


class Encoding(enum.Enum):
    """Form of the events inside a batch; the batch itself is an array in both."""

    ARRAY = "array"
    """vLLM <= 0.23: positional, always at the full length of the sender's release."""
    MAP = "map"
    """vLLM >= 0.24: named, with defaults left out."""


def encode_batch(events: Sequence[Event], timestamp: float, rank: int, encoding: Encoding) -> bytes:
    """The payload of one message: [timestamp, events, data-parallel rank]."""
    encode = _as_array if encoding is Encoding.ARRAY else _as_map
    packed: bytes = msgpack.packb([timestamp, [encode(event) for event in events], rank])
    return packed


def _as_array(event: Event) -> list[Any]:
    match event:
        case Stored():
            extra_keys = [None] * len(event.hashes)
            head = ["BlockStored", event.hashes, event.parent, event.tokens, event.block_size]
            # lora_id, medium, lora_name, extra_keys, group_idx, spec kind, sliding window
            return [*head, None, MEDIUM, None, extra_keys, GROUP, KIND, None]
        case Removed():
            return ["BlockRemoved", [event.block], MEDIUM, GROUP]
        case Cleared():
            return ["AllBlocksCleared"]


def _as_map(event: Event) -> dict[str, Any]:
    match event:
        case Stored():
            return {
                "type": "BlockStored",
                "block_hashes": event.hashes,
                "parent_block_hash": event.parent,
                "token_ids": event.tokens,
                "block_size": event.block_size,
                "lora_id": None,
                "medium": MEDIUM,
                "lora_name": None,
                "extra_keys": [None] * len(event.hashes),
                "group_idx": GROUP,
                "kv_cache_spec_kind": KIND,
            }
        case Removed():
            return {
                "type": "BlockRemoved",
                "block_hashes": [event.block],
                "medium": MEDIUM,
                "group_idx": GROUP,
            }
        case Cleared():
            return {"type": "AllBlocksCleared"}
