"""Stands before every RPC: readiness, limits, deadlines, error codes and metrics, in one place."""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import grpc

from kvindex_server import logs
from kvindex_server.errors import DeadlineExceeded, KvindexError, ResourceExhausted, Unavailable
from kvindex_server.lookup import Check

logger = logging.getLogger(__name__)

Unary = Callable[[bytes, Check], bytes]
"""A handler: the request's bytes and the deadline check in, the answer's bytes out."""
Refusal = Callable[[int, str], bytes]
"""Makes the answer to one bad request of a stream, from status code and message."""

MAX_MESSAGE = 512
"""Characters of a status message; it travels in a header, whose size is bounded by every client."""


class RpcMetrics(Protocol):
    """What is measured of an RPC."""

    def observe_rpc(self, method: str, code: str, seconds: float) -> None: ...


class _Cancelled(KvindexError):
    """The caller went away."""

    code = grpc.StatusCode.CANCELLED


class _CountingPool(ThreadPoolExecutor):
    """A thread pool that knows how much it has to do: RPCs at work and those waiting for a thread."""

    def __init__(self, workers: int, name: str) -> None:
        super().__init__(workers, name)
        self._counted = threading.Lock()
        self.in_flight = 0

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(*args, **kwargs)
        with self._counted:
            self.in_flight += 1
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[Any]) -> None:
        with self._counted:
            self.in_flight -= 1


class Guard:
    """Makes gRPC handlers of plain functions. `pool` is for `grpc.server`; close() ends all threads."""

    def __init__(
        self, metrics: RpcMetrics, ready: Callable[[], bool], workers: int = 4, max_in_flight: int = 256
    ) -> None:
        self._metrics = metrics
        self._ready = ready
        self._max_in_flight = max_in_flight
        self.pool = _CountingPool(workers, "rpc")
        # A stream keeps its thread for as long as the client likes, and operators and probes must be answered
        # when the read path is overloaded: neither may wait for, nor use up, the read path's few threads.
        # The spare threads are there to refuse a stream too many.
        self.aside = _CountingPool(max_in_flight + 8, "rpc-aside")
        self._streams = threading.BoundedSemaphore(max_in_flight)

    def read(self, method: str, handler: Unary) -> grpc.RpcMethodHandler:
        """A read RPC: only while ready, at most `max_in_flight` of them."""

        def admitted(data: bytes, check: Check) -> bytes:
            self._check_ready()
            if self.pool.in_flight > self._max_in_flight:
                raise ResourceExhausted(f"more than {self._max_in_flight} requests in flight")
            return handler(data, check)

        return grpc.unary_unary_rpc_method_handler(self._unary(method, admitted))

    def admin(self, method: str, handler: Unary) -> grpc.RpcMethodHandler:
        """An operator's RPC: answered also while not ready, and apart from the read path's load."""
        return grpc.unary_unary_rpc_method_handler(self.beside(self._unary(method, handler)))

    def stream(self, method: str, handler: Unary, refusal: Refusal) -> grpc.RpcMethodHandler:
        """Many reads on one connection, answered in order; a bad request does not end the stream."""

        def behaviour(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            started = time.perf_counter()
            code, message = grpc.StatusCode.OK, ""
            if not self._streams.acquire(blocking=False):
                error: KvindexError = ResourceExhausted(f"more than {self._max_in_flight} streams")
                self._observe(method, error.code, started)
                context.abort(error.code, error.message)
            try:
                check = _checker(context)
                self._check_ready()
                for data in requests:
                    check()
                    yield self._one_of_stream(method, handler, refusal, data, check)
            except KvindexError as error:
                code, message = error.code, error.message
            except grpc.RpcError:  # the client went away while its next request was awaited
                code = grpc.StatusCode.CANCELLED
            except GeneratorExit:  # or while its answer was on the way
                code = grpc.StatusCode.CANCELLED
                raise
            finally:
                self._streams.release()
                self._observe(method, code, started)
            if code is not grpc.StatusCode.OK:
                context.abort(code, message)

        return grpc.stream_stream_rpc_method_handler(self.beside(behaviour))

    def beside(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        """The same behaviour, run on the threads beside the read path's."""
        behaviour.experimental_thread_pool = self.aside  # type: ignore[attr-defined]
        return behaviour

    def close(self) -> None:
        """End the threads; call it after the gRPC server has stopped."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.aside.shutdown(wait=False, cancel_futures=True)

    def _unary(self, method: str, handler: Unary) -> Callable[[bytes, grpc.ServicerContext], bytes]:
        def behaviour(data: bytes, context: grpc.ServicerContext) -> bytes:
            started = time.perf_counter()
            check = _checker(context)
            try:
                check()  # it may have waited for a thread longer than its caller waits for it
                answer = handler(data, check)
            except Exception as error:  # noqa: BLE001 - nothing a request does may end a worker or leak
                code, message = _status(method, error)
            else:
                self._observe(method, grpc.StatusCode.OK, started)
                return answer
            self._observe(method, code, started)
            context.abort(code, message)
            raise AssertionError("abort always raises")

        return behaviour

    def _one_of_stream(self, method: str, handler: Unary, refusal: Refusal, data: bytes, check: Check) -> bytes:
        try:
            self._check_ready()
            return handler(data, check)
        except (DeadlineExceeded, _Cancelled):
            raise  # these are the stream's own end
        except Exception as error:  # noqa: BLE001 - see _unary
            code, message = _status(method, error)
            return refusal(code.value[0], message)

    def _check_ready(self) -> None:
        if not self._ready():
            raise Unavailable("not ready: the first synchronisation with the configured pods is not over")

    def _observe(self, method: str, code: grpc.StatusCode, started: float) -> None:
        self._metrics.observe_rpc(method, code.name, time.perf_counter() - started)


def service(name: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> Iterable[grpc.GenericRpcHandler]:
    """Handlers by method name, ready for `grpc.Server.add_generic_rpc_handlers`."""
    return (grpc.method_handlers_generic_handler(name, handlers),)


def _checker(context: grpc.ServicerContext) -> Check:
    def check() -> None:
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the answer was ready")
        if not context.is_active():
            raise _Cancelled("the caller cancelled")

    check.remaining = context.time_remaining  # type: ignore[attr-defined]
    return check


def _status(method: str, error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, KvindexError):
        return error.code, error.message[:MAX_MESSAGE]
    # Where and what kind, but not the exception's own text: it may quote the request.
    logs.event(
        logger,
        logging.ERROR,
        "request failed",
        method=method,
        error=type(error).__name__,
        trace="".join(traceback.format_tb(error.__traceback__)),
    )
    return grpc.StatusCode.INTERNAL, "internal error"
