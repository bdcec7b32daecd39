"""grpc.health.v1: per service, SERVING only while the server is ready."""

from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2

from kvindex_server.interceptors import Guard, service

SERVICE = str(health.SERVICE_NAME)


class Health:
    """The health of each service, and of the whole server under the empty name."""

    def __init__(self, read: Iterable[str], always: Iterable[str] = ()) -> None:
        """`read` services follow set_serving; those of `always` are answered from the start."""
        self._servicer = health.HealthServicer()
        self._read = ("", *read)
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
        """Serve Check and Watch apart from the read path's threads, so that load is not ill health."""
        servicer = self._servicer

        def check(
            request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
        ) -> health_pb2.HealthCheckResponse:
            return servicer.Check(request, context)

        handlers = {
            "Check": grpc.unary_unary_rpc_method_handler(
                guard.beside(check),
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                servicer.Watch,  # not wrapped: it needs no thread while it waits, which grpc asks the method
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers(service(SERVICE, handlers))
