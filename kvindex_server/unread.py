"""Answers that clients have not taken yet: bounded in memory by ending the calls that have waited longest."""

import itertools
import threading
from collections.abc import Callable
from typing import Protocol

PER_CALL = 16384
COPIES = 2
"""What an answer costs while it waits: what gRPC keeps of the call, the answer, and gRPC's own copy of it."""


class Call(Protocol):
    """What is asked of a call; gRPC's context is one."""

    def add_callback(self, callback: Callable[[], None]) -> bool: ...
    def cancel(self) -> object: ...


class Unread:
    """Who reads takes an answer within milliseconds, so the oldest ones are those that nobody reads.

    gRPC gives a call's thread and permit back when its answer is handed over, and keeps the answer for as long as the
    client's window is closed: without a bound a few connections that read nothing would fill the memory.
    """

    def __init__(self, max_bytes: int, ended: Callable[[str], None]) -> None:
        """`ended` is called with the method of each call that was ended."""
        self._max_bytes = max_bytes
        self._ended = ended
        self._lock = threading.Lock()
        self._tickets = itertools.count()
        self._waiting: dict[int, tuple[str, int, Call]] = {}  # oldest first
        self.bytes = 0

    def add(self, method: str, size: int, call: Call) -> None:
        """An answer of `size` bytes is about to be sent; it counts until the call is over."""
        ticket = next(self._tickets)
        size = COPIES * size + PER_CALL
        with self._lock:
            self._waiting[ticket] = method, size, call
            self.bytes += size
        if not call.add_callback(lambda: self._over(ticket)):
            self._over(ticket)
        while self.bytes > self._max_bytes and self._end_oldest(before=ticket):
            pass

    def _over(self, ticket: int) -> None:
        with self._lock:
            found = self._waiting.pop(ticket, None)
            if found is not None:
                self.bytes -= found[1]

    def _end_oldest(self, before: int) -> bool:
        with self._lock:
            oldest = next(iter(self._waiting), before)
            if oldest >= before:
                return False
            method, size, call = self._waiting.pop(oldest)
            self.bytes -= size
        call.cancel()
        self._ended(method)
        return True
