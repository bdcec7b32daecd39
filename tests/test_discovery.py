"""Files, names and engines as sources of pods, and who wins when several want one pod."""

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvindex_server._core import Index
from kvindex_server.config import ConfigError, DiscoveryDefaults, DnsSettings, PodFileSettings, Settings, load_pods
from kvindex_server.discovery import reconciler as reconciler_module
from kvindex_server.discovery.dns import DnsSource
from kvindex_server.discovery.engine import BadAnswer, Engines, EventSources, Known, fetch, read_sources
from kvindex_server.discovery.file import FileSource
from kvindex_server.discovery.reconciler import Reconciler
from kvindex_server.discovery.source import Backoff, Changed, Found, Progress, Sight
from kvindex_server.errors import FailedPrecondition
from kvindex_server.fleet import Fleet
from kvindex_server.models import Model, Models
from kvindex_server.pods import PodSpec
from kvindex_server.server import Server

DEFAULTS = DiscoveryDefaults(model="m", replay_port=5558)


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    index = Index(0, 1337, 0)
    made = Fleet(Models([Model("m", index, aliases=("alias",))]), max_pods=4)
    yield made
    made.stop()


def eventually(check: Callable[[], bool], seconds: float = 5.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.01)


def spec(pod: str, port: int = 5557, **values: Any) -> PodSpec:
    return PodSpec(pod, values.pop("model", "m"), f"tcp://127.0.0.1:{port}", **values)


class Given:
    """A source that sees what the test says."""

    def __init__(self, name: str, specs: Sequence[PodSpec] = ()) -> None:
        self.name = name
        self.progress = Progress(name)
        self.specs = list(specs)

    def start(self, changed: Changed) -> None:
        pass

    def stop(self) -> None:
        pass

    def look(self) -> Sight:
        return Sight([Found(each) for each in self.specs], {"blind": 1})


def standing(fleet: Fleet) -> dict[str, tuple[str, bool]]:
    return {each.pod: (each.endpoint, discovered) for each, discovered in fleet.registrations()}


# ---- who wins ---------------------------------------------------------------


def test_only_its_own_pods_are_taken_away(fleet: Fleet) -> None:
    """What an RPC or the configuration registered stays as it is, whatever discovery sees."""
    fleet.register(spec("by-rpc", 7000))
    source = Given("file", [spec("found", 7001), spec("by-rpc", 7002), spec("reader", 7000)])
    reconciler = Reconciler(fleet, [source])
    reconciler.reconcile()
    expected = {"by-rpc": ("tcp://127.0.0.1:7000", False), "found": ("tcp://127.0.0.1:7001", True)}
    assert standing(fleet) == expected
    (status,) = reconciler.statuses()
    # by-rpc is not discovery's; reader would be credited with the blocks of by-rpc's publisher.
    assert status.refused == {"blind": 1, "registered_otherwise": 1, "publisher_taken": 1}
    assert status.pods == 3
    source.specs = []
    reconciler.reconcile()
    assert standing(fleet) == {"by-rpc": ("tcp://127.0.0.1:7000", False)}


def test_an_rpc_takes_a_found_pod_over_and_gives_it_back(fleet: Fleet) -> None:
    """Registered by RPC, discovery lets go of it; unregistered, discovery brings it back."""
    source = Given("dns", [spec("a", 7001)])
    reconciler = Reconciler(fleet, [source])
    reconciler.reconcile()
    assert fleet.register(spec("a", 7001)) is False
    source.specs = [spec("a", 7009)]
    reconciler.reconcile()
    assert standing(fleet) == {"a": ("tcp://127.0.0.1:7001", False)}
    with pytest.raises(FailedPrecondition):
        fleet.unregister("a", "m", discovered=True)
    fleet.unregister("a", "m")
    reconciler.reconcile()
    assert standing(fleet) == {"a": ("tcp://127.0.0.1:7009", True)}


def test_the_earlier_source_wins_and_an_alias_is_the_same_model(fleet: Fleet) -> None:
    first, second = Given("file", [spec("a", 7001)]), Given("dns", [spec("a", 7002, model="alias"), spec("b", 7003)])
    reconciler = Reconciler(fleet, [first, second])
    reconciler.reconcile()
    assert standing(fleet) == {"a": ("tcp://127.0.0.1:7001", True), "b": ("tcp://127.0.0.1:7003", True)}
    assert [status.refused for status in reconciler.statuses()] == [{"blind": 1}, {"blind": 1, "other_source": 1}]
    first.specs = []
    reconciler.reconcile()
    assert standing(fleet) == {"a": ("tcp://127.0.0.1:7002", True), "b": ("tcp://127.0.0.1:7003", True)}


def test_another_life_replaces_the_registration(fleet: Fleet) -> None:
    """A new incarnation is a new stream; an unchanged one is left alone."""
    source = Given("dns", [spec("a", 7001, incarnation="1")])
    reconciler = Reconciler(fleet, [source])
    reconciler.reconcile()
    subscriber = fleet._subscribers[("m", "a")]
    reconciler.reconcile()
    assert fleet._subscribers[("m", "a")] is subscriber
    source.specs = [spec("a", 7001, incarnation="2")]
    reconciler.reconcile()
    assert fleet._subscribers[("m", "a")] is not subscriber


def test_more_than_the_limit_is_refused_and_counted(fleet: Fleet) -> None:
    reconciler = Reconciler(fleet, [Given("file", [spec(f"p{n}", 7000 + n) for n in range(6)])])
    reconciler.reconcile()
    assert len(standing(fleet)) == 4
    assert reconciler.statuses()[0].refused == {"blind": 1, "limit": 2}


def test_pods_swap_addresses_in_one_pass(fleet: Fleet) -> None:
    source = Given("file", [spec("a", 7001), spec("b", 7002)])
    reconciler = Reconciler(fleet, [source])
    reconciler.reconcile()
    source.specs = [spec("c", 7001), spec("a", 7002)]
    reconciler.reconcile()
    assert standing(fleet) == {"a": ("tcp://127.0.0.1:7002", True), "c": ("tcp://127.0.0.1:7001", True)}


def test_a_bad_pass_does_not_end_discovery(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "PASS_SECONDS", 0.02)
    source = Given("file", [spec("a", 7001)])
    broken = source.look
    source.look = lambda: 1 / 0  # type: ignore[assignment, return-value]
    reconciler = Reconciler(fleet, [source])
    reconciler.start()
    time.sleep(0.1)
    source.look = broken  # type: ignore[method-assign]
    eventually(lambda: "a" in standing(fleet))
    reconciler.stop()


# ---- file ------------------------------------------------------------------


def pods_text(*ports: int) -> str:
    return json.dumps([{"pod": f"p{n}", "model": "m", "endpoint": f"tcp://127.0.0.1:{n}"} for n in ports])


def seen(source: FileSource | DnsSource) -> list[str]:
    return [each.spec.pod for each in source.look().found]


@pytest.fixture
def source_of(request: pytest.FixtureRequest) -> Callable[[Path], FileSource]:
    def make(path: Path) -> FileSource:
        source = FileSource(PodFileSettings(path=str(path), interval_seconds=0.02))
        request.addfinalizer(source.stop)
        source.start(lambda: None)
        return source

    return make


def test_a_configmaps_symlink_swap_is_seen(tmp_path: Path, source_of: Callable[[Path], FileSource]) -> None:
    """The kubelet writes a new directory and swaps one link; the file's own link never changes."""
    for version, ports in (("v1", (1, 2)), ("v2", (3,))):
        (tmp_path / version).mkdir()
        (tmp_path / version / "pods.yaml").write_text(pods_text(*ports), encoding="utf-8")
        os.utime(tmp_path / version / "pods.yaml", (1, 1))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "pods.yaml").symlink_to("..data/pods.yaml")
    source = source_of(tmp_path / "pods.yaml")
    eventually(lambda: source.look().whole)
    assert seen(source) == ["p1", "p2"]
    (tmp_path / "..data_tmp").symlink_to("v2")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    eventually(lambda: seen(source) == ["p3"])
    assert source.progress.errors == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "must be a list"),
        ("pods: []", "must be a list"),
        ("[{pod: a}]", r"pods\[0\].model: is required"),
        ("[{pod: a, model: m, endpoint: tcp://a:1, port: 3}]", r"pods\[0\].port: unknown key"),
        ("[{pod: a, model: m, endpoint: tcp://a:1}, {pod: b, model: m, endpoint: tcp://a:1}]", "is read by pods"),
        ("[{pod: a, model: m, endpoint: tcp://a:1}, {pod: a, model: m, endpoint: tcp://b:1}]", "already given"),
        ("[" * 400, "pods.yaml: line 1"),
        ("\x00", "not valid"),
    ],
)
def test_a_broken_file_keeps_the_last_good_one(
    tmp_path: Path, source_of: Callable[[Path], FileSource], text: str, reason: str
) -> None:
    """Anything wrong in it is counted once per change, and costs nothing that was known."""
    path = tmp_path / "pods.yaml"
    path.write_text(pods_text(1), encoding="utf-8")
    source = source_of(path)
    eventually(lambda: source.look().whole)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason):
        load_pods(path)
    eventually(lambda: source.progress.errors == {"broken": 1})
    time.sleep(0.1)
    assert source.progress.errors == {"broken": 1}
    assert seen(source) == ["p1"]
    path.write_text("[]", encoding="utf-8")
    eventually(lambda: seen(source) == [])


def test_a_missing_file_keeps_the_last_good_one(tmp_path: Path, source_of: Callable[[Path], FileSource]) -> None:
    path = tmp_path / "pods.yaml"
    source = source_of(path)
    eventually(lambda: source.progress.errors.get("unreadable", 0) >= 2)
    assert not source.look().whole
    path.write_text(pods_text(1), encoding="utf-8")
    eventually(lambda: seen(source) == ["p1"])
    path.unlink()
    before = source.progress.errors["unreadable"]
    eventually(lambda: source.progress.errors["unreadable"] >= before + 2)
    assert seen(source) == ["p1"]


def test_a_file_being_written_is_not_read(tmp_path: Path) -> None:
    """Half a list is valid too: as long as it grows, the last whole one counts. Looked at by hand: on a busy machine a
    writer may pause for longer than an interval.
    """
    path = tmp_path / "pods.yaml"
    line = "- {{pod: p{0}, model: m, endpoint: 'tcp://127.0.0.1:{0}'}}\n"
    path.write_text("".join(line.format(n) for n in range(1, 41)), encoding="utf-8")
    source = FileSource(PodFileSettings(path=str(path)))
    source._renew()
    assert source.look().whole
    with path.open("w", encoding="utf-8") as file:
        for n in range(1, 42):
            file.write(line.format(n))
            file.flush()
            source._renew()
            assert len(seen(source)) == 40, n
    source._renew()
    assert len(seen(source)) == 41


# ---- names -----------------------------------------------------------------


def test_addresses_are_pods_and_failures_keep_them() -> None:
    """A and AAAA records in any spelling; a name that fails or has no records keeps its addresses."""
    answers: dict[str, list[str] | OSError] = {"a": ["10.0.0.2", "10.0.0.1"], "b": ["FD00:0::1"]}

    def resolve(name: str) -> list[str]:
        answer = answers[name]
        if isinstance(answer, OSError):
            raise answer
        return answer

    settings = DnsSettings(hosts=("a", "b", "a"), interval_seconds=0.01)
    source = DnsSource(settings, DEFAULTS, resolve)
    changes = threading.Event()
    source.start(changes.set)
    try:
        eventually(lambda: source.look().whole)
        assert seen(source) == ["10.0.0.1:8000", "10.0.0.2:8000", "[fd00::1]:8000"]
        assert source.look().found[2].spec.endpoint == "tcp://[fd00::1]:5557"
        changes.clear()
        answers["a"] = socket.gaierror(socket.EAI_AGAIN, "later")
        answers["b"] = []
        eventually(lambda: source.progress.errors.get("unresolved", 0) >= 4)
        assert len(seen(source)) == 3
        assert not changes.is_set()
        answers["a"] = ["10.0.0.3"]
        eventually(lambda: seen(source) == ["10.0.0.3:8000", "[fd00::1]:8000"])
        assert changes.is_set()
        answers["a"] = ["no address"]
        before = source.progress.errors["unresolved"]
        eventually(lambda: source.progress.errors["unresolved"] >= before + 2)
        assert seen(source) == ["10.0.0.3:8000", "[fd00::1]:8000"]
    finally:
        source.stop()


def test_the_systems_resolver_is_asked() -> None:
    source = DnsSource(DnsSettings(hosts=("localhost",)), DEFAULTS)
    source.start(lambda: None)
    eventually(lambda: source.look().whole)
    assert "127.0.0.1:8000" in seen(source) or "[::1]:8000" in seen(source)
    source.stop()


# ---- engines ---------------------------------------------------------------


def ranks(*ports: int, host: str = "*", replay: int = 1000, topic: str = "") -> dict[str, dict[str, object]]:
    return {
        str(rank): {
            "endpoint": f"tcp://{host}:{port}",
            "replay_endpoint": f"tcp://{host}:{port + replay}" if replay else None,
            "topic": topic,
        }
        for rank, port in enumerate(ports)
    }


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (ranks(5557, 5558), EventSources(5557, 6557, 2, "")),
        (ranks(5557, host="10.0.0.1", replay=0, topic="kv@"), EventSources(5557, 0, 1, "kv@")),
        ([{"data_parallel_rank": 0, "endpoint": "tcp://[::]:1", "topic": None}], EventSources(1, 0, 1, "")),
        ([{"endpoint": "tcp://0.0.0.0:7"}], EventSources(7, 0, 1, "")),
    ],
)
def test_engines_answers_are_read(document: object, expected: EventSources) -> None:
    """An object of ranks (vLLM 0.32) and a list of them, with the wildcard or the pod's own address."""
    assert read_sources(json.dumps(document).encode(), "10.0.0.1") == expected


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"<html>", "engine_bad_answer"),
        (b"3", "engine_bad_answer"),
        (b"[" * 100_000, "engine_bad_answer"),
        (b"{}", "engine_without_events"),
        (b"[]", "engine_without_events"),
        (b'[{"endpoint": null}]', "engine_without_events"),
        (json.dumps({"0": 3}).encode(), "engine_bad_answer"),
        (json.dumps({"0": {"endpoint": "ipc:///x"}}).encode(), "engine_bad_answer"),
        (json.dumps({"1": {"endpoint": "tcp://*:1"}}).encode(), "engine_bad_answer"),
        (json.dumps([{"endpoint": "tcp://*:1"}, {"endpoint": "tcp://*:2"}]).encode(), "engine_bad_answer"),
        (json.dumps([{"data_parallel_rank": [0], "endpoint": "tcp://*:1"}]).encode(), "engine_bad_answer"),
        (json.dumps(ranks(5557, 5600)).encode(), "engine_ports"),
        (json.dumps(ranks(5557, host="index")).encode(), "engine_dials_out"),
        (json.dumps({**ranks(5557), "1": ranks(5557, 5558, topic="t")["1"]}).encode(), "engine_topics"),
    ],
)
def test_answers_that_cannot_be_registered_name_their_reason(body: bytes, reason: str) -> None:
    with pytest.raises(BadAnswer, match=reason):
        read_sources(body, "10.0.0.1")


class Engine:
    """An engine's HTTP side."""

    def __init__(self) -> None:
        self.status, self.body = 503, b""
        self.asked = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                known = self.path == "/kv_event_sources"
                self.send_response(outer.status if known else 418)
                self.send_header("Content-Length", str(len(outer.body)))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self.http.server_address[1])
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_engines_are_asked_over_http(engine: Engine) -> None:
    engine.status, engine.body = 200, json.dumps(ranks(5557, 5558)).encode()
    assert fetch("127.0.0.1", engine.port, 2.0) == EventSources(5557, 6557, 2, "")
    engine.status = 404
    assert fetch("127.0.0.1", engine.port, 2.0) is None
    engine.status = 500
    with pytest.raises(BadAnswer, match="engine_status"):
        fetch("127.0.0.1", engine.port, 2.0)
    engine.status, engine.body = 200, b" " * 300_000
    with pytest.raises(BadAnswer, match="engine_bad_answer"):
        fetch("127.0.0.1", engine.port, 2.0)


def test_an_engine_that_is_not_up_yet_is_asked_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not known until it answers; then asked no more, and the change is told."""
    monkeypatch.setattr("kvindex_server.discovery.engine.RETRY_SECONDS", (0.02, 0.05))
    progress = Progress("dns")
    engines = Engines(progress, timeout=1.0)
    changed = threading.Event()
    engines.start(changed.set)
    life = ("1", "127.0.0.1", engine.port)
    try:
        assert engines.known(life) == Known(False, False, None)
        eventually(lambda: not engines.known(life).answered and progress.errors.get("engine_status", 0) >= 2)
        assert engines.known(life).asked
        engine.status, engine.body = 200, json.dumps(ranks(5557)).encode()
        eventually(lambda: engines.known(life) == Known(True, True, EventSources(5557, 6557, 1, "")))
        assert changed.is_set()
        asked = engine.asked
        time.sleep(0.1)
        assert engines.known(life).answered
        assert engine.asked == asked
        engines.keep([])
        assert not engines.known(life).asked
    finally:
        engines.stop()


def test_names_found_by_dns_ask_their_engines(engine: Engine) -> None:
    """Ports, ranks and topic come from the engine; before it answers the pod is counted and not followed."""
    engine.status, engine.body = 200, json.dumps(ranks(6001, 6002, topic="t")).encode()
    defaults = DiscoveryDefaults(model="m", ask_engine=True, serving_port=engine.port)
    source = DnsSource(DnsSettings(hosts=("a",)), defaults, lambda _: ["127.0.0.1"])
    source.start(lambda: None)
    try:
        eventually(lambda: bool(source.look().found))
        (found,) = source.look().found
        assert found.spec == PodSpec(
            f"127.0.0.1:{engine.port}", "m", "tcp://127.0.0.1:6001", "tcp://127.0.0.1:7001", ranks=2, topic="t"
        )
        assert source.look().whole
    finally:
        source.stop()


# ---- the whole server ------------------------------------------------------


def test_readiness_waits_for_the_first_list(tmp_path: Path) -> None:
    """The file's pods count like configured ones; what is found shows in the metrics; the end is in order."""
    path = tmp_path / "pods.yaml"
    settings = Settings.model_validate(
        {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "discovery": {"file": {"path": str(path), "interval_seconds": 0.02}},
            "server": {"ready_timeout_seconds": 30, "drain_seconds": 0},
        }
    )
    server = Server(settings)
    server.start()
    try:
        assert not server.wait_ready(0.2)
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
            dead = {"pod": "dead", "model": "m", "endpoint": f"tcp://127.0.0.1:{port}"}
            dead["replay_endpoint"] = f"tcp://127.0.0.2:{port}"  # so that there is something to wait for
            path.write_text(json.dumps([dead]), encoding="utf-8")
            eventually(lambda: server.discovery.listed)
            assert standing(server.fleet)["dead"][1]
            assert server.fleet.readiness == 0.0
            assert not server.wait_ready(0.2)
            path.write_text("[]", encoding="utf-8")
            assert server.wait_ready(10)
        value = server.metrics.registry.get_sample_value
        assert value("kvindex_discovery_pods", {"source": "file"}) == 0
        assert (value("kvindex_discovery_errors_total", {"source": "file", "reason": "unreadable"}) or 0) > 0
        assert (value("kvindex_discovery_age_seconds", {"source": "file"}) or 9) < 5
    finally:
        server.stop()


def test_the_wait_doubles_and_differs() -> None:
    backoff = Backoff(1.0, 4.0)
    waits = [backoff.next() for _ in range(5)]
    for wait, whole in zip(waits, (1, 2, 4, 4, 4), strict=True):
        assert whole / 2 <= wait <= whole
    # Two replicas that lose one server together do not come back together, nor does one at even times.
    other = Backoff(1.0, 4.0)
    assert [other.next() for _ in range(5)] != waits
    assert len(set(waits[2:])) == 3
    backoff.reset()
    assert backoff.next() <= 1.0


@pytest.mark.parametrize("template", ["{ip}:{uid}", "engine", "{ip", "{ip.x}", "{0}"])
def test_pod_names_use_known_fields(template: str) -> None:
    with pytest.raises(ValueError, match=r"pod_name|may only use|at least one"):
        Settings.model_validate({"discovery": {"kubernetes": {"pod_name": template}}})


@pytest.mark.parametrize("namespaces", [["*", "a"], ["../nodes"], ["a/b"], ["A"]])
def test_namespaces_are_names(namespaces: list[str]) -> None:
    """They become part of a path at the API server."""
    with pytest.raises(ValueError, match=r"stands alone|is not a namespace's name"):
        Settings.model_validate({"discovery": {"kubernetes": {"namespaces": namespaces}}})
