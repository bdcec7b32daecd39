"""A seeded workload of chats that share system prompts and grow turn by turn, and its routing to pods."""

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvindex_server.simulate.engine import VOCABULARY
from kvindex_server.simulate.pod import Completion, SimulatedPod


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in tokens; pairs are inclusive ranges."""

    system_prompts: int = 4
    system_tokens: int = 384
    sessions: int = 24
    turns: tuple[int, int] = (3, 10)
    user_tokens: tuple[int, int] = (24, 160)
    output_tokens: tuple[int, int] = (16, 64)


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of one chat: everything said so far, and the new message."""

    session: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(slots=True)
class _Session:
    number: int
    history: tuple[int, ...]
    turns_left: int


@dataclass
class Workload:
    """Turns in a seeded random order. A chat has one turn at a time under way; at its end another begins."""

    seed: int = 0
    shape: Shape = field(default_factory=Shape)
    system_prompts: Sequence[Sequence[int]] = ()
    """Token ids to begin with; made up when empty."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        if not self.system_prompts:
            self.system_prompts = [self._tokens(self.shape.system_tokens) for _ in range(self.shape.system_prompts)]
        self._started = 0
        self._ready = [self._new_session() for _ in range(self.shape.sessions)]
        self._under_way: dict[int, _Session] = {}

    def next_turn(self) -> Turn | None:
        """A turn of a chat that has none under way; None when all are waiting for an answer."""
        if not self._ready:
            return None
        session = self._ready.pop(self._random.randrange(len(self._ready)))
        self._under_way[session.number] = session
        prompt = (*session.history, *self._tokens(self._random.randint(*self.shape.user_tokens)))
        return Turn(session.number, prompt, self._random.randint(*self.shape.output_tokens))

    def finish(self, turn: Turn, tokens: Sequence[int]) -> None:
        """The turn was answered: prompt and answer are what the chat goes on from."""
        session = self._under_way.pop(turn.session)
        session.history = tuple(tokens)
        session.turns_left -= 1
        self._ready.append(session if session.turns_left else self._new_session())

    def abandon(self, turn: Turn) -> None:
        """The turn failed; its chat ends."""
        del self._under_way[turn.session]
        self._ready.append(self._new_session())

    def _new_session(self) -> _Session:
        self._started += 1
        system = self._random.choice(self.system_prompts)
        return _Session(self._started, tuple(system), self._random.randint(*self.shape.turns))

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(VOCABULARY) for _ in range(count)]


Route = Callable[[Turn], str]
"""Chooses the pod, by its name, that answers a turn."""
Served = Callable[[Turn, str, Completion], None]
"""Told of each turn that a pod has answered."""


def by_session(pods: Sequence[str]) -> Route:
    """The same pod for every turn of a chat."""
    return lambda turn: pods[turn.session % len(pods)]


@dataclass(slots=True)
class Tally:
    """What the engines themselves report of the turns answered."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Count one."""
        self.requests += 1
        self.prompt_tokens += completion.prompt_tokens
        self.cached_tokens += completion.cached_tokens

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens that needed no computation."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass
class Traffic:
    """Sends the workload's turns to pods and keeps count of what they found in their caches."""

    workload: Workload
    pods: Mapping[str, SimulatedPod]
    route: Route
    served: Served | None = None

    def __post_init__(self) -> None:
        self.total = Tally()
        self.by_pod = {name: Tally() for name in self.pods}
        self._under_way: list[tuple[Turn, str, Future[Completion]]] = []

    @property
    def under_way(self) -> int:
        """Requests not answered yet."""
        return len(self._under_way)

    def load(self, pod: str) -> int:
        """Requests that a pod has not answered yet."""
        return sum(name == pod for _, name, _ in self._under_way)

    def send(self) -> bool:
        """One more turn; False when every chat has one under way."""
        turn = self.workload.next_turn()
        if turn is None:
            return False
        try:
            pod = self.route(turn)
        except BaseException:
            self.workload.abandon(turn)
            raise
        self._under_way.append((turn, pod, self.pods[pod].generate(turn.prompt, turn.output_tokens)))
        return True

    def collect(self) -> None:
        """Take what has been answered."""
        waiting = []
        for turn, pod, future in self._under_way:
            if not future.done():
                waiting.append((turn, pod, future))
            elif future.cancelled() or future.exception() is not None:
                self.workload.abandon(turn)
            else:
                completion = future.result()
                self.total.add(completion)
                self.by_pod[pod].add(completion)
                if self.served is not None:
                    self.served(turn, pod, completion)
                self.workload.finish(turn, completion.tokens)
        self._under_way = waiting
