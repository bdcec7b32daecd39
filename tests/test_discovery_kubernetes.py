"""Pods of a Kubernetes API server over real HTTP: after any schedule the fleet is what the server says."""

import json
import random
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgpack
import pytest
import yaml
from kube_api import LABELS, KubeApi, pod
from publisher import Publisher

from kvindex_server import fleet as fleet_module
from kvindex_server.config import ConfigError, DiscoveryDefaults, KubernetesSettings
from kvindex_server.discovery import api as api_module
from kvindex_server.discovery.kubernetes import KubernetesSource
from kvindex_server.discovery.reconciler import Reconciler
from kvindex_server.fleet import Fleet
from kvindex_server.models import Models
from kvindex_server.pods import PodSpec

DEFAULTS = DiscoveryDefaults(model="m", replay_port=5558)


class Still:
    """A subscriber without sockets: what is tested here is who is registered, a thousand times over."""

    def __init__(self, spec: PodSpec, *_: object) -> None:
        self.spec = spec
        self.synced = spec.ranks

    def start(self) -> None:
        pass

    def stop(self) -> int:
        return 0


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setattr(fleet_module, "Subscriber", Still)
    monkeypatch.setattr(fleet_module, "open_ears", lambda spec: [])
    return Fleet(Models([]))


@pytest.fixture
def api() -> Iterator[KubeApi]:
    made = KubeApi()
    yield made
    if made.is_up:
        made.down()


def kubeconfig(tmp_path: Path, api: KubeApi, namespace: str = "llm") -> str:
    path = tmp_path / "kubeconfig"
    document = {
        "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{api.port}"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return str(path)


@contextmanager
def following(
    fleet: Fleet, api: KubeApi, tmp_path: Path, defaults: DiscoveryDefaults = DEFAULTS, **values: Any
) -> Iterator[Reconciler]:
    """Discovery against this server, with short waits."""
    settings = KubernetesSettings(
        **{"enabled": True, "kubeconfig": kubeconfig(tmp_path, api), "watch_seconds": 1, "relist_seconds": 60, **values}
    )
    source = KubernetesSource(settings, defaults, waits=(0.02, 0.2), chance=random.Random(1))
    reconciler = Reconciler(fleet, [source])
    reconciler.start()
    try:
        yield reconciler
    finally:
        reconciler.stop()


def eventually(check: Callable[[], bool], seconds: float = 10.0) -> None:
    ends = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < ends, "did not come true in time"
        time.sleep(0.02)


def followed(fleet: Fleet) -> dict[str, PodSpec]:
    return {spec.pod: spec for spec, _ in fleet.registrations()}


def names(fleet: Fleet) -> set[str]:
    return set(followed(fleet))


def truth(api: KubeApi) -> dict[str, str]:
    """Pod name to life, as the server's present state has it."""
    lives = {}
    with api.changed:
        for each in api.pods.values():
            meta, status = each["metadata"], each["status"]
            if meta["labels"] == LABELS and status["phase"] == "Running" and "deletionTimestamp" not in meta:
                engine = status["containerStatuses"][1]
                life = f"{meta['uid']}/{engine['restartCount']}/{engine['containerID']}"
                lives[f"{status['podIP']}:8000"] = life
    return lives


def lives(fleet: Fleet) -> dict[str, str]:
    return {name: spec.incarnation for name, spec in followed(fleet).items()}


def test_pods_come_change_and_go(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """Label, phase, deletion and a container's restart decide who is followed; readiness does not."""
    api.put(pod("a", "1", "10.0.0.1"))
    api.put(pod("other", "2", "10.0.0.2", labels={"app": "web"}))
    api.put(pod("b", "3", "10.0.0.3", ready=False))
    api.put(pod("c", "4", "10.0.0.4", phase="Pending"))
    api.put(pod("elsewhere", "5", "10.0.0.5", namespace="default"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        assert names(fleet) == {"10.0.0.1:8000", "10.0.0.3:8000"}
        assert fleet._awaited == {("m", "10.0.0.1:8000")}  # readiness does not wait for a pod that is not Ready
        spec = followed(fleet)["10.0.0.1:8000"]
        assert (spec.endpoint, spec.replay_endpoint) == ("tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558")
        assert spec.incarnation == "1/0/containerd://1-0"
        api.put(pod("c", "4", "10.0.0.4"))
        eventually(lambda: "10.0.0.4:8000" in names(fleet))
        api.put(pod("a", "1", "10.0.0.1", restarts=1))
        eventually(lambda: followed(fleet)["10.0.0.1:8000"].incarnation == "1/1/containerd://1-1")
        api.put(pod("a", "1", "10.0.0.1", restarts=1, labels={"app": "web"}))
        leaving = pod("b", "3", "10.0.0.3")
        leaving["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:01Z"
        api.put(leaving)
        eventually(lambda: names(fleet) == {"10.0.0.4:8000"})
        api.put(pod("d", "6", "10.0.0.4"))  # the address is used again before the old pod is gone
        api.delete("c")
        eventually(lambda: lives(fleet) == {"10.0.0.4:8000": "6/0/containerd://6-0"})


def test_a_sidecars_restart_is_no_new_life(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """Only the engine's container counts; which one that is, an annotation or the configuration says."""
    api.put(pod("a", "1", "10.0.0.1", annotations={"kvindex.io/container": "sidecar"}))
    api.put(pod("b", "2", "10.0.0.2"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        assert lives(fleet) == {
            "10.0.0.1:8000": "1/0/containerd://side-1",
            "10.0.0.2:8000": "2/0/containerd://2-0",
        }


def test_annotations_describe_a_pod(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """Annotations come before the defaults; a wrong or unknown one is refused by name, never guessed at."""
    api.put(
        pod(
            "a",
            "1",
            "fd00::1",
            annotations={
                "kvindex.io/serving-port": "8200",
                "kvindex.io/events-port": "6000",
                "kvindex.io/replay-port": "6100",
                "kvindex.io/ranks": "4",
                "kvindex.io/topic": "kv@",
                "kvindex.io/model": "other",
                "kvindex.io/engine": "vllm",
                "kvindex.io/block-size": "32",
                "example.com/ranks": "9",
            },
        )
    )
    api.put(pod("b", "2", "10.0.0.2", annotations={"kvindex.io/ranks": "many"}))
    api.put(pod("c", "3", "10.0.0.3", annotations={"kvindex.io/rank": "2"}))
    api.put(pod("d", "4", "10.0.0.4", annotations={"kvindex.io/engine": "gpt"}))
    api.put(pod("e", "5", "10.0.0.5", annotations={"kvindex.io/container": "none"}))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        assert list(followed(fleet).values()) == [
            PodSpec(
                pod="[fd00::1]:8200",
                model="other",
                endpoint="tcp://[fd00::1]:6000",
                replay_endpoint="tcp://[fd00::1]:6100",
                ranks=4,
                topic="kv@",
                engine="vllm",
                block_size=32,
                incarnation="1/0/containerd://1-0",
            )
        ]
        (status,) = reconciler.statuses()
        assert status.refused == {"annotation": 2, "invalid": 1, "no_container": 1}


def test_names_and_namespaces(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """The identifier follows the template; several namespaces, and all of them."""
    api.put(pod("a", "1", "10.0.0.1"))
    api.put(pod("b", "2", "10.0.0.2", namespace="blue"))
    api.put(pod("c", "3", "10.0.0.3", namespace="red"))
    template = {"pod_name": "{namespace}/{name}@{ip}:{port}"}
    with following(fleet, api, tmp_path, namespaces=("llm", "red"), **template) as reconciler:
        eventually(lambda: reconciler.listed)
        assert names(fleet) == {"llm/a@10.0.0.1:8000", "red/c@10.0.0.3:8000"}
    other = Fleet(Models([]))
    with following(other, api, tmp_path, namespaces=("*",), ready_only=True) as reconciler:
        eventually(lambda: reconciler.listed)
        assert names(other) == {"10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"}
        api.put(pod("b", "2", "10.0.0.2", namespace="blue", ready=False))
        eventually(lambda: names(other) == {"10.0.0.1:8000", "10.0.0.3:8000"})


def test_the_newest_pod_of_an_address_counts(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """As long as an old pod is still listed, the one made later has the address, under any name."""
    api.put(pod("old", "1", "10.0.0.1", created="2026-01-01T00:00:01Z"))
    api.put(pod("new", "2", "10.0.0.1", created="2026-01-01T00:00:02Z"))
    api.put(pod("old", "1", "10.0.0.1", created="2026-01-01T00:00:01Z", ready=False))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        assert lives(fleet) == {"10.0.0.1:8000": "2/0/containerd://2-0"}
        assert reconciler.statuses()[0].refused == {"same_name": 1}
    other = Fleet(Models([]))
    with following(other, api, tmp_path, pod_name="{name}") as reconciler:
        eventually(lambda: reconciler.listed)
        assert names(other) == {"new"}
        assert reconciler.statuses()[0].refused == {"publisher_taken": 1}
        api.delete("new")
        eventually(lambda: names(other) == {"old"})


def test_engines_tell_where_they_publish(
    fleet: Fleet, api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked again as soon as the pod is Ready; in a new life the last answer stands until the engine gives another."""
    monkeypatch.setattr("kvindex_server.discovery.engine.RETRY_SECONDS", (60.0, 60.0))
    answers = {"status": 503, "port": 6000, "told": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"0": {"endpoint": f"tcp://*:{answers['port']}", "topic": "kv"}}).encode()
            time.sleep(0.3 if not answers["told"] else 0)
            answers["told"] += 1
            self.send_response(answers["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    engine = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=engine.serve_forever, args=(0.02,), daemon=True).start()
    defaults = DiscoveryDefaults(model="m", ask_engine=True, serving_port=engine.server_address[1])
    try:
        api.put(pod("a", "1", "127.0.0.1", ready=False))
        api.put(pod("b", "2", "127.0.0.2", annotations={"kvindex.io/events-port": "7000"}))
        with following(fleet, api, tmp_path, defaults) as reconciler:
            eventually(lambda: reconciler.listed)
            assert answers["told"] == 1  # readiness has waited for the first answer
            assert reconciler.statuses()[0].refused == {"not_answered": 1}
            assert [spec.endpoint for spec in followed(fleet).values()] == ["tcp://127.0.0.2:7000"]
            answers["status"] = 200
            api.put(pod("a", "1", "127.0.0.1"))
            name = f"127.0.0.1:{engine.server_address[1]}"
            eventually(lambda: name in names(fleet))
            assert (followed(fleet)[name].endpoint, followed(fleet)[name].topic) == ("tcp://127.0.0.1:6000", "kv")
            answers["status"] = 503
            api.put(pod("a", "1", "127.0.0.1", restarts=1, ready=False))
            eventually(lambda: followed(fleet)[name].incarnation.startswith("1/1/"))
            assert followed(fleet)[name].endpoint == "tcp://127.0.0.1:6000"
            answers.update(status=200, port=6100)
            api.put(pod("a", "1", "127.0.0.1", restarts=1))
            eventually(lambda: followed(fleet)[name].endpoint == "tcp://127.0.0.1:6100")
    finally:
        engine.shutdown()
        engine.server_close()


def test_credentials_over_tls(fleet: Fleet, tmp_path: Path) -> None:
    """As in a cluster: the server's certificate is checked, the token sent, and a running watch can be ended."""
    key, certificate = tmp_path / "key.pem", tmp_path / "ca.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=kube", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    try:
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no certificate can be made: {error}")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    api = KubeApi(tls=context)
    try:
        api.token = "t"
        api.put(pod("a", "1", "10.0.0.1"))
        config = yaml.safe_load(Path(kubeconfig(tmp_path, api)).read_text(encoding="utf-8"))
        config["clusters"][0]["cluster"] = {"server": f"https://127.0.0.1:{api.port}"}
        untrusted = tmp_path / "untrusted"
        untrusted.write_text(yaml.safe_dump(config), encoding="utf-8")
        with following(fleet, api, tmp_path, kubeconfig=str(untrusted)) as reconciler:
            eventually(lambda: reconciler.statuses()[0].errors.get("connection", 0) >= 1)
        assert names(fleet) == set()
        config["clusters"][0]["cluster"]["certificate-authority"] = str(certificate)
        trusted = tmp_path / "trusted"
        trusted.write_text(yaml.safe_dump(config), encoding="utf-8")
        with following(fleet, api, tmp_path, kubeconfig=str(trusted), watch_seconds=60) as reconciler:
            eventually(lambda: names(fleet) == {"10.0.0.1:8000"})
            api.put(pod("b", "2", "10.0.0.2"))
            eventually(lambda: names(fleet) == {"10.0.0.1:8000", "10.0.0.2:8000"})
            began = time.monotonic()
            reconciler.stop()
            assert time.monotonic() - began < 1.5
            assert reconciler.statuses()[0].errors == {}
    finally:
        api.down()


def test_a_rotated_token_is_read_again(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """A service account's token is replaced by the kubelet every hour: the new one is found without a failure."""
    token = tmp_path / "token"
    token.write_text("first")
    api.token = "first"
    api.put(pod("a", "1", "10.0.0.1"))
    config = yaml.safe_load(Path(kubeconfig(tmp_path, api)).read_text(encoding="utf-8"))
    config["users"][0]["user"] = {"tokenFile": str(token)}
    rotating = tmp_path / "rotating"
    rotating.write_text(yaml.safe_dump(config), encoding="utf-8")
    with following(fleet, api, tmp_path, kubeconfig=str(rotating)) as reconciler:
        eventually(lambda: reconciler.listed)
        token.write_text("second")
        api.token = "second"
        watches = api.counts.get("watches", 0)
        api.put(pod("b", "2", "10.0.0.2"))
        eventually(lambda: api.counts.get("watches", 0) > watches + 1)
        assert names(fleet) == {"10.0.0.1:8000", "10.0.0.2:8000"}
        assert reconciler.statuses()[0].errors == {}


def test_a_lost_server_keeps_the_fleet(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """While nobody answers, the last known pods stand and errors are counted; then the news of the outage come."""
    api.put(pod("a", "1", "10.0.0.1"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        api.down()
        api.put(pod("b", "2", "10.0.0.2"))
        eventually(lambda: reconciler.statuses()[0].errors.get("connection", 0) >= 2)
        assert names(fleet) == {"10.0.0.1:8000"}
        before = reconciler.statuses()[0].age_seconds
        time.sleep(0.3)
        assert reconciler.statuses()[0].age_seconds > before
        api.delete("a")
        api.compact()
        api.up()
        eventually(lambda: names(fleet) == {"10.0.0.2:8000"})
        eventually(lambda: reconciler.statuses()[0].age_seconds < 0.3)


@pytest.mark.parametrize("how", ["status", "event"])
def test_a_forgotten_version_is_listed_anew(fleet: Fleet, api: KubeApi, tmp_path: Path, how: str) -> None:
    """410, in either of the ways that servers say it: what happened meanwhile is known all the same."""
    api.tells_gone = how
    api.put(pod("a", "1", "10.0.0.1"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        api.down()
        api.delete("a")
        api.put(pod("b", "2", "10.0.0.2"))
        api.compact()
        api.up()
        eventually(lambda: names(fleet) == {"10.0.0.2:8000"})
        assert reconciler.statuses()[0].errors["gone"] >= 1
        assert api.counts["lists"] == 2


def test_a_list_whose_pages_expire_is_asked_for_whole(
    fleet: Fleet, api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server too busy to keep a list's snapshot until its last page is asked for all in one answer."""
    monkeypatch.setattr(api_module, "PAGE", 2)
    api.expires_pages = True
    for number in range(5):
        api.put(pod(f"p{number}", f"u{number}", f"10.0.0.{number + 1}"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        assert len(names(fleet)) == 5
        assert api.counts["expired_pages"] == 1
        assert "gone" not in reconciler.statuses()[0].errors


def test_a_server_that_falls_silent_is_noticed(
    fleet: Fleet, api: KubeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch that says nothing beyond the time it was to end at counts as lost, and is begun anew."""
    monkeypatch.setattr(api_module, "CONNECT_SECONDS", 0.3)
    api.put(pod("a", "1", "10.0.0.1"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        eventually(lambda: api.counts.get("watches", 0) > 0)
        api.silent = True
        api.put(pod("b", "2", "10.0.0.2"))
        eventually(lambda: reconciler.statuses()[0].errors.get("connection", 0) >= 1)
        assert names(fleet) == {"10.0.0.1:8000"}
        api.silent = False
        eventually(lambda: names(fleet) == {"10.0.0.1:8000", "10.0.0.2:8000"})


def test_stopping_does_not_wait_for_the_watch(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """A watch of a minute ends at once when the server stops, and what is registered stays."""
    api.put(pod("a", "1", "10.0.0.1"))
    with following(fleet, api, tmp_path, watch_seconds=60) as reconciler:
        eventually(lambda: reconciler.listed)
        eventually(lambda: api.counts.get("watches", 0) > 0)
        time.sleep(0.1)
        began = time.monotonic()
        reconciler.stop()
        assert time.monotonic() - began < 1.5
    assert names(fleet) == {"10.0.0.1:8000"}


def test_quiet_watches_are_renewed_without_a_list(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """Time-outs and bookmarks carry the version on: history may be forgotten meanwhile, and nothing is listed anew."""
    api.put(pod("a", "1", "10.0.0.1"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        for number in range(20):  # of no interest to the selector: only bookmarks tell how far the server is
            api.put(pod(f"web-{number}", f"w{number}", "10.1.0.1", labels={"app": "web"}))
        eventually(lambda: api.counts.get("watches", 0) >= 3)
        api.compact()
        eventually(lambda: api.counts["watches"] >= 5)
        assert api.counts["lists"] == 1
        assert "gone" not in api.counts


def test_late_news_change_nothing(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """An older state of a pod, or anything of a deleted one, is dropped when it comes after the newer."""
    api.reverse = True
    api.put(pod("a", "1", "10.0.0.1"))
    api.put(pod("b", "2", "10.0.0.2"))
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.listed)
        with api.changed:
            api.put(pod("a", "1", "10.0.0.1", restarts=1))
            api.put(pod("a", "1", "10.0.0.1", restarts=2))
        eventually(lambda: lives(fleet) == truth(api))
        with api.changed:
            api.put(pod("b", "2", "10.0.0.2", restarts=1))
            api.delete("b")
            api.put(pod("c", "3", "10.0.0.3"))
        eventually(lambda: "10.0.0.3:8000" in names(fleet))
        assert api.counts["lists"] == 1
        time.sleep(0.3)
        assert lives(fleet) == truth(api)


def test_a_server_that_denies_is_asked_again(fleet: Fleet, api: KubeApi, tmp_path: Path) -> None:
    """Missing rights are counted, keep nothing waiting for ever, and end as soon as they are given."""
    api.put(pod("a", "1", "10.0.0.1"))
    api.denied = True
    with following(fleet, api, tmp_path) as reconciler:
        eventually(lambda: reconciler.statuses()[0].errors.get("denied", 0) >= 2)
        assert not reconciler.listed
        time.sleep(0.2)
        assert reconciler.statuses()[0].age_seconds > 0.2
        api.denied = False
        eventually(lambda: names(fleet) == {"10.0.0.1:8000"})


def test_missing_or_broken_credentials(tmp_path: Path) -> None:
    """What cannot be used is a configuration error that names its key."""
    with pytest.raises(ConfigError, match=r"discovery\.kubernetes\.kubeconfig: no usable credentials"):
        KubernetesSource(KubernetesSettings(enabled=True, kubeconfig=str(tmp_path / "none")), DEFAULTS)
    broken = tmp_path / "broken"
    for text in ("[", "- a", "clusters: 1", "current-context: x\nclusters: []\ncontexts: []"):
        broken.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"discovery\.kubernetes\.kubeconfig"):
            KubernetesSource(KubernetesSettings(enabled=True, kubeconfig=str(broken)), DEFAULTS)


def test_without_the_client_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lightkube.config.client_adapter", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvindex-server\[kubernetes\]'"):
        KubernetesSource(KubernetesSettings(enabled=True), DEFAULTS)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_pods_roll_under_hostility(
    fleet: Fleet, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts, reordered news, refusals, 410 storms, addresses used again: in the end the fleet is the truth."""
    monkeypatch.setattr(api_module, "PAGE", 7)
    api = KubeApi(seed, hostile=0.04)
    chance = random.Random(seed)
    alive: list[str] = []
    restarts: dict[str, int] = {}
    free = [f"10.0.{n // 200}.{n % 200 + 1}" for n in range(70)]
    ips: dict[str, str] = {}
    try:
        with following(fleet, api, tmp_path, relist_seconds=3) as reconciler:
            for number in range(1000):
                name = f"pod-{number % 90}" if f"pod-{number % 90}" not in alive else f"extra-{number}"
                uid = f"uid-{number}"
                ips[name] = free.pop()
                restarts[name] = 0
                made = f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}Z"
                api.put(pod(name, uid, ips[name], phase="Pending", created=made))
                api.put(pod(name, uid, ips[name], ready=chance.random() < 0.5, created=made))
                alive.append(name)
                if chance.random() < 0.3:
                    other = chance.choice(alive)
                    document = next(each for key, each in list(api.pods.items()) if key[1] == other)
                    meta = document["metadata"]
                    restarts[other] += 1
                    labels = {"app": "web"} if chance.random() < 0.2 else LABELS
                    api.put(
                        pod(
                            other,
                            meta["uid"],
                            ips[other],
                            restarts=restarts[other],
                            labels=labels,
                            created=meta["creationTimestamp"],
                        )
                    )
                if len(alive) > 50:
                    gone = alive.pop(chance.randrange(len(alive)))
                    api.delete(gone)
                    free.append(ips.pop(gone))  # the next pod gets this very address
                if chance.random() < 0.01:
                    api.compact()
                time.sleep(0.004)
            api.hostile = 0.0
            assert len(truth(api)) > 30
            eventually(lambda: lives(fleet) == truth(api), 12)
            errors = reconciler.statuses()[0].errors
            assert {"gone", "connection"} <= set(errors)
        assert {"cut", "reordered", "refused", "gone"} <= set(api.counts)
    finally:
        api.down()


def test_a_fleet_of_a_thousand_is_rolled(fleet: Fleet, tmp_path: Path) -> None:
    """1,000 pods at once, each followed by one at an address that was another's until just now, in waves and out of
    order, while connections break and the server is away for a while: no life outlasts the roll, and no pod is lost.
    """
    api = KubeApi(3, hostile=0.005)
    for number in range(1000):
        api.put(pod(f"old-{number}", f"old-{number}", f"10.1.{number // 200}.{number % 200 + 1}"))
    order = list(range(1000))
    random.Random(3).shuffle(order)
    try:
        with following(fleet, api, tmp_path, relist_seconds=3):
            eventually(lambda: len(followed(fleet)) == 1000, 40)
            for wave in range(0, 1000, 100):
                if wave == 500:
                    api.down()
                rolled = order[wave : wave + 100]
                for number in rolled:
                    api.delete(f"old-{number}")
                for number, successor in zip(rolled, rolled[1:] + rolled[:1], strict=True):
                    address = f"10.1.{successor // 200}.{successor % 200 + 1}"
                    created = f"2026-01-02T00:{wave // 100:02d}:00Z"
                    api.put(pod(f"new-{number}", f"new-{number}", address, created=created))
                if not api.is_up:
                    time.sleep(0.3)
                    # What was known stays, and old lives with it: nothing else can be known now.
                    assert len(followed(fleet)) >= 500
                    api.up()
                time.sleep(0.05)
            api.hostile = 0.0
            assert len(truth(api)) == 1000
            eventually(lambda: lives(fleet) == truth(api), 40)
            assert not any(life.startswith("old-") for life in lives(fleet).values())
    finally:
        api.down()


def test_a_container_restart_drops_the_claims(api: KubeApi, tmp_path: Path) -> None:
    """With real sockets: the engine's blocks are taken in, and are gone when Kubernetes tells of another life."""
    real = Fleet(Models([]))
    with Publisher(topic=b"kv") as engine:
        ports = {"kvindex.io/events-port": str(engine.port), "kvindex.io/replay-port": str(engine.replay_port)}
        engine.publish(msgpack.packb([1.0, [["BlockStored", [1, 2], None, [7] * 8, 4, None, "GPU"]], 0]))
        api.put(pod("a", "1", "127.0.0.1", annotations=ports))
        with following(real, api, tmp_path):
            eventually(lambda: [each.blocks for each in real.statuses()] == [2])
            engine.buffer.clear()  # the new engine has no past
            api.put(pod("a", "1", "127.0.0.1", restarts=1, annotations=ports))
            eventually(lambda: [each.blocks for each in real.statuses()] == [0])
            api.delete("a")
            eventually(lambda: real.statuses() == [])
    real.stop()
