"""One engine: a block pool with a prefix cache and LRU eviction, one prefill at a time, decoding beside it."""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from fleet.requests import BLOCK, Request
from kvindex_server.simulate.events import Event, Removed, Stored


@dataclass(frozen=True, slots=True)
class Speed:
    """What the hardware does."""

    prefill_tokens_per_second: float = 8000.0
    """Of prompt tokens that are not cached."""
    overhead_seconds: float = 0.015
    """Per request before its prefill: tokenizing, scheduling, the first step."""
    seconds_per_output_token: float = 0.02


@dataclass(eq=False, slots=True)
class Running:
    """A request at an engine."""

    request: Request
    arrived: float
    expected_work: int
    """Prompt tokens that the router expected to be computed; what it counts as this pod's load."""
    pod: int
    held: int = 0
    """Blocks found in the cache."""
    private: int = 0
    """Blocks taken and not yet full."""


@dataclass(eq=False)
class Engine:
    """`at(seconds, action)` and `emit(pod, events)` are the simulation's; times are its clock's."""

    number: int
    blocks: int
    speed: Speed
    now: Callable[[], float]
    later: Callable[[float, Callable[[], None]], None]
    emit: Callable[[int, list[Event]], None]
    first_token: Callable[[Running, int], None]
    done: Callable[[Running], None]
    _empty: int = field(init=False)
    _idle: OrderedDict[int, None] = field(init=False, default_factory=OrderedDict)
    """Cached blocks that no request uses, the next to be evicted first."""
    _used: dict[int, int] = field(init=False, default_factory=dict)
    """Cached blocks in use, and by how many."""
    _waiting: deque[Running] = field(init=False, default_factory=deque)
    _prefilling: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._empty = self.blocks

    def submit(self, running: Running) -> None:
        """First come, first served."""
        self._waiting.append(running)
        self._next()

    def _next(self) -> None:
        if self._prefilling or not self._waiting:
            return
        running = self._waiting[0]
        request = running.request
        hits = self._cached(request)
        needed = -(-len(request.tokens) // BLOCK) - hits
        reused = sum(key in self._idle for key in request.keys[:hits])
        if needed > self._empty + len(self._idle) - reused:
            return  # until a request that is decoding gives its blocks back
        self._waiting.popleft()
        self._use(request, hits)
        self._take(needed)
        running.held, running.private = hits, needed
        # An engine always computes the last token of a prompt.
        cached = min(hits * BLOCK, request.prompt_tokens - 1)
        self._prefilling = True
        seconds = self.speed.overhead_seconds + (
            (request.prompt_tokens - cached) / self.speed.prefill_tokens_per_second
        )
        self.later(seconds, lambda: self._prefilled(running, cached))

    def _prefilled(self, running: Running, cached: int) -> None:
        self._prefilling = False
        self._fill(running, running.request.prompt_blocks)
        self.first_token(running, cached)
        self.later(running.request.output_tokens * self.speed.seconds_per_output_token, lambda: self._finished(running))
        self._next()

    def _finished(self, running: Running) -> None:
        request = running.request
        self._fill(running, len(request.keys))
        self._empty += running.private
        for key in reversed(request.keys):
            users = self._used[key] - 1
            if users:
                self._used[key] = users
            else:
                del self._used[key]
                self._idle[key] = None
        self.done(running)
        self._next()

    def _cached(self, request: Request) -> int:
        hits = 0
        for key in request.keys[: request.prompt_blocks]:
            if key not in self._used and key not in self._idle:
                break
            hits += 1
        return hits

    def _use(self, request: Request, hits: int) -> None:
        for key in request.keys[:hits]:
            self._idle.pop(key, None)
            self._used[key] = self._used.get(key, 0) + 1

    def _take(self, count: int) -> None:
        from_empty = min(count, self._empty)
        self._empty -= from_empty
        evicted: list[Event] = [Removed(self._idle.popitem(last=False)[0]) for _ in range(count - from_empty)]
        if evicted:
            self.emit(self.number, evicted)

    def _fill(self, running: Running, until: int) -> None:
        """Blocks up to `until` are full now: they join the cache, and the engine tells."""
        request, first = running.request, running.held
        if until <= first:
            return
        keys = request.keys[first:until]
        twice: list[Event] = []  # computed by two requests at once; one copy stays
        for key in keys:
            if key in self._idle or key in self._used:
                self._idle.pop(key, None)
                self._empty += 1
                twice.append(Removed(key))
            self._used[key] = self._used.get(key, 0) + 1
        running.held = until
        running.private -= len(keys)
        tokens = tuple(request.tokens[first * BLOCK : until * BLOCK])
        parent = request.keys[first - 1] if first else None
        self.emit(self.number, [Stored(tuple(keys), parent, tokens, BLOCK), *twice])
