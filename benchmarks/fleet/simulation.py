"""The clock of the simulated fleet, and what one run of it gives."""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from fleet.engine import Engine, Running, Speed
from fleet.policies import Policy
from fleet.requests import BLOCK, Request
from kvindex_server.simulate.events import Event


class Load(Protocol):
    """Where requests come from."""

    def begin(self) -> Iterator[tuple[float, Request]]: ...

    def after(self, request: Request, now: float) -> tuple[float, Request] | None: ...


@dataclass(slots=True)
class Outcome:
    """Per answered request: time to the first token; over all: tokens asked and found."""

    first_token_seconds: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    believed_tokens: int = 0
    """What the router believed the chosen pods to hold."""

    @property
    def hit_ratio(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    def percentile(self, share: float) -> float:
        """Seconds."""
        ordered = sorted(self.first_token_seconds)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


class Simulation:
    """One load, one policy, `pods` equal engines; an engine's message arrives `lag` seconds after it was sent."""

    def __init__(self, load: Load, policy: Policy, pods: int, blocks: int, lag: float, speed: Speed) -> None:
        self.outcome = Outcome()
        self._load, self._policy, self._lag = load, policy, lag
        self._now, self._order = 0.0, itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._work = [0] * pods
        self._arrivals = load.begin()
        self._engines = [
            Engine(number, blocks, speed, lambda: self._now, self._later, self._emit, self._first_token, self._done)
            for number in range(pods)
        ]

    def run(self) -> Outcome:
        """Until the last answer."""
        self._next_arrival()
        while self._due:
            self._now, _, action = heapq.heappop(self._due)
            action()
        return self.outcome

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self._now + seconds, next(self._order), action))

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            moment, request = arrival
            self._later(moment - self._now, lambda: self._arrive(request, True))

    def _arrive(self, request: Request, first: bool) -> None:
        pod, believed = self._policy.choose(request, self._work, self._now)
        self._policy.routed(request, pod)
        work = max(request.prompt_tokens - believed * BLOCK, 0)
        self._work[pod] += work
        self.outcome.believed_tokens += believed * BLOCK
        self._engines[pod].submit(Running(request, self._now, work, pod))
        if first:
            self._next_arrival()

    def _first_token(self, running: Running, cached: int) -> None:
        self._work[running.pod] -= running.expected_work
        self.outcome.first_token_seconds.append(self._now - running.arrived)
        self.outcome.prompt_tokens += running.request.prompt_tokens
        self.outcome.cached_tokens += cached

    def _done(self, running: Running) -> None:
        following = self._load.after(running.request, self._now)
        if following is not None:
            moment, request = following
            self._later(moment - self._now, lambda: self._arrive(request, False))

    def _emit(self, pod: int, events: list[Event]) -> None:
        self._later(self._lag, lambda: self._policy.told(pod, events))
