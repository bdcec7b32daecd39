"""Engine blocks that are several canonical blocks, or a part of one, lose no block and no removal."""

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgpack
import pytest

from kvindex_server._core import Index, Stream, block_keys

TIERS = ("GPU", "CPU")


def ids(tokens: list[int]) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


def keys_of(tokens: list[int], size: int, lora: str = "") -> list[int]:
    packed = block_keys(ids(tokens), size, lora_name=lora)
    return [int.from_bytes(packed[at : at + 8], "little") for at in range(0, len(packed), 8)]


@dataclass
class Block:
    """One engine block: its hash, and every token up to its end."""

    hash: int
    parent: "Block | None"
    prefix: list[int]
    children: list["Block"] = field(default_factory=list)

    def chain(self) -> list["Block"]:
        return [*(self.parent.chain() if self.parent else []), self]


class Model:
    """A tree of engine blocks, copies per (tier, hash), and what canonical blocks follow from them."""

    def __init__(self, rng: random.Random, engine_size: int, canonical: int, lora: str = "") -> None:
        self.rng, self.size, self.canonical, self.lora = rng, engine_size, canonical, lora
        self.names = itertools.count(1)
        self.blocks: list[Block] = []
        self.copies: Counter[tuple[str, int]] = Counter()

    def grow(self, parent: Block | None, count: int) -> list[Block]:
        """A new run of blocks below `parent`."""
        run = []
        for _ in range(count):
            prefix = [*(parent.prefix if parent else []), *self.rng.choices(range(5), k=self.size)]
            block = Block(self.rng.getrandbits(63) ^ next(self.names), parent, prefix)
            if parent:
                parent.children.append(block)
            self.blocks.append(block)
            run.append(block)
            parent = block
        return run

    def event(self, run: list[Block], tier: str) -> list[object]:
        first = run[0].parent
        tokens = run[-1].prefix[len(first.prefix) if first else 0 :]
        return [
            "BlockStored",
            [block.hash for block in run],
            first.hash if first else None,
            tokens,
            self.size,
            None,
            tier,
            self.lora or None,
        ]

    def expected(self) -> dict[int, set[str]]:
        """Per canonical key the tiers that hold it."""
        held: dict[int, set[str]] = {}
        for block in self.blocks:
            chain = block.chain()
            keys = keys_of(block.prefix, self.canonical, self.lora)
            for number, key in enumerate(keys):
                begin, end = number * self.canonical, (number + 1) * self.canonical
                touching = [each for each in chain if len(each.prefix) > begin and len(each.prefix) - self.size < end]
                for tier in TIERS:
                    if all(self.copies[tier, each.hash] for each in touching):
                        held.setdefault(key, set()).add(tier.lower())
        return held


def apply(stream: Stream, *events: object) -> dict[str, int]:
    return stream.apply([bytes(msgpack.packb([1.0, list(events), 0]))]).reasons


def actual(index: Index, model: Model) -> dict[int, set[str]]:
    keys = sorted({key for block in model.blocks for key in keys_of(block.prefix, model.canonical, model.lora)})
    found = index.holders(b"".join(key.to_bytes(8, "little") for key in keys), [])
    tiers = index.tiers
    held = zip(keys, found, strict=True)
    return {key: {tiers[tier] for _, _, tier, *_ in holders} for key, holders in held if holders}


SIZES = [(1, 16), (4, 16), (8, 16), (16, 16), (32, 16), (64, 16), (2, 2)]


def random_operations(
    engine_size: int, canonical: int, seed: int, between: Callable[[Index, Stream], tuple[Index, Stream]]
) -> None:
    """Growth by one block, branches, copies, two tiers, removals in any order, restorations, clears.

    `between` may put another index and stream in place of those at work, after each step.
    """
    rng = random.Random(seed * 1000 + engine_size)
    index = Index(canonical)
    stream = index.add_stream("pod", 0)
    model = Model(rng, engine_size, canonical, lora="adapter" if seed % 2 else "")
    for step in range(250):
        claimed = [block for block in model.blocks if any(model.copies[tier, block.hash] for tier in TIERS)]
        action = rng.random()
        tier = rng.choice(TIERS)
        if action < 0.45 or not claimed:
            parent = rng.choice(claimed) if claimed and rng.random() < 0.9 else None
            run = model.grow(parent, rng.choice((1, 1, 1, 3, 20 if engine_size < canonical else 2)))
            assert apply(stream, model.event(run, tier)) == {}
        elif action < 0.6:  # another copy, or a removed one restored, as an engine recomputes it
            stored = rng.choice(model.blocks)
            if stored.parent is not None and stored.parent not in claimed:
                continue
            run = [stored]
            assert apply(stream, model.event(run, tier)) == {}
        elif action < 0.98:
            held = sorted(key for key, copies in model.copies.items() if copies)
            for gone in rng.sample(held, min(len(held), rng.choice((1, 2, 8)))):
                assert apply(stream, ["BlockRemoved", [gone[1]], gone[0]]) == {}
                model.copies[gone] -= 1
            run = []
        else:
            apply(stream, ["AllBlocksCleared"])
            model.copies.clear()
            run = []
        for block in run:
            model.copies[tier, block.hash] += 1
        index, stream = between(index, stream)
        if step % 5 == 0 or step > 240:
            assert actual(index, model) == model.expected()
            assert stream.claims == sum(1 for copies in model.copies.values() if copies)
    stream.close()
    assert index.blocks == 0 and index.claims == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("engine_size", "canonical"), SIZES)
def test_random_operations_agree_with_the_model(engine_size: int, canonical: int, seed: int) -> None:
    """Whatever the engine's block size, the same blocks are held as in the model."""
    random_operations(engine_size, canonical, seed, lambda index, stream: (index, stream))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("engine_size", "canonical"), SIZES)
def test_any_order_of_arrival_ends_the_same(engine_size: int, canonical: int, seed: int) -> None:
    """Children before their parents wait, and are adopted with all that hangs on them."""
    rng = random.Random(seed)
    index = Index(canonical)
    stream = index.add_stream("pod", 0)
    model = Model(rng, engine_size, canonical)
    events = []
    for _ in range(12):
        run = model.grow(rng.choice([None, *model.blocks]), rng.randint(1, 8))
        events.append(model.event(run, "GPU"))
        for block in run:
            model.copies["GPU", block.hash] += 1
    rng.shuffle(events)
    for event in events:
        apply(stream, event)
    assert actual(index, model) == model.expected()
    assert stream.orphans == 0 and stream.unresolved == 0


def test_partial_block_is_held_but_matches_nothing() -> None:
    """A last block with fewer tokens than the engine's block size is counted, without a key, and costs no trust."""
    index = Index()
    stream = index.add_stream("pod", 0)
    assert apply(stream, ["BlockStored", [1], None, [1, 2, 3, 4], 4, None, "GPU"]) == {}
    assert apply(stream, ["BlockStored", [2], 1, [5, 6], 2, None, "GPU"]) == {}
    assert (stream.claims, stream.unresolved, index.block_size) == (2, 1, 4)
    assert apply(stream, ["BlockRemoved", [2], "GPU"]) == {}
    assert (stream.claims, stream.unresolved) == (1, 0)


def test_sizes_that_cannot_work_are_refused_loudly() -> None:
    """Neither a multiple nor a part: counted per block, held by engine hash only."""
    index = Index(16)
    stream = index.add_stream("pod", 0)
    assert apply(stream, ["BlockStored", [1, 2], None, [0] * 48, 24, None, "GPU"]) == {"block_size_mismatch": 2}
    assert index.blocks == 0 and stream.claims == 2
