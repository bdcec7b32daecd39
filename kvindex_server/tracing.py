"""OpenTelemetry: a span per call whose parent is the caller's, and one per stage; the only module that imports it."""

import contextlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kvindex_server import __version__
from kvindex_server._core import LookupTallies

Metadata = Sequence[tuple[str, str | bytes]]
"""A caller's metadata or headers, names in lower case."""

EXPORT_SECONDS = 2.0
"""For one export with its retries; shutting down takes two of them at most."""
QUEUE_SPANS = 4096
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-|$)")
_NOTHING = contextlib.nullcontext()
_CARRIED = ("traceparent", "tracestate")
STRANGERS = ("UNAUTHENTICATED", "PERMISSION_DENIED")
"""Codes of those who may not call."""
_SEEN_FROM_OUTSIDE = ("total",)
"""Stages that are the whole: the call's own span is that already."""


class TracingMissing(Exception):
    """The packages of OpenTelemetry are not installed."""


class Metrics(Protocol):
    """What is measured of calls and lookups, and what `Spans.measured` stands before."""

    def observe_rpc(self, method: str, code: str, seconds: float) -> None: ...
    def shed(self, method: str, reason: str) -> None: ...
    def watch_in_flight(self, method: str, read: Any) -> None: ...
    def observe_stage(self, stage: str, seconds: float) -> None: ...
    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None: ...
    def unknown_tier(self, model: str, tier: str) -> None: ...
    def observe_usage(self, model: str, predicted: int, cached: int) -> None: ...
    def lookup_tallies(self, model: str) -> LookupTallies: ...
    @property
    def heard(self) -> Callable[[str, int, int, float], None] | None: ...


@dataclass(frozen=True, slots=True)
class Collector:
    """Where spans go by OTLP over gRPC, and which share of the calls without a traced caller gets any."""

    endpoint: str
    """`http://host:port`, or `https://` for TLS."""
    ca_file: str = ""
    sample_ratio: float = 0.01
    service_name: str = "kvindex-server"


class _Call:
    """One traced call, used by its thread alone."""

    __slots__ = ("code", "context", "span", "started", "wall")

    def __init__(self, span: Any, context: Any, wall: int, started: int) -> None:
        self.span, self.context = span, context
        self.wall, self.started = wall, started
        self.code = "OK"

    def now(self) -> int:
        """Nanoseconds since the epoch, by a clock that only goes forward."""
        return self.wall + time.perf_counter_ns() - self.started


class Spans:
    """Traces the calls of one server. Nothing of a prompt is in a span: names of models, counts, status codes.

    TracingMissing without the packages; OSError when `ca_file` cannot be read. close() sends what is left.
    """

    def __init__(self, collector: Collector) -> None:
        try:
            import grpc  # noqa: PLC0415  with the next ones: only who traces pays for them
            from opentelemetry import trace  # noqa: PLC0415
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError as error:
            raise TracingMissing("install kvindex-server[tracing]") from error
        credentials = None
        if collector.endpoint.startswith("https://"):
            roots = Path(collector.ca_file).read_bytes() if collector.ca_file else None
            credentials = grpc.ssl_channel_credentials(roots)
        exporter = OTLPSpanExporter(
            endpoint=collector.endpoint,
            insecure=credentials is None,
            credentials=credentials,
            timeout=EXPORT_SECONDS,
        )
        self._counts = dict.fromkeys(("ended", "exported", "failed"), 0)
        self._counted = threading.Lock()
        counted: Any = _CountedExporter(
            exporter,
            lambda result, spans: self._count("exported" if result is SpanExportResult.SUCCESS else "failed", spans),
        )
        resource = Resource.create({"service.name": collector.service_name, "service.version": __version__})
        self._ratio, self._dice = collector.sample_ratio, random.random
        self._provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(counted, max_queue_size=QUEUE_SPANS, schedule_delay_millis=1000)
        )
        self._tracer = self._provider.get_tracer("kvindex_server", __version__)
        self._extract = TraceContextTextMapPropagator().extract
        self._as_parent = trace.set_span_in_context
        self._nowhere = trace.set_span_in_context(trace.INVALID_SPAN)
        self._server, self._inside = trace.SpanKind.SERVER, trace.SpanKind.INTERNAL
        self._wrong = trace.Status(trace.StatusCode.ERROR)
        self._here = threading.local()

    def call(self, method: str, metadata: Metadata | None) -> contextlib.AbstractContextManager[None]:
        """The call that this thread works on; `method` is `/service/method` or a path."""
        # Most calls are not traced, and OpenTelemetry would take 30 times as long to find that out.
        carrier = {name: value for name, value in metadata or () if name in _CARRIED and isinstance(value, str)}
        parent = _TRACEPARENT.match(carrier.get("traceparent", ""))
        if parent is None or int(parent[1], 16) == 0 or int(parent[2], 16) == 0:
            return self._recorded(method, {}) if self._dice() < self._ratio else _NOTHING
        return self._recorded(method, carrier) if int(parent[3], 16) & 1 else _NOTHING

    @contextlib.contextmanager
    def _recorded(self, method: str, carrier: Mapping[str, str]) -> Iterator[None]:
        parent = self._extract(carrier, self._nowhere)
        wall, started = time.time_ns(), time.perf_counter_ns()
        span = self._tracer.start_span(
            method.lstrip("/"), parent, self._server, _attributes_of(method), start_time=wall
        )
        call = self._here.call = _Call(span, self._as_parent(span, parent), wall, started)
        try:
            yield
        finally:
            self._here.call = None
            # A span that is never ended is never sent: strangers must not fill the collector.
            if call.code not in STRANGERS:
                self._end(call)

    def working(self) -> None:
        """The call's turn has come: what went before was waiting for it."""
        call: _Call | None = getattr(self._here, "call", None)
        if call is not None:
            self._stage(call, "wait", call.now() - call.wall)

    def answered(self, code: str) -> None:
        """The call's status code, by name."""
        call: _Call | None = getattr(self._here, "call", None)
        if call is not None:
            call.code = code

    def ids(self) -> Mapping[str, str]:
        """`trace_id` and `span_id` of the call that this thread works on, in hexadecimal; empty when it has no span."""
        call: _Call | None = getattr(self._here, "call", None)
        if call is None:
            return {}
        context = call.span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def measured(self, metrics: Metrics) -> "Metrics":
        """The same metrics; what is measured on a traced call's thread is told in its span too."""
        return _Measured(self, metrics)

    def counts(self) -> Mapping[str, int]:
        """Spans by what became of them: `ended`, and of those `exported` or `failed`."""
        with self._counted:
            return dict(self._counts)

    def close(self) -> None:
        """Send what is left; a collector that does not answer costs some seconds, not more."""
        self._provider.shutdown()

    # --- for _Measured ---

    def stage(self, name: str, seconds: float) -> None:
        """A part of the call that ends now."""
        call: _Call | None = getattr(self._here, "call", None)
        if call is not None and name not in _SEEN_FROM_OUTSIDE:
            self._stage(call, name, int(seconds * 1e9))

    def lookup(self, model: str, blocks: int, best_match: int) -> None:
        """What the call found out."""
        call: _Call | None = getattr(self._here, "call", None)
        if call is not None:
            call.span.set_attributes(
                {"kvindex.model": model, "kvindex.blocks": blocks, "kvindex.best_match_blocks": best_match}
            )

    def _stage(self, call: _Call, name: str, nanoseconds: int) -> None:
        now = call.now()
        span = self._tracer.start_span(name, call.context, self._inside, start_time=now - nanoseconds)
        span.end(now)
        self._count("ended", 1)

    def _end(self, call: _Call) -> None:
        call.span.set_attribute("rpc.response.status_code", call.code)
        if call.code != "OK":
            call.span.set_status(self._wrong)
        call.span.end(call.now())
        self._count("ended", 1)

    def _count(self, outcome: str, spans: int) -> None:
        with self._counted:
            self._counts[outcome] += spans


class _CountedExporter:
    """Sends spans, and tells how many with which result."""

    def __init__(self, exporter: Any, told: Callable[[Any, int], None]) -> None:
        self._exporter, self._told = exporter, told

    def export(self, spans: Sequence[Any]) -> Any:
        result = self._exporter.export(spans)
        self._told(result, len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


class _Measured:
    """Metrics that are told to the spans too."""

    def __init__(self, spans: Spans, metrics: Metrics) -> None:
        self._spans, self._metrics = spans, metrics
        self.shed = metrics.shed
        self.watch_in_flight = metrics.watch_in_flight
        self.unknown_tier = metrics.unknown_tier
        self.observe_usage = metrics.observe_usage
        self.lookup_tallies = metrics.lookup_tallies

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        self._metrics.observe_rpc(method, code, seconds)
        self._spans.answered(code)

    def observe_stage(self, stage: str, seconds: float) -> None:
        self._metrics.observe_stage(stage, seconds)
        self._spans.stage(stage, seconds)

    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None:
        self._metrics.observe_lookup(model, blocks, best_match)
        self._spans.lookup(model, blocks, best_match)

    def heard(self, model: str, blocks: int, best_match: int, seconds: float) -> None:
        if self._metrics.heard is not None:
            self._metrics.heard(model, blocks, best_match, seconds)
        self._spans.stage("match", seconds)
        self._spans.lookup(model, blocks, best_match)


def _attributes_of(method: str) -> Mapping[str, str]:
    service, _, name = method.strip("/").rpartition("/")
    if not service:
        return {"http.request.method": "POST", "url.path": method}
    return {"rpc.system.name": "grpc", "rpc.service": service, "rpc.method": name}
