"""A simulated engine: schedules requests over its block pool step by step, as vLLM does."""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvindex_server.engine_hashes import block_hash, none_hash, wire_hash
from kvindex_server.simulate.events import Cleared, Event, Stored
from kvindex_server.simulate.pool import Block, Pool

VOCABULARY = 32_000
STEP_TOKENS = 2_048


@dataclass(slots=True, eq=False)
class Request:
    """One generation. `tokens` grows from the prompt by one with each sampled token."""

    tokens: list[int]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = -1
    """Prompt tokens found in the cache when the request was first scheduled; -1 before."""
    computed: int = 0
    digests: list[bytes] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """All its tokens are sampled."""
        return len(self.tokens) >= self.prompt_tokens + self.output_tokens


class Engine:
    """Used by one thread at a time. A step computes tokens for every running request it has room for."""

    def __init__(self, blocks: int, block_size: int = 16, *, hash_seed: str = "0", seed: int = 0) -> None:
        self.block_size = block_size
        self._pool = Pool(blocks)
        self._none_hash = none_hash(hash_seed)
        self._random = random.Random(seed)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        """A request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def load(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + len(self._running)

    def resident(self) -> dict[int, int]:
        """Ground truth: physical copies by engine hash."""
        return self._pool.resident()

    def submit(self, prompt: Sequence[int], output_tokens: int) -> Request:
        """Queue a generation."""
        if not prompt or output_tokens < 1:
            raise ValueError("a request has at least one prompt token and one output token")
        if self._blocks_for(len(prompt) + output_tokens) > self._pool.size:
            raise ValueError("the request is larger than the whole pool")
        request = Request(list(prompt), len(prompt), output_tokens)
        self._waiting.append(request)
        return request

    def reset(self) -> bool:
        """Empty the prefix cache, if idle. As in vLLM, the event comes only with the next step's."""
        if not self._pool.reset():
            return False
        self._events.append(Cleared())
        return True

    def step(self) -> tuple[list[Event], list[Request]]:
        """One scheduler step: the events it causes, in order, and the requests that it finished."""
        budget = STEP_TOKENS
        scheduled: list[tuple[Request, int]] = []
        preempted = False
        for request in list(self._running):
            # One may have been preempted for the sake of another before its turn came.
            if request not in self._running or budget == 0:
                continue
            count = min(len(request.tokens) - request.computed, budget)
            while not self._allocate(request, request.computed + count):
                preempted = True
                if self._preempt() is request:
                    break
            else:
                scheduled.append((request, count))
                budget -= count
        while self._waiting and budget and not preempted:
            request = self._waiting[0]
            admitted = self._admit(request, budget)
            if admitted == 0:
                break
            self._running.append(self._waiting.popleft())
            scheduled.append((request, admitted))
            budget -= admitted
        finished = self._compute([(r, count) for r, count in scheduled if r in self._running])
        events, self._events = self._events, []
        return events, finished

    def run(self) -> list[Event]:
        """Step until idle; all events."""
        events: list[Event] = []
        while self.busy:
            events += self.step()[0]
        return events

    def _compute(self, scheduled: list[tuple[Request, int]]) -> list[Request]:
        finished = []
        for request, count in scheduled:
            request.computed += count
            if request.computed == len(request.tokens):
                request.tokens.append(self._random.randrange(VOCABULARY))
            if request.finished:
                # The last sampled token is never computed: it has no place in a block.
                self._pool.release(request.blocks)
                request.blocks = []
                self._running.remove(request)
                finished.append(request)
        return finished

    def _admit(self, request: Request, budget: int) -> int:
        """Tokens to compute in its first step; 0 when there is no room yet."""
        self._hash_blocks(request)
        # At least one token must be computed to have something to sample from, hence the - 1: a prompt that
        # is block-aligned and cached to its end has its last block computed into another physical block.
        hit = self._pool.cached_prefix(request.digests[: (len(request.tokens) - 1) // self.block_size])
        cached = len(hit) * self.block_size
        count = min(len(request.tokens) - cached, budget)
        needed = self._blocks_for(cached + count) - len(hit)
        if self._pool.free - self._pool.idle(hit) < needed:
            return 0
        self._pool.use(hit)
        request.blocks = hit
        request.computed = cached
        if request.cached_tokens < 0:
            request.cached_tokens = cached
        self._allocate(request, cached + count)
        return count

    def _allocate(self, request: Request, tokens: int) -> bool:
        """Room for its first `tokens` tokens, and the events of it; False when there is none."""
        needed = self._blocks_for(tokens) - len(request.blocks)
        if needed > self._pool.free:
            return False
        if needed > 0:
            taken, removals = self._pool.take(needed)
            request.blocks += taken
            self._events += removals
        self._cache_full(request, request.computed // self.block_size, tokens // self.block_size)
        return True

    def _cache_full(self, request: Request, first: int, end: int) -> None:
        if first >= end:
            return
        self._hash_blocks(request)
        for number in range(first, end):
            self._pool.cache(request.blocks[number], request.digests[number])
        self._events.append(
            Stored(
                hashes=tuple(wire_hash(digest) for digest in request.digests[first:end]),
                parent=wire_hash(request.digests[first - 1]) if first else None,
                tokens=tuple(request.tokens[first * self.block_size : end * self.block_size]),
                block_size=self.block_size,
            )
        )

    def _preempt(self) -> Request:
        """Take the blocks of the request that came last; it starts over when there is room."""
        request = self._running.pop()
        self._pool.release(request.blocks)
        request.blocks = []
        request.computed = 0
        self._waiting.appendleft(request)
        return request

    def _hash_blocks(self, request: Request) -> None:
        size = self.block_size
        for start in range(len(request.digests) * size, len(request.tokens) - size + 1, size):
            parent = request.digests[-1] if request.digests else self._none_hash
            request.digests.append(block_hash(parent, request.tokens[start : start + size]))

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
