"""Parts of the chart that stand apart: TLS, snapshots, the shared store, and what keeps replicas available."""

import re
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from publisher import free_port
from rendered import CHART, ROOT, container, render, rendered_settings, run, values_file

from kvindex_server.config import Settings
from kvindex_server.server import Server

kubernetes_validate = pytest.importorskip("kubernetes_validate")

OWN = "kv-kvindex-server"


def _volumes(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Volumes of the pod by mount path."""
    volumes = {each["name"]: each for each in manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    return {each["mountPath"]: volumes[each["name"]] for each in container(manifests)["volumeMounts"]}


def _valid(manifests: dict[str, dict[str, Any]]) -> None:
    for manifest in manifests.values():
        if not manifest["apiVersion"].startswith(("cert-manager.io/", "monitoring.coreos.com/")):
            kubernetes_validate.validate(manifest, "1.37.0", strict=True)


# ---- TLS -------------------------------------------------------------------


def test_tls_by_secret(helm: str, tmp_path: Path) -> None:
    """The server reads the Secret's files, and probes go where no TLS is spoken: the kubelet's gRPC probe cannot."""
    manifests = render(helm, tmp_path, {"tls": {"enabled": True, "secretName": "own", "clientCertificates": True}})
    _valid(manifests)
    settings = rendered_settings(manifests, tmp_path)
    mounted = _volumes(manifests)["/etc/kvindex-tls"]["secret"]
    assert mounted["secretName"] == "own"
    assert settings.tls.cert_file == "/etc/kvindex-tls/tls.crt"
    assert settings.tls.key_file == "/etc/kvindex-tls/tls.key"
    assert settings.tls.client_ca_file == "/etc/kvindex-tls/ca.crt"
    for probe, path in (("startupProbe", "/readyz"), ("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert container(manifests)[probe]["httpGet"] == {"path": path, "port": "metrics"}
    # No replica has a client certificate to show the others.
    assert settings.snapshot.peers == ()
    assert "Certificate" not in manifests
    for service in ("Service", "Service-headless"):
        protocols = {each["name"]: each["appProtocol"] for each in manifests[service]["spec"]["ports"]}
        assert protocols["grpc"] == "https"


def test_tls_by_the_servers_own_settings_moves_the_probes_too(helm: str, tmp_path: Path) -> None:
    manifests = render(helm, tmp_path, {"config": {"tls": {"cert_file": "/tls/c", "key_file": "/tls/k"}}})
    assert "httpGet" in container(manifests)["readinessProbe"]
    # The chart does not know the CA, so replicas could not ask one another.
    assert rendered_settings(manifests, tmp_path).snapshot.peers == ()


def test_tls_by_cert_manager(helm: str, tmp_path: Path) -> None:
    """The Certificate has every name that clients and other replicas call, and fills the Secret that is mounted."""
    manager = {"enabled": True, "issuerRef": {"kind": "ClusterIssuer", "name": "ca"}, "dnsNames": ["kv.example.com"]}
    manifests = render(helm, tmp_path, {"replicaCount": 3, "tls": {"enabled": True, "certManager": manager}})
    _valid(manifests)
    spec = manifests["Certificate"]["spec"]
    settings = rendered_settings(manifests, tmp_path)
    assert spec["secretName"] == _volumes(manifests)["/etc/kvindex-tls"]["secret"]["secretName"]
    assert spec["issuerRef"] == manager["issuerRef"]
    (peer,) = settings.snapshot.peers
    assert {peer.partition(":")[0], OWN, f"{OWN}.llm.svc", "kv.example.com"} <= set(spec["dnsNames"])
    assert settings.snapshot.peer_ca_file == "/etc/kvindex-tls/ca.crt"


def test_documented_tls_values_render(helm: str, tmp_path: Path) -> None:
    """What docs/kubernetes.md shows is enough by itself."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    snippets = re.findall(r"<!-- tls values -->\n```yaml\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        manifests = render(helm, tmp_path, yaml.safe_load(snippet))
        _valid(manifests)
        assert rendered_settings(manifests, tmp_path).tls.cert_file


# ---- snapshots -------------------------------------------------------------


def test_replicas_keep_their_index_and_ask_one_another(helm: str, tmp_path: Path) -> None:
    """By default: a volume that the server may write to, and the headless Service at the admin service's port."""
    for values, port in (({}, 50051), ({"ports": {"admin": 50052}, "networkPolicy": {"enabled": True}}, 50052)):
        manifests = render(helm, tmp_path, values)
        settings = rendered_settings(manifests, tmp_path)
        assert settings.snapshot.directory in _volumes(manifests)
        assert _volumes(manifests)[settings.snapshot.directory]["emptyDir"] == {}
        assert settings.snapshot.peers == (f"{manifests['Service-headless']['metadata']['name']}:{port}",)
    # Of a port that otherwise nobody may reach.
    own = {"podSelector": {"matchLabels": manifests["Deployment"]["spec"]["selector"]["matchLabels"]}}
    ingress = {rule["ports"][0]["port"]: rule.get("from") for rule in manifests["NetworkPolicy"]["spec"]["ingress"]}
    assert ingress["admin"] == [own]


@pytest.mark.parametrize(
    "values",
    [
        {"snapshot": {"peers": False}},
        {"service": {"headless": False}},
        {"config": {"auth": {"admin_tokens_file": "/auth/operators"}}},
    ],
)
def test_replicas_ask_only_where_they_would_be_answered(helm: str, tmp_path: Path, values: dict[str, Any]) -> None:
    assert rendered_settings(render(helm, tmp_path, values), tmp_path).snapshot.peers == ()


def test_a_claim_is_for_one_replica(any_helm: str, tmp_path: Path) -> None:
    """Its pod is replaced, not surged, because two could not both have the claim; more replicas are refused."""
    values: dict[str, Any] = {"snapshot": {"volume": {"persistentVolumeClaim": {"claimName": "kv"}, "emptyDir": None}}}
    manifests = render(any_helm, tmp_path, values)
    _valid(manifests)
    assert manifests["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}
    assert "persistentVolumeClaim" in _volumes(manifests)["/var/lib/kvindex"]
    assert render(any_helm, tmp_path, {})["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"
    for more in ({"replicaCount": 2}, {"autoscaling": {"enabled": True}}):
        done = run(any_helm, "template", "kv", CHART, "--values", values_file(tmp_path, {**values, **more}))
        assert done.returncode != 0
        assert "is for one replica" in done.stderr


def test_a_generic_ephemeral_volume_serves_several(helm: str, tmp_path: Path) -> None:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "4Gi"}}}
    volume = {"emptyDir": None, "ephemeral": {"volumeClaimTemplate": {"spec": spec}}}
    manifests = render(helm, tmp_path, {"replicaCount": 3, "snapshot": {"volume": volume}})
    _valid(manifests)
    assert _volumes(manifests)["/var/lib/kvindex"]["ephemeral"] == volume["ephemeral"]


# ---- rights ----------------------------------------------------------------


def test_a_review_of_tokens_gets_its_right_and_no_other(helm: str, tmp_path: Path) -> None:
    """With `auth.review` the pod has a token, which may create TokenReviews; without, there is no such right."""
    review = {"url": "https://kubernetes.default.svc", "token_file": "/var/run/secrets/t"}
    config = {"auth": {"review": review}, "discovery": {"kubernetes": {"enabled": False}}}
    manifests = render(helm, tmp_path, {"config": config})
    _valid(manifests)
    (role,) = [each for each in manifests.values() if each["kind"] in ("Role", "ClusterRole")]
    (binding,) = [each for each in manifests.values() if each["kind"].endswith("RoleBinding")]
    right = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
    assert role["rules"] == [right]
    assert (binding["kind"], binding["roleRef"]["name"]) == ("ClusterRoleBinding", role["metadata"]["name"])
    assert [(each["name"], each["namespace"]) for each in binding["subjects"]] == [(OWN, "llm")]
    assert manifests["Deployment"]["spec"]["template"]["spec"]["automountServiceAccountToken"] is True
    assert not any("reviewer" in name for name in render(helm, tmp_path, {}))


# ---- the shared store ------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("valkey://valkey.kv.svc:6379", ("valkey.kv.svc:6379", "", 0, False)),
        ("valkeys://kvindex@valkey.kv.svc:6380/3", ("valkey.kv.svc:6380", "kvindex", 3, True)),
        ("rediss://cache:6379/0", ("cache:6379", "", 0, True)),
    ],
)
def test_the_store_by_url(helm: str, tmp_path: Path, url: str, expected: tuple[str, str, int, bool]) -> None:
    """Address, user, database and TLS come from the URL, the password from the Secret and from nowhere else."""
    values = {"store": {"url": url, "secretName": "valkey-auth", "passwordKey": "pass"}}
    manifests = render(helm, tmp_path, values)
    _valid(manifests)
    store = rendered_settings(manifests, tmp_path).store
    assert ((*store.addresses,), store.username, store.database, store.tls) == ((expected[0],), *expected[1:])
    assert store.password_file == "/etc/kvindex-store/password"
    secret = _volumes(manifests)["/etc/kvindex-store"]["secret"]
    assert (secret["secretName"], secret["items"]) == ("valkey-auth", [{"key": "pass", "path": "password"}])
    # An index that the store keeps is not written to a volume.
    assert rendered_settings(manifests, tmp_path).snapshot.directory == ""
    assert "/var/lib/kvindex" not in _volumes(manifests)


def test_without_a_store_nothing_of_it_is_rendered(helm: str, tmp_path: Path) -> None:
    manifests = render(helm, tmp_path, {})
    assert rendered_settings(manifests, tmp_path).store.addresses == ()
    assert "/etc/kvindex-store" not in _volumes(manifests)


# ---- queries by HTTP -------------------------------------------------------


def test_queries_by_http_have_a_port_of_the_service(helm: str, tmp_path: Path) -> None:
    """Where the server listens, the Service leads and the policy lets those in who may call by gRPC; else nowhere."""
    callers = [{"podSelector": {"matchLabels": {"app": "router"}}}]
    values = {"ports": {"http": 8090}, "networkPolicy": {"enabled": True, "grpcFrom": callers}}
    manifests = render(helm, tmp_path, {**values, "config": {"http": {"max_connections": 7}}})
    _valid(manifests)
    http = rendered_settings(manifests, tmp_path).http
    assert (http.listen, http.max_connections) == ("0.0.0.0:8090", 7)
    assert {"name": "http", "containerPort": 8090} in container(manifests)["ports"]
    served = {each["name"]: each["targetPort"] for each in manifests["Service"]["spec"]["ports"]}
    assert served["http"] == "http"
    rule = manifests["NetworkPolicy"]["spec"]["ingress"][0]
    assert ([each["port"] for each in rule["ports"]], rule["from"]) == (["grpc", "http"], callers)
    assert rendered_settings(render(helm, tmp_path, {}), tmp_path).http.listen is None


# ---- availability ----------------------------------------------------------


def test_replicas_are_kept_available(helm: str, tmp_path: Path) -> None:
    """A disruption budget over this release's pods, an autoscaler of this Deployment, a priority class on its pods."""
    values = {"autoscaling": {"enabled": True, "minReplicas": 3}, "priorityClassName": "system-cluster-critical"}
    manifests = render(helm, tmp_path, values)
    _valid(manifests)
    selector = manifests["Deployment"]["spec"]["selector"]
    budget, scaler = manifests["PodDisruptionBudget"]["spec"], manifests["HorizontalPodAutoscaler"]["spec"]
    assert budget == {"maxUnavailable": 1, "selector": selector}
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": OWN}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (3, 6)
    # Or callers that stay connected would leave a new replica idle.
    assert rendered_settings(manifests, tmp_path).server.max_connection_age_seconds == 300
    for server in ({"max_connection_age_seconds": 0}, {"transport": "native"}):
        own = render(helm, tmp_path, {**values, "config": {"server": server}})
        assert rendered_settings(own, tmp_path).server.max_connection_age_seconds == 0
    assert rendered_settings(render(helm, tmp_path, {}), tmp_path).server.max_connection_age_seconds == 0
    assert manifests["Deployment"]["spec"]["template"]["spec"]["priorityClassName"] == "system-cluster-critical"
    assert render(helm, tmp_path, {"podDisruptionBudget": {"enabled": False}}).keys() == manifests.keys() - {
        *("PodDisruptionBudget", "HorizontalPodAutoscaler")
    }


@pytest.mark.parametrize("ports", [{}, {"admin": 50052}])
def test_a_replica_that_is_not_ready_is_not_restarted(helm: str, tmp_path: Path, ports: dict[str, int]) -> None:
    """The rendered probes, asked of a real server that waits for its first pod: startup and readiness say no, liveness
    says yes. Otherwise every replica would be killed when the shared store is away for a minute.
    """
    main = container(render(helm, tmp_path, {"ports": ports}))
    events, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))  # where nobody is
    document = {
        **dict.fromkeys(("listen", "metrics_listen", *(["admin_listen"] if ports else [])), "127.0.0.1:0"),
        "pods": [{"pod": "p", "model": "m", "endpoint": events, "replay_endpoint": replay}],
        "stream": {"replay_timeout_seconds": 60},
        "server": {"ready_timeout_seconds": 60, "drain_seconds": 0},
    }
    server = Server(Settings.model_validate(document))
    server.start()
    try:
        with grpc.insecure_channel(server.grpc_address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)

            def serving(probe: str) -> bool:
                request = health_pb2.HealthCheckRequest(service=main[probe]["grpc"].get("service", ""))
                answer = stub.Check(request, timeout=5, wait_for_ready=True)
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            probes = ("startupProbe", "readinessProbe", "livenessProbe")
            assert [serving(each) for each in probes] == [False, False, True]
    finally:
        server.stop()


def test_clients_can_balance_by_themselves(helm: str, tmp_path: Path) -> None:
    """The headless Service gives the replicas' own addresses, and only those that are ready."""
    spec = render(helm, tmp_path, {})["Service-headless"]["spec"]
    assert spec["clusterIP"] == "None"
    assert not spec.get("publishNotReadyAddresses")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, 2 << 30),
        (
            {"resources": {"limits": {"memory": "512Mi"}}, "config": {"models": [{"name": "a"}, {"name": "b"}]}},
            128 << 20,
        ),
        ({"resources": {"limits": {"memory": "3G"}}, "config": {"limits": {"max_streams": 9}}}, 1_500_000_000),
        ({"resources": {"limits": {"memory": 2_000_000_000}}}, 1_000_000_000),
        ({"resources": {"limits": {"memory": "1.5Gi"}}}, 0),
        ({"resources": {"limits": {"memory": None}}}, 0),
        ({"config": {"limits": {"max_index_bytes": 7}}}, 7),
        ({"config": {"limits": {"max_index_bytes": 0}}}, 0),
        ({"store": {"url": "valkey://h:1"}}, 0),
    ],
)
def test_the_index_stays_within_the_memory_limit(
    helm: str, tmp_path: Path, values: dict[str, Any], expected: int
) -> None:
    """New claims are refused and told of before the kernel ends the process; what the user says comes first."""
    assert rendered_settings(render(helm, tmp_path, values), tmp_path).limits.max_index_bytes == expected


def test_each_kind_of_trouble_has_an_alert(helm: str, tmp_path: Path) -> None:
    """The PrometheusRule: lag, gap, stale, blind, divergence, saturation, hit ratio; the dashboard is JSON."""
    manifests = render(helm, tmp_path, {"prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}})
    (group,) = manifests["PrometheusRule"]["spec"]["groups"]
    names = {rule["alert"] for rule in group["rules"]}
    assert {
        *("KVIndexIngestBehind", "KVIndexStreamBroken", "KVIndexStreamStale", "KVIndexStreamBlind"),
        *("KVIndexSaturated", "KVIndexHitRatioDropped", "KVIndexLimitReached"),
        *("KVIndexReplicasDiffer", "KVIndexStoreLost", "KVIndexSnapshotsFail"),
    } <= names
    dashboard = manifests["ConfigMap-dashboard"]
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert yaml.safe_load(dashboard["data"]["kvindex-server.json"])["panels"]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"tls": {"enabled": True}}, "tls.secretName"),
        ({"tls": {"certManager": {"enabled": True}}}, "needs tls.enabled"),
        ({"tls": {"clientCertificates": True}}, "needs tls.enabled"),
        ({"tls": {"enabled": True, "certManager": {"enabled": True}}}, "issuerRef"),
        (
            {"tls": {"enabled": True, "secretName": "a"}, "config": {"tls": {"cert_file": "a", "key_file": "b"}}},
            "two ways",
        ),
        ({"store": {"url": "valkey://user:password@h:1"}}, "url"),
        ({"store": {"url": "http://h:1"}}, "url"),
        ({"store": {"url": "valkey://h:1"}, "config": {"store": {"addresses": ["h:1"]}}}, "two ways"),
        ({"store": {"secretName": "a"}}, "store.url"),
        ({"snapshot": {"volume": {"emptyDir": None}}}, "volume"),
        ({"snapshot": {"volume": {"persistentVolumeClaim": {"claimName": "kv"}}}}, "emptyDir, persistentVolumeClaim"),
        ({"ports": {"http": 8090}, "config": {"http": {"listen": "0.0.0.0:1"}}}, "two ways"),
        ({"ports": {"http": 8090}, "tls": {"enabled": True, "secretName": "a"}}, "plain HTTP"),
        ({"config": {"snapshot": {"peer_timeout_seconds": 290}}}, "startupFailureThreshold"),
    ],
)
def test_contradictions_are_refused(any_helm: str, tmp_path: Path, values: dict[str, Any], word: str) -> None:
    done = run(any_helm, "template", "kv", CHART, "--values", values_file(tmp_path, values))
    assert done.returncode != 0
    assert word in done.stderr
