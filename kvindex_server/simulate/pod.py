"""A simulated pod: one engine and its publisher on a thread of their own."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from kvindex_server.simulate.engine import Engine, Request
from kvindex_server.simulate.events import Encoding
from kvindex_server.simulate.publisher import Publisher

IDLE_WAIT_MS = 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of a request."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int


class SimulatedPod(threading.Thread):
    """Everything that touches engine or sockets runs on the pod's thread, in the order it was asked for."""

    def __init__(
        self,
        name: str,
        model: str,
        *,
        blocks: int = 1024,
        block_size: int = 16,
        encoding: Encoding = Encoding.MAP,
        step_seconds: float = 0.0,
        endpoint: str = "tcp://127.0.0.1:0",
        replay_endpoint: str = "tcp://127.0.0.1:0",
        rank: int = 0,
        buffer_steps: int = 10_000,
        seed: int = 0,
    ) -> None:
        super().__init__(name=f"engine-{name}-{rank}", daemon=True)
        self.pod = name
        self.model = model
        self.rank = rank
        self._step_seconds = step_seconds
        self._new_engine: Callable[[], Engine] = lambda: Engine(blocks, block_size, seed=seed)
        self._engine = self._new_engine()
        self._publisher = Publisher(
            f"kv@{name}@{model}",
            endpoint=endpoint,
            replay_endpoint=replay_endpoint,
            encoding=encoding,
            rank=rank,
            buffer_steps=buffer_steps,
        )
        self.endpoint = self._publisher.endpoint
        self.replay_endpoint = self._publisher.replay_endpoint
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: dict[Request, Future[Completion]] = {}
        self._halt = threading.Event()

    def generate(self, prompt: Sequence[int], output_tokens: int) -> Future[Completion]:
        """Queue a generation; its result comes when the last token is sampled and the events are out."""
        future: Future[Completion] = Future()

        def submit() -> None:
            try:
                self._open[self._engine.submit(prompt, output_tokens)] = future
            except ValueError as error:
                future.set_exception(error)

        self._commands.put(submit)
        return future

    def resident(self) -> dict[int, int]:
        """Ground truth between two steps: physical copies by engine hash."""
        return self._ask(lambda: self._engine.resident())  # noqa: PLW0108 - a restart replaces the engine

    def published(self) -> int:
        """Messages numbered so far in this life."""
        return self._ask(lambda: self._publisher.published)

    def reset(self) -> bool:
        """Empty the prefix cache if idle; announced with the next request's events only."""
        return self._ask(lambda: self._engine.reset())  # noqa: PLW0108 - likewise

    def lose(self, messages: int) -> None:
        """The next messages go missing; a replay still has them."""
        self._ask(lambda: self._publisher.lose(messages))

    def restart(self) -> None:
        """Kill the engine and start it again at the same addresses, with an empty cache."""
        self._ask(self._restart)

    def stop(self) -> None:
        """End the thread and close the sockets; open requests are cancelled."""
        self._halt.set()
        if self.ident is None:
            self._publisher.close()
        else:
            self.join()

    def run(self) -> None:
        """The engine's loop: commands, one step, its events, replay requests."""
        with contextlib.closing(self._publisher):
            while not self._halt.is_set():
                self._turn()
        self._cancel_open()

    def _turn(self) -> None:
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                break
        if not self._engine.busy:
            self._publisher.serve_replay(IDLE_WAIT_MS)
            return
        events, finished = self._engine.step()
        self._publisher.publish(events)
        for request in finished:
            completion = Completion(tuple(request.tokens), request.prompt_tokens, request.cached_tokens)
            self._open.pop(request).set_result(completion)
        self._publisher.serve_replay(0)
        if self._step_seconds:
            time.sleep(self._step_seconds)

    def _restart(self) -> None:
        self._cancel_open()
        self._engine = self._new_engine()
        self._publisher.restart()

    def _cancel_open(self) -> None:
        for future in self._open.values():
            future.cancel()
        self._open.clear()

    def _ask(self, action: Callable[[], T]) -> T:
        answer: Future[T] = Future()

        def act() -> None:
            try:
                answer.set_result(action())
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                answer.set_exception(error)

        self._commands.put(act)
        return answer.result(timeout=30)
