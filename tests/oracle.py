"""The index of one model as slow, obvious Python: what the native core must agree with."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import xxhash
from event_encoding import Cleared, Event, Hash, Removed, Stored

MmFeature = tuple[str, int, int]
Item = tuple[int, bytes]
Holder = tuple[str, int, str, int, bool]  # pod, rank, tier, group, speculative

LORA, MM, SALT, EMBEDS, LORA_ID = 1, 2, 3, 4, 5
FIXED_TIERS = ("gpu", "cpu", "disk")
MAX_TIERS = 8
FULL_KINDS = (None, "full_attention", "mla_attention", "sink_full_attention")
SLIDING_KINDS = ("sliding_window", "sliding_window_mla")


def item(kind: int, value: bytes) -> bytes:
    """One thing that makes equal tokens different."""
    return struct.pack("<BI", kind, len(value)) + value


def chain_keys(
    blocks: Sequence[Sequence[int]], extras: Sequence[bytes], seed: int, parent: int | None = None
) -> list[int]:
    """Keys of consecutive blocks after `parent`."""
    keys = []
    for tokens, extra in zip(blocks, extras, strict=True):
        local = xxhash.xxh3_64_intdigest(struct.pack(f"<{len(tokens)}I", *tokens) + extra, seed)
        if parent is not None:
            local = xxhash.xxh3_64_intdigest(struct.pack("<QQ", parent, local), seed)
        parent = local
        keys.append(local)
    return keys


def split_blocks(tokens: Sequence[int], block_size: int) -> list[Sequence[int]]:
    """The full blocks only."""
    return [tokens[at : at + block_size] for at in range(0, len(tokens) - block_size + 1, block_size)]


def query_keys(
    tokens: Sequence[int],
    block_size: int,
    seed: int = 1337,
    lora_name: str = "",
    cache_salt: str = "",
    mm_features: Sequence[MmFeature] = (),
) -> list[int]:
    """Keys of a prompt, as a client asks for them."""
    blocks = split_blocks(tokens, block_size)
    extras = []
    for index in range(len(blocks)):
        start, end = index * block_size, (index + 1) * block_size
        extra = item(LORA, lora_name.encode()) if lora_name else b""
        for name, offset, length in sorted(mm_features, key=lambda feature: feature[1]):
            if offset < end and offset + length > start:
                extra += item(MM, name.encode())
        if cache_salt and index == 0:
            extra += item(SALT, cache_salt.encode())
        extras.append(extra)
    return chain_keys(blocks, extras, seed)


def event_extras(event: Stored, index: int) -> bytes:
    """The same bytes for block `index` of an event."""
    return encode(event_items(event, index))


def encode(items: Iterable[Item]) -> bytes:
    """Items in their documented form."""
    return b"".join(item(kind, value) for kind, value in items)


def event_items(event: Stored, index: int) -> list[Item]:
    """What an engine says of block `index` of an event, in the order of the encoding."""
    entries = event.extra_keys or []
    items: list[Any] = list(entries[index] or []) if index < len(entries) else []
    first_of_chain = event.parent is None and index == 0
    lora = event.lora_name or None
    if lora is None and event.lora_id is not None and items and isinstance(items[0], str):
        lora = items[0]
    elsewhere = {
        other for at, entry in enumerate(entries) if at != index for other in entry or [] if isinstance(other, str)
    }
    bare = [value for value in items if isinstance(value, str) and value != lora]
    salt = event.cache_salt if first_of_chain else None
    mm: list[str] = []
    embeds: list[bytes] = []
    for value in items:
        match value:
            case bytes():
                embeds.append(value)
            case str() if value == lora:
                pass
            case str() if first_of_chain and value is bare[-1] and value not in elsewhere:
                salt = value
            case str():
                mm.append(value)
            case ["lora", str(name), str()]:
                lora = name
            case ["mm", str(name), int()]:
                mm.append(name)
            case ["cache_salt", str(text)]:
                salt = text
            case ["prompt_embeds", bytes(digest)]:
                embeds.append(digest)
            case [str(name), int()]:
                mm.append(name)
    out: list[Item] = []
    if lora:
        out.append((LORA, lora.encode()))
    elif event.lora_id is not None:
        out.append((LORA_ID, str(event.lora_id).encode()))
    out += [(MM, name.encode()) for name in mm]
    if salt:
        out.append((SALT, salt.encode()))
    return out + [(EMBEDS, digest) for digest in embeds]


def normal(value: Hash) -> Hash:
    """An engine hash as it is counted: ints in two's complement, bytes as they are."""
    return value % 2**64 if isinstance(value, int) else value


@dataclass(frozen=True)
class Match:
    """What one stream holds of a prompt."""

    blocks: int
    score: float
    tiers: dict[str, int]
    speculative: int = 0


@dataclass(frozen=True)
class Range:
    """Consecutive engine blocks with their tokens."""

    parent: Hash | None
    hashes: list[Hash]
    blocks: list[Sequence[int]]
    items: list[list[Item]]
    size: int


@dataclass(frozen=True)
class Part:
    """An engine block smaller than the canonical one, with all that came before it in that block."""

    members: tuple[Hash, ...]
    tokens: tuple[int, ...]
    items: tuple[Item, ...]
    base: int | None  # key of the canonical block before
    key: int | None  # of the whole block, once this part completes it


@dataclass
class StreamOracle:
    """What one (pod, rank) holds."""

    model: "ModelOracle"
    pod: str
    rank: int
    counts: dict[tuple[int, str, Hash], int] = field(default_factory=dict)
    keys_of: dict[Hash, list[int]] = field(default_factory=dict)  # canonical blocks in an engine block
    parts: dict[Hash, Part] = field(default_factory=dict)
    waiting: list[Range] = field(default_factory=list)
    groups: dict[int, tuple[str | None, int | None]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)  # the group's own block size, by its full blocks
    lists: bool = False  # the engine lists extra keys: an event without them is one that does not know them
    unknown_removals: int = 0
    placed: dict[int, tuple[float, bool]] = field(default_factory=dict)  # key -> (end, the rank is a guess)

    def apply(self, events: Iterable[Event]) -> None:
        """Everything an engine announces, in order."""
        for event in events:
            if isinstance(event, Stored):
                before = self.holdings()
                self._store(event)
                for key, _, _ in self.holdings() - before:
                    self.model.confirm(self, key)
            elif isinstance(event, Removed):
                self._remove(event)
            else:
                self._drop()

    def holdings(self) -> set[tuple[int, int, str]]:
        """The (key, group, tier) held."""
        return {
            (key, group, tier) for key, of in self.tiers_of().items() for group, tiers in of.items() for tier in tiers
        }

    def _store(self, event: Stored) -> None:
        group, tier = event.group or 0, (event.medium or "gpu").lower()
        if not self.model.has_tier(tier):
            return
        kind, window = self.groups.get(group, (None, None))
        self.groups[group] = (event.kind or kind, event.window or window)
        hashes = [normal(value) for value in event.hashes]
        for value in hashes:
            claim = (group, tier, value)
            self.counts[claim] = self.counts.get(claim, 0) + 1
        size = event.block_size
        if event.extra_keys is not None and not self.lists:
            self.lists = True
            self.keys_of.clear()
            self.parts.clear()
            self.waiting.clear()
        sure = event.extra_keys is not None or not self.lists
        exact = sure and bool(hashes) and size > 0 and len(event.tokens) == len(hashes) * size
        kind = self.groups[group][0]
        if kind != "mamba":
            self.sizes[group] = max(self.sizes.get(group, 0), size)
        if not exact or kind == "mamba":
            return  # a mamba state is found through the hash that another group's event carries
        if self.model.block_size == 0 and kind in (*FULL_KINDS, *SLIDING_KINDS):
            self.model.block_size = size
        canonical = self.model.block_size
        if not canonical or (size % canonical and canonical % size):
            return
        if size < self.sizes[group] and size != canonical:
            return  # a partial block: held, but no part of a prefix yet
        items = [event_items(event, index) for index in range(len(hashes))]
        parent = None if event.parent is None else normal(event.parent)
        found = Range(parent, hashes, split_blocks(event.tokens, size), items, size)
        if parent is None or self._knows(parent):
            self._place(found)
        else:
            self.waiting.append(found)

    def _knows(self, value: Hash) -> bool:
        return value in self.keys_of or value in self.parts

    def _held(self, value: Hash) -> bool:
        return any(other == value for _, _, other in self.counts)

    def _place(self, found: Range) -> None:
        held = {value for _, _, value in self.counts}
        ready: list[Hash] = []
        for value in self._parts(found) if found.size < self.model.block_size else self._blocks(found):
            # Only a block that is held tells others its key: a removed one may come back as another.
            if value in held:
                ready.append(value)
        for value in [value for value in self.keys_of if value not in held]:
            del self.keys_of[value]
        self._forget_parts()
        for value in ready:
            adopted = [orphan for orphan in self.waiting if orphan.parent == value]
            self.waiting = [orphan for orphan in self.waiting if orphan.parent != value]
            for orphan in adopted:
                self._place(orphan)

    def _blocks(self, found: Range) -> Iterator[Hash]:
        canonical = self.model.block_size
        key = None if found.parent is None else self.keys_of[found.parent][-1]
        for value, tokens, items in zip(found.hashes, found.blocks, found.items, strict=True):
            blocks = split_blocks(tokens, canonical)
            if len(blocks) > 1 and any(kind in (MM, EMBEDS) for kind, _ in items):
                return  # nobody can tell which of its canonical blocks they touch
            later = [each for each in items if each[0] != SALT]
            extras = [encode(items)] + [encode(later)] * (len(blocks) - 1)
            self.keys_of[value] = chain_keys(blocks, extras, self.model.seed, key)
            key = self.keys_of[value][-1]
            yield value

    def _parts(self, found: Range) -> Iterator[Hash]:
        before = None if found.parent is None else self.parts.get(found.parent)
        if found.parent is not None and before is None:
            return
        for value, tokens, items in zip(found.hashes, found.blocks, found.items, strict=True):
            start = Part((), (), (), before.key if before else None, None)
            so_far = before if before and before.key is None else start
            known = so_far.items + tuple(each for each in items if each not in so_far.items)
            whole = (*so_far.tokens, *tokens)
            key = None
            if len(whole) == self.model.block_size:
                order = (LORA, LORA_ID, MM, SALT, EMBEDS)
                extra = encode(sorted(known, key=lambda each: order.index(each[0])))
                (key,) = chain_keys([whole], [extra], self.model.seed, so_far.base)
            before = self.parts[value] = Part((*so_far.members, value), whole, known, so_far.base, key)
            yield value

    def _forget_parts(self) -> None:
        needed = {member for value, part in self.parts.items() if self._held(value) for member in part.members}
        self.parts = {value: part for value, part in self.parts.items() if value in needed}

    def _remove(self, event: Removed) -> None:
        group, tier = event.group or 0, (event.medium or "gpu").lower()
        for value in map(normal, event.hashes):
            claim = (group, tier, value)
            if claim not in self.counts:
                self.unknown_removals += 1
                continue
            self.counts[claim] -= 1
            if self.counts[claim] == 0:
                del self.counts[claim]
                if not self._held(value):
                    self.keys_of.pop(value, None)
        self._forget_parts()

    def _drop(self) -> None:
        self.counts.clear()
        self.keys_of.clear()
        self.parts.clear()
        self.waiting.clear()
        self.groups.clear()
        self.sizes.clear()
        self.drop_placed()

    def clear(self) -> int:
        """A fence: the engine behind the stream is another one now."""
        dropped = len(self.counts)
        self._drop()
        self.lists = False
        return dropped

    def key_of(self, value: Hash) -> int:
        """The key a client learns for an engine hash; 0 when there is none."""
        part = self.parts.get(value)
        return (part.key or 0) if part else self.keys_of.get(value, [0])[-1]

    @property
    def unresolved(self) -> int:
        """Claims whose key is not known."""
        return sum(not self._knows(value) for _, _, value in self.counts)

    def tiers_of(self) -> dict[int, dict[int, set[str]]]:
        """Key -> group -> tiers."""
        out: dict[int, dict[int, set[str]]] = {}
        for group, tier, value in self.counts:
            keys = self.keys_of.get(value, [])
            if self.sizes.get(group, 0) <= self.model.block_size:
                keys = keys[-1:]  # a group of smaller blocks calls its block as the larger one that it ends
            part = self.parts.get(value)
            if part and part.key is not None and all((group, tier, each) in self.counts for each in part.members):
                keys = [part.key]
            for key in keys:
                out.setdefault(key, {}).setdefault(group, set()).add(tier)
        return out

    def _valid(self, held: list[dict[int, set[str]]], length: int) -> bool:
        for group, (kind, window) in self.groups.items():
            if kind in FULL_KINDS:
                needed = range(length)
            elif kind in SLIDING_KINDS and window:
                reach = -(-(window - 1) // self.model.block_size)
                needed = range(max(0, length - reach), length)
            elif kind == "mamba":
                needed = range(max(0, length - 1), length)
            else:
                return False
            if any(group not in held[index] for index in needed):
                return False
        return bool(self.groups)

    def match(self, keys: Sequence[int], weights: dict[str, float]) -> Match:
        """The longest prefix every group can serve, and its weight."""
        tiers = self.tiers_of()
        held = [tiers.get(key, {}) for key in keys]
        length = next((length for length in range(len(keys), 0, -1) if self._valid(held, length)), 0)
        best = []
        for groups in held[:length]:
            available = {tier for names in groups.values() for tier in names} or {"gpu"}
            best.append(self._best(available, weights))
        beyond = self._speculative(keys[length:], held[length:], weights)
        return Match(
            length,
            sum(weight(weights, tier) for tier in [*best, *beyond]),
            {tier: best.count(tier) for tier in set(best)},
            len(beyond),
        )

    def _best(self, tiers: Iterable[str], weights: dict[str, float]) -> str:
        return max(sorted(tiers, key=self.model.tiers.index), key=lambda tier: weight(weights, tier))

    def _speculative(
        self, keys: Sequence[int], held: list[dict[int, set[str]]], weights: dict[str, float]
    ) -> list[str]:
        """The tiers of the blocks by which placements lengthen a match."""
        kinds = [kind for kind, window in self.groups.values() if window or kind not in SLIDING_KINDS]
        if len(kinds) < len(self.groups) or not set(kinds) <= {*FULL_KINDS, *SLIDING_KINDS}:
            return []
        full = [group for group, (kind, _) in self.groups.items() if kind in FULL_KINDS]
        tiers: list[str] = []
        end = 0
        for key, groups in zip(keys, held, strict=True):
            is_placed = self.is_placed(key)
            if is_placed:
                tiers.append("gpu")
            elif full and all(group in groups for group in full):
                tiers.append(self._best({tier for group in full for tier in groups[group]}, weights))
            else:
                break
            # A window's blocks may be gone already behind the last one that will be computed anew.
            if is_placed or len(full) == len(self.groups):
                end = len(tiers)
        return tiers[:end]

    def is_placed(self, key: int) -> bool:
        """Whether there is a placement whose time is not over."""
        return key in self.placed and self.placed[key][0] > self.model.now

    def drop_placed(self) -> None:
        """The engine they were meant for is gone."""
        for key in self.placed:
            self.model.counts["fenced" if self.is_placed(key) else "expired"] += 1
        self.placed.clear()


def weight(weights: dict[str, float], tier: str) -> float:
    """An unknown tier weighs as the lowest."""
    return weights.get(tier, min(weights.values()))


class ModelOracle:
    """All the streams of a model."""

    def __init__(self, block_size: int = 0, seed: int = 1337) -> None:
        self.block_size = block_size
        self.seed = seed
        self.tiers = list(FIXED_TIERS)
        self.streams: list[StreamOracle] = []
        self.now = 0.0
        self.counts = dict.fromkeys(("recorded", "renewed", "confirmed", "expired", "fenced", "refused"), 0)

    def has_tier(self, tier: str) -> bool:
        """Whether the tier has a place, giving it one if there is room."""
        if tier not in self.tiers and len(self.tiers) < MAX_TIERS:
            self.tiers.append(tier)
        return tier in self.tiers

    def add_stream(self, pod: str, rank: int) -> StreamOracle:
        """A new stream without claims."""
        stream = StreamOracle(self, pod, rank)
        self.streams.append(stream)
        return stream

    def close(self, stream: StreamOracle) -> int:
        """The stream is gone from answers."""
        self.streams.remove(stream)
        stream.drop_placed()
        return len(stream.counts)

    def place(self, pod: str, rank: int | None, keys: Sequence[int], ttl: float) -> tuple[int, int]:
        """A router's decision; the rank it counts at, and the blocks held there already."""
        streams = [stream for stream in self.streams if stream.pod == pod]
        guessed = rank is None and len(streams) > 1
        if rank is None:
            found = [(-stream.match(keys, {"gpu": 1.0}).score, stream.rank) for stream in streams]
            rank = min(found)[1]
        (stream,) = (stream for stream in streams if stream.rank == rank)
        full = [group for group, (kind, _) in stream.groups.items() if kind in FULL_KINDS]
        tiers = stream.tiers_of()
        missing = [key for key in keys if not full or not all(group in tiers.get(key, {}) for group in full)]
        for key in missing:
            self.counts["renewed" if stream.is_placed(key) else "recorded"] += 1
            self.counts["expired"] += key in stream.placed and not stream.is_placed(key)
            end, guess = stream.placed[key] if stream.is_placed(key) else (0.0, True)
            stream.placed[key] = (max(end, self.now + ttl), guess and guessed)
        return rank, len(keys) - len(missing)

    def confirm(self, stream: StreamOracle, key: int) -> None:
        """The engine has stored a block."""
        for each in self.streams:
            if each.pod == stream.pod and key in each.placed and (each is stream or each.placed[key][1]):
                self.counts["confirmed" if each.is_placed(key) else "expired"] += 1
                del each.placed[key]

    def sweep(self) -> None:
        """Forget what has expired."""
        for stream in self.streams:
            over = [key for key in stream.placed if not stream.is_placed(key)]
            self.counts["expired"] += len(over)
            for key in over:
                del stream.placed[key]

    def holders(self, pods: Sequence[str] = ()) -> dict[int, set[Holder]]:
        """Who holds each key that anyone holds."""
        out: dict[int, set[Holder]] = {}
        for stream in self.streams:
            if pods and stream.pod not in pods:
                continue
            for key, groups in stream.tiers_of().items():
                for group, tiers in groups.items():
                    for tier in tiers:
                        out.setdefault(key, set()).add((stream.pod, stream.rank, tier, group, False))
            for key in filter(stream.is_placed, stream.placed):
                out.setdefault(key, set()).add((stream.pod, stream.rank, "gpu", 0, True))
        return out

    def holders_of_hash(self, value: Hash) -> set[Holder]:
        """Who holds a block by its engine's name."""
        return {
            (stream.pod, stream.rank, tier, group, False)
            for stream in self.streams
            for group, tier, other in stream.counts
            if other == normal(value)
        }

    def matches(
        self, keys: Sequence[int], weights: dict[str, float], pods: Sequence[str] = ()
    ) -> dict[str, dict[int, Match]]:
        """Pod -> rank -> match, only where there is one."""
        out: dict[str, dict[int, Match]] = {}
        for stream in self.streams:
            if pods and stream.pod not in pods:
                continue
            found = stream.match(keys, weights)
            if found.blocks or found.speculative:
                out.setdefault(stream.pod, {})[stream.rank] = found
        return out


__all__ = ["Cleared", "Match", "ModelOracle", "Removed", "Stored", "StreamOracle", "query_keys"]
