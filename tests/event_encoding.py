"""KV events as every engine release puts them on the wire, and back from what a release decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

Hash = int | bytes

# Array lengths with the tag, by what the release knows: medium, lora_name, extra_keys, group, kind.
VLLM_LENGTHS = (7, 8, 9, 10, 12)
STORED_FIELDS = (
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
)
REMOVED_FIELDS = ("block_hashes", "medium", "group_idx")


@dataclass(frozen=True)
class Stored:
    """BlockStored, whatever its encoding."""

    hashes: Sequence[Hash]
    parent: Hash | None
    tokens: Sequence[int]
    block_size: int
    medium: str | None = "GPU"
    lora_id: int | None = None
    lora_name: str | None = None
    extra_keys: Sequence[Any] | None = None
    group: int | None = None
    kind: str | None = None
    window: int | None = None
    cache_salt: str | None = None

    def values(self) -> list[Any]:
        """In the order of the arrays; the salt, which only SGLang's maps have, is left out."""
        return [
            list(self.hashes),
            self.parent,
            list(self.tokens),
            self.block_size,
            self.lora_id,
            self.medium,
            self.lora_name,
            self.extra_keys,
            self.group,
            self.kind,
            self.window,
        ]


@dataclass(frozen=True)
class Removed:
    """BlockRemoved, whatever its encoding."""

    hashes: Sequence[Hash]
    medium: str | None = "GPU"
    group: int | None = None

    def values(self) -> list[Any]:
        """In the order of the arrays."""
        return [list(self.hashes), self.medium, self.group]


@dataclass(frozen=True)
class Cleared:
    """AllBlocksCleared."""


Event = Stored | Removed | Cleared


def as_array(event: Event, length: int = 12) -> list[Any]:
    """vLLM <= 0.23 and SGLang <= 0.5.18. `length` counts the tag of a BlockStored and tells the release."""
    if isinstance(event, Cleared):
        return ["AllBlocksCleared"]
    if isinstance(event, Removed):
        return ["BlockRemoved", *event.values()[: 3 if length >= 10 else 2]]
    return ["BlockStored", *event.values()[: length - 1]]


def shortest_array(event: Event) -> int:
    """The oldest release that could have said all of this event as an array."""
    if isinstance(event, Removed):
        return 10 if event.group is not None else 7
    if isinstance(event, Stored):
        return next(length for length in VLLM_LENGTHS if all(value is None for value in event.values()[length - 1 :]))
    return 7


def as_map(event: Event, *, spare_nils: bool = True) -> dict[str, Any]:
    """vLLM >= 0.24 and SGLang >= 0.5.20. Nil fields are left out, but for those without a default."""
    if isinstance(event, Cleared):
        return {"type": "AllBlocksCleared"}
    if isinstance(event, Removed):
        out = dict(zip(REMOVED_FIELDS, event.values(), strict=True))
        return {"type": "BlockRemoved", **_without(out, ("group_idx",), spare_nils)}
    out = dict(zip(STORED_FIELDS, event.values(), strict=True)) | {"cache_salt": event.cache_salt}
    return {"type": "BlockStored", **_without(out, (*STORED_FIELDS[7:], "cache_salt"), spare_nils)}


def _without(fields: dict[str, Any], defaulted: Sequence[str], spare_nils: bool) -> dict[str, Any]:
    if not spare_nils:
        return fields
    return {name: value for name, value in fields.items() if value is not None or name not in defaulted}


def batch(
    events: Sequence[Any], rank: int | None = 0, timestamp: float = 1764000000.25, shape: str = "array3"
) -> bytes:
    """A payload of already encoded events: array3, array2 or map."""
    body: Any = [timestamp, list(events), rank]
    if shape == "array2":
        body = body[:2]
    elif shape == "map":
        body = {"ts": timestamp, "events": list(events), "data_parallel_rank": rank}
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def maps(*events: Event, rank: int | None = 0) -> bytes:
    """A payload as vLLM >= 0.24 sends it."""
    return batch([as_map(event) for event in events], rank)


def read(event: Any) -> Event:
    """A decoded event, array or map, of any release."""
    if isinstance(event, dict):
        tag, fields = event["type"], event
    else:
        tag = event[0]
        names = STORED_FIELDS if tag == "BlockStored" else REMOVED_FIELDS
        fields = dict(zip(names, event[1:], strict=False))
    if tag == "AllBlocksCleared":
        return Cleared()
    if tag == "BlockRemoved":
        return Removed(fields["block_hashes"], fields.get("medium"), fields.get("group_idx"))
    return Stored(
        fields["block_hashes"],
        fields["parent_block_hash"],
        fields["token_ids"],
        fields["block_size"],
        fields.get("medium"),
        fields.get("lora_id"),
        fields.get("lora_name"),
        fields.get("extra_keys"),
        fields.get("group_idx"),
        fields.get("kv_cache_spec_kind"),
        fields.get("kv_cache_spec_sliding_window"),
        fields.get("cache_salt"),
    )
