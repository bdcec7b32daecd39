"""gRPC server reflection under both names clients ask for: v1 and v1alpha."""

from collections.abc import Iterable, Iterator

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvindex_server.interceptors import Guard, service

# The messages of v1 are those of v1alpha under another package name, so the same bytes go over the wire.
SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


def register(server: grpc.Server, services: Iterable[str], guard: Guard) -> None:
    """Describe these services, whose stubs must have been imported, and reflection itself."""
    servicer = reflection.ReflectionServicer((*services, *SERVICES))

    def info(
        requests: Iterator[reflection_pb2.ServerReflectionRequest], context: grpc.ServicerContext
    ) -> Iterator[reflection_pb2.ServerReflectionResponse]:
        yield from servicer.ServerReflectionInfo(requests, context)

    handler = grpc.stream_stream_rpc_method_handler(
        guard.beside(info),
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in SERVICES:
        server.add_generic_rpc_handlers(service(name, {"ServerReflectionInfo": handler}))
