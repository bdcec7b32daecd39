"""How a router chooses: each policy says how many leading blocks of a prompt it believes each pod to hold."""

import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from fleet.requests import Request
from kvindex_server._core import Index
from kvindex_server.simulate.events import Encoding, Event, encode_batch


class Policy(Protocol):
    """What a router knows. `load` is prompt tokens each pod has still to compute, as the router expects."""

    name: str

    def choose(self, request: Request, load: Sequence[int], now: float) -> tuple[int, int]:
        """(pod, blocks it is believed to hold)."""

    def routed(self, request: Request, pod: int) -> None:
        """The request has been sent."""

    def told(self, pod: int, events: Sequence[Event]) -> None:
        """An engine's message has arrived."""


class Blind:
    """Knows nothing of caches."""

    def __init__(self, name: str, pods: int) -> None:
        self.name, self.pods = name, pods
        self._dice, self._turn = random.Random(1), 0

    def choose(self, request: Request, load: Sequence[int], now: float) -> tuple[int, int]:
        match self.name:
            case "random":
                return self._dice.randrange(self.pods), 0
            case "round robin":
                self._turn += 1
                return self._turn % self.pods, 0
            case "session affinity":
                return random.Random(request.session).randrange(self.pods), 0
        return _least([float(each) for each in load], self._dice), 0  # "least load"

    def routed(self, request: Request, pod: int) -> None: ...

    def told(self, pod: int, events: Sequence[Event]) -> None: ...


class Approximate:
    """Remembers what it has routed where: an LRU of blocks per pod, one memory per router replica."""

    def __init__(self, pods: int, capacity: int, routers: int, by_load: bool) -> None:
        self.name = "approximate" + (" + load" if by_load else "")
        self._memories = [[OrderedDict[int, None]() for _ in range(pods)] for _ in range(routers)]
        self._capacity, self._by_load = capacity, by_load
        self._dice, self._router = random.Random(1), 0

    def choose(self, request: Request, load: Sequence[int], now: float) -> tuple[int, int]:
        self._router = self._dice.randrange(len(self._memories))
        matches = [self._match(request, memory) for memory in self._memories[self._router]]
        return _pick(request, matches, load if self._by_load else None, self._dice)

    def routed(self, request: Request, pod: int) -> None:
        memory = self._memories[self._router][pod]
        for key in request.keys[: request.prompt_blocks]:
            memory[key] = None
            memory.move_to_end(key)
        while len(memory) > self._capacity:
            memory.popitem(last=False)

    def told(self, pod: int, events: Sequence[Event]) -> None: ...

    @staticmethod
    def _match(request: Request, memory: OrderedDict[int, None]) -> int:
        matched = 0
        for key in request.keys[: request.prompt_blocks]:
            if key not in memory:
                break
            matched += 1
        return matched


class Precise:
    """Asks this project's index, which is fed with the engines' own messages; every router asks the same one."""

    def __init__(self, pods: int, block: int, by_load: bool, place_seconds: float, name: str) -> None:
        self.name = name
        self._index = Index(block)
        self._streams = [self._index.add_stream(str(pod), 0) for pod in range(pods)]
        self._pods, self._by_load, self._place_seconds = pods, by_load, place_seconds
        self._dice, self._now = random.Random(1), 0.0

    def choose(self, request: Request, load: Sequence[int], now: float) -> tuple[int, int]:
        if self._place_seconds:
            self._index.advance_clock(now - self._now)
            self._index.sweep_placements()
            self._now = now
        matches = [0] * self._pods
        for pod, _, _, score, _, _ in self._index.score(request.prompt_keys, [], [1.0]):
            matches[int(pod)] = round(score)
        return _pick(request, matches, load if self._by_load else None, self._dice)

    def routed(self, request: Request, pod: int) -> None:
        if self._place_seconds:
            self._index.place(str(pod), 0, request.prompt_keys, self._place_seconds)

    def told(self, pod: int, events: Sequence[Event]) -> None:
        applied = self._streams[pod].apply([encode_batch(events, 0.0, 0, Encoding.MAP)])
        if applied.reasons:
            raise AssertionError(f"the index dropped something: {applied.reasons}")


def _pick(request: Request, matches: Sequence[int], load: Sequence[int] | None, dice: random.Random) -> tuple[int, int]:
    """Without load the longest match; with it, the pod with the least left to compute, this prompt included."""
    if load is None:
        costs = [float(-match) for match in matches]
    else:
        block = request.prompt_tokens / max(request.prompt_blocks, 1)
        costs = [waiting - match * block for waiting, match in zip(load, matches, strict=True)]
    pod = _least(costs, dice)
    return pod, matches[pod]


def _least(costs: Sequence[float], dice: random.Random) -> int:
    best = min(costs)
    return dice.choice([pod for pod, cost in enumerate(costs) if cost == best])
