"""grpc.health.v1: per service, SERVING only while the server is ready."""

import threading
from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health, health_pb2

from kvindex_server.codec import decode
from kvindex_server.errors import InvalidArgument
from kvindex_server.interceptors import Guard, service

SERVICE = str(health.SERVICE_NAME)
MAX_WATCHES = 16_384
"""Open at once: a watch needs no thread and no credential, and some 17 KiB."""


class Health:
    """The health of each service, and of the whole server under the empty name."""

    def __init__(self, read: Iterable[str], always: Iterable[str] = ()) -> None:
        """`read` services follow set_serving; those of `always` are answered from the start."""
        self._servicer = health.HealthServicer()
        self._counted = threading.Lock()
        self._watches = 0
        self._read = ("", *read)
        self._known = frozenset((*self._read, *always))
        self.set_serving(False)
        for name in always:
            self._servicer.set(name, health_pb2.HealthCheckResponse.SERVING)

    def set_serving(self, serving: bool) -> None:
        """Say whether the read services can be asked."""
        status = health_pb2.HealthCheckResponse
        for name in self._read:
            self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)

    def stop(self) -> None:
        """Every service is NOT_SERVING from now on; for draining."""
        self._servicer.enter_graceful_shutdown()

    def register(self, server: grpc.Server, guard: Guard) -> None:
        """Serve Check and Watch, to everybody and apart from the read path, so that load is not ill health."""
        servicer = self._servicer

        def check(data: bytes, context: grpc.ServicerContext) -> bytes:
            guard.heard()
            answer = servicer.Check(_request(data, context), context)
            return bytes(answer.SerializeToString())

        # It needs no thread while it waits, which gRPC asks the method.
        def watch(data: bytes, context: grpc.ServicerContext, send: Callable[[object], None]) -> None:
            guard.heard()
            request = _request(data, context)
            if request.service not in self._known:
                request.service = "?"  # the servicer keeps every name it was ever asked for
            if not self._take_watch(context):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many watches are open")
            guard.keep_idle(context)
            servicer.Watch(request, context, send)

        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(check),
            "Watch": grpc.unary_stream_rpc_method_handler(
                watch, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
            ),
        }
        arrivals = {name: guard.open(f"/{SERVICE}/{name}", each) for name, each in handlers.items()}
        server.add_generic_rpc_handlers(service(SERVICE, arrivals))

    def _take_watch(self, context: grpc.ServicerContext) -> bool:
        """Count one more until its call ends; False when there are too many."""
        with self._counted:
            if self._watches >= MAX_WATCHES:
                return False
            self._watches += 1
        if not context.add_callback(self._give_watch):  # it has ended already
            self._give_watch()
        return True

    def _give_watch(self) -> None:
        with self._counted:
            self._watches -= 1


def _request(data: bytes, context: grpc.ServicerContext) -> health_pb2.HealthCheckRequest:
    try:
        return decode(health_pb2.HealthCheckRequest, data)
    except InvalidArgument as error:
        context.abort(error.code, error.message)
        raise
