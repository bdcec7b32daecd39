"""Metrics: what a scrape shows, over real HTTP, and docs that name exactly what exists."""

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvindex_server import __version__, _core
from kvindex_server.discovery.reconciler import SourceStatus
from kvindex_server.keeper import KeeperStats
from kvindex_server.metrics import (
    DISCOVERY,
    LOGS,
    MAX_METHODS,
    REPLICAS,
    REQUESTS,
    SNAPSHOTS,
    SPANS,
    STORE,
    STREAMS,
    TEXT,
    Metrics,
    MetricsServer,
    metrics_table,
)
from kvindex_server.shared import StoreStats
from kvindex_server.siblings import PeerState
from kvindex_server.stream import LAG_BOUNDS, StreamState, StreamStatus, Trust

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
STREAM = {"model": "m", "pod": "10.0.0.1:8000", "rank": "1"}

SOURCE = SourceStatus("dns", 7, refused={"no_model": 2}, errors={"unresolved": 3}, age_seconds=1.5)


@dataclass
class Stats:
    name: str = "m"
    blocks: int = 10
    claims: int = 20
    bytes: int = 4096
    block_size: int = 16
    coverage: float = 0.5
    placements: dict[str, int] = field(
        default_factory=lambda: {
            "blocks": 1,
            "recorded": 10,
            "renewed": 2,
            "confirmed": 3,
            "expired": 4,
            "fenced": 2,
            "refused": 5,
        }
    )


def status() -> StreamStatus:
    buckets = [0, 1] + [3] * (len(LAG_BOUNDS) - 1)
    return StreamStatus(
        pod="10.0.0.1:8000",
        rank=1,
        model="m",
        state=StreamState.LIVE,
        trust=Trust.EXACT,
        last_sequence=41,
        lag_seconds=0.004,
        blocks=7,
        blocks_by_tier={"gpu": 5, "cpu": 2},
        gaps=1,
        restarts=2,
        replays=3,
        orphans=4,
        unresolved=5,
        decode_errors={"unknown_tag": 6},
        dropped={"too_many": 7},
        duplicates=8,
        messages=42,
        events=90,
        blocks_stored=100,
        blocks_removed=30,
        lag_buckets=buckets,
        lag_sum=0.25,
    )


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in parse_text(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            found[(sample.name, frozenset(sample.labels.items()))] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


@pytest.fixture
def server() -> Iterator[tuple[Metrics, MetricsServer]]:
    metrics = Metrics()
    running = metrics.serve("127.0.0.1", 0)
    yield metrics, running
    running.stop()


def get(port: int, path: str, accept: str = "", method: str = "GET") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Accept": accept}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


def test_requests() -> None:
    metrics = Metrics()
    metrics.observe_stage("hash", 30e-6)
    metrics.observe_lookup("m", 10, 4)
    metrics.observe_lookup("m", 0, 0)
    metrics.observe_rpc("/kvindex.v1.KVIndex/Score", "OK", 0.001)
    metrics.unknown_tier("m", "nvme")
    metrics.unknown_tier("m", "nvme")
    metrics.observe_usage("m", 96, 64)
    method = "/kvindex.v1.KVIndex/Score"
    assert value(metrics, "kvindex_score_stage_seconds_bucket", stage="hash", le="2.5e-05") == 0
    assert value(metrics, "kvindex_score_stage_seconds_bucket", stage="hash", le="5e-05") == 1
    assert value(metrics, "kvindex_usage_error_tokens_bucket", model="m", direction="over", le="16.0") == 0
    assert value(metrics, "kvindex_usage_error_tokens_bucket", model="m", direction="over", le="64.0") == 1
    assert value(metrics, "kvindex_blocks_looked_up_total", model="m") == 10
    assert value(metrics, "kvindex_blocks_matched_total", model="m") == 4
    assert value(metrics, "kvindex_best_match_blocks_count", model="m") == 2
    assert value(metrics, "kvindex_best_match_ratio_sum", model="m") == 0.4
    assert value(metrics, "kvindex_best_match_ratio_count", model="m") == 1
    assert value(metrics, "kvindex_rpc_total", method=method, code="OK") == 1
    assert value(metrics, "kvindex_rpc_seconds_count", method=method) == 1
    assert value(metrics, "kvindex_unknown_tier_total", model="m") == 2
    assert value(metrics, "kvindex_build_info", version=__version__) == 1


def test_registries_are_separate() -> None:
    one, other = Metrics(), Metrics()
    one.ready(True)
    assert (value(one, "kvindex_ready"), value(other, "kvindex_ready")) == (1, 0)


def test_invented_methods_do_not_grow_the_scrape() -> None:
    metrics = Metrics()
    for number in range(MAX_METHODS + 10):
        metrics.observe_rpc(f"/made/up{number}", "UNIMPLEMENTED", 0.0)
    assert value(metrics, "kvindex_rpc_total", method="other", code="UNIMPLEMENTED") == 10
    assert len([key for key in samples(metrics) if key[0] == "kvindex_rpc_total"]) == MAX_METHODS + 1


def test_streams_and_models() -> None:
    metrics = Metrics()
    metrics.watch(lambda: [status()], lambda: [Stats()], lambda: [SOURCE])
    expected = {
        "kvindex_stream_messages_total": 42,
        "kvindex_stream_events_total": 90,
        "kvindex_stream_blocks_stored_total": 100,
        "kvindex_stream_blocks_removed_total": 30,
        "kvindex_ingest_lag_seconds_sum": 0.25,
        "kvindex_ingest_lag_seconds_count": 3,
        "kvindex_ingest_last_lag_seconds": 0.004,
        "kvindex_stream_gaps_total": 1,
        "kvindex_stream_restarts_total": 2,
        "kvindex_stream_replays_total": 3,
        "kvindex_stream_duplicates_total": 8,
        "kvindex_stream_orphans": 4,
        "kvindex_stream_unresolved": 5,
        "kvindex_stream_last_sequence": 41,
    }
    for name, number in expected.items():
        assert value(metrics, name, **STREAM) == number, name
    assert value(metrics, "kvindex_stream_decode_errors_total", **STREAM, reason="unknown_tag") == 6
    assert value(metrics, "kvindex_stream_dropped_total", **STREAM, reason="too_many") == 7
    assert value(metrics, "kvindex_stream_blocks", **STREAM, tier="cpu") == 2
    for trust in Trust:
        assert value(metrics, "kvindex_stream_trust", **STREAM, trust=trust.name) == (trust is Trust.EXACT)
    for state in StreamState:
        shown = value(metrics, "kvindex_stream_state", **STREAM, state=state.name)
        assert shown == (state is StreamState.LIVE)
    assert value(metrics, "kvindex_ingest_lag_seconds_bucket", **STREAM, le="0.001") == 0
    assert value(metrics, "kvindex_ingest_lag_seconds_bucket", **STREAM, le="0.0025") == 1
    assert value(metrics, "kvindex_ingest_lag_seconds_bucket", **STREAM, le="+Inf") == 3
    for what, number in (("blocks", 10), ("claims", 20), ("bytes", 4096), ("block_size", 16)):
        assert value(metrics, f"kvindex_index_{what}", model="m") == number
    assert value(metrics, "kvindex_coverage_ratio", model="m") == 0.5
    assert value(metrics, "kvindex_discovery_pods", source="dns") == 7
    assert value(metrics, "kvindex_discovery_refused_pods", source="dns", reason="no_model") == 2
    assert value(metrics, "kvindex_discovery_errors_total", source="dns", reason="unresolved") == 3
    assert value(metrics, "kvindex_discovery_age_seconds", source="dns") == 1.5
    assert value(metrics, "kvindex_stream_trust_cause", **STREAM, cause="nothing_heard") == 1
    assert value(metrics, "kvindex_stream_age_seconds", **STREAM) == status().age_seconds
    assert value(metrics, "kvindex_placement_blocks", model="m") == 1
    for what, number in (("recorded", 10), ("renewed", 2), ("confirmed", 3), ("expired", 4)):
        assert value(metrics, f"kvindex_placement_{what}_total", model="m") == number
    for reason, number in (("fenced", 2), ("refused", 5)):
        assert value(metrics, "kvindex_placement_dropped_total", model="m", reason=reason) == number


def test_series_end_with_their_pod() -> None:
    metrics = Metrics()
    streams = [status()]
    metrics.watch(lambda: list(streams), list)
    assert any(("pod", STREAM["pod"]) in labels for _, labels in samples(metrics))
    streams.clear()
    assert not any(("pod", STREAM["pod"]) in labels for _, labels in samples(metrics))


def test_registering_does_not_ask_the_fleet() -> None:
    def not_yet() -> list[StreamStatus]:
        raise AssertionError("asked before the first scrape")

    Metrics().watch(not_yet, list)


def test_fresh_stream_has_no_sequence() -> None:
    metrics = Metrics()
    metrics.watch(lambda: [StreamStatus(pod="p", rank=0, model="m")], list)
    assert not any(name == "kvindex_stream_last_sequence" for name, _ in samples(metrics))
    assert value(metrics, "kvindex_stream_trust", pod="p", rank="0", model="m", trust="COLD") == 1


def test_http_metrics_in_both_formats(server: tuple[Metrics, MetricsServer]) -> None:
    metrics, running = server
    metrics.observe_stage("hash", 1e-5)
    metrics.watch(lambda: [status()], lambda: [Stats()], lambda: [SOURCE])
    code, kind, body = get(running.port, "/metrics")
    assert (code, kind.split(";")[0]) == (200, "text/plain")
    assert any(family.name == "kvindex_stream_gaps" for family in parse_text(body))
    assert "_created" not in body
    code, kind, body = get(running.port, "/metrics?x=1", "application/openmetrics-text; version=1.0.0")
    assert (code, kind.split(";")[0]) == (200, "application/openmetrics-text")
    assert any(family.name == "kvindex_ingest_lag_seconds" for family in parse_openmetrics(body))
    assert get(running.port, "/metrics", method="HEAD")[2] == ""


def test_http_health_and_readiness(server: tuple[Metrics, MetricsServer]) -> None:
    metrics, running = server
    assert get(running.port, "/healthz")[0] == 200
    assert get(running.port, "/readyz")[0] == 503
    metrics.ready(True)
    assert get(running.port, "/readyz")[0] == 200
    metrics.ready(False)
    assert get(running.port, "/readyz")[0] == 503
    assert get(running.port, "/")[0] == 404
    assert get(running.port, "/metrics/x")[0] == 404
    assert get(running.port, "/metrics", method="POST")[0] == 405


def test_a_failing_scrape_answers_and_reveals_nothing(server: tuple[Metrics, MetricsServer]) -> None:
    metrics, running = server

    def broken() -> list[StreamStatus]:
        raise RuntimeError("inner detail")

    metrics.watch(broken, list)
    code, _, body = get(running.port, "/metrics")
    assert code == 500
    assert "inner detail" not in body
    assert get(running.port, "/healthz")[0] == 200


def test_stop_frees_the_port_even_with_an_idle_client() -> None:
    running = Metrics().serve("127.0.0.1", 0)
    with socket.create_connection(("127.0.0.1", running.port), timeout=5):
        running.stop()
    again = Metrics().serve("127.0.0.1", running.port)
    assert again.port == running.port
    again.stop()


def test_taken_port_fails_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError):
        Metrics().serve("127.0.0.1", taken.getsockname()[1])


def test_every_name_exists_and_none_is_undeclared() -> None:
    metrics = Metrics()
    metrics.watch(list, list)
    metrics.watch_text(_core.TextCache(1 << 20).stats, dict)
    metrics.watch_snapshots(KeeperStats)
    metrics.watch_store(list)
    metrics.watch_replicas(list, dict)
    metrics.watch_logs(lambda: 0)
    metrics.watch_spans(dict)
    exposed = set()
    for family in metrics.registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        exposed.add((family.name + suffix, family.type))
    declared = {
        (row.name, row.kind)
        for row in (*REQUESTS, *TEXT, *STORE, *STREAMS, *DISCOVERY, *SNAPSHOTS, *REPLICAS, *LOGS, *SPANS)
    }
    assert {each for each in exposed if not each[0].startswith("process_")} == declared


def test_labels_are_as_declared() -> None:
    metrics = Metrics()
    metrics.observe_stage("hash", 1.0)
    metrics.observe_lookup("m", 1, 1)
    metrics.observe_rpc("method", "OK", 1.0)
    metrics.unknown_tier("m", "t")
    metrics.observe_usage("m", 2, 1)
    metrics.shed("method", "in_flight")
    metrics.watch_in_flight("method", lambda: 1)
    metrics.watch(lambda: [status()], lambda: [Stats()], lambda: [SOURCE], lambda: {"tcp://0.0.0.0:5557": ["kv@a@m"]})
    metrics.watch_text(_core.TextCache(1 << 20).stats, lambda: {"m": (True, False)})
    metrics.watch_snapshots(KeeperStats)
    metrics.watch_store(lambda: [StoreStats("m", True, {"reads": 1})])
    metrics.watch_replicas(lambda: [PeerState("10.0.0.2:50051", 3, 0)], lambda: {"adopt": 0})
    metrics.watch_logs(lambda: 1)
    metrics.watch_spans(lambda: {"ended": 1})
    rows = (*REQUESTS, *TEXT, *STORE, *STREAMS, *DISCOVERY, *SNAPSHOTS, *REPLICAS, *LOGS, *SPANS)
    declared = {row.name: set(row.labels) for row in rows}
    seen = set()
    for name, labels in samples(metrics):
        base = name if name in declared else re.sub(r"_(bucket|sum|count)$", "", name)
        if not base.startswith("process_"):
            assert {label for label, _ in labels} - {"le"} == declared[base], name
            seen.add(base)
    assert seen == set(declared)


def test_documented_table_is_the_code() -> None:
    found = re.search(r"<!-- metrics -->\n(.*)<!-- /metrics -->", DOCS.read_text(), re.DOTALL)
    assert found is not None
    assert found.group(1) == metrics_table()


def test_documented_alerts_name_real_metrics() -> None:
    declared = {
        row.name for row in (*REQUESTS, *TEXT, *STORE, *STREAMS, *DISCOVERY, *SNAPSHOTS, *REPLICAS, *LOGS, *SPANS)
    }
    named = set(re.findall(r"kvindex_[a-z_]+", DOCS.read_text()))
    assert {re.sub(r"_(bucket|sum)$", "", name) for name in named} - {"kvindex_server"} <= declared


def test_the_text_cache_is_read_at_scrape() -> None:
    metrics = Metrics()
    cache = _core.TextCache(1 << 20)
    metrics.watch_text(cache.stats, lambda: {"m": (True, False), "n": (False, True)})
    text = _core.Text(cache, None, 1, (), (), lambda text, left: b"\1\0\0\0")
    text.ids("a", 9, 1e9)
    text.ids("a", 9, 1e9)
    samples = scrape(metrics)
    assert samples["kvindex_text_chunk_hits_total"] == samples["kvindex_text_chunk_misses_total"] == 1
    assert samples["kvindex_text_tokens_saved_total"] == samples["kvindex_text_tokens_encoded_total"] == 1
    assert samples["kvindex_text_cache_bytes"] == cache.stats()["bytes"] > 0
    assert samples['kvindex_tokenizer_native{model="m"}'] == 1
    assert samples['kvindex_tokenizer_native{model="n"}'] == 0
    assert samples['kvindex_tokenizer_whole{model="m"}'] == 0
    assert samples['kvindex_tokenizer_whole{model="n"}'] == 1


def scrape(metrics: Metrics) -> dict[str, float]:
    """Samples by name and labels as they are printed."""
    lines = generate_latest(metrics.registry).decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
