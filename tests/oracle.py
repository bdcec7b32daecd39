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
class Claim:
    """A block that one (group, tier) holds under one engine hash."""

    count: int
    size: int  # of the block in tokens; 0 while nobody has said it
    keys: list[int] | None = None  # the canonical blocks it stands for
    is_part: bool = False

    @property
    def resolved(self) -> bool:
        """Whether what it stands for is known."""
        return self.is_part or self.keys is not None


@dataclass
class StreamOracle:
    """What one (pod, rank) holds."""

    model: "ModelOracle"
    pod: str
    rank: int
    counts: dict[tuple[int, str, Hash], Claim] = field(default_factory=dict)
    spans: dict[int, list[int]] = field(default_factory=dict)  # key -> the keys before it
    parts: dict[tuple[Hash, int], Part] = field(default_factory=dict)  # by hash and size
    gone: dict[Hash, int] = field(default_factory=dict)  # keys of what this batch has removed
    early: list[Range] = field(default_factory=list)  # until the block size is known
    waiting: list[Range] = field(default_factory=list)
    known: list[tuple[Hash, int, int]] = field(default_factory=list)  # parents whose orphans are to be placed
    groups: dict[int, tuple[str | None, int | None]] = field(default_factory=dict)
    sizes: dict[tuple[int, str], int] = field(default_factory=dict)  # own block size of a group on a tier
    lists: bool = False  # the engine lists extra keys: an event without them is one that does not know them
    unknown_removals: int = 0
    placed: dict[int, tuple[float, bool]] = field(default_factory=dict)  # key -> (end, the rank is a guess)

    def apply(self, events: Iterable[Event]) -> None:
        """One batch of what an engine announces, in order."""
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
        self._forget()

    def holdings(self) -> set[tuple[int, int, str]]:
        """The (key, group, tier) held."""
        return {
            (key, group, tier) for key, of in self.tiers_of().items() for group, tiers in of.items() for tier in tiers
        }

    def _store(self, event: Stored) -> None:
        group, tier = event.group or 0, (event.medium or "gpu").lower()
        if not self.model.has_tier(tier):
            return
        if event.kind is not None or group not in self.groups:
            self.groups[group] = (event.kind, event.window)
        kind = self.groups[group][0]
        known_kind = self._is_known(group)
        hashes = [normal(value) for value in event.hashes]
        size = 0 if kind == "mamba" else event.block_size
        if event.extra_keys is not None and not self.lists:
            self.lists = True
            self._doubt()
        sure = event.extra_keys is not None or not self.lists
        mapped = sure and bool(hashes) and event.block_size > 0 and len(event.tokens) == len(hashes) * event.block_size
        can_place = can_wait = False
        if size:
            own = self.sizes[group, tier] = max(self.sizes.get((group, tier), 0), size)
            if mapped and known_kind and not self.model.block_size:
                self._learn_size(event, size)
            canonical = self.model.block_size
            can_wait = mapped and not canonical and known_kind
            # A smaller block than the group's own is a partial one: held, but no part of a prefix yet.
            can_place = mapped and canonical > 0 and size in (own, canonical) and self._fits(size)
        canonical = self.model.block_size
        if canonical:
            early, self.early = self.early, []
            for each in early:
                self._place(each, None)
        parent = None if event.parent is None else normal(event.parent)
        found = Range(
            parent,
            hashes,
            split_blocks(event.tokens, size) if size else [],
            [event_items(event, index) for index in range(len(hashes))],
            size,
        )
        if not mapped and canonical and size > canonical and size % canonical == 0 and self._knows(parent, size):
            self._guess(found)
        placed = can_place and self._knows(parent, size)
        for value in hashes:
            key = self.key_of(value) or (0 if event.tokens and sure else self.gone.get(value, 0))
            self._claim((group, tier, value), size)
            if not placed:
                self._settle(value, key)
        if placed:
            self._place(found, None if parent is None else self.key_of(parent))
        elif can_wait and parent is None:
            self.early.append(found)
        elif can_place or can_wait:
            self.waiting.append(found)

    def _is_known(self, group: int) -> bool:
        kind, window = self.groups[group]
        return kind in FULL_KINDS or (kind in SLIDING_KINDS and bool(window))

    def _fits(self, size: int) -> bool:
        return size % self.model.block_size == 0 or self.model.block_size % size == 0

    def _learn_size(self, event: Stored, size: int) -> None:
        """A block that comes alone may be a partial one, unless its size is one that engines have."""
        if len(event.hashes) > 1 or size & (size - 1) == 0:
            self.model.block_size = size
        elif event.parent is not None:
            built_on = [
                claim.size
                for (group, _, value), claim in self.counts.items()
                if value == normal(event.parent) and (self._is_known(group) or self.groups[group][0] == "mamba")
            ]
            self.model.block_size = next(filter(None, built_on), 0)

    def _knows(self, value: Hash | None, size: int) -> bool:
        """Whether a block of this size can follow."""
        if value is None:
            return True
        return (size < self.model.block_size and (value, size) in self.parts) or self.key_of(value) != 0

    def _held(self, value: Hash) -> bool:
        return any(other == value for _, _, other in self.counts)

    def _claim(self, name: tuple[int, str, Hash], size: int) -> None:
        if name not in self.counts:
            self.counts[name] = Claim(1, size)
            return
        claim = self.counts[name]
        claim.count += 1
        if size and claim.size != size:
            # Of blocks of two sizes under one name only what both hold is sure.
            if size < claim.size:
                claim.keys, claim.is_part = None, False
            claim.size = min(size, claim.size or size)

    def _size_of(self, group: int, value: Hash) -> int:
        """The size of a block that nobody has told."""
        if self.groups[group][0] == "mamba":
            return self.model.block_size
        claimed = [claim.size for (of, _, other), claim in self.counts.items() if (of, other) == (group, value)]
        own = [size for (of, _), size in self.sizes.items() if of == group]
        return min(filter(None, claimed), default=0) or min(own, default=self.model.block_size)

    def _settle(self, value: Hash, key: int) -> None:
        """Try every claim of a hash."""
        canonical = self.model.block_size
        if not canonical:
            return
        for (group, _, other), claim in self.counts.items():
            if other != value or claim.resolved:
                continue
            size = claim.size or self._size_of(group, value)
            if size < canonical:
                claim.is_part = (value, size) in self.parts
            elif key and size % canonical == 0:
                width = size // canonical - 1
                before = self.spans.get(key, [])
                if len(before) < width:
                    continue
                claim.keys = [*before[len(before) - width :], key]
            if claim.resolved:
                claim.size = size

    def _tell(self, keys: list[int]) -> None:
        *before, key = keys
        if len(before) > len(self.spans.get(key, [])):
            self.spans[key] = before

    def _guess(self, found: Range) -> None:
        """A range that does not say where its hashes stand: they may be at the end of any block."""
        items = found.items[0] if found.items else []
        if not found.hashes or any(kind in (MM, EMBEDS) for kind, _ in items):
            return
        key = None if found.parent is None else self.key_of(found.parent)
        later = encode([each for each in items if each[0] != SALT])
        first = encode(items) if found.parent is None else later
        for tokens in found.blocks:
            blocks = split_blocks(tokens, self.model.block_size)
            keys = chain_keys(blocks, [first] + [later] * (len(blocks) - 1), self.model.seed, key)
            key, first = keys[-1], later
            self._tell(keys)

    def _place(self, found: Range, parent: int | None) -> None:
        """Takes in a range after the key of its parent, which is 0 when that ends inside a block."""
        if not self._fits(found.size):
            return
        steps = self._parts if found.size < self.model.block_size else self._blocks
        for value, key in steps(found, parent):
            self._settle(value, key)
            # Only a block that is held tells others its key: a removed one may come back as another.
            if self._held(value):
                self._adopt(value, key, found.size)

    def _adopt(self, value: Hash, key: int, size: int) -> None:
        """A block that has no key ends inside a canonical one: only blocks of its own size can follow."""
        self.known.append((value, key, size))
        if len(self.known) > 1:
            return  # the range that is being placed comes first
        while self.known:
            value, key, size = self.known[-1]
            adopted = [orphan for orphan in self.waiting if orphan.parent == value and (key or orphan.size == size)]
            self.waiting = [orphan for orphan in self.waiting if orphan not in adopted]
            for orphan in adopted:
                self._place(orphan, key)
            self.known.remove((value, key, size))

    def _blocks(self, found: Range, key: int | None) -> Iterator[tuple[Hash, int]]:
        canonical = self.model.block_size
        for value, tokens, items in zip(found.hashes, found.blocks, found.items, strict=True):
            blocks = split_blocks(tokens, canonical)
            if len(blocks) > 1 and any(kind in (MM, EMBEDS) for kind, _ in items):
                return  # nobody can tell which of its canonical blocks they touch
            later = [each for each in items if each[0] != SALT]
            extras = [encode(items)] + [encode(later)] * (len(blocks) - 1)
            keys = chain_keys(blocks, extras, self.model.seed, key)
            key = keys[-1]
            self._tell(keys)
            yield value, key

    def _parts(self, found: Range, base: int | None) -> Iterator[tuple[Hash, int]]:
        before = None if found.parent is None else self.parts.get((found.parent, found.size))
        for value, tokens, items in zip(found.hashes, found.blocks, found.items, strict=True):
            so_far = before if before and before.key is None else Part((), (), (), before.key if before else base, None)
            known = so_far.items + tuple(each for each in items if each not in so_far.items)
            whole = (*so_far.tokens, *tokens)
            key = None
            if len(whole) == self.model.block_size:
                order = (LORA, LORA_ID, MM, SALT, EMBEDS)
                extra = encode(sorted(known, key=lambda each: order.index(each[0])))
                (key,) = chain_keys([whole], [extra], self.model.seed, so_far.base)
            before = self.parts[value, found.size] = Part((*so_far.members, value), whole, known, so_far.base, key)
            yield value, key or 0

    def _forget(self) -> None:
        """The batch is over: what no claim needs goes."""
        needed = {
            (member, claim.size)
            for (_, _, value), claim in self.counts.items()
            if claim.is_part
            for member in self.parts[value, claim.size].members
        }
        self.parts = {each: part for each, part in self.parts.items() if each in needed}
        wide = {claim.keys[-1] for claim in self.counts.values() if claim.keys and len(claim.keys) > 1}
        self.spans = {key: before for key, before in self.spans.items() if key in wide}
        self.gone.clear()

    def _remove(self, event: Removed) -> None:
        group, tier = event.group or 0, (event.medium or "gpu").lower()
        for value in map(normal, event.hashes):
            name = (group, tier, value)
            if name not in self.counts:
                self.unknown_removals += 1
                continue
            claim = self.counts[name]
            claim.count -= 1
            if claim.count == 0:
                key = self._key_in(value, claim)
                if key:
                    self.gone[value] = key
                del self.counts[name]

    def _doubt(self) -> None:
        """No key told so far is believed any more."""
        for claim in self.counts.values():
            claim.keys, claim.is_part = None, False
        for told in (self.spans, self.parts, self.gone, self.early, self.waiting):
            told.clear()

    def _drop(self) -> None:
        self.counts.clear()
        self.spans.clear()
        self.parts.clear()
        self.gone.clear()
        self.early.clear()
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

    def _key_in(self, value: Hash, claim: Claim) -> int:
        if claim.is_part:
            return self.parts[value, claim.size].key or 0
        return claim.keys[-1] if claim.keys else 0

    def key_of(self, value: Hash) -> int:
        """The key of an engine hash; 0 when there is none."""
        keys = [self._key_in(value, claim) for (_, _, other), claim in self.counts.items() if other == value]
        return next(filter(None, keys), 0)

    @property
    def unresolved(self) -> int:
        """Claims of which nobody knows what they stand for."""
        return sum(not claim.resolved for claim in self.counts.values())

    def tiers_of(self) -> dict[int, dict[int, set[str]]]:
        """Key -> group -> tiers."""
        out: dict[int, dict[int, set[str]]] = {}
        for (group, tier, value), claim in self.counts.items():
            keys = claim.keys or []
            if claim.is_part:
                part = self.parts[value, claim.size]
                others = [self.counts.get((group, tier, each)) for each in part.members]
                if part.key is not None and all(
                    each is not None and each.is_part and each.size == claim.size for each in others
                ):
                    keys = [part.key]
            for key in keys:
                out.setdefault(key, {}).setdefault(group, set()).add(tier)
        return out

    def _valid(self, held: list[dict[int, set[str]]], length: int) -> bool:
        for group, (kind, window) in self.groups.items():
            if kind in FULL_KINDS:
                needed = range(length)
            elif kind in SLIDING_KINDS and window:
                reach = max(1, -(-(window - 1) // self.model.block_size))
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
