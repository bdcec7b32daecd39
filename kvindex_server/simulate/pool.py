"""The block pool of a simulated engine: physical blocks, a prefix cache over them, and LRU eviction."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvindex_server.engine_hashes import wire_hash
from kvindex_server.simulate.events import Removed


@dataclass(slots=True, eq=False)
class Block:
    """One physical block. It keeps its hash, and can be hit, while it waits in the free queue."""

    number: int
    references: int = 0
    digest: bytes | None = None


@dataclass
class Pool:
    """`size` blocks. The free queue is in eviction order: the first is the next to lose its content."""

    size: int
    _free: OrderedDict[int, Block] = field(init=False)
    _cached: dict[bytes, dict[int, Block]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._free = OrderedDict((number, Block(number)) for number in range(self.size))

    @property
    def free(self) -> int:
        """Blocks that no request uses, cached ones included."""
        return len(self._free)

    def cached_prefix(self, digests: Sequence[bytes]) -> list[Block]:
        """The cached blocks of the longest prefix of `digests`; any one copy of each."""
        found = []
        for digest in digests:
            copies = self._cached.get(digest)
            if not copies:
                break
            found.append(next(iter(copies.values())))
        return found

    def idle(self, blocks: Sequence[Block]) -> int:
        """How many of these lie in the free queue."""
        return sum(block.references == 0 for block in blocks)

    def use(self, blocks: Sequence[Block]) -> None:
        """Another request uses these cached blocks."""
        for block in blocks:
            if block.references == 0:
                del self._free[block.number]
            block.references += 1

    def take(self, count: int) -> tuple[list[Block], list[Removed]]:
        """`count` blocks to fill, and the removals of what they held; the caller has checked `free`."""
        taken, removals = [], []
        for _ in range(count):
            _, block = self._free.popitem(last=False)
            if block.digest is not None:
                removals.append(Removed(wire_hash(block.digest)))
                self._forget(block)
            block.references = 1
            taken.append(block)
        return taken, removals

    def cache(self, block: Block, digest: bytes) -> None:
        """The block is full. Another block may hold the same content already: both are copies then."""
        block.digest = digest
        self._cached.setdefault(digest, {})[block.number] = block

    def release(self, blocks: Sequence[Block]) -> None:
        """A request is done with its blocks: the tail of its prefix becomes the first to be evicted."""
        for block in reversed(blocks):
            block.references -= 1
            if block.references == 0:
                self._free[block.number] = block

    def reset(self) -> bool:
        """Forget all content; False, and nothing done, while a request uses a block."""
        if self.free < self.size:
            return False
        for block in self._free.values():
            block.digest = None
        self._cached.clear()
        return True

    def resident(self) -> dict[int, int]:
        """Ground truth: physical copies by engine hash, as it stands on the wire."""
        return {wire_hash(digest): len(copies) for digest, copies in self._cached.items()}

    def _forget(self, block: Block) -> None:
        if block.digest is None:
            return
        copies = self._cached[block.digest]
        del copies[block.number]
        if not copies:
            del self._cached[block.digest]
        block.digest = None
