"""Prometheus metrics: what requests cost, and the state of every stream and model, read at scrape."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvindex_server import __version__, _core, logs
from kvindex_server.discovery.reconciler import SourceStatus
from kvindex_server.stream import LAG_BOUNDS, StreamState, StreamStatus, Trust
from kvindex_server.tally import Counters, Histograms
from kvindex_server.web import Answer, Bounds, Request, Routes, WebServer, text

logger = logging.getLogger(__name__)

STAGE_BOUNDS = (
    *(5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
RPC_BOUNDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
MATCH_BOUNDS = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
USAGE_BOUNDS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
RATIO_BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

MAX_METHODS = 64
"""Method names come from the wire; above so many distinct ones the rest count as `other`."""

Kind = Literal["counter", "gauge", "histogram", "info"]


Tokenizers = Callable[[], Mapping[str, tuple[bool, bool]]]
"""Per model with a tokenizer: is it encoded natively, and are its texts never cut."""


@dataclass(frozen=True, slots=True)
class MetricName:
    """One row of docs/metrics.md; `name` is as it appears in a scrape."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str


_STREAM = ("model", "pod", "rank")

REQUESTS = (
    MetricName("kvindex_build_info", "info", ("version",), "Version of the server; always 1"),
    MetricName("kvindex_ready", "gauge", (), "1 when the server is ready to answer"),
    MetricName("kvindex_rpc_total", "counter", ("method", "code"), "RPCs answered, by gRPC status code"),
    MetricName("kvindex_rpc_seconds", "histogram", ("method",), "Time from an RPC's arrival to its answer"),
    MetricName("kvindex_rpc_shed_total", "counter", ("method", "reason"), "RPCs turned away before any work"),
    MetricName("kvindex_rpc_in_flight", "gauge", ("method",), "RPCs at work or waiting for a thread"),
    MetricName("kvindex_score_stage_seconds", "histogram", ("stage",), "Time of one stage of a lookup"),
    MetricName("kvindex_blocks_looked_up_total", "counter", ("model",), "Blocks of the prompts asked about"),
    MetricName("kvindex_blocks_matched_total", "counter", ("model",), "Those of them the best pod held"),
    MetricName("kvindex_best_match_blocks", "histogram", ("model",), "Blocks the best pod held, by request"),
    MetricName("kvindex_best_match_ratio", "histogram", ("model",), "Share the best pod held, by request"),
    MetricName("kvindex_unknown_tier_total", "counter", ("model",), "Scores over a tier that has no weight"),
    MetricName("kvindex_usage_predicted_tokens_total", "counter", ("model",), "Cached tokens foreseen, as reported"),
    MetricName(
        "kvindex_usage_cached_tokens_total", "counter", ("model",), "Cached tokens that engines found, likewise"
    ),
    MetricName(
        "kvindex_usage_error_tokens",
        "histogram",
        ("model", "direction"),
        "Foreseen against found, by report: too many (`over`), too few (`under`), or equal (`exact`)",
    ),
)

TEXT = (
    MetricName("kvindex_text_chunk_hits_total", "counter", (), "Pieces of text that were known"),
    MetricName("kvindex_text_chunk_misses_total", "counter", (), "Pieces of text that had to be encoded"),
    MetricName("kvindex_text_tokens_saved_total", "counter", (), "Tokens of the known pieces"),
    MetricName("kvindex_text_tokens_encoded_total", "counter", (), "Tokens of the encoded pieces"),
    MetricName("kvindex_text_reference_chunks_total", "counter", (), "Pieces the reference library had to encode"),
    MetricName("kvindex_text_verified_chunks_total", "counter", (), "Pieces encoded twice to compare"),
    MetricName("kvindex_text_waits_total", "counter", (), "Calls that waited for another's encoding of a piece"),
    MetricName("kvindex_text_evictions_total", "counter", (), "Pieces forgotten for want of memory"),
    MetricName("kvindex_text_cache_bytes", "gauge", (), "Memory of the known pieces"),
    MetricName("kvindex_text_cache_chunks", "gauge", (), "Known pieces"),
    MetricName("kvindex_tokenizer_native", "gauge", ("model",), "1 native, 0 by the reference library"),
    MetricName("kvindex_tokenizer_whole", "gauge", ("model",), "1 when texts are never cut: only whole ones are known"),
)

STORE = (
    MetricName("kvindex_store_reachable", "gauge", ("model",), "1 while the shared store answers"),
    MetricName(
        "kvindex_store_events_total",
        "counter",
        ("model", "event"),
        "What was done in the shared store: `reads`, `batches`, `lives` begun, dead holders `swept`, changes of the "
        "primary (`eras`), `answers` to other replicas; and what failed: `failed_reads`, `failed_writes`, `full` "
        "batches, streams of an `other_block_size`",
    ),
)

STREAMS = (
    MetricName("kvindex_stream_messages_total", "counter", _STREAM, "Messages applied"),
    MetricName("kvindex_stream_events_total", "counter", _STREAM, "Events applied"),
    MetricName("kvindex_stream_blocks_stored_total", "counter", _STREAM, "Blocks engines reported as stored"),
    MetricName("kvindex_stream_blocks_removed_total", "counter", _STREAM, "Blocks reported as removed"),
    MetricName("kvindex_ingest_lag_seconds", "histogram", _STREAM, "Engine's time of a batch to applied"),
    MetricName("kvindex_ingest_last_lag_seconds", "gauge", _STREAM, "The same, of the last batch"),
    MetricName("kvindex_stream_gaps_total", "counter", _STREAM, "Holes in the sequence"),
    MetricName("kvindex_stream_restarts_total", "counter", _STREAM, "Engine restarts noticed"),
    MetricName("kvindex_stream_replays_total", "counter", _STREAM, "Replays asked for"),
    MetricName("kvindex_stream_duplicates_total", "counter", _STREAM, "Messages received again and skipped"),
    MetricName("kvindex_stream_orphans", "gauge", _STREAM, "Blocks waiting for their parent"),
    MetricName("kvindex_stream_unresolved", "gauge", _STREAM, "Claims whose key is not known"),
    MetricName(
        "kvindex_stream_decode_errors_total",
        "counter",
        (*_STREAM, "reason"),
        "Events or messages not understood",
    ),
    MetricName("kvindex_stream_dropped_total", "counter", (*_STREAM, "reason"), "Events dropped or left open"),
    MetricName("kvindex_stream_blocks", "gauge", (*_STREAM, "tier"), "Blocks held, by tier"),
    MetricName("kvindex_stream_trust", "gauge", (*_STREAM, "trust"), "1 for the current trust, 0 for others"),
    MetricName("kvindex_stream_trust_cause", "gauge", (*_STREAM, "cause"), "1 for what the trust rests on"),
    MetricName("kvindex_stream_state", "gauge", (*_STREAM, "state"), "1 for the current state, 0 for others"),
    MetricName("kvindex_stream_last_sequence", "gauge", _STREAM, "Last applied sequence; absent before any"),
    MetricName("kvindex_stream_age_seconds", "gauge", _STREAM, "Since the last applied message; absent before any"),
    MetricName("kvindex_coverage_ratio", "gauge", ("model",), "Share of the streams that are synchronised"),
    MetricName("kvindex_index_blocks", "gauge", ("model",), "Distinct blocks known"),
    MetricName("kvindex_index_claims", "gauge", ("model",), "Claims kept"),
    MetricName("kvindex_index_bytes", "gauge", ("model",), "Memory of the index"),
    MetricName("kvindex_index_block_size", "gauge", ("model",), "Tokens per block; 0 while not known"),
    MetricName("kvindex_placement_blocks", "gauge", ("model",), "Blocks placed by routers and not yet confirmed"),
    MetricName("kvindex_placement_recorded_total", "counter", ("model",), "Blocks placed"),
    MetricName("kvindex_placement_renewed_total", "counter", ("model",), "Blocks placed again while still placed"),
    MetricName("kvindex_placement_confirmed_total", "counter", ("model",), "Placed blocks that the engine then stored"),
    MetricName("kvindex_placement_expired_total", "counter", ("model",), "Placed blocks whose time was over first"),
    MetricName(
        "kvindex_placement_dropped_total",
        "counter",
        ("model", "reason"),
        "Placed blocks lost to a cleared or closed stream (`fenced`), or never taken for want of room (`refused`)",
    ),
)

DISCOVERY = (
    MetricName("kvindex_discovery_pods", "gauge", ("source",), "Pods that a source of discovery sees"),
    MetricName("kvindex_discovery_refused_pods", "gauge", ("source", "reason"), "Pods seen and not followed"),
    MetricName("kvindex_discovery_errors_total", "counter", ("source", "reason"), "Failures of a source"),
    MetricName("kvindex_discovery_age_seconds", "gauge", ("source",), "Since a source last answered, or the start"),
    MetricName("kvindex_unclaimed_engines", "gauge", ("endpoint",), "Engines that dialled in and belong to no pod"),
)


REPLICAS = (
    MetricName(
        "kvindex_replica_divergence_blocks",
        "gauge",
        ("peer",),
        "By how many blocks at least this replica and a peer differ after the same messages; none when not comparable",
    ),
    MetricName("kvindex_replica_compared_streams", "gauge", ("peer",), "Streams compared with a peer last time"),
    MetricName(
        "kvindex_replica_repairs_total",
        "counter",
        ("how",),
        "Streams that differed and took over the peer's state (`adopt`), or are built anew by the engine's (`doubt`)",
    ),
)

SNAPSHOTS = (
    MetricName("kvindex_snapshots_written_total", "counter", (), "Snapshots written"),
    MetricName("kvindex_snapshots_failed_total", "counter", (), "Snapshots that could not be written"),
    MetricName("kvindex_snapshots_refused_total", "counter", (), "Snapshots found damaged or foreign"),
    MetricName("kvindex_snapshot_last_bytes", "gauge", (), "Size of the last snapshot written"),
    MetricName("kvindex_snapshot_last_seconds", "gauge", (), "Time the last snapshot took to write"),
    MetricName(
        "kvindex_snapshot_last_time_seconds", "gauge", (), "Unix time of the last one written or loaded; 0 = none"
    ),
    MetricName("kvindex_snapshot_restored_streams_total", "counter", (), "Streams restored from a snapshot"),
    MetricName("kvindex_snapshot_restored_claims_total", "counter", (), "Claims restored with them"),
)

LOGS = (MetricName("kvindex_log_lines_suppressed_total", "counter", (), "Lines of the log left out as one of many"),)

SPANS = (
    MetricName(
        "kvindex_trace_spans_total",
        "counter",
        ("outcome",),
        "Spans for OpenTelemetry: `ended`, and of those `exported` or `failed`; the rest waits, or was one too many",
    ),
)


def metrics_table() -> str:
    """The table of docs/metrics.md."""
    rows = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for row in (*REQUESTS, *TEXT, *STORE, *STREAMS, *DISCOVERY, *SNAPSHOTS, *REPLICAS, *LOGS, *SPANS):
        labels = ", ".join(f"`{label}`" for label in row.labels)
        rows.append(f"| `{row.name}` | {row.kind} | {labels} | {row.meaning} |")
    return "\n".join(rows) + "\n"


class StoreStats(Protocol):
    """One model's part in the shared store, as of now."""

    @property
    def model(self) -> str: ...
    @property
    def reachable(self) -> bool: ...
    @property
    def counts(self) -> Mapping[str, int]: ...


class ModelStats(Protocol):
    """What is shown of a model: its index, asked at scrape."""

    @property
    def name(self) -> str: ...
    @property
    def blocks(self) -> int: ...
    @property
    def claims(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def coverage(self) -> float: ...
    @property
    def placements(self) -> Mapping[str, int]: ...


class Metrics:
    """The server's metrics, on a registry of their own. Every method may be called from any thread."""

    def __init__(self) -> None:
        # A `_created` series beside every series would double a scrape.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        names = {row.name: row for row in REQUESTS}

        def of(name: str) -> tuple[str, str, tuple[str, ...]]:
            return name, names[name].meaning, names[name].labels

        build = Info("kvindex_build", names["kvindex_build_info"].meaning, registry=self.registry)
        build.info({"version": __version__})
        self._ready = Gauge(*of("kvindex_ready"), registry=self.registry)
        self._rpcs = Counters(*of("kvindex_rpc_total"))
        self._rpc_seconds = Histograms(*of("kvindex_rpc_seconds"), RPC_BOUNDS)
        self._shed = Counter(*of("kvindex_rpc_shed_total"), registry=self.registry)
        self._in_flight = Gauge(*of("kvindex_rpc_in_flight"), registry=self.registry)
        self._stages = Histograms(*of("kvindex_score_stage_seconds"), STAGE_BOUNDS)
        self._looked_up = Counters(*of("kvindex_blocks_looked_up_total"))
        self._matched = Counters(*of("kvindex_blocks_matched_total"))
        self._best = Histograms(*of("kvindex_best_match_blocks"), MATCH_BOUNDS)
        self._ratio = Histograms(*of("kvindex_best_match_ratio"), RATIO_BOUNDS)
        for counters in (self._rpcs, self._looked_up, self._matched):
            self.registry.register(counters)
        for histograms in (self._rpc_seconds, self._stages, self._best, self._ratio):
            self.registry.register(histograms)
        self._unknown_tiers = Counter(*of("kvindex_unknown_tier_total"), registry=self.registry)
        self._foreseen = Counter(*of("kvindex_usage_predicted_tokens_total"), registry=self.registry)
        self._found = Counter(*of("kvindex_usage_cached_tokens_total"), registry=self.registry)
        self._off = Histogram(*of("kvindex_usage_error_tokens"), buckets=USAGE_BOUNDS, registry=self.registry)
        ProcessCollector(registry=self.registry)
        # Finding one locks; the read path keeps those it needs instead.
        self._of_stage: dict[str, _core.Histogram] = {}
        self._of_model: dict[str, _core.LookupTallies] = {}
        self._of_rpc: dict[tuple[str, str], tuple[_core.Counter, _core.Histogram]] = {}
        self._methods: set[str] = set()
        self._warned_tiers: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        self.is_ready = False

    def observe_stage(self, stage: str, seconds: float) -> None:
        """Time of one stage of a lookup; stages are a fixed set."""
        histogram = self._of_stage.get(stage)
        if histogram is None:
            histogram = self._of_stage[stage] = self._stages.of(stage)
        histogram.observe(seconds)

    heard: Callable[[str, int, int, float], None] | None = None
    """Told (model, blocks, best match, seconds of matching) by who counts lookups natively; nobody listens here."""

    def lookup_tallies(self, model: str) -> _core.LookupTallies:
        """What the native core adds an answered lookup of this model to. Known models only."""
        found = self._of_model.get(model)
        if found is None:
            found = self._of_model[model] = _core.LookupTallies(
                self._looked_up.of(model),
                self._matched.of(model),
                self._best.of(model),
                self._ratio.of(model),
                self._stages.of("match"),
                self._stages.of("total"),
            )
        return found

    def observe_lookup(self, model: str, blocks: int, best_match: int) -> None:
        """One answered lookup: the prompt's blocks, and how many the best pod held. Known models only."""
        self.lookup_tallies(model).looked(blocks, best_match)

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """One finished RPC: full method name and the status code's name."""
        tallies = self._of_rpc.get((method, code))
        if tallies is None:
            tallies = self._rpc_tallies(method, code)
        tallies[0].add(1)
        tallies[1].observe(seconds)

    def _rpc_tallies(self, method: str, code: str) -> tuple[_core.Counter, _core.Histogram]:
        with self._lock:
            if method not in self._methods and len(self._methods) >= MAX_METHODS:
                return self._rpcs.of("other", code), self._rpc_seconds.of("other")
            self._methods.add(method)
            tallies = (self._rpcs.of(method, code), self._rpc_seconds.of(method))
            self._of_rpc[(method, code)] = tallies
            return tallies

    def shed(self, method: str, reason: str) -> None:
        """An RPC was turned away; methods and reasons are fixed sets."""
        self._shed.labels(method, reason).inc()

    def watch_in_flight(self, method: str, read: Callable[[], int]) -> None:
        """Show this number in every scrape from now on."""
        self._in_flight.labels(method).set_function(read)

    def unknown_tier(self, model: str, tier: str) -> None:
        """A score met a tier without a weight; logged once per model and tier, counted always."""
        self._unknown_tiers.labels(model).inc()
        with self._lock:
            first = (model, tier) not in self._warned_tiers and len(self._warned_tiers) < 1024
            if first:
                self._warned_tiers.add((model, tier))
        if first:
            logs.event(logger, logging.WARNING, "tier has no weight; weighs as the lowest", model=model, tier=tier)

    def observe_usage(self, model: str, predicted: int, cached: int) -> None:
        """One report of tokens foreseen to be cached and tokens found. Known models only."""
        self._foreseen.labels(model).inc(predicted)
        self._found.labels(model).inc(cached)
        direction = "over" if predicted > cached else "under" if predicted < cached else "exact"
        self._off.labels(model, direction).observe(abs(predicted - cached))

    def ready(self, ready: bool) -> None:
        """Say whether the server is ready to answer."""
        self.is_ready = ready
        self._ready.set(1 if ready else 0)

    def watch(
        self,
        statuses: Callable[[], list[StreamStatus]],
        models: Callable[[], Iterable[ModelStats]],
        sources: Callable[[], Iterable[SourceStatus]] = list,
        unclaimed: Callable[[], Mapping[str, Sequence[str]]] = dict,
    ) -> None:
        """Show the fleet's streams and models, what discovery sees, and who dialled in for no pod, in every scrape."""
        self.registry.register(FleetCollector(statuses, models, sources, unclaimed))

    def watch_text(self, stats: Callable[[], Mapping[str, int]], tokenizers: Tokenizers) -> None:
        """Show the text cache, and per model (is it native, are its texts never cut), in every scrape."""
        self.registry.register(TextCollector(stats, tokenizers))

    def watch_store(self, stats: Callable[[], Iterable[StoreStats]]) -> None:
        """Show each model's part in the shared store in every scrape."""
        self.registry.register(StoreCollector(stats))

    def watch_snapshots(self, stats: Callable[[], "SnapshotStats"]) -> None:
        """Show how the index is kept, in every scrape."""
        self.registry.register(SnapshotCollector(stats))

    def watch_replicas(
        self, states: Callable[[], Iterable["PeerState"]], repairs: Callable[[], Mapping[str, int]]
    ) -> None:
        """Show what the last comparison with each peer said, in every scrape."""
        self.registry.register(ReplicaCollector(states, repairs))

    def watch_logs(self, suppressed: Callable[[], int]) -> None:
        """Show how many lines of the log were left out, in every scrape."""
        self.registry.register(CountsCollector(LOGS, lambda: {"": suppressed()}))

    def watch_spans(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Show what became of the spans, in every scrape."""
        self.registry.register(CountsCollector(SPANS, counts))

    def lookups(self) -> dict[str, tuple[int, int]]:
        """Per model: the blocks of the prompts asked about, and those of them the best pod held, since the start."""
        matched = self._matched.totals()
        return {model: (blocks, matched.get((model,), 0)) for (model,), blocks in self._looked_up.totals().items()}

    def serve(self, host: str, port: int, routes: Routes | None = None, body_bytes: int = 0) -> "MetricsServer":
        """Answer HTTP on this address, also by `routes`, whose bodies are bounded; port 0 picks a free one."""
        return MetricsServer(self, host, port, routes, body_bytes)


class FleetCollector(Collector):
    """Builds the series of streams and models anew at each scrape, so they end with their pod."""

    def __init__(
        self,
        statuses: Callable[[], list[StreamStatus]],
        models: Callable[[], Iterable[ModelStats]],
        sources: Callable[[], Iterable[SourceStatus]],
        unclaimed: Callable[[], Mapping[str, Sequence[str]]],
    ) -> None:
        self._statuses = statuses
        self._models = models
        self._sources = sources
        self._unclaimed = unclaimed

    def describe(self) -> Iterable[Metric]:
        """The families without samples: registering must not ask the fleet."""
        return list(_families().values())

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        families = _families()
        for status in self._statuses():
            _add_stream(families, status)
        for model in self._models():
            for what in ("blocks", "claims", "bytes", "block_size"):
                _add(families, f"kvindex_index_{what}", (model.name,), getattr(model, what))
            _add(families, "kvindex_coverage_ratio", (model.name,), model.coverage)
            _add_placements(families, model.name, model.placements)
        for source in self._sources():
            _add_source(families, source)
        for endpoint, topics in self._unclaimed().items():
            _add(families, "kvindex_unclaimed_engines", (endpoint,), len(topics))
        yield from families.values()


class TextCollector(Collector):
    """The text cache's own counters, read at scrape."""

    def __init__(self, stats: Callable[[], Mapping[str, int]], tokenizers: Tokenizers) -> None:
        self._stats = stats
        self._tokenizers = tokenizers

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return list(_families(TEXT).values())

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        families = _families(TEXT)
        for what, value in self._stats().items():
            name = f"kvindex_text_cache_{what}" if what in ("bytes", "chunks") else f"kvindex_text_{what}_total"
            _add(families, name, (), value)
        for model, (native, whole) in self._tokenizers().items():
            _add(families, "kvindex_tokenizer_native", (model,), native)
            _add(families, "kvindex_tokenizer_whole", (model,), whole)
        yield from families.values()


class SnapshotStats(Protocol):
    """What is shown of snapshots; see Keeper."""

    written: int
    failed: int
    refused: int
    last_bytes: int
    last_seconds: float
    last_time: float
    restored_streams: int
    restored_claims: int


class SnapshotCollector(Collector):
    """The keeper's own counters, read at scrape."""

    def __init__(self, stats: Callable[[], SnapshotStats]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return list(_families(SNAPSHOTS).values())

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        families, stats = _families(SNAPSHOTS), self._stats()
        for what in ("written", "failed", "refused"):
            _add(families, f"kvindex_snapshots_{what}_total", (), getattr(stats, what))
        for what in ("bytes", "seconds"):
            _add(families, f"kvindex_snapshot_last_{what}", (), getattr(stats, f"last_{what}"))
        _add(families, "kvindex_snapshot_last_time_seconds", (), stats.last_time)
        for what in ("streams", "claims"):
            _add(families, f"kvindex_snapshot_restored_{what}_total", (), getattr(stats, f"restored_{what}"))
        yield from families.values()


class PeerState(Protocol):
    """What is shown of a comparison with a peer."""

    @property
    def peer(self) -> str: ...
    @property
    def streams(self) -> int: ...
    @property
    def blocks(self) -> int | None: ...


class ReplicaCollector(Collector):
    """How far the replicas agree, read at scrape."""

    def __init__(self, states: Callable[[], Iterable[PeerState]], repairs: Callable[[], Mapping[str, int]]) -> None:
        self._states = states
        self._repairs = repairs

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return list(_families(REPLICAS).values())

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        families = _families(REPLICAS)
        for each in self._states():
            if each.blocks is not None:
                _add(families, "kvindex_replica_divergence_blocks", (each.peer,), each.blocks)
            _add(families, "kvindex_replica_compared_streams", (each.peer,), each.streams)
        for how, times in self._repairs().items():
            _add(families, "kvindex_replica_repairs_total", (how,), times)
        yield from families.values()


class CountsCollector(Collector):
    """One family's counts by its only label, or a single one by the empty string, read at scrape."""

    def __init__(self, rows: Sequence[MetricName], counts: Callable[[], Mapping[str, int]]) -> None:
        self._rows, self._counts = rows, counts

    def describe(self) -> Iterable[Metric]:
        """The family without samples."""
        return list(_families(self._rows).values())

    def collect(self) -> Iterator[Metric]:
        """The family with this moment's samples."""
        families = _families(self._rows)
        for name, family in families.items():
            for label, count in self._counts().items():
                _add(families, name, (label,) if label else (), count)
            yield family


class StoreCollector(Collector):
    """What this replica has done in the shared store, read at scrape."""

    def __init__(self, stats: Callable[[], Iterable[StoreStats]]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        """The families without samples."""
        return list(_families(STORE).values())

    def collect(self) -> Iterator[Metric]:
        """The families with this moment's samples."""
        families = _families(STORE)
        for each in self._stats():
            _add(families, "kvindex_store_reachable", (each.model,), each.reachable)
            for event, times in each.counts.items():
                _add(families, "kvindex_store_events_total", (each.model, event), times)
        yield from families.values()


def _families(rows: Sequence[MetricName] = (*STREAMS, *DISCOVERY)) -> dict[str, Metric]:
    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    return {row.name: kinds[row.kind](row.name, row.meaning, labels=row.labels) for row in rows}


def _add(families: dict[str, Metric], name: str, labels: Sequence[str], value: float) -> None:
    cast(GaugeMetricFamily | CounterMetricFamily, families[name]).add_metric(labels, value)


def _add_placements(families: dict[str, Metric], model: str, placements: Mapping[str, int]) -> None:
    # An index in a shared store does not know all of them.
    if "blocks" in placements:
        _add(families, "kvindex_placement_blocks", (model,), placements["blocks"])
    for what in ("recorded", "renewed", "confirmed", "expired"):
        if what in placements:
            _add(families, f"kvindex_placement_{what}_total", (model,), placements[what])
    for reason in ("fenced", "refused"):
        if reason in placements:
            _add(families, "kvindex_placement_dropped_total", (model, reason), placements[reason])


def _add_source(families: dict[str, Metric], source: SourceStatus) -> None:
    _add(families, "kvindex_discovery_pods", (source.name,), source.pods)
    for reason, pods in source.refused.items():
        _add(families, "kvindex_discovery_refused_pods", (source.name, reason), pods)
    for reason, count in source.errors.items():
        _add(families, "kvindex_discovery_errors_total", (source.name, reason), count)
    _add(families, "kvindex_discovery_age_seconds", (source.name,), source.age_seconds)


def _add_stream(families: dict[str, Metric], status: StreamStatus) -> None:
    labels = (status.model, status.pod, str(status.rank))
    for what in (
        *("messages", "events", "blocks_stored", "blocks_removed"),
        *("gaps", "restarts", "replays", "duplicates"),
    ):
        _add(families, f"kvindex_stream_{what}_total", labels, getattr(status, what))
    _add(families, "kvindex_stream_orphans", labels, status.orphans)
    _add(families, "kvindex_stream_unresolved", labels, status.unresolved)
    _add(families, "kvindex_ingest_last_lag_seconds", labels, status.lag_seconds)
    bounds = [*(str(bound) for bound in LAG_BOUNDS), "+Inf"]
    cast(HistogramMetricFamily, families["kvindex_ingest_lag_seconds"]).add_metric(
        labels, buckets=list(zip(bounds, status.lag_buckets, strict=True)), sum_value=status.lag_sum
    )
    # Copied before the walk: the stream's own thread may be adding a reason or a tier meanwhile.
    for reason, count in dict(status.decode_errors).items():
        _add(families, "kvindex_stream_decode_errors_total", (*labels, reason), count)
    for reason, count in dict(status.dropped).items():
        _add(families, "kvindex_stream_dropped_total", (*labels, reason), count)
    for tier, blocks in dict(status.blocks_by_tier).items():
        _add(families, "kvindex_stream_blocks", (*labels, tier), blocks)
    for trust in Trust:
        _add(families, "kvindex_stream_trust", (*labels, trust.name), trust is status.trust)
    _add(families, "kvindex_stream_trust_cause", (*labels, status.trust_cause), 1)
    for state in StreamState:
        _add(families, "kvindex_stream_state", (*labels, state.name), state is status.state)
    if status.last_sequence is not None:
        _add(families, "kvindex_stream_last_sequence", labels, status.last_sequence)
        _add(families, "kvindex_stream_age_seconds", labels, status.age_seconds)


class MetricsServer:
    """A running HTTP server with `/metrics`, `/healthz` and `/readyz`, and what else is given to it."""

    def __init__(
        self, metrics: Metrics, host: str, port: int, routes: Routes | None = None, body_bytes: int = 0
    ) -> None:
        self._metrics = metrics
        own = {("GET", "/metrics"): self._scrape, ("GET", "/healthz"): self._alive, ("GET", "/readyz"): self._ready}
        bounds = Bounds(connections=MAX_HTTP_CONNECTIONS, body_bytes=body_bytes)
        self._web = WebServer("metrics", host, port, {**own, **(routes or {})}, bounds)
        self.port = self._web.port

    def stop(self) -> None:
        """Close the port and wait for the accepting thread to end."""
        self._web.stop()

    def _scrape(self, request: Request) -> Answer:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        try:
            return Answer(200, content_type, encode(self._metrics.registry))
        except Exception:  # noqa: BLE001  a scrape must not end the connection without an answer
            logs.event(logger, logging.ERROR, "scrape failed", exc_info=True)
            return text(500, "scrape failed\n")

    def _alive(self, _: Request) -> Answer:
        return text(200, "ok\n")

    def _ready(self, _: Request) -> Answer:
        ready = self._metrics.is_ready
        return text(200 if ready else 503, "ready\n" if ready else "not ready\n")


MAX_HTTP_CONNECTIONS = 32
"""Each has a thread; one more is closed at once."""
