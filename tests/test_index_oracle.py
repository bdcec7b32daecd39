"""Random operation streams: after every step the native index agrees with the oracle."""

import hashlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from event_encoding import (
    VLLM_LENGTHS,
    Cleared,
    Event,
    Hash,
    Removed,
    Stored,
    as_array,
    as_map,
    batch,
    shortest_array,
)
from oracle import MmFeature, ModelOracle, StreamOracle, query_keys

from kvindex_server._core import Index, Stream, block_keys, xxh3_64

BLOCK = 4
ALL_ONES = 2**64 - 1


def mixed(value: int) -> int:
    """SplitMix64's output for a state."""
    value = value + 0x9E3779B97F4A7C15 & ALL_ONES
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & ALL_ONES
    value = (value ^ value >> 27) * 0x94D049BB133111EB & ALL_ONES
    return value ^ value >> 31


def digest_of(held: set[tuple[int, int, str]]) -> int:
    """The digest of (key, group, tier), taken from scratch."""
    sums: dict[tuple[int, str], int] = {}
    for key, group, tier in held:
        sums[group, tier] = sums.get((group, tier), 0) + mixed(key) & ALL_ONES
    named = [mixed(total ^ mixed(xxh3_64(tier.encode()) + group & ALL_ONES)) for (group, tier), total in sums.items()]
    return sum(named) & ALL_ONES


WEIGHTS = {"gpu": 1.0, "cpu": 0.75, "disk": 0.5}
TIERS = ("GPU", "gpu", "CPU", "Disk", "DISK", None)
RARE_TIERS = ("CPU_PINNED", "EXTERNAL", "Storage")
Groups = dict[int, tuple[str | None, int | None]]
PLAIN: Groups = {0: (None, None)}
LAYOUTS: tuple[Groups, ...] = (
    PLAIN,
    PLAIN,
    PLAIN,
    {0: ("full_attention", None)},
    {0: ("full_attention", None), 1: ("sliding_window", 9)},
    {0: ("sliding_window", 6), 1: ("mla_attention", None)},
    {0: ("sliding_window_mla", 5)},
    {0: ("sink_full_attention", None), 2: ("mamba", None)},
    {0: ("full_attention", None), 1: ("chunked_local_attention", None)},
    {0: ("sliding_window", 1)},
    {0: ("full_attention", None), 1: ("sliding_window", 1)},
    {0: ("full_attention", None), 1: ("sliding_window", 0)},
)


def words(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def token_bytes(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@dataclass(frozen=True)
class Chain:
    """A prompt with all that makes its blocks what they are."""

    tokens: tuple[int, ...]
    lora_name: str = ""
    lora_id: int | None = None
    salt: str = ""
    mm: tuple[MmFeature, ...] = ()
    embeds: bytes = b""

    def identity(self, end: int) -> bytes:
        """What distinguishes the prefix of `end` tokens."""
        touching = [name for name, offset, _ in self.mm if offset < end]
        rest = (self.lora_name, self.lora_id, self.salt, touching, self.embeds)
        return repr((self.tokens[:end], rest)).encode()

    def extra_keys(self, start: int, end: int, size: int, *, tagged: bool) -> list[list[object] | None]:
        """Per block of `size` tokens, in vLLM's order: LoRA, mm, salt, embeds."""
        entries: list[list[object] | None] = []
        for index in range(start, end):
            entry: list[object] = []
            if self.lora_name:
                entry.append(["lora", self.lora_name, "/a/path"] if tagged else self.lora_name)
            for name, offset, length in self.mm:
                if offset < (index + 1) * size and offset + length > index * size:
                    relative = offset - index * size
                    entry.append(["mm", name, relative] if tagged else [name, relative])
            if self.salt and index == 0:
                entry.append(["cache_salt", self.salt] if tagged else self.salt)
            if self.embeds:
                entry.append(["prompt_embeds", self.embeds] if tagged else self.embeds)
            entries.append(entry or None)
        return entries


def make_chains(rng: random.Random) -> list[Chain]:
    """Prompts that share prefixes."""
    pool = [tuple(rng.randrange(2**32) for _ in range(BLOCK)) for _ in range(5)]
    chains: list[Chain] = []
    for _ in range(5):
        start = rng.choice(chains).tokens[: rng.randrange(5) * BLOCK] if chains else ()
        tokens = start + sum((rng.choice(pool) for _ in range(rng.randint(2, 6))), ())
        chains.append(Chain(tokens))
    chains.append(Chain(sum((rng.choice(pool) for _ in range(12)), ())))  # room for several blocks of any size
    base = chains[0]
    chains += [
        replace(base, lora_name="sql-adapter"),
        replace(base, lora_id=3),
        replace(base, salt="tenant-A"),
        replace(chains[1], lora_name="sql-adapter", salt="tenant-B"),
        replace(base, mm=(("image-1", 3, 4), ("image-2", 9, 1))),
        replace(base, mm=(("image-1", 0, 2),), salt="tenant-A", lora_name="chat"),
        replace(base, embeds=b"digest-of-embeddings"),
    ]
    return chains


@dataclass
class Engine:
    """One simulated engine behind one stream, on both sides of the comparison."""

    rng: random.Random
    native: Stream
    oracle: StreamOracle
    chains: list[Chain]
    groups: Groups
    sizes: dict[int, int]  # of each group's blocks
    uneven: bool  # not of every tier's
    form: str = field(init=False)
    style: str = field(init=False)
    name: bytes = field(init=False)
    lists: bool = field(init=False)  # it lists extra keys though there are none, as vLLM does

    def __post_init__(self) -> None:
        self.form = self.rng.choice(("unsigned", "signed", "bytes32", "bytes16", "bytes8"))
        self.style = self.rng.choice(("array", "map", "both"))
        self.name = self.rng.randbytes(4)
        self.lists = self.rng.random() < 0.7

    def hash_of(self, chain: Chain, end: int, variant: int = 0) -> Hash:
        """Opaque, but the same for the same prefix of `end` tokens, whatever the size of the block that ends there."""
        data = self.name + bytes([variant]) + chain.identity(end)
        digest = hashlib.blake2b(data, digest_size=32).digest()
        if self.form.startswith("bytes"):
            return digest[: int(self.form[5:])]
        return int.from_bytes(digest[:8], "big", signed=self.form == "signed")

    def tier(self) -> str | None:
        return self.rng.choice(RARE_TIERS if self.rng.random() < 0.05 else TIERS)

    def stored(self) -> Stored:
        rng = self.rng
        group = rng.choice(list(self.groups))
        size, tier = self.sizes[group], self.tier()
        if self.uneven and rng.random() < 0.1:  # a connector that copies by larger chunks
            size, tier = size * 2, "CPU"
        chain = rng.choice([chain for chain in self.chains if len(chain.tokens) >= size])
        blocks = len(chain.tokens) // size
        start = 0 if rng.random() < 0.5 else rng.randrange(blocks)
        end = rng.randint(start + 1, blocks)
        kind, window = self.groups[group]
        variant = int(rng.random() < 0.05)
        hashes = [self.hash_of(chain, (index + 1) * size, variant) for index in range(start, end)]
        event = Stored(
            hashes,
            self.hash_of(chain, start * size, variant) if start else None,
            chain.tokens[start * size : end * size],
            size,
            tier,
            chain.lora_id,
            chain.lora_name or None,
            chain.extra_keys(start, end, size, tagged=rng.random() < 0.5),
            None if group == 0 and kind is None else group,
            kind,
            window,
        )
        if not self.lists and not any(event.extra_keys or ()):
            event = replace(event, extra_keys=None)
        # SGLang's maps have the salt as a field, and know neither images nor embeddings.
        if not (chain.mm or chain.embeds) and self.style == "map" and rng.random() < (0.1 if self.lists else 0.9):
            event = replace(event, extra_keys=None, cache_salt=chain.salt or None)
        match rng.random():
            case p if p < 0.08:  # placeholder of a connector
                return replace(event, tokens=[], block_size=0, extra_keys=None, medium="CPU", cache_salt=None)
            case p if p < 0.14:  # a sliding-window group: all tokens, few hashes
                kept = sorted(rng.sample(range(len(hashes)), rng.randrange(len(hashes))))
                return replace(event, hashes=[hashes[index] for index in kept], extra_keys=None)
            case p if p < 0.14 + (0.5 if tier == "CPU" and size != self.sizes[group] else 0.05) and (
                self.oracle.lists or not any(event.extra_keys or ())
            ):  # a connector that knows of no extra keys
                return replace(event, extra_keys=None)
            case p if p < 0.23:  # a block that is not full yet
                part = [self.hash_of(chain, (start + 1) * size, 7)]
                return replace(
                    event,
                    hashes=part,
                    block_size=size // 2,
                    tokens=event.tokens[: size // 2],
                    extra_keys=None,
                    cache_salt=None,
                )
        return event

    def removed(self) -> Event:
        rng = self.rng
        claims = list(self.oracle.counts)
        if not claims or rng.random() < 0.1:
            return Removed([self.hash_of(rng.choice(self.chains), 4, 9)], "GPU", None)
        group, tier, _ = rng.choice(claims)
        same = [value for other, name, value in claims if (other, name) == (group, tier)]
        hashes = [rng.choice(same) for _ in range(rng.choice((1, 1, 2, 5)))]
        medium = rng.choice((tier, tier.upper(), None)) if tier == "gpu" else tier.upper()
        return Removed(hashes, medium, group or rng.choice((0, None)))

    def events(self) -> list[Event]:
        rng = self.rng
        out: list[Event] = []
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            choice = rng.random()
            if choice < 0.01:
                out.append(Cleared())
            else:
                out.append(self.stored() if choice < 0.55 else self.removed())
            last = out[-1]
            if isinstance(last, Removed) and rng.random() < 0.2:  # what leaves the GPU is told to be elsewhere now
                out.append(Stored(last.hashes, None, [], 0, "CPU", group=last.group))
        return out

    def encode(self, events: list[Event]) -> bytes:
        rng = self.rng
        array = self.style == "array" or (self.style == "both" and rng.random() < 0.5)
        encoded: list[object] = []
        for event in events:
            salted = isinstance(event, Stored) and event.cache_salt
            if array and not salted:
                fitting = [length for length in VLLM_LENGTHS if length >= shortest_array(event)]
                encoded.append(as_array(event, rng.choice(fitting)))
            else:
                encoded.append(as_map(event, spare_nils=rng.random() < 0.7))
        shape = rng.choice(("array3", "array3", "array2", "map"))
        return batch(encoded, rng.choice((self.oracle.rank, None)), shape=shape)


class Fleet:
    """Several engines over one native index and one oracle."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.hash_seed = 1337 if seed % 3 else seed
        size = 0 if seed % 2 else BLOCK
        # Engines whose blocks are a multiple or a fraction of the canonical ones.
        self.mixed = {0: "sometimes", 1: "", 2: "", 3: "always"}[seed % 4]
        self.pool = (BLOCK, BLOCK, BLOCK // 2, BLOCK * 2) if seed % 8 < 6 else (12, 12, 6, 4, 24)
        self.index = Index(size, self.hash_seed)
        self.oracle = ModelOracle(size, self.hash_seed)
        self.chains = make_chains(self.rng)
        self.engines = [self.engine(pod, rank) for pod, rank in (("a:1", 0), ("a:1", 1), ("b:1", 0), ("c", 0))]

    def engine(self, pod: str, rank: int) -> Engine:
        groups = self.rng.choice(LAYOUTS)
        sizes = {group: self.rng.choice(self.pool) if self.mixed else BLOCK for group in groups}
        return Engine(
            self.rng,
            self.index.add_stream(pod, rank),
            self.oracle.add_stream(pod, rank),
            self.chains,
            groups,
            sizes,
            self.mixed == "always",
        )

    def step(self) -> None:
        """One random operation on both sides."""
        engine = self.rng.choice(self.engines)
        choice = self.rng.random()
        if choice < 0.01:
            assert engine.native.clear() == engine.oracle.clear()
        elif choice < 0.02:
            assert engine.native.close() == self.oracle.close(engine.oracle)
            assert engine.native.closed
            self.engines.remove(engine)
            self.engines.append(self.engine(engine.oracle.pod, engine.oracle.rank))
        else:
            payloads = []
            before, stored = engine.oracle.unknown_removals, 0
            for _ in range(self.rng.choice((1, 1, 2))):
                events = engine.events()
                payloads.append(engine.encode(events))
                engine.oracle.apply(events)
                stored += sum(isinstance(event, Stored) for event in events)
            applied = engine.native.apply(payloads)
            assert applied.messages == len(payloads)
            odd = engine.oracle.unknown_removals - before
            assert applied.reasons.get("unknown_removal", 0) == odd
            assert not {"bad_batch", "bad_event", "bad_field", "unknown_event"} & set(applied.reasons)

    def audit(self) -> None:
        """Everything that can be asked."""
        index, oracle = self.index, self.oracle
        assert index.block_size == oracle.block_size
        tiers = index.tiers
        for engine in self.engines:
            counts = engine.oracle.counts
            assert engine.native.claims == len(counts)
            by_tier = dict(zip(tiers, engine.native.claims_by_tier, strict=False))
            expected = {name: sum(tier == name for _, tier, _ in counts) for name in tiers}
            assert by_tier == expected
            assert engine.native.unresolved == engine.oracle.unresolved
            assert engine.native.digest == digest_of(engine.oracle.holdings())
        assert index.claims == sum(len(engine.oracle.counts) for engine in self.engines)
        holders = oracle.holders()
        assert index.blocks == sum(any(not speculative for *_, speculative in found) for found in holders.values())
        keys = sorted(holders)
        got = index.holders(words(keys), [])
        for key, found in zip(keys, got, strict=True):
            named = [(pod, rank, tiers[bit], group, speculative) for pod, rank, bit, group, speculative in found]
            assert len(named) == len(set(named))
            assert set(named) == holders[key], key
            assert found == sorted(found, key=lambda holder: (holder[0], holder[1], holder[3], holder[2]))
        if oracle.block_size:
            for _ in range(2):
                self.ask(tiers)

    def ask(self, tiers: list[str]) -> None:
        """A random prompt of a random client."""
        rng = self.rng
        chain = rng.choice(self.chains)
        tokens = list(chain.tokens[: rng.randint(0, len(chain.tokens))])
        if rng.random() < 0.2:
            tokens += [rng.randrange(1000) for _ in range(rng.randrange(9))]
        if rng.random() < 0.1 and tokens:
            tokens[rng.randrange(len(tokens))] += 1
            tokens = [token % 2**32 for token in tokens]
        pods = rng.sample(["a:1", "b:1", "c", "absent"], rng.randrange(5))
        size = self.index.block_size
        keys = query_keys(tokens, size, self.hash_seed, chain.lora_name, chain.salt, chain.mm)
        own = block_keys(token_bytes(tokens), size, self.hash_seed, chain.lora_name, chain.salt, list(chain.mm))
        assert own == words(keys)
        weights = [WEIGHTS[tier] for tier in tiers if tier in WEIGHTS]
        answer = self.index.score(own, pods, weights)
        by_tokens = self.index.score_tokens(
            token_bytes(tokens), pods, weights, chain.lora_name, chain.salt, list(chain.mm)
        )
        assert sorted(answer) == sorted(by_tokens)
        expected = self.oracle.matches(keys, WEIGHTS, pods)
        assert {pod for pod, *_ in answer} == set(expected)
        assert len(answer) == len(expected)
        for pod, rank, blocks, score, bits, speculative in answer:
            best = expected[pod][rank]
            assert (blocks, score, speculative) == (best.blocks, best.score, best.speculative)
            assert score == max(match.score for match in expected[pod].values())
            assert {tiers[bit]: count for bit, count in enumerate(bits) if count} == best.tiers


@pytest.mark.parametrize("seed", range(40))
def test_random_operations_agree_with_the_oracle(seed: int) -> None:
    """Whatever engines announce, in any order and encoding, answers are those of the slow model."""
    fleet = Fleet(seed)
    for _ in range(300):
        fleet.step()
        fleet.audit()
    for engine in fleet.engines:
        assert engine.native.close() == len(engine.oracle.counts)
    assert (fleet.index.claims, fleet.index.blocks) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_a_chain_arriving_in_any_order_is_adopted(seed: int) -> None:
    """However a chain's events are shuffled, the end is that of their natural order."""
    rng = random.Random(seed)
    tokens = [rng.randrange(2**32) for _ in range(BLOCK * 12)]
    events = [
        Stored([start + 1], start or None, tokens[start * BLOCK : (start + 1) * BLOCK], BLOCK) for start in range(12)
    ]
    rng.shuffle(events)
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    for event in events:
        stream.apply([batch([as_map(event)])])
    assert (stream.claims, stream.unresolved, stream.orphans) == (12, 0, 0)
    assert [score[:4] for score in index.score_tokens(token_bytes(tokens), [], [1.0, 0.5])] == [("p", 0, 12, 12.0)]


def test_a_hole_and_its_restoration_heal() -> None:
    """After a removal in the middle and its return the score is that of a fresh index."""
    tokens = list(range(1, BLOCK * 6 + 1))
    whole = batch([as_map(Stored([1, 2, 3, 4, 5, 6], None, tokens, BLOCK))])
    index, fresh = Index(), Index()
    stream, other = index.add_stream("p", 0), fresh.add_stream("p", 0)
    stream.apply([whole])
    other.apply([whole])
    ask = token_bytes(tokens)
    stream.apply([batch([as_map(Removed([3]))])])
    assert index.score_tokens(ask, [], [1.0])[0][2] == 2
    stream.apply([batch([as_map(Stored([3], 2, tokens[2 * BLOCK : 3 * BLOCK], BLOCK))])])
    assert index.score_tokens(ask, [], [1.0]) == fresh.score_tokens(ask, [], [1.0])
    assert index.claims == fresh.claims


def test_copies_are_counted() -> None:
    """A block announced twice is held until it is removed twice."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    stored = as_map(Stored([1], None, [1, 2, 3, 4], BLOCK))
    removed = as_map(Removed([1]))
    stream.apply([batch([stored, stored, removed])])
    assert stream.claims == 1
    applied = stream.apply([batch([removed, removed])])
    assert stream.claims == 0
    assert applied.reasons == {"unknown_removal": 1}


def test_a_fence_forgets_the_groups_of_the_dead_engine() -> None:
    """An engine restarted without its sliding-window group is not judged by it."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    stream.apply([batch([as_map(Stored([1], None, [1, 2, 3, 4], BLOCK, group=1, kind="mamba"))])])
    assert stream.clear() == 1
    stream.apply([batch([as_map(Stored([1], None, [1, 2, 3, 4], BLOCK))])])
    assert [score[2] for score in index.score_tokens(token_bytes([1, 2, 3, 4]), [], [1.0])] == [1]


def test_at_most_eight_tiers() -> None:
    """A flood of invented tiers is dropped and counted, and costs the known ones nothing."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    stored = Stored([1], None, [1, 2, 3, 4], BLOCK)
    applied = stream.apply([batch([as_map(replace(stored, medium=f"tier-{n}")) for n in range(300)])])
    assert index.tiers == ["gpu", "cpu", "disk", *(f"tier-{n}" for n in range(5))]
    assert applied.reasons["tier_limit"] == 295
    stream.apply([batch([as_map(stored)])])
    assert stream.claims == 6
    assert stream.claims_by_tier[0] == 1


def test_a_claim_limit_is_counted() -> None:
    """A full index refuses new claims, says so, and takes them again when there is room."""
    index = Index(BLOCK, max_claims=3)
    stream = index.add_stream("p", 0)
    tokens = list(range(BLOCK * 5))
    applied = stream.apply([batch([as_map(Stored([1, 2, 3, 4, 5], None, tokens, BLOCK))])])
    assert stream.claims == 3
    assert applied.reasons == {"claim_limit": 2}
    stream.apply([batch([as_map(Removed([3])), as_map(Stored([3], 2, tokens[2 * BLOCK : 3 * BLOCK], BLOCK))])])
    assert (stream.claims, index.score_tokens(token_bytes(tokens), [], [1.0])[0][2]) == (3, 3)


def test_a_claim_limit_of_a_stream_is_its_own() -> None:
    """One stream that is full refuses and says so, while another takes its blocks; room is used again."""
    index = Index(BLOCK, max_claims=5, max_claims_per_stream=3)
    full, other = index.add_stream("p", 0), index.add_stream("q", 0)
    tokens = list(range(BLOCK * 5))
    stored = batch([as_map(Stored([1, 2, 3, 4, 5], None, tokens, BLOCK))])
    assert full.apply([stored]).reasons == {"claim_limit": 2}
    assert full.apply([stored]).reasons == {"claim_limit": 2}  # copies of what is held count, and take no room
    assert other.apply([stored]).reasons == {"claim_limit": 3}  # of the model
    assert (full.claims, other.claims, index.claims) == (3, 2, 5)
    other.clear()
    full.apply([batch([as_map(Removed([3])), as_map(Removed([3]))])])
    assert full.apply([batch([as_map(Stored([3], 2, tokens[2 * BLOCK : 3 * BLOCK], BLOCK))])]).reasons == {}
    assert index.claims == full.claims + other.claims
    assert not Index(BLOCK, max_claims_per_stream=2).add_stream("p", 0).restore(full.snapshot())


def test_a_limit_of_bytes_is_counted() -> None:
    """An index as large as it may be refuses new claims and says so; copies of what is held cost nothing and count."""
    limit = 4 << 20
    index = Index(BLOCK, max_bytes=limit)
    stream = index.add_stream("p", 0)
    held = refused = 0
    for number in range(400):
        hashes = list(range(number * 1000 + 1, number * 1000 + 1001))
        tokens = [number * 1000 + i for i in range(BLOCK * 1000)]
        applied = stream.apply([batch([as_map(Stored(hashes, None, tokens, BLOCK))])])
        held += 1000 - applied.reasons.get("claim_limit", 0)
        refused += applied.reasons.get("claim_limit", 0)
        assert stream.claims == index.claims == held
    assert refused > 100_000
    # It stops at the limit, but for what one event may add: a slab of chunks and the tables' next size.
    assert limit <= index.bytes < limit + (4 << 20)
    applied = stream.apply([batch([as_map(Stored([1], None, list(range(BLOCK)), BLOCK))])])
    assert (applied.reasons, stream.claims) == ({}, held)
    # Room that is given back is used again.
    stream.clear()
    assert index.bytes < limit
    applied = stream.apply([batch([as_map(Stored([1], None, list(range(BLOCK)), BLOCK))])])
    assert (applied.reasons, stream.claims) == ({}, 1)


def test_a_group_of_unknown_kind_does_not_teach_the_block_size() -> None:
    """Its blocks may be of any size; the model's size is learned from a group that is understood."""
    index = Index()
    stream = index.add_stream("p", 0)
    tokens = list(range(8))
    strange = Stored([9], None, tokens, 8, group=1, kind="chunked_local_attention")
    applied = stream.apply([batch([as_map(strange), as_map(Stored([1, 2], None, tokens, 4))])])
    assert index.block_size == 4
    assert applied.reasons["unknown_group_kind"] >= 1
    assert index.score_tokens(token_bytes(tokens), [], [1.0]) == []  # fails closed


def test_parts_behind_a_removed_one_are_adopted() -> None:
    """Sub-blocks that waited for their parent are not lost because one before them is gone: it may come back."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    tokens = list(range(1, 9))  # two canonical blocks in four halves
    stream.apply([batch([as_map(Stored([2, 3, 4], 1, tokens[2:], 2)), as_map(Removed([2]))])])
    stream.apply([batch([as_map(Stored([1], None, tokens[:2], 2))])])
    assert stream.unresolved == 0
    stream.apply([batch([as_map(Stored([2], 1, tokens[2:4], 2))])])
    assert [score[2] for score in index.score_tokens(token_bytes(tokens), [], [1.0])] == [2]


def test_a_sliding_group_of_wide_blocks_holds_all_of_them() -> None:
    """A group whose events are resolved through another group's still holds every canonical block of its own."""
    index = Index(BLOCK)
    stream = index.add_stream("p", 0)
    tokens = list(range(1, 17))  # two engine blocks of 8, four canonical ones
    full = Stored([1, 2], None, tokens, 8, group=0, kind="full_attention")
    # Window 9 needs the 8 tokens before: the last engine block is all that the engine keeps.
    tail = Stored([2], None, tokens, 8, group=1, kind="sliding_window", window=9)
    for events in ([full, tail], [tail, full]):
        stream.clear()
        stream.apply([batch([as_map(event) for event in events])])
        assert [score[2] for score in index.score_tokens(token_bytes(tokens), [], [1.0])] == [4]


@pytest.mark.parametrize("seed", range(12))
def test_a_full_index_stays_consistent(seed: int) -> None:
    """Whatever arrives above the claim limit, in blocks of any size, is refused without harm to what is held."""
    rng = random.Random(seed)
    limit = rng.choice((1, 5, 60))
    fleet = Fleet(seed * 4 + 3)  # engines of all block sizes
    of_stream = rng.choice((0, 1, 20))
    index = Index(BLOCK, max_claims=limit, max_claims_per_stream=of_stream)
    streams = [index.add_stream(engine.oracle.pod, engine.oracle.rank) for engine in fleet.engines]
    for _ in range(200):
        number = rng.randrange(len(streams))
        events = fleet.engines[number].events()
        fleet.engines[number].oracle.apply(events)  # the generator removes what this one holds
        streams[number].apply([fleet.engines[number].encode(events)])
        if rng.random() < 0.02:
            streams[number].clear()
        assert index.claims == sum(stream.claims for stream in streams) <= limit
        assert all(sum(stream.claims_by_tier) == stream.claims for stream in streams)
        assert not of_stream or max(stream.claims for stream in streams) <= of_stream
    for stream in streams:
        stream.close()
    assert (index.claims, index.blocks) == (0, 0)


def test_a_stream_without_room_for_any_claim_survives_parts() -> None:
    """Sub-blocks of a stream that holds nothing, because the index is full, are refused and counted."""
    index = Index(BLOCK, max_claims=1)
    first, second = index.add_stream("a", 0), index.add_stream("b", 0)
    first.apply([batch([as_map(Stored([9], None, [1, 2, 3, 4], BLOCK))])])
    applied = second.apply([batch([as_map(Stored([1, 2], None, [1, 2, 3, 4], BLOCK // 2))])])
    assert applied.reasons == {"claim_limit": 2}
    assert (second.claims, index.claims, index.blocks) == (0, 1, 1)
