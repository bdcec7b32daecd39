"""The optional transport: Score through pygrpc-native, every other RPC through the grpcio server behind it."""

import logging
import os
import threading
import time
from typing import Any

import grpc

from kvindex_server import logs
from kvindex_server._core import ScoreRequest
from kvindex_server.auth import Role
from kvindex_server.direct import Direct
from kvindex_server.errors import DeadlineExceeded, KvindexError, Overloaded, ResourceExhausted
from kvindex_server.interceptors import MAX_MESSAGE, MAX_PING_MS, Guard, retry_trailers
from kvindex_server.lookup import Check

_logger = logging.getLogger(__name__)

_LARGE = 256 * 1024
"""Bytes of a request that is worked on by a thread of its own, so that small ones do not wait for it."""
_BATCH = 4096


class TransportMissing(Exception):
    """The package pygrpc-native is not installed."""


class Front:
    """One port; one thread answers, as each answer takes some ten microseconds and most of them without the GIL.

    Calls that arrived while the last ones were answered come as one batch: what is above `max_in_flight` in it is
    refused at once, before any is worked on.
    """

    def __init__(
        self,
        address: str,
        fallback: str,
        guard: Guard,
        method: str,
        direct: Direct,
        *,
        max_message_bytes: int,
        max_calls_per_connection: int,
        max_metadata_bytes: int,
        max_in_flight: int,
        keepalive_seconds: float,
    ) -> None:
        """OSError when the address cannot be bound. `fallback`: path of the socket of the grpcio server."""
        try:
            import pygrpc_native  # noqa: PLC0415  an optional extra
        except ImportError as error:
            raise TransportMissing("install kvindex-server[native-transport]") from error
        self._call_event = pygrpc_native.EVENT_CALL
        self._guard = guard
        self._method = method
        self._direct = direct
        self._max_message_bytes = max_message_bytes
        self._small = min(_LARGE, max_message_bytes)
        self._max_in_flight = max_in_flight
        self._lane = guard.lane("front", max_in_flight)
        self._work = self._one if guard.spans is None else self._traced
        self._front = pygrpc_native.NativeGrpcFront(
            address,
            [(method, False)],
            call_details=True,
            max_concurrent_streams=max_calls_per_connection,
            max_metadata_size=max_metadata_bytes,
            # Beside the thread that answers; on two cores a second one only hands work to the first.
            io_threads=1 if len(os.sched_getaffinity(0)) <= 2 else 2,
            keepalive_time_ms=int(keepalive_seconds * 1000),
            keepalive_timeout_ms=min(int(keepalive_seconds * 1000), MAX_PING_MS),
            keepalive_permit_without_calls=True,
        )
        self._front.set_fallback(fallback)
        self.port: int = self._front.bound_port
        self._thread = threading.Thread(target=self._serve, name="front", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._front.start()
        self._thread.start()

    def stop(self) -> None:
        """Close the port; calls at work are cut off, so the servers behind it are drained first."""
        self._front.close()
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        front, direct, ok = self._front, self._direct, grpc.StatusCode.OK
        while (events := front.recv_batch_details(_BATCH)) is not None:
            arrived = time.perf_counter()  # of all of them: a call that waits for those before it waits here too
            calls = [each for each in events if each[0] == self._call_event]  # others say that a caller went away
            if len(calls) > self._max_in_flight:
                for _, call, *_ in calls[self._max_in_flight :]:
                    self._refuse(call, arrived)
                del calls[self._max_in_flight :]
            plain = self._guard.spans is None and self._guard.open_to_all(Role.READ)
            for _, call, _, message, _, details in calls:
                try:
                    assert message is not None and details is not None  # as every call has
                    # What most calls are: nobody to ask who it is, no text, time left. The rest is looked at closely.
                    remaining = details[2]
                    if plain and len(message) <= self._small and (remaining is None or self._left(arrived, remaining)):
                        answer = direct.plain(message)
                        if answer is not None:
                            front.respond(call, answer)
                            self._guard.observe(self._method, ok, arrived)
                            continue
                    self._take(call, message, details, arrived)
                except Exception as error:  # noqa: BLE001 - this thread answers everybody
                    logs.event(_logger, logging.ERROR, "call failed", error=type(error).__name__)
                    self._fail(call, KvindexError("internal error"), arrived)

    @staticmethod
    def _left(arrived: float, remaining: float) -> bool:
        return time.perf_counter() - arrived < remaining

    def _refuse(self, call: int, arrived: float) -> None:
        self._guard.shed(self._method, "in_flight")
        self._fail(call, Overloaded("too many calls of this kind in flight"), arrived)

    def _take(self, call: int, payload: bytes, details: Any, arrived: float) -> None:
        request = self._direct.read(payload)
        # Text is tokenized, and what the native core does not take is worked on in Python.
        at_length = request is None or request.is_prompt or request.is_chat or len(payload) > _LARGE
        if at_length and self._lane.full:
            self._refuse(call, arrived)
        elif at_length:
            self._lane.submit(self._turn, call, payload, request, details, arrived)
        else:
            self._work(call, payload, request, details, arrived)

    def _turn(self, call: int, payload: bytes, request: ScoreRequest | None, details: Any, arrived: float) -> None:
        with self._lane.turn():
            self._work(call, payload, request, details, arrived)

    def _traced(self, call: int, payload: bytes, request: ScoreRequest | None, details: Any, arrived: float) -> None:
        assert self._guard.spans is not None
        with self._guard.spans.call(self._method, details[0]):
            self._one(call, payload, request, details, arrived)

    def _one(self, call: int, payload: bytes, request: ScoreRequest | None, details: Any, arrived: float) -> None:
        metadata, _, remaining = details
        try:
            refusal = self._guard.at_arrival(self._method, Role.READ, metadata)
            if refusal is not None:
                raise refusal
            if len(payload) > self._max_message_bytes:
                raise ResourceExhausted(f"the message is larger than {self._max_message_bytes} bytes")
            check = self._checker(arrived, remaining)
            check()
            answer = self._guard.answer(self._method, lambda: self._direct.answer(payload, request, check))
        except KvindexError as error:
            self._fail(call, error, arrived)
            return
        self._front.respond(call, answer)
        self._guard.observe(self._method, grpc.StatusCode.OK, arrived)

    def _fail(self, call: int, error: KvindexError, arrived: float) -> None:
        message = error.message[:MAX_MESSAGE]
        trailers = None
        if error.retry_seconds:
            # Of the two ways to say it only the standard's own is let through: the other's name is reserved here.
            trailers = retry_trailers(error.code, message, error.retry_seconds)[:1]
        self._front.fail(call, error.code.value[0], message, trailers)
        self._guard.observe(self._method, error.code, arrived)

    def _checker(self, arrived: float, remaining: float | None) -> Check:
        def check() -> None:
            if remaining is not None and time.perf_counter() - arrived >= remaining:
                self._guard.shed(self._method, "deadline")
                raise DeadlineExceeded("the deadline passed before the answer was ready")

        return check
