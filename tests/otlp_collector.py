"""A collector of OpenTelemetry's own protocol: a gRPC server that keeps the spans it is sent."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Span:
    """One span as it came over the wire; ids in hexadecimal."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    kind: int
    status: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    """`with Collector() as c:` listens at `c.endpoint`; `c.raw` are the bytes of all requests."""

    credentials: grpc.ServerCredentials | None = None
    spans: list[Span] = field(default_factory=list)
    raw: bytes = b""

    def __enter__(self) -> "Collector":
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        if self.credentials is None:
            self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        else:
            self.endpoint = f"https://127.0.0.1:{self._server.add_secure_port('127.0.0.1:0', self.credentials)}"
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()

    def Export(self, request: Any, _: grpc.ServicerContext) -> Any:
        """The only method of the protocol."""
        with self._lock:
            self.raw += request.SerializeToString()
            for group in request.resource_spans:
                resource = _plain(group.resource.attributes)
                for scope in group.scope_spans:
                    self.spans += [_span(each, resource) for each in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, name: str, count: int = 1, seconds: float = 20) -> list[Span]:
        """The spans of this name, once there are `count` of them."""
        ends = time.monotonic() + seconds
        while True:
            with self._lock:
                found = [each for each in self.spans if each.name == name]
                seen = sorted({each.name for each in self.spans})
            if len(found) >= count:
                return found
            assert time.monotonic() < ends, f"{len(found)} of {count} spans {name}; there are {seen}"
            time.sleep(0.02)

    def below(self, span: Span) -> dict[str, Span]:
        """Its children by name."""
        with self._lock:
            return {each.name: each for each in self.spans if each.parent_id == span.span_id}


def _span(each: Any, resource: dict[str, Any]) -> Span:
    return Span(
        each.name,
        each.trace_id.hex(),
        each.span_id.hex(),
        each.parent_span_id.hex(),
        each.start_time_unix_nano,
        each.end_time_unix_nano,
        each.kind,
        each.status.code,
        _plain(each.attributes),
        resource,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
