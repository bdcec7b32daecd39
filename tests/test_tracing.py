"""Spans as a collector gets them: whose child a call is, its stages, what fails, and that nothing secret is in them."""

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from publisher import free_port
from tokenizers_at_hand import byte_level

pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="pip install kvindex-server[tracing]")

from otlp_collector import Collector, Span

from kvindex_server import logs, tracing
from kvindex_server.config import ConfigError, Settings, load_settings
from kvindex_server.pb.kvindex.v1 import kvindex_pb2 as pb
from kvindex_server.pb.kvindex.v1.kvindex_pb2_grpc import KVIndexAdminStub, KVIndexStub
from kvindex_server.server import Server
from kvindex_server.tracing import Spans

SCORE = "kvindex.v1.KVIndex/Score"
SECRET = "the-launch-code-is-7319"
SALT = "salt-of-tenant-4711"
SERVER_KIND = 2
ERROR = 2


@contextlib.contextmanager
def serving(collector: Collector | None, sample_ratio: float = 0.0, **settings: Any) -> Iterator[Server]:
    given = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "models": [{"name": "m", "block_size": 4}],
        **settings,
    }
    if collector is not None:
        given["tracing"] = {"endpoint": collector.endpoint, "sample_ratio": sample_ratio, **given.get("tracing", {})}
    server = Server(Settings.model_validate(given))
    server.start()
    assert server.wait_ready(10)
    try:
        yield server
    finally:
        server.stop(0)


class Caller:
    """A traced caller: its trace, its own span, and what it sends along."""

    def __init__(self, sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        self.traceparent = f"00-{self.trace_id}-{self.span_id}-0{int(sampled)}"
        self.metadata = (("traceparent", self.traceparent), ("tracestate", "vendor=1"), ("baggage", f"note={SECRET}"))

    def is_parent_of(self, span: Span) -> bool:
        return (span.trace_id, span.parent_id) == (self.trace_id, self.span_id)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as listening:
        yield listening


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_level().save(str(directory / "tokenizer.json"))
    models = [{"name": "m", "block_size": 4, "tokenizer": str(directory)}]
    with serving(collector, models=models, http={"listen": "127.0.0.1:0"}) as running:
        yield running


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address) as opened:
        yield opened


def of(caller: Caller, collector: Collector, name: str, count: int = 1) -> list[Span]:
    """The spans of this name whose parent is the caller's."""
    ends = time.monotonic() + 20
    while True:
        found = [each for each in list(collector.spans) if each.name == name and caller.is_parent_of(each)]
        if len(found) >= count:
            return found
        assert time.monotonic() < ends, sorted({each.name for each in collector.spans})
        time.sleep(0.02)


def test_a_call_is_its_callers_child_and_has_its_stages(channel: grpc.Channel, collector: Collector) -> None:
    """Text: waiting for a turn, tokenizing with hashing, matching; each inside the call's own time."""
    caller = Caller()
    request = pb.ScoreRequest(model="m", prompt="a text of some words", pods=["p"])
    KVIndexStub(channel).Score(request, metadata=caller.metadata, timeout=10)
    (span,) = of(caller, collector, SCORE)
    assert (span.kind, span.status) == (SERVER_KIND, 0)
    assert span.resource["service.name"] == "kvindex-server"
    told = {name: span.attributes[name] for name in ("rpc.system.name", "rpc.service", "rpc.method")}
    assert told == {"rpc.system.name": "grpc", "rpc.service": "kvindex.v1.KVIndex", "rpc.method": "Score"}
    assert span.attributes["rpc.response.status_code"] == "OK"
    assert span.attributes["kvindex.model"] == "m"
    assert span.attributes["kvindex.blocks"] > 0
    assert span.attributes["kvindex.best_match_blocks"] == 0
    collector.wait("match")
    stages = collector.below(span)
    assert set(stages) == {"wait", "tokenize", "match"}
    assert all(span.start <= each.start <= each.end <= span.end for each in stages.values())
    assert stages["wait"].end <= stages["tokenize"].end <= stages["match"].end
    assert {each.trace_id for each in stages.values()} == {caller.trace_id}


def test_tokens_that_python_answers_are_hashed_as_a_stage(channel: grpc.Channel, collector: Collector) -> None:
    caller = Caller()
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
    request.mm_features.add(hash="image", offset=0, length=4)
    KVIndexStub(channel).Score(request, metadata=caller.metadata, timeout=10)
    blocks = pb.GetPodsForBlocksRequest(model="m", tokens=pb.Tokens(ids=range(8)))
    KVIndexStub(channel).GetPodsForBlocks(blocks, metadata=caller.metadata, timeout=10)
    (span,) = of(caller, collector, "kvindex.v1.KVIndex/GetPodsForBlocks")
    assert set(collector.below(span)) == {"wait", "hash"}


def test_each_request_of_a_stream_has_a_span(channel: grpc.Channel, collector: Collector) -> None:
    """With its own status: the bad one is an error, the stream goes on."""
    caller = Caller()
    good = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
    bad = pb.ScoreRequest(model="nobody", tokens=pb.Tokens(ids=range(8)), pods=["p"])
    answers = KVIndexStub(channel).ScoreStream(iter((good, bad, good)), metadata=caller.metadata, timeout=10)
    assert len(list(answers)) == 3
    spans = of(caller, collector, "kvindex.v1.KVIndex/ScoreStream", 3)
    ordered = sorted(spans, key=lambda each: each.start)
    assert [each.attributes["rpc.response.status_code"] for each in ordered] == ["OK", "NOT_FOUND", "OK"]
    assert [each.status for each in ordered] == [0, ERROR, 0]


def test_a_failed_call_is_an_error(channel: grpc.Channel, collector: Collector) -> None:
    caller = Caller()
    with pytest.raises(grpc.RpcError):
        KVIndexStub(channel).Score(pb.ScoreRequest(model=SECRET, prompt="x"), metadata=caller.metadata, timeout=10)
    (span,) = of(caller, collector, SCORE)
    assert (span.status, span.attributes["rpc.response.status_code"]) == (ERROR, "NOT_FOUND")


def test_admin_and_http_calls_are_traced(server: Server, channel: grpc.Channel, collector: Collector) -> None:
    caller = Caller()
    KVIndexAdminStub(channel).ListPods(pb.ListPodsRequest(), metadata=caller.metadata, timeout=10)
    of(caller, collector, "kvindex.v1.KVIndexAdmin/ListPods")
    request = urllib.request.Request(
        f"http://{server.http_address}/query",
        json.dumps({"model": "m", "token_ids": list(range(8))}).encode(),
        {"Content-Type": "application/json", "Traceparent": caller.traceparent},
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
    (span,) = of(caller, collector, "query")
    assert span.attributes["url.path"] == "/query"


@pytest.mark.parametrize("traceparent", [None, "", "rubbish", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_call_without_a_traced_caller_gets_none_at_ratio_0(
    channel: grpc.Channel, collector: Collector, traceparent: str | None
) -> None:
    """Also one whose traceparent is none, and one whose caller decided against it. A later traced call comes alone."""
    before = len(collector.spans)
    metadata = [] if traceparent is None else [("traceparent", traceparent)]
    request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
    KVIndexStub(channel).Score(request, metadata=metadata, timeout=10)
    KVIndexStub(channel).Score(request, metadata=Caller(sampled=False).metadata, timeout=10)
    last = Caller()
    KVIndexStub(channel).Score(request, metadata=last.metadata, timeout=10)
    of(last, collector, SCORE)
    collector.wait(SCORE)
    assert {each.trace_id for each in collector.spans[before:]} == {last.trace_id}


def test_at_ratio_1_a_call_without_a_caller_begins_a_trace() -> None:
    with Collector() as collector, serving(collector, 1.0) as server, grpc.insecure_channel(server.grpc_address) as to:
        KVIndexStub(to).Score(pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"]), timeout=10)
        (span,) = collector.wait(SCORE)
        assert span.parent_id == ""
        scrape = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5).read().decode()
    assert 'kvindex_trace_spans_total{outcome="failed"} 0.0' in scrape


def test_nothing_of_a_prompt_is_sent(server: Server, channel: grpc.Channel, collector: Collector) -> None:
    """Text, chat, salt, tokens, keys, adapter, baggage and bearer token: none is in any byte that a collector gets."""
    caller = Caller()
    metadata = (*caller.metadata, ("authorization", f"Bearer {SECRET}"))
    stub = KVIndexStub(channel)
    chat = json.dumps({"messages": [{"role": "user", "content": SECRET}]})
    token, key = 123_454_321, 0x1122_3344_5566_7788
    requests = [
        pb.ScoreRequest(model="m", prompt=SECRET, cache_salt=SALT),
        pb.ScoreRequest(model="m", chat=chat, cache_salt=SALT),
        pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=[token] * 8), lora_name=SECRET),
        pb.ScoreRequest(model="m", keys=pb.Keys(values=[key])),
    ]
    for request in requests:
        with contextlib.suppress(grpc.RpcError):
            stub.Score(request, metadata=metadata, timeout=10)
    of(caller, collector, SCORE, len(requests))
    for secret in (SECRET.encode(), SALT.encode(), str(token).encode(), str(key).encode(), hex(key)[2:].encode()):
        assert secret not in collector.raw


def test_strangers_cannot_fill_the_collector(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("reader-token-0123456789\n")
    (tmp_path / "operators").write_text("operator-token-0123456789\n")
    auth = {"tokens_file": str(tmp_path / "tokens"), "admin_tokens_file": str(tmp_path / "operators")}
    with Collector() as collector:
        with serving(collector, 1.0, auth=auth) as server, grpc.insecure_channel(server.grpc_address) as to:
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    KVIndexStub(to).Score(request, metadata=Caller().metadata, timeout=10)
            known = Caller()
            metadata = (*known.metadata, ("authorization", "Bearer reader-token-0123456789"))
            KVIndexStub(to).Score(request, metadata=metadata, timeout=10)
        # Stopping has sent all there was.
        assert {each.trace_id for each in collector.spans} == {known.trace_id}


def test_a_caller_that_is_refused_late_leaves_no_span_either() -> None:
    """As by a revoked certificate or Kubernetes' review, which are judged inside the call."""
    with Collector() as collector:
        spans = Spans(tracing.Collector(collector.endpoint, sample_ratio=1.0))
        for code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "NOT_FOUND"):
            with spans.call("/s/Score", Caller().metadata):
                spans.answered(code)
        spans.close()
        assert [each.attributes["rpc.response.status_code"] for each in collector.spans] == ["NOT_FOUND"]


def test_the_native_transport_traces_too(collector: Collector) -> None:
    pytest.importorskip("pygrpc_native")
    caller = Caller()
    with (
        serving(collector, server={"transport": "native"}) as server,
        grpc.insecure_channel(server.grpc_address) as to,
    ):
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
        KVIndexStub(to).Score(request, metadata=caller.metadata, timeout=10)
        (span,) = of(caller, collector, SCORE)
        assert "match" in collector.below(span)


def test_tls_to_the_collector(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    with (
        Collector(grpc.ssl_server_credentials([pair])) as collector,
        serving(collector, 1.0, tracing={"ca_file": str(tmp_path / "ca.pem")}) as server,
        grpc.insecure_channel(server.grpc_address) as to,
    ):
        KVIndexStub(to).Score(pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"]), timeout=10)
        collector.wait(SCORE)


def test_a_collector_that_is_away_harms_nobody() -> None:
    """Answers come, the spans are counted as failed, and the end does not wait for it."""
    away = Collector()
    away.endpoint = f"http://127.0.0.1:{free_port()}"
    with serving(away, 1.0) as server, grpc.insecure_channel(server.grpc_address) as to:
        request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
        assert KVIndexStub(to).Score(request, timeout=10).total_blocks == 2
        ends = time.monotonic() + 20
        while True:
            scrape = urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5).read().decode()
            if 'kvindex_trace_spans_total{outcome="failed"} 3.0' in scrape:
                break
            assert time.monotonic() < ends, scrape
            time.sleep(0.1)


def test_a_line_of_the_log_names_the_trace(collector: Collector) -> None:
    """A call's line has the ids of its span, and no other line has any."""
    written: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: written.append(logs.JsonFormatter().format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("kvindex_server.calls")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    caller = Caller()
    try:
        with serving(collector, log={"calls": 1.0}) as server, grpc.insecure_channel(server.grpc_address) as to:
            request = pb.ScoreRequest(model="m", tokens=pb.Tokens(ids=range(8)), pods=["p"])
            KVIndexStub(to).Score(request, metadata=caller.metadata, timeout=10)
            KVIndexStub(to).Score(request, timeout=10)
            (span,) = of(caller, collector, SCORE)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, second = map(json.loads, written)
    assert (first["event"], first["trace_id"], first["span_id"]) == ("call", span.trace_id, span.span_id)
    assert (first["method"], first["code"], first["model"]) == ("/kvindex.v1.KVIndex/Score", "OK", "m")
    assert (first["lookups"], first["blocks"], first["best_match_blocks"]) == (1, 2, 0)
    assert "trace_id" not in second


def test_off_loads_nothing_and_wraps_nothing() -> None:
    """Neither OpenTelemetry nor a decorator is there when nobody asked."""
    program = (
        "import sys; from kvindex_server.config import Settings; from kvindex_server.server import Server;"
        "s = Server(Settings.model_validate({'listen': '127.0.0.1:0', 'metrics_listen': '127.0.0.1:0'}));"
        "assert s._measured is s.metrics and s._direct._metrics is s.metrics;"
        "assert s._guards[0].spans is None;"
        "assert not [m for m in sys.modules if m.startswith('opentelemetry')], 'loaded'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_without_the_packages_the_start_says_what_to_install(tmp_path: Path) -> None:
    blocked = tmp_path / "opentelemetry.py"
    blocked.write_text("raise ImportError\n")
    done = subprocess.run(
        [sys.executable, "-m", "kvindex_server", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
        env={**os.environ, "KVINDEX_TRACING__ENDPOINT": "http://127.0.0.1:1", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "kvindex-server: config: tracing.endpoint: install kvindex-server[tracing]\n"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tracing.endpoint", "collector:4317", "must begin with http"),
        ("tracing.sample_ratio", "1.5", "1"),
        ("tracing.service_name", "", "1 char"),
    ],
)
def test_wrong_settings_are_named(key: str, value: str, reason: str) -> None:
    variable = "KVINDEX_" + key.upper().replace(".", "__")
    with pytest.raises(ConfigError, match=reason) as caught:
        load_settings({}, {variable: value}, None)
    assert key in str(caught.value) or variable in str(caught.value)


def test_a_process_sends_its_last_spans_before_it_ends() -> None:
    with Collector() as collector:
        popen = subprocess.Popen(
            [sys.executable, "-m", "kvindex_server", "serve"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "KVINDEX_LISTEN": "127.0.0.1:0",
                "KVINDEX_METRICS_LISTEN": "127.0.0.1:0",
                "KVINDEX_TRACING__ENDPOINT": collector.endpoint,
                "KVINDEX_TRACING__SAMPLE_RATIO": "1",
                "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
            },
        )
        try:
            assert popen.stdout is not None
            address = popen.stdout.readline().split()[1].removeprefix("grpc=")
            with grpc.insecure_channel(address) as channel:
                KVIndexAdminStub(channel).ListPods(pb.ListPodsRequest(), wait_for_ready=True, timeout=10)
        finally:
            popen.send_signal(signal.SIGTERM)
            popen.communicate(timeout=30)
        assert popen.returncode == 0
        (span,) = [each for each in collector.spans if each.name == "kvindex.v1.KVIndexAdmin/ListPods"]
        assert span.resource["deployment.environment"] == "test"
