"""gRPC server reflection under both names clients ask for: v1 and v1alpha."""

from collections.abc import Iterable, Iterator

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvindex_server.codec import decode
from kvindex_server.errors import InvalidArgument
from kvindex_server.interceptors import Guard, service

# The messages of v1 are those of v1alpha under another package name, so the same bytes go over the wire.
SERVICES = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")


def register(server: grpc.Server, services: Iterable[str], guard: Guard) -> None:
    """Describe these services, whose stubs must have been imported, and reflection itself."""
    servicer = reflection.ReflectionServicer((*services, *SERVICES))

    def info(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            messages = (decode(reflection_pb2.ServerReflectionRequest, each) for each in requests)
            for answer in servicer.ServerReflectionInfo(messages, context):
                yield answer.SerializeToString()
        except InvalidArgument as error:
            context.abort(error.code, error.message)

    for name in SERVICES:
        method = f"/{name}/ServerReflectionInfo"
        arrival = guard.describe(method, info)
        server.add_generic_rpc_handlers(service(name, {"ServerReflectionInfo": arrival}))
