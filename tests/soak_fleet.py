"""The engines of the soak: what each really holds, what it told, and what an index that was told so has to answer."""

import time
from collections.abc import Sequence

import msgpack
from event_encoding import Cleared, Event, Removed, Stored
from oracle import ModelOracle, query_keys

from kvindex_server import wire
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb

SIZE = 16
WEIGHTS = {"gpu": 1.0, "cpu": 0.8, "disk": 0.6}


class Engine:
    """A publisher without replay. `held` is the truth, in blocks from the front of each prompt; `told` is the oracle.

    The two differ where the index came late or lost a message, and `trust` is then what the index has to say.
    """

    def __init__(self, name: str, prompts: Sequence[Sequence[int]], first_hash: int = 1000) -> None:
        self.name = name
        self.socket = wire.publisher("tcp://127.0.0.1:*")
        self.endpoint = self.socket.endpoint
        self.sequence = 0
        self.lost = 0
        self._prompts = prompts
        self._first_hash = first_hash
        self._keys = [query_keys(tokens, SIZE) for tokens in prompts]
        self.held = [0] * len(prompts)
        self.joined()

    def joined(self) -> None:
        """Somebody has begun to listen and has heard nothing yet."""
        self.told = ModelOracle(SIZE).add_stream(self.name, 0)
        self.trust = pb.TRUST_COLD
        self._gap = False

    def store(self, prompt: int, blocks: int, lost: bool = False) -> None:
        """Up to so many blocks of it."""
        first = self.held[prompt]
        if blocks > first:
            parent = self._hashes(prompt, first - 1, first)[0] if first else None
            tokens = self._prompts[prompt][first * SIZE : blocks * SIZE]
            self.held[prompt] = blocks
            self._publish(Stored(self._hashes(prompt, first, blocks), parent, tokens, SIZE), lost)

    def evict(self, prompt: int, blocks: int, lost: bool = False) -> None:
        """Down to so many."""
        first = self.held[prompt]
        if blocks < first:
            self.held[prompt] = blocks
            self._publish(Removed(self._hashes(prompt, blocks, first)), lost)

    def clear(self) -> None:
        """Everything goes."""
        self.held = [0] * len(self._prompts)
        self._publish(Cleared())

    def say_nothing(self) -> None:
        """A batch without events."""
        self._publish(None)

    def restart(self) -> None:
        """Another life at the same address."""
        self.socket.close()
        ends = time.monotonic() + 20
        while True:  # for as long as somebody's outgoing connection happens to have the port
            time.sleep(0.05)
            try:
                self.socket = wire.publisher(self.endpoint)
                break
            except wire.BindError:
                assert time.monotonic() < ends
        self.sequence = 0
        self.held = [0] * len(self._prompts)

    @property
    def unsaid(self) -> bool:
        """A message was lost, and none has come since that would show it."""
        return self._gap

    def matched(self, prompt: int) -> int:
        """Leading blocks that an index which was told all this has to answer."""
        return self.told.match(self._keys[prompt], WEIGHTS).blocks

    def keys(self, prompt: int) -> list[int]:
        return self._keys[prompt]

    def _publish(self, event: Event | None, lost: bool = False) -> None:
        self.sequence += 1
        if lost:  # as by a full queue: the number is used up, the message is gone
            self.lost += 1
            self._gap = True
            return
        events = [] if event is None else [encode(event)]
        self.socket.send([b"", (self.sequence - 1).to_bytes(8, "big"), msgpack.packb([time.time(), events])])
        if self.trust == pb.TRUST_COLD:
            self.trust = pb.TRUST_EXACT if self.sequence == 1 else pb.TRUST_PARTIAL
        if self._gap:
            self.trust = pb.TRUST_STALE
            self._gap = False
        if isinstance(event, Cleared):
            self.trust = pb.TRUST_EXACT
        if event is not None:
            self.told.apply([event])

    def _hashes(self, prompt: int, begin: int, end: int) -> list[int]:
        per_prompt = len(self._prompts[0]) // SIZE
        return [self._first_hash + prompt * per_prompt + block for block in range(begin, end)]


def encode(event: Event) -> dict[str, object]:
    """As a map."""
    if isinstance(event, Stored):
        found: dict[str, object] = {"type": "BlockStored", "block_hashes": list(event.hashes)}
        found |= {"parent_block_hash": event.parent, "token_ids": list(event.tokens), "block_size": event.block_size}
        return found | {"medium": event.medium}
    if isinstance(event, Removed):
        return {"type": "BlockRemoved", "block_hashes": list(event.hashes), "medium": event.medium}
    return {"type": "AllBlocksCleared"}
