"""Stands before every RPC: who may call, readiness, permits, deadlines, error codes and metrics, in one place."""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from kvindex_server import logs
from kvindex_server.auth import Caller, Gate, Role
from kvindex_server.errors import (
    DeadlineExceeded,
    KvindexError,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from kvindex_server.lanes import Lane
from kvindex_server.lookup import Check
from kvindex_server.unread import Unread

logger = logging.getLogger(__name__)

Unary = Callable[[bytes, Check], bytes]
"""A handler: the request's bytes and the deadline check in, the answer's bytes out."""
Download = Callable[[bytes, Check], Iterator[bytes]]
"""The same with an answer in parts."""
Description = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]
"""Requests of one stream in, its answers out."""
Refusal = Callable[[int, str], bytes]
"""Makes the answer to one bad request of a stream, from status code and message."""
Arrival = Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler]
"""Decides on a call before its message is read, on gRPC's own thread: it must not wait for anything."""
Shed = Literal["in_flight", "not_ready", "deadline", "silent", "unread", "unauthenticated", "permission_denied"]
"""Why a call was turned away; a metric's label."""

MAX_MESSAGE = 512
"""Characters of a status message; it travels in a header, whose size is bounded by every client."""
IDLE_STREAM_SECONDS = 1.0
"""While draining, a stream that is silent for so long is ended."""
_UNBOUNDED = 1 << 30
MAX_PING_MS = 20_000
"""A connection whose client answers no ping for so long, or for as long as it was silent before, is closed."""
DOWNLOADS = 4
"""Long answers sent at once."""
IDENTIFY_SECONDS = 1.0
"""Who calls is asked again so often while a stream is used: its token or certificate may be withdrawn meanwhile."""
DESCRIPTIONS = 16
"""Streams at once that describe the services, per RPC."""
SPARE_THREADS = 28
"""Per RPC, for calls whose message is still on the way: they work at nothing yet."""


class RpcMetrics(Protocol):
    """What is measured of an RPC."""

    def observe_rpc(self, method: str, code: str, seconds: float) -> None: ...
    def shed(self, method: str, reason: str) -> None: ...
    def watch_in_flight(self, method: str, read: Callable[[], int]) -> None: ...


class Spans(Protocol):
    """What traces calls. Whoever traces none hands over None, and no call is wrapped then."""

    def call(
        self, method: str, metadata: Sequence[tuple[str, str | bytes]] | None
    ) -> contextlib.AbstractContextManager[None]: ...
    def working(self) -> None: ...
    def answered(self, code: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may be at work at once, per RPC."""

    workers: int = 4
    max_in_flight: int = 256
    max_streams: int = 256
    message_seconds: float = 10.0
    max_unread_bytes: int = 256 << 20


class _Cancelled(KvindexError):
    """The caller went away."""

    code = grpc.StatusCode.CANCELLED


class Guard:
    """Makes gRPC handlers of plain functions, for one `grpc.server`. close() ends all threads."""

    def __init__(
        self,
        metrics: RpcMetrics,
        ready: Callable[[], bool],
        bounds: Bounds | None = None,
        gate: Gate | None = None,
        spans: Spans | None = None,
    ) -> None:
        self.spans = spans
        self._metrics = metrics
        self._ready = ready
        self._bounds = bounds or Bounds()
        self._gate = gate or Gate()
        self._lanes: list[Lane] = []
        # Health: never shed for load, and never in the way of anything else.
        self._aside = self._lane("aside", 64, _UNBOUNDED)
        self._refusers = self._lane("refuse", 2, _UNBOUNDED)
        self._unread = Unread(self._bounds.max_unread_bytes, lambda method: metrics.shed(method, "unread"))
        self._idle: dict[grpc.ServicerContext, float] = {}
        self._draining = False

    @property
    def pool(self) -> Lane:
        """For `grpc.server`; every handler brings its own lane."""
        return self._aside

    def read(self, method: str, handler: Unary) -> Arrival:
        """A read RPC: only while ready."""

        def when_ready(data: bytes, check: Check) -> bytes:
            self._check_ready(method)
            return handler(data, check)

        return self._unary(method, when_ready, Role.READ)

    def admin(self, method: str, handler: Unary) -> Arrival:
        """An operator's RPC: answered also while not ready."""
        return self._unary(method, handler, Role.ADMIN)

    def stream(self, method: str, handler: Unary, refusal: Refusal) -> Arrival:
        """Many reads on one connection, answered in order; a bad request does not end the stream."""
        # A stream keeps its thread for as long as the client likes.
        lane = self._lane(_short(method), self._bounds.max_streams, self._bounds.max_streams, method)

        def behaviour(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            started = time.perf_counter()
            error: KvindexError | None = None
            one = self._one_of_stream if self.spans is None else self._traced_one(self.spans, context)
            lane.heard()  # clients open it long before they ask: `max_streams` alone bounds those that never do
            try:
                check = self._checker(method, context)
                self.identify(method, Role.READ, context)
                asked = time.monotonic()
                self._check_ready(method)
                for data in self.watched(requests, context):
                    check()
                    if time.monotonic() - asked >= IDENTIFY_SECONDS:  # a stream may outlive its token or certificate
                        self._identify_again(method, Role.READ, context)
                        asked = time.monotonic()
                    with lane.turn():
                        answer = one(method, handler, refusal, data, check)
                    yield answer
            except KvindexError as caught:
                error = caught
            except grpc.RpcError:  # the client went away while its next request was awaited
                error = _Cancelled("")
            except GeneratorExit:  # or while its answer was on the way
                error = _Cancelled("")
                raise
            finally:
                self.observe(method, error.code if error else grpc.StatusCode.OK, started)
            if error is not None:
                _abort(context, error)

        behaviour.experimental_thread_pool = lane  # type: ignore[attr-defined]
        return self._arrival(method, Role.READ, lane, grpc.stream_stream_rpc_method_handler(behaviour))

    def download(self, method: str, handler: Download) -> Arrival:
        """An operator's RPC with a long answer, sent as fast as the caller takes it; answered also while not ready."""
        lane = self._lane(_short(method), DOWNLOADS, DOWNLOADS, method)

        def behaviour(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            started = time.perf_counter()
            error: KvindexError | None = None
            lane.heard()
            try:
                check = self._checker(method, context)
                self.identify(method, Role.ADMIN, context)
                for part in handler(data, check):
                    check()
                    yield part
            except GeneratorExit:  # the client went away
                error = _Cancelled("")
                raise
            except Exception as caught:  # noqa: BLE001 - see _unary
                error = _safe(method, caught)
            finally:
                self.observe(method, error.code if error else grpc.StatusCode.OK, started)
            if error is not None:
                _abort(context, error)

        spans = self.spans

        def traced(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            assert spans is not None
            with spans.call(method, context.invocation_metadata()):
                yield from behaviour(data, context)

        called = behaviour if spans is None else traced
        called.experimental_thread_pool = lane  # type: ignore[attr-defined]
        return self._arrival(method, Role.ADMIN, lane, grpc.unary_stream_rpc_method_handler(called))

    def describe(self, method: str, handler: Description) -> Arrival:
        """A stream of another library that answers from memory: few at once, and one that asks nothing is ended."""
        lane = self._lane(_short(method), DESCRIPTIONS, DESCRIPTIONS, method)

        def asked(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for data in self.watched(requests, context):
                lane.heard()
                yield data
                lane.waits()

        def behaviour(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            try:
                self.identify(method, Role.READ, context)
            except KvindexError as error:
                _abort(context, error)
            yield from handler(asked(requests, context), context)

        behaviour.experimental_thread_pool = lane  # type: ignore[attr-defined]
        return self._arrival(method, Role.READ, lane, grpc.stream_stream_rpc_method_handler(behaviour))

    def open(self, method: str, handler: grpc.RpcMethodHandler) -> Arrival:
        """A handler of another library (health), beside the others, that everybody may call."""
        for behaviour in (handler.unary_unary, handler.unary_stream):
            if behaviour is not None:
                behaviour.experimental_thread_pool = self._aside
        return self._arrival(method, None, self._aside, handler)

    def heard(self) -> None:
        """To be called first by the behaviours given to `open`: the call's message is there."""
        self._aside.heard()

    def watched(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """The same requests; while the next one is awaited, `drain` may end the call."""
        try:
            while True:
                self._idle[context] = time.monotonic()
                try:
                    data = next(requests)
                except StopIteration:
                    return
                self._idle.pop(context, None)
                yield data
        finally:
            self._idle.pop(context, None)

    def keep_idle(self, context: grpc.ServicerContext) -> None:
        """A call that only ever sends: `drain` ends it."""
        self._idle[context] = time.monotonic()
        if not context.add_callback(lambda: self._idle.pop(context, None)):
            self._idle.pop(context, None)  # it has ended already

    def drain(self, seconds: float, stopped: threading.Event) -> None:
        """End streams that stay silent, until the server has stopped or the time is over."""
        self._draining = True
        began = time.monotonic()
        while not stopped.wait(0.05) and time.monotonic() - began < seconds:
            for context, since in list(self._idle.items()):
                if time.monotonic() - max(since, began) > min(IDLE_STREAM_SECONDS, seconds):
                    self._idle.pop(context, None)
                    context.cancel()

    def close(self) -> None:
        """End the threads; call it after the gRPC server has stopped."""
        for lane in self._lanes:
            lane.close()

    # --- for another transport ---

    def lane(self, name: str, permits: int) -> Lane:
        """Threads for calls that do not come by gRPC's own pool."""
        return self._lane(name, self._bounds.workers, permits)

    def at_arrival(
        self, method: str, role: Role, metadata: Sequence[tuple[str, str | bytes]] | None
    ) -> KvindexError | None:
        """What turns a call away by its metadata alone; counted."""
        error = self._gate.at_arrival(role, metadata)
        if error is not None:
            self._count_refusal(method, error)
        return error

    def open_to_all(self, role: Role) -> bool:
        """Nothing but a call's own bytes can turn it away now: the server is ready and asks nobody who they are."""
        return self._ready() and not self._gate.asks(role)

    def answer(self, method: str, work: Callable[[], bytes]) -> bytes:
        """Its answer while ready; every error as a KvindexError that is fit to be sent."""
        self._check_ready(method)
        try:
            return work()
        except Exception as caught:  # noqa: BLE001 - see _unary
            raise _safe(method, caught) from None

    def shed(self, method: str, reason: Shed) -> None:
        """Count a call turned away."""
        self._metrics.shed(method, reason)

    def observe(self, method: str, code: grpc.StatusCode, started: float) -> None:
        """Count a finished call; `started` by time.perf_counter."""
        self._metrics.observe_rpc(method, code.name, time.perf_counter() - started)

    # --- arrival ---

    def _lane(self, name: str, threads: int, permits: int, method: str = "") -> Lane:
        bounds = self._bounds
        gave_up = partial(self.shed, method, "silent") if method else None
        lane = Lane(f"rpc-{name}", threads, bounds.workers, permits, bounds.message_seconds, gave_up)
        self._lanes.append(lane)
        return lane

    def _arrival(self, method: str, role: Role | None, lane: Lane, handler: grpc.RpcMethodHandler) -> Arrival:
        if lane is not self._aside:
            self._metrics.watch_in_flight(method, lambda: lane.in_flight)

        def arrive(details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            error: KvindexError | None = None
            if role is not None:
                error = self.at_arrival(method, role, details.invocation_metadata)
            if error is None and lane.full:
                error = Overloaded("too many calls of this kind in flight")
                self.shed(method, "in_flight")
            return handler if error is None else self._refuse(method, error)

        return arrive

    def _refuse(self, method: str, error: KvindexError) -> grpc.RpcMethodHandler:
        started = time.perf_counter()

        # A streaming handler, for any method: it is run without waiting for the message.
        def behaviour(_: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self.observe(method, error.code, started)
            _abort(context, error)
            return iter(())

        behaviour.experimental_thread_pool = self._refusers  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(behaviour)

    def _count_refusal(self, method: str, error: KvindexError) -> None:
        if isinstance(error, Unauthenticated):
            self.shed(method, "unauthenticated")
        elif isinstance(error, PermissionDenied):
            self.shed(method, "permission_denied")

    def identify(self, method: str, role: Role, context: Caller) -> None:
        """The rest of what may turn a call away, after `at_arrival`; it may wait for the Kubernetes API server."""
        error = self._gate.in_call(role, context)
        if error is not None:
            self._count_refusal(method, error)
            raise error

    def _identify_again(self, method: str, role: Role, context: grpc.ServicerContext) -> None:
        error = self.at_arrival(method, role, context.invocation_metadata())
        if error is not None:
            raise error
        self.identify(method, role, context)

    # --- work ---

    def _unary(self, method: str, handler: Unary, role: Role) -> Arrival:
        bounds, spans = self._bounds, self.spans
        lane = self._lane(_short(method), bounds.workers + SPARE_THREADS, bounds.max_in_flight, method)
        work = handler if spans is None else _after_waiting(handler, spans)

        def behaviour(data: bytes, context: grpc.ServicerContext) -> bytes:
            started = time.perf_counter()
            lane.heard()
            check = self._checker(method, context)
            try:
                check()  # it may have waited for a thread longer than its caller waits for it
                self.identify(method, role, context)
                with lane.turn():
                    check()
                    answer = work(data, check)
            except Exception as caught:  # noqa: BLE001 - nothing a request does may end a worker or leak
                error = _safe(method, caught)
            else:
                self.observe(method, grpc.StatusCode.OK, started)
                self._unread.add(method, len(answer), context)
                return answer
            self.observe(method, error.code, started)
            _abort(context, error)
            raise AssertionError("abort always raises")

        def traced(data: bytes, context: grpc.ServicerContext) -> bytes:
            assert spans is not None
            with spans.call(method, context.invocation_metadata()):
                return behaviour(data, context)

        called = behaviour if spans is None else traced
        called.experimental_thread_pool = lane  # type: ignore[attr-defined]
        return self._arrival(method, role, lane, grpc.unary_unary_rpc_method_handler(called))

    def _one_of_stream(self, method: str, handler: Unary, refusal: Refusal, data: bytes, check: Check) -> bytes:
        try:
            self._check_ready(method)
            return handler(data, check)
        except (DeadlineExceeded, _Cancelled):
            raise  # these are the stream's own end
        except Exception as caught:  # noqa: BLE001 - see _unary
            error = _safe(method, caught)
            if self.spans is not None:
                self.spans.answered(error.code.name)
            return refusal(error.code.value[0], error.message)

    def _traced_one(
        self, spans: Spans, context: grpc.ServicerContext
    ) -> Callable[[str, Unary, Refusal, bytes, Check], bytes]:
        """A span for each request of a stream: the stream itself may live for days."""
        metadata = context.invocation_metadata()

        def one(method: str, handler: Unary, refusal: Refusal, data: bytes, check: Check) -> bytes:
            with spans.call(method, metadata):
                return self._one_of_stream(method, handler, refusal, data, check)

        return one

    def _check_ready(self, method: str) -> None:
        if not self._ready():
            self.shed(method, "not_ready")
            raise Unavailable("not ready: the first synchronisation with the configured pods is not over")

    def _checker(self, method: str, context: grpc.ServicerContext) -> Check:
        def check() -> None:
            remaining = context.time_remaining()
            if remaining is not None and remaining <= 0:
                self.shed(method, "deadline")
                raise DeadlineExceeded("the deadline passed before the answer was ready")
            if not context.is_active():
                raise _Cancelled("the caller cancelled")

        check.remaining = context.time_remaining  # type: ignore[attr-defined]
        return check


class _Service(grpc.ServiceRpcHandler):  # type: ignore[misc]
    def __init__(self, name: str, arrivals: Mapping[str, Arrival]) -> None:
        self._name = name
        self._arrivals = {f"/{name}/{method}": arrival for method, arrival in arrivals.items()}

    def service_name(self) -> str:
        return self._name

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        arrival = self._arrivals.get(handler_call_details.method)
        return None if arrival is None else arrival(handler_call_details)


def service(name: str, arrivals: Mapping[str, Arrival]) -> Iterable[grpc.GenericRpcHandler]:
    """Arrivals by method name, ready for `grpc.Server.add_generic_rpc_handlers`."""
    return (_Service(name, arrivals),)


def _after_waiting(handler: Unary, spans: Spans) -> Unary:
    def work(data: bytes, check: Check) -> bytes:
        spans.working()
        return handler(data, check)

    return work


def _short(method: str) -> str:
    return method.rpartition("/")[2]


def _safe(method: str, error: Exception) -> KvindexError:
    """The same, fit to be sent: an error that nobody foresaw says nothing of the request."""
    if isinstance(error, KvindexError):
        return error
    # Where and what kind, but not the exception's own text: it may quote the request.
    logs.event(
        logger,
        logging.ERROR,
        "request failed",
        method=method,
        error=type(error).__name__,
        trace="".join(traceback.format_tb(error.__traceback__)),
    )
    return KvindexError("internal error")


def _abort(context: grpc.ServicerContext, error: KvindexError) -> None:
    message = error.message[:MAX_MESSAGE]
    if error.retry_seconds:
        context.set_trailing_metadata(retry_trailers(error.code, message, error.retry_seconds))
    context.abort(error.code, message)


def retry_trailers(code: grpc.StatusCode, message: str, seconds: float) -> Sequence[tuple[str, str | bytes]]:
    """When to try again, in both ways clients know: google.rpc.RetryInfo, and what a retry policy obeys."""
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMicroseconds(int(seconds * 1e6))
    detail = AnyMessage()
    detail.Pack(info)
    status = status_pb2.Status(code=code.value[0], message=message, details=[detail])
    return (
        ("grpc-status-details-bin", status.SerializeToString()),
        ("grpc-retry-pushback-ms", str(int(seconds * 1000))),
    )
