"""Threads and permits of one kind of RPC, so that no kind can use up what another one needs."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc

_SWEEP_SECONDS = 1.0


class Lane(ThreadPoolExecutor):
    """The pool of one RPC for gRPC: counts its calls, lets `workers` of them work at once, gives up on silent ones.

    `permits` bounds the calls that work or wait; a call beyond it is to be refused, which `full` says.
    `threads` is more than `workers`, because a call holds a thread also while its message is still on the way.
    A call whose message does not come within `message_seconds` is cancelled: clients that open calls and send
    nothing would otherwise hold every thread. `gave_up` is called for each of them.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        workers: int,
        permits: int,
        message_seconds: float,
        gave_up: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(threads, name)
        self._permits = permits
        self._turns = threading.BoundedSemaphore(workers)
        self._counted = threading.Lock()
        self._here = threading.local()
        self._silent: dict[int, tuple[float, Any]] = {}
        self._message_seconds = message_seconds
        self._gave_up = gave_up
        self._closed = threading.Event()
        self.in_flight = 0
        threading.Thread(target=self._sweep, name=f"{name}-sweep", daemon=True).start()

    @property
    def full(self) -> bool:
        """Every permit is taken."""
        return self.in_flight >= self._permits

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As of an executor; gRPC calls it once per RPC."""
        with self._counted:
            self.in_flight += 1
        # gRPC hands the call over among the arguments; without it the call could not be ended from outside.
        call = next((each.call for each in args if hasattr(each, "call_details")), None)
        ticket = id(call)
        if call is not None:
            self._silent[ticket] = (time.monotonic() + self._message_seconds, call)
        try:
            future = super().submit(self._run, call, fn, *args, **kwargs)
        except RuntimeError:  # shut down
            self._done(ticket)
            raise
        future.add_done_callback(lambda _: self._done(ticket))
        return future

    def heard(self) -> None:
        """The message of the call that runs on this thread is there."""
        self._silent.pop(id(getattr(self._here, "call", None)), None)

    def waits(self) -> None:
        """The call that runs on this thread waits for its next message, for which it has as long again."""
        call = getattr(self._here, "call", None)
        if call is not None:
            self._silent[id(call)] = (time.monotonic() + self._message_seconds, call)

    def turn(self) -> contextlib.AbstractContextManager[object]:
        """Hold it while working; waits while `workers` others do."""
        return self._turns

    def close(self) -> None:
        """End the threads."""
        self._closed.set()
        self.shutdown(wait=False, cancel_futures=True)

    def _run(self, call: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._here.call = call
        try:
            return fn(*args, **kwargs)
        finally:
            self._here.call = None

    def _done(self, ticket: int) -> None:
        self._silent.pop(ticket, None)
        with self._counted:
            self.in_flight -= 1

    def _sweep(self) -> None:
        code = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        while not self._closed.wait(_SWEEP_SECONDS):
            now = time.monotonic()
            for ticket, (ends, call) in list(self._silent.items()):
                if now > ends and self._silent.pop(ticket, None) is not None:
                    call.cancel(code, "the request's message did not come in time")
                    if self._gave_up is not None:
                        self._gave_up()
