"""The requests of a stream that may have to go on over another connection: those without an answer are sent again."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any


class Feed:
    """Requests from an iterator of any speed, for one connection after another. Safe for threads.

    gRPC reads them on a thread of its own, and that of a lost connection may still wait for the iterator's next: what
    it gets then is not lost, but goes to the connection that follows.
    """

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._changed = threading.Condition()
        self._unanswered: deque[Any] = deque()
        self._answers = 0
        self._connection = 0
        self._pulling = False
        self._ended = False
        self._error: BaseException | None = None

    def connection(self) -> Iterator[Any]:
        """For a new connection, from the first request without an answer on; older ones get no more."""
        with self._changed:
            self._connection += 1
            self._changed.notify_all()
            return self._requests(self._connection, self._answers)

    def answered(self) -> bool:
        """The oldest request has its answer; False when there is none that waits for one."""
        with self._changed:
            if not self._unanswered:
                return False
            self._unanswered.popleft()
            self._answers += 1
            return True

    def close(self) -> None:
        """No connection gets anything more."""
        with self._changed:
            self._connection = 0
            self._changed.notify_all()

    @property
    def done(self) -> bool:
        """Every request has its answer, and there are no more."""
        with self._changed:
            return self._ended and self._error is None and not self._unanswered

    def _requests(self, connection: int, number: int) -> Iterator[Any]:
        while True:
            with self._changed:
                while self._connection == connection and self._pulling and number - self._answers >= self._length:
                    self._changed.wait()
                if self._connection != connection:
                    return
                if number - self._answers < self._length:
                    request = self._unanswered[number - self._answers]
                    number += 1
                elif self._error is not None:
                    raise self._error
                elif self._ended:
                    return
                else:
                    self._pulling, request = True, None
            if request is None:
                self._pull()
            else:
                yield request

    @property
    def _length(self) -> int:
        return len(self._unanswered)

    def _pull(self) -> None:
        found: list[Any] = []
        error: BaseException | None = None
        try:
            found.append(next(self._source))
        except StopIteration:
            pass
        except BaseException as caught:  # noqa: BLE001 - raised again to the connection that is there by then
            error = caught
        with self._changed:
            self._pulling, self._ended, self._error = False, not found, error
            self._unanswered.extend(found)
            self._changed.notify_all()


class AsyncFeed:
    """The same for one event loop."""

    def __init__(self, source: AsyncIterator[Any]) -> None:
        self._source = source
        self._unanswered: deque[Any] = deque()
        self._answers = 0
        self._ended = False
        self._next: asyncio.Task[None] | None = None

    async def connection(self) -> AsyncIterator[Any]:
        """For a new connection, from the first request without an answer on; the one before has been cancelled."""
        number = self._answers
        while True:
            if number - self._answers < len(self._unanswered):
                request = self._unanswered[number - self._answers]
                number += 1
                yield request
            elif self._ended:
                return
            else:
                # A lost connection cancels whoever waits here, and not the source's own next step.
                if self._next is None:
                    self._next = asyncio.create_task(self._pull())
                await asyncio.shield(self._next)

    def answered(self) -> bool:
        """The oldest request has its answer; False when there is none that waits for one."""
        if not self._unanswered:
            return False
        self._unanswered.popleft()
        self._answers += 1
        return True

    async def close(self) -> None:
        """No connection gets anything more."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)

    @property
    def done(self) -> bool:
        """Every request has its answer, and there are no more."""
        return self._ended and not self._unanswered

    async def _pull(self) -> None:
        # An error stays in the task, for the connection that is there by then.
        try:
            self._unanswered.append(await anext(self._source))
        except StopAsyncIteration:
            self._ended = True
        self._next = None
