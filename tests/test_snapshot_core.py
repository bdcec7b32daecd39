"""A stream's state as bytes and back: whatever comes afterwards, nobody can tell that it was moved."""

import random
import struct

import pytest
from test_block_sizes import SIZES, Model, actual, apply, random_operations
from test_index_oracle import Fleet

from kvindex_server._core import Index, Stream


class MovingFleet(Fleet):
    """Engines whose whole index is now and then replaced by one made from snapshots."""

    def move(self) -> None:
        moved = Index(0, self.hash_seed)
        for engine in self.engines:
            stream = moved.add_stream(engine.oracle.pod, engine.oracle.rank)
            assert stream.restore(engine.native.snapshot())
            engine.native = stream
        if self.index.block_size:
            assert moved.learn_block_size(self.index.block_size) == self.index.block_size
        self.index = moved


@pytest.mark.parametrize("seed", range(24))
def test_a_moved_index_agrees_with_the_oracle(seed: int) -> None:
    """Copies, tiers, hybrid groups, mixed block sizes, orphans, unresolved claims, and all that follows from them."""
    fleet = MovingFleet(seed)
    for step in range(240):
        fleet.step()
        if step % 12 == 11:
            fleet.move()
            fleet.audit()
    for engine in fleet.engines:
        assert engine.native.close() == len(engine.oracle.counts)
    assert (fleet.index.claims, fleet.index.blocks) == (0, 0)


@pytest.mark.parametrize(("engine_size", "canonical"), SIZES)
def test_blocks_of_another_size_are_moved(engine_size: int, canonical: int) -> None:
    """Parts of a block and blocks of several keep what hangs on them."""
    rng = random.Random(engine_size)

    def between(index: Index, stream: Stream) -> tuple[Index, Stream]:
        if rng.random() < 0.8:
            return index, stream
        moved = Index(canonical)
        into = moved.add_stream("pod", 0)
        assert into.restore(stream.snapshot())
        return moved, into

    random_operations(engine_size, canonical, 1, between)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("engine_size", "canonical"), SIZES)
def test_orphans_are_moved(engine_size: int, canonical: int, seed: int) -> None:
    """Blocks that wait for their parent are still adopted when it comes after the move."""
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
    for number, event in enumerate(events):
        apply(stream, event)
        if number in (3, 7):
            index = Index(canonical)
            moved = index.add_stream("pod", 0)
            assert moved.restore(stream.snapshot())
            assert (moved.orphans, moved.unresolved) == (stream.orphans, stream.unresolved)
            stream = moved
    assert actual(index, model) == model.expected()
    assert stream.orphans == 0 and stream.unresolved == 0


def some_snapshot() -> bytes:
    fleet = Fleet(4)
    for _ in range(120):
        fleet.step()
    return max((engine.native.snapshot() for engine in fleet.engines), key=len)


def test_truncated_bytes_are_refused() -> None:
    """Every proper prefix, and one byte more; nothing is left behind."""
    snapshot = some_snapshot()
    for end in [*range(0, len(snapshot), 7), len(snapshot) - 1]:
        index = Index()
        stream = index.add_stream("pod", 0)
        assert not stream.restore(snapshot[:end])
        assert (index.claims, index.blocks, stream.claims, stream.orphans) == (0, 0, 0, 0)
    assert not index.add_stream("pod", 1).restore(snapshot + b"\0")
    assert index.add_stream("pod", 2).restore(snapshot)


def test_damaged_bytes_are_refused_or_harmless() -> None:
    """A file's checksum keeps damage away; should it come through, nothing dies and all can be taken back."""
    snapshot = some_snapshot()
    rng = random.Random(1)
    for _ in range(3000):
        damaged = bytearray(snapshot)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            damaged[at] = rng.choice([0, 1, 255, damaged[at] ^ 1 << rng.randrange(8)])
        index = Index()
        stream = index.add_stream("pod", 0)
        if not stream.restore(bytes(damaged)):
            assert (index.claims, index.blocks) == (0, 0)
        stream.close()
        assert (index.claims, index.blocks) == (0, 0)


def test_a_snapshot_that_does_not_fit_is_refused() -> None:
    """Another hash seed, another block size, a stream that knows something, no room, a closed stream."""
    index = Index(16)
    stream = index.add_stream("pod", 0)
    event = ["BlockStored", [1, 2], None, list(range(32)), 16, None, "GPU"]
    apply(stream, event)
    snapshot = stream.snapshot()
    assert not stream.restore(snapshot)
    assert not Index(16, seed=7).add_stream("pod", 0).restore(snapshot)
    assert not Index(32).add_stream("pod", 0).restore(snapshot)
    full = Index(16, max_claims=1)
    assert not full.add_stream("pod", 0).restore(snapshot) and full.claims == 0
    closed = Index(16).add_stream("pod", 0)
    closed.close()
    assert not closed.restore(snapshot)


def test_a_plain_claim_takes_sixteen_bytes() -> None:
    """The file of a large index is little more than its hashes and keys."""
    index = Index(16)
    stream = index.add_stream("pod", 0)
    count = 4096
    apply(stream, ["BlockStored", list(range(count)), None, list(range(count * 16)), 16, None, "GPU"])
    snapshot = stream.snapshot()
    assert len(snapshot) < count * 16 + 256
    assert struct.unpack_from("<I", snapshot)[0] == 2
