"""The Helm chart, rendered by Helm itself, is valid and gives the server a configuration it loads."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rendered import CHART, ROOT, container, render, rendered_settings, run, values_file

GOLDEN = ROOT / "tests" / "golden" / "chart"
MODEL = "Qwen/Qwen3-32B"
FULL: dict[str, Any] = {
    "replicaCount": 2,
    "config": {
        "models": [{"name": MODEL, "block_size": 16, "aliases": ["qwen"]}],
        "pods": [
            {
                "pod": "10.0.0.7:8000",
                "model": MODEL,
                "endpoint": "tcp://10.0.0.7:5557",
                "replay_endpoint": "tcp://10.0.0.7:5567",
                "ranks": 2,
            },
            {"pod": "10.0.0.8:8000", "model": MODEL, "endpoint": "tcp://*:5600", "bind": True},
        ],
        "tier_weights": {"gpu": 1.0, "cpu": 0.7, "disk": 0.3},
        "limits": {"max_in_flight": 64, "max_prompt_bytes": 16777216},
        "stream": {"on_gap": "drop"},
        "server": {"drain_seconds": 12.5},
        "log": {"format": "json", "level": "info"},
    },
    "ports": {"grpc": 6000, "metrics": 6001, "admin": 6002, "http": 6003},
    "bindPorts": [{"name": "events-a", "port": 5600}],
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
    "dashboard": {"enabled": True},
    "autoscaling": {"enabled": True},
    "networkPolicy": {
        "enabled": True,
        "grpcFrom": [{"podSelector": {"matchLabels": {"app": "router"}}}],
        "adminFrom": [{"podSelector": {"matchLabels": {"app": "operator"}}}],
    },
    "extraEnv": [{"name": "KVINDEX_LOG__LEVEL", "value": "debug"}],
    "extraVolumes": [{"name": "tokenizers", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "tokenizers", "mountPath": "/tokenizers"}],
    "tolerations": [{"operator": "Exists"}],
}
CASES = {"defaults": {}, "full": FULL}
PROFILES = ["small", "production", "cluster-wide", "secured"]


def _script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", [*CASES, *PROFILES])
def test_lints_strictly(any_helm: str, tmp_path: Path, case: str) -> None:
    """`helm lint --strict` finds nothing."""
    values = values_file(tmp_path, CASES[case]) if case in CASES else GOLDEN / f"{case}.values.yaml"
    done = run(any_helm, "lint", "--strict", CHART, "--values", values)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_rendered_config_loads(helm: str, tmp_path: Path, case: str) -> None:
    """The server accepts the rendered configuration, and listens where probes and Service look for it."""
    manifests = render(helm, tmp_path, CASES[case])
    settings = rendered_settings(manifests, tmp_path)
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    served = {port["name"]: port["port"] for port in manifests["Service"]["spec"]["ports"]}
    assert settings.listen == f"0.0.0.0:{ports['grpc']}"
    assert settings.metrics_listen == f"0.0.0.0:{ports['metrics']}"
    assert settings.admin_listen == (f"0.0.0.0:{ports['admin']}" if "admin" in ports else None)
    assert settings.http.listen == (f"0.0.0.0:{ports['http']}" if "http" in ports else None)
    assert served == ports
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container(manifests)[probe]["grpc"]["port"] == ports["grpc"]


def test_config_values_arrive_unchanged(helm: str, tmp_path: Path) -> None:
    """What the user writes under `config` is what the server gets, large integers included."""
    settings = rendered_settings(render(helm, tmp_path, FULL), tmp_path)
    assert [model.name for model in settings.models] == [MODEL]
    assert settings.limits.max_prompt_bytes == 16 * 1024 * 1024
    assert settings.server.drain_seconds == 12.5
    first, second = settings.pods
    assert (first.ranks, first.replay_endpoint, second.bind) == (2, "tcp://10.0.0.7:5567", True)


@pytest.mark.parametrize("seed", [2**53 - 1, str(2**64 - 1)])
def test_a_large_seed_arrives_unchanged(any_helm: str, tmp_path: Path, seed: int | str) -> None:
    """Helm rounds numbers above 2^53 without a word, so such a seed must be quoted."""
    settings = rendered_settings(render(any_helm, tmp_path, {"config": {"hash_seed": seed}}), tmp_path)
    assert settings.hash_seed == int(seed)


def test_pod_is_restricted(helm: str, tmp_path: Path) -> None:
    """The pod meets the `restricted` Pod Security Standard, and has no service links; without discovery, no token."""
    manifests = render(helm, tmp_path, {"config": {"discovery": {"kubernetes": {"enabled": False}}}})
    spec, main = manifests["Deployment"]["spec"]["template"]["spec"], container(manifests)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert main["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    # KVINDEX_SERVER_PORT and its like would stand among the server's own variables.
    assert spec["enableServiceLinks"] is False


BASE = {
    *("ConfigMap", "Deployment", "PodDisruptionBudget", "Service", "Service-headless", "ServiceAccount"),
    *("Role", "RoleBinding"),
}


def test_optional_manifests(helm: str, tmp_path: Path) -> None:
    """Monitors, rules, autoscaling and a NetworkPolicy appear only when asked for."""
    assert set(render(helm, tmp_path, {})) == BASE
    assert set(render(helm, tmp_path, FULL)) == BASE | {
        *("ServiceMonitor", "NetworkPolicy", "PrometheusRule", "ConfigMap-dashboard", "HorizontalPodAutoscaler")
    }
    bare = {"service": {"headless": False}, "config": {"discovery": {"kubernetes": {"enabled": False}}}}
    assert set(render(helm, tmp_path, bare)) == BASE - {"Service-headless", "Role", "RoleBinding"}
    assert "replicas" not in render(helm, tmp_path, FULL)["Deployment"]["spec"]


@pytest.mark.parametrize(
    ("namespaces", "expected"),
    [
        ([], {"Role", "RoleBinding"}),
        (["llm", "red"], {"Role", "RoleBinding", "Role@red", "RoleBinding@red"}),
        (["red", "llm", "red"], {"Role", "RoleBinding", "Role@red", "RoleBinding@red"}),
        (["*"], {"ClusterRole", "ClusterRoleBinding"}),
        (["*", "llm"], {"ClusterRole", "ClusterRoleBinding"}),
    ],
)
def test_rights_are_the_least(helm: str, tmp_path: Path, namespaces: list[str], expected: set[str]) -> None:
    """Reading pods where discovery looks, for the chart's own account, and nothing else."""
    manifests = render(helm, tmp_path, {"config": {"discovery": {"kubernetes": {"namespaces": namespaces}}}})
    rights = {name: each for name, each in manifests.items() if "Role" in name}
    assert set(rights) == expected
    for each in rights.values():
        if "rules" in each:
            assert each["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
        else:
            (subject,) = each["subjects"]
            assert (subject["name"], subject["namespace"]) == ("kv-kvindex-server", "llm")
            assert each["roleRef"]["kind"] == each["kind"].removesuffix("Binding")
            assert each["roleRef"]["name"] == each["metadata"]["name"]
    assert manifests["Deployment"]["spec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_replicas_spread_by_themselves(helm: str, tmp_path: Path) -> None:
    """Over zones and nodes, softly, unless told otherwise; by this release's own label."""
    spec = render(helm, tmp_path, {})["Deployment"]["spec"]["template"]
    spread = spec["spec"]["topologySpreadConstraints"]
    assert [each["topologyKey"].rpartition("/")[2] for each in spread] == ["zone", "hostname"]
    for each in spread:
        assert each["labelSelector"]["matchLabels"].items() <= spec["metadata"]["labels"].items()
    own = [{"maxSkew": 2, "topologyKey": "rack", "whenUnsatisfiable": "DoNotSchedule"}]
    other = render(helm, tmp_path, {"topologySpreadConstraints": own})
    assert other["Deployment"]["spec"]["template"]["spec"]["topologySpreadConstraints"] == own


def test_only_one_service_is_scraped(helm: str, tmp_path: Path) -> None:
    """The ServiceMonitor's port exists in one Service: with two, every replica would be counted twice."""
    manifests = render(helm, tmp_path, FULL)
    (port,) = (each["port"] for each in manifests["ServiceMonitor"]["spec"]["endpoints"])
    services = [each for name, each in manifests.items() if name.startswith("Service") and each["kind"] == "Service"]
    assert len(services) == 2
    assert sum(port in {each["name"] for each in service["spec"]["ports"]} for service in services) == 1


def test_egress_reaches_what_discovery_needs(helm: str, tmp_path: Path) -> None:
    """With `egressTo`, names, the API server, the other replicas and the engines can be reached."""
    engines = [{"podSelector": {"matchLabels": {"llm-d.ai/inference-serving": "true"}}}]
    manifests = render(helm, tmp_path, {"networkPolicy": {"enabled": True, "egressTo": engines}})
    spec = manifests["NetworkPolicy"]["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [[each["port"] for each in rule.get("ports", [])] for rule in spec["egress"]] == [
        *([53, 53], [443, 6443], [], [])
    ]
    own = {"podSelector": {"matchLabels": manifests["Deployment"]["spec"]["selector"]["matchLabels"]}}
    assert [rule["to"] for rule in spec["egress"][-2:]] == [[own], engines]
    assert render(helm, tmp_path, FULL)["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize("version", ["1.29.0", "1.33.0", "1.37.0"])
@pytest.mark.parametrize("case", CASES)
def test_manifests_are_valid(helm: str, tmp_path: Path, case: str, version: str) -> None:
    """Kubernetes' own schemas, strictly: no unknown field in any manifest. The operator's kinds have none there."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    checked = 0
    for manifest in render(helm, tmp_path, CASES[case]).values():
        if not manifest["apiVersion"].startswith("monitoring.coreos.com/"):
            kubernetes_validate.validate(manifest, version, strict=True)
            checked += 1
    assert checked >= len(BASE)


@pytest.mark.parametrize("profile", PROFILES)
def test_golden_renders(any_helm: str, profile: str) -> None:
    """What each profile renders to is reviewed as a file; `KVINDEX_GOLDEN=1` writes it anew."""
    values, golden = GOLDEN / f"{profile}.values.yaml", GOLDEN / f"{profile}.yaml"
    done = run(any_helm, "template", "kvindex", CHART, "--namespace", "llm", "--values", values)
    assert done.returncode == 0, done.stderr
    if os.environ.get("KVINDEX_GOLDEN"):
        golden.write_text(done.stdout, encoding="utf-8")
    # Helm's releases differ in the order of manifests and in blank lines.
    assert _sorted(done.stdout) == _sorted(golden.read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", ["1.29.0", "1.33.0", "1.37.0"])
def test_golden_renders_are_valid(version: str) -> None:
    """Of every profile, strictly, as `test_manifests_are_valid` for single values."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    checked = 0
    for golden in GOLDEN.glob("*.yaml"):
        if golden.name.endswith(".values.yaml"):
            continue
        for manifest in yaml.safe_load_all(golden.read_text(encoding="utf-8")):
            if manifest and not manifest["apiVersion"].startswith(("monitoring.coreos.com/", "cert-manager.io/")):
                kubernetes_validate.validate(manifest, version, strict=True)
                checked += 1
    assert checked > 4 * len(BASE) - 4


def test_checkov_finds_nothing() -> None:
    """Over the profiles' renders and the Dockerfile, but for the exceptions of .checkov.yaml; see `make checkov`."""
    if not list((ROOT / "build" / "checkov-venv").glob(".installed-*")):
        pytest.skip("checkov is not installed: make checkov")
    done = subprocess.run([ROOT / "scripts" / "checkov.sh"], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing found in 4 rendered profiles" in done.stdout


def test_each_exception_is_explained() -> None:
    """No check is skipped without a reason, by checkov or by hadolint."""
    for name, item in ((".checkov.yaml", r"CKV\w+"), (".hadolint.yaml", r"DL\d+")):
        lines = re.findall(rf"^ +- {item}.*$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        assert lines
        for line in lines:
            assert re.search(r"# \w.{20,}$", line), line


def test_hadolint_finds_nothing() -> None:
    """With the exceptions that .hadolint.yaml explains."""
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed: pip install --group dev")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
VOLUMES |= {"image"}  # from Kubernetes 1.33 on


def check_restricted(spec: dict[str, Any], names: set[str] | None = None) -> None:
    """The Pod Security Standard "restricted", of all containers or those named, as admission would judge."""
    pod = spec.get("securityContext", {})
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        assert not spec.get(field), field
    for volume in spec.get("volumes", []):
        assert set(volume) - {"name"} <= VOLUMES, volume
    for each in (*spec["containers"], *spec.get("initContainers", [])):
        if names is not None and each["name"] not in names:
            continue
        own = {**pod, **each.get("securityContext", {})}
        assert own["runAsNonRoot"] is True and own.get("runAsUser") != 0, each["name"]
        assert own["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost"), each["name"]
        assert own["allowPrivilegeEscalation"] is False and not own.get("privileged"), each["name"]
        capabilities = own["capabilities"]
        assert capabilities["drop"] == ["ALL"] and set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}, each[
            "name"
        ]
        assert not any("hostPort" in port for port in each.get("ports", [])), each["name"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_restricted(profile: str) -> None:
    manifests = _sorted((GOLDEN / f"{profile}.yaml").read_text(encoding="utf-8"))
    (deployment,) = [each for each in manifests if each["kind"] == "Deployment"]
    check_restricted(deployment["spec"]["template"]["spec"])


def _sorted(text: str) -> list[dict[str, Any]]:
    documents = [each for each in yaml.safe_load_all(text) if each]
    return sorted(
        documents, key=lambda each: (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace"))
    )


def test_notes_tell_the_first_commands_and_the_engines_flags(helm: str, tmp_path: Path) -> None:
    """As the install shows them; the flags are valid JSON with the ports that discovery expects. Helm 4 alone:
    Helm 3 wants a cluster even for a dry run.
    """

    def notes(values: dict[str, Any]) -> str:
        flags = ("--dry-run=client", "--namespace", "llm", "--values", values_file(tmp_path, values))
        done = run(helm, "install", "kv", CHART, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("NOTES:")[2]

    text = notes({})
    for command in (
        "kubectl -n llm rollout status",
        "kubectl -n llm port-forward",
        "grpcurl -plaintext localhost:50051",
    ):
        assert command in text
    configs = [
        json.loads(line.partition("'")[2].rstrip("'")) for line in text.splitlines() if "kv-events-config '" in line
    ]
    assert [each["endpoint"] for each in configs] == ["tcp://*:5557"] * 2
    assert [each["replay_endpoint"] for each in configs] == ["tcp://*:5558"] * 2
    assert "WARNING: their model is not known" in text
    assert "WARNING" not in notes({"config": {"models": [{"name": MODEL}]}})
    assert "discovery is off" in notes({"config": {"discovery": {"kubernetes": {"enabled": False}}}})
    assert ":8090/query" in notes({"ports": {"http": 8090}})
    # The third command has what a caller must show.
    tokens = {"config": {"auth": {"tokens_file": "/auth/readers", "admin_tokens_file": "/auth/operators"}}}
    assert 'grpcurl -plaintext -H "authorization: Bearer $TOKEN" localhost' in notes(tokens)
    mutual = {"tls": {"enabled": True, "secretName": "own", "clientCertificates": True}}
    assert "grpcurl -insecure -cert client.crt -key client.key localhost" in notes(mutual)
    assert "grpcurl -insecure localhost" in notes({"tls": {"enabled": True, "secretName": "own"}})


def test_config_change_restarts_pods(helm: str, tmp_path: Path) -> None:
    """Another configuration gives another checksum annotation, the same one the same."""

    def checksum(values: dict[str, Any]) -> str:
        template = render(helm, tmp_path, values)["Deployment"]["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum({}) == checksum({"replicaCount": 3})
    assert checksum({}) != checksum({"config": {"stream": {"on_gap": "drop"}}})


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"config": {"listen": "0.0.0.0:1"}}, "listen"),
        ({"config": {"modells": []}}, "modells"),
        ({"config": {"discovery": {"kubernetes": {"selektor": "a=b"}}}}, "selektor"),
        ({"config": {"stream": {"buffer_seconds": 0}}}, "buffer_seconds"),
        ({"config": {"pods": [{"pod": "a", "model": "m"}]}}, "endpoint"),
        ({"config": {"hash_seed": 2**53}}, "hash_seed"),
        ({"config": {"hash_seed": "0x10"}}, "hash_seed"),
        ({"ports": {"grpc": 70000}}, "grpc"),
        ({"ports": {"admin": 50051}}, "50051 is given twice"),
        ({"ports": {"http": 9090}}, "9090 is given twice"),
        ({"bindPorts": [{"name": "a", "port": 9090}]}, "9090 is given twice"),
        ({"bindPorts": [{"name": "a", "port": 5600}, {"name": "b", "port": 5600}]}, "5600 is given twice"),
        ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "minReplicas"),
        ({"serviceMonitor": {"enabled": True}, "podMonitor": {"enabled": True}}, "podMonitor"),
        ({"replicas": 2}, "replicas"),
        ({"config": {"server": {"drain_seconds": 60}}}, "terminationGracePeriodSeconds"),
        ({"config": {"server": {"ready_timeout_seconds": 300}}}, "startupFailureThreshold"),
    ],
)
def test_wrong_values_are_refused(any_helm: str, tmp_path: Path, values: dict[str, Any], word: str) -> None:
    """A misspelt or impossible value fails the render and is named."""
    done = run(any_helm, "template", "kv", CHART, "--values", values_file(tmp_path, values))
    assert done.returncode != 0
    assert word in done.stderr


def test_schema_knows_every_setting(helm: str) -> None:
    """The chart's schema is the server's under `config`; `python scripts/chart_schema.py --write` renews it."""
    done = run(helm, "show", "values", CHART)
    assert done.returncode == 0
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    assert schema["properties"]["config"] == _script("chart_schema").config_schema()
    assert set(yaml.safe_load(done.stdout)) == set(schema["properties"]) - {"global"}


def test_the_sidecar_recipe_is_valid(tmp_path: Path) -> None:
    """The recipe of docs/kubernetes.md: valid manifests, a configuration that loads, probes on the metrics port."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    recipe = text.partition("<!-- sidecar -->\n```yaml\n")[2].partition("```")[0]
    config, role, binding, deployment = yaml.safe_load_all(recipe)
    for manifest in (config, role, binding, deployment):
        kubernetes_validate.validate(manifest, "1.37.0", strict=True)
    assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert binding["subjects"][0]["name"] == deployment["spec"]["template"]["spec"]["serviceAccountName"]
    check_restricted(deployment["spec"]["template"]["spec"], {"kvindex-server"})
    settings = rendered_settings({"ConfigMap": config}, tmp_path)
    assert settings.discovery.kubernetes.enabled
    main = deployment["spec"]["template"]["spec"]["containers"][1]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert settings.metrics_listen.endswith(f":{main[probe]['httpGet']['port']}")


def test_documented_engine_flags_are_the_charts(helm: str) -> None:
    """What docs/kubernetes.md tells engines to publish on is where the chart's defaults look."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    flags = [json.loads(each) for each in re.findall(r"'(\{[^']*\})'", text)]
    defaults = yaml.safe_load(run(helm, "show", "values", CHART).stdout)["config"]["discovery"]["defaults"]
    assert len(flags) == 2
    for each in flags:
        assert each["endpoint"] == f"tcp://*:{defaults['events_port']}"
        assert each["replay_endpoint"] == f"tcp://*:{defaults['replay_port']}"


def test_documented_values_render(helm: str, tmp_path: Path) -> None:
    """Each way to bring a tokenizer in, as docs/kubernetes.md shows it, gives a valid Deployment that mounts it."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    snippets = re.findall(r"<!-- values -->\n```yaml\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 3
    for snippet in snippets:
        manifests = render(helm, tmp_path, yaml.safe_load(snippet))
        kubernetes_validate.validate(manifests["Deployment"], "1.37.0", strict=True)
        assert "/tokenizers" in {each["mountPath"] for each in container(manifests)["volumeMounts"]}
        volumes = {each["name"] for each in manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]}
        assert "tokenizers" in volumes
        check_restricted(manifests["Deployment"]["spec"]["template"]["spec"])
