"""Which endpoint is asked when, and whether a failure is tried again; no sockets, no clock of its own."""

import random
import threading
from collections.abc import Collection, Sequence

import grpc

from kvindex_client.errors import CallError, Pushback, Try
from kvindex_client.options import Options


class Endpoints:
    """What all calls of a client share: whose turn it is, which endpoint pauses until when, how many extra tries
    are left. Safe for threads."""

    def __init__(self, names: Sequence[str], options: Options, jitter: random.Random | None = None) -> None:
        if not names:
            raise ValueError("endpoints: at least one is needed")
        self.names = tuple(names)
        self._options = options
        self._jitter = jitter or random.Random()
        self._lock = threading.Lock()
        self._turn = 0
        self._until = [0.0] * len(names)
        self._strikes = [0] * len(names)
        self._budget = options.retry_budget

    def pick(self, now: float, avoid: Collection[int] = ()) -> int:
        """The next in turn that does not pause; if all do, the one whose pause ends first."""
        with self._lock:
            count = len(self.names)
            order = [(self._turn + step) % count for step in range(count)]
            choice = [each for each in order if each not in avoid] or order
            best = next((each for each in choice if self._until[each] <= now), None)
            if best is None:
                best = min(choice, key=lambda each: self._until[each])
            self._turn = (best + 1) % count
            return best

    def spare(self, now: float, avoid: Collection[int]) -> bool:
        """Whether there is one that neither pauses nor is among these."""
        return any(each not in avoid and until <= now for each, until in enumerate(self._until))

    def free_at(self, avoid: Collection[int]) -> float:
        """When `pick` has one that does not pause."""
        choice = [until for each, until in enumerate(self._until) if each not in avoid]
        return min(choice or self._until)

    def failed(self, endpoint: int, now: float, told: Pushback | None) -> None:
        """Let it pause: for as long as it said, else longer each time."""
        with self._lock:
            self._strikes[endpoint] += 1
            if told is not None and told.seconds >= 0:
                pause = told.seconds * self._jitter.uniform(1.0, 1.1)  # never earlier than it said
            else:
                grown = self._options.backoff * 2.0 ** min(self._strikes[endpoint] - 1, 30)
                pause = min(grown, self._options.backoff_max) * self._jitter.uniform(0.5, 1.0)
            self._until[endpoint] = max(self._until[endpoint], now + pause)

    def answered(self, endpoint: int) -> None:
        """It is well, and a part of an extra try is earned."""
        with self._lock:
            self._strikes[endpoint], self._until[endpoint] = 0, 0.0
            self._budget = min(self._budget + self._options.retry_ratio, self._options.retry_budget)

    def pay(self) -> bool:
        """Take one extra try, if there is one: a fleet in trouble is not asked twice as much."""
        with self._lock:
            if self._budget < 1.0:
                return False
            self._budget -= 1.0
            return True


class Race:
    """One call: its tries, one after another or side by side. Times are of one monotonic clock."""

    def __init__(self, endpoints: Endpoints, options: Options, now: float, timeout: float, *, read: bool) -> None:
        self.deadline = now + timeout
        self.failures: list[Try] = []
        self._endpoints = endpoints
        self._options = options
        self._read = read
        self._started = 0
        self._running: list[int] = []  # in the order of their start
        self._next: float | None = now
        self._paid = True  # the first try is free

    def start(self, now: float) -> int | None:
        """The endpoint of a try that begins now; None when none does."""
        if self._next is None or now < self._next:
            return None
        self._next = None
        # A hedge: only where it can help, and while there is budget.
        if not self._paid and not (self._endpoints.spare(now, self._running) and self._endpoints.pay()):
            return None
        endpoint = self._endpoints.pick(now, self._running)
        self._started += 1
        self._running.append(endpoint)
        if self._read and self._options.hedge_after is not None and self._started < self._options.tries:
            self._next, self._paid = now + self._options.hedge_after, False
        return endpoint

    def wake(self) -> float | None:
        """When `start` is to be asked again, if no try ends before; None when only a try's end changes anything."""
        return self._next

    def won(self, endpoint: int, now: float) -> None:
        """It answered. One that was asked before it and still has not pauses: else each of its turns costs a hedge."""
        self._endpoints.answered(endpoint)
        for slower in self._running[: self._running.index(endpoint)]:
            self._endpoints.failed(slower, now, None)

    def progressed(self, endpoint: int) -> None:
        """It gave a part of what was asked for, and goes on: from here on the tries are counted anew."""
        self._endpoints.answered(endpoint)
        self._started, self._running = 1, [endpoint]
        self.failures.clear()

    def lost(
        self, endpoint: int, code: grpc.StatusCode, message: str, told: Pushback | None, now: float
    ) -> CallError | None:
        """It failed; the error of the call when there is nothing left to hope for."""
        self._running.remove(endpoint)
        self.failures.append(Try(self._endpoints.names[endpoint], code, message))
        if not self._again(code, told):
            if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                self._endpoints.failed(endpoint, now, None)  # silent: others first for a while
            return CallError(self.failures)
        self._endpoints.failed(endpoint, now, told)
        if self._started < self._options.tries and not (told is not None and told.seconds < 0):
            at = max(now, self._endpoints.free_at(self._running))
            if at < self.deadline and self._endpoints.pay():
                self._next, self._paid = at, True
                return None
        return None if self._running else CallError(self.failures)

    def _again(self, code: grpc.StatusCode, told: Pushback | None) -> bool:
        """Whether the call may be asked again without doing anything twice, and whether that can help.

        A server that says when to try again has not begun. Without that, UNAVAILABLE may hide an answer that was
        lost, which matters to everything but reads; and RESOURCE_EXHAUSTED is a request that is too large.
        """
        if code is grpc.StatusCode.UNAVAILABLE:
            return self._read or told is not None
        return code is grpc.StatusCode.RESOURCE_EXHAUSTED and told is not None
