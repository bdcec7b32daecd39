"""The Helm chart as Helm renders it: the binaries, the manifests by kind, and the configuration inside."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvindex_server.config import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy" / "helm" / "kvindex-server"


def fetched(release: str) -> str:
    """Path of the Helm binary of release 3 or 4; skips the test when it cannot be had."""
    command = [ROOT / "scripts" / "helm.sh", release]
    fetched = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    if fetched.returncode != 0:
        pytest.skip(f"Helm cannot be fetched: {fetched.stderr.strip()[-300:]}")
    return fetched.stdout.strip()


def run(helm: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm, *arguments], capture_output=True, text=True, timeout=60, check=False)


def render(helm: str, tmp_path: Path, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The manifests by kind; a second one of a kind is named by the kind and the end of its name."""
    done = run(helm, "template", "kv", CHART, "--namespace", "llm", "--values", values_file(tmp_path, values))
    assert done.returncode == 0, done.stderr
    manifests = [document for document in yaml.safe_load_all(done.stdout) if document]
    by_kind = {_short(manifest): manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    return by_kind


def _short(manifest: dict[str, Any]) -> str:
    rest = manifest["metadata"]["name"].removeprefix("llm-").removeprefix("kv-kvindex-server")
    namespace = manifest["metadata"].get("namespace", "llm")
    return str(manifest["kind"]) + rest + (f"@{namespace}" if namespace != "llm" else "")


def values_file(tmp_path: Path, values: dict[str, Any]) -> Path:
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def rendered_settings(manifests: dict[str, dict[str, Any]], tmp_path: Path) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(manifests["ConfigMap"]["data"]["config.yaml"], encoding="utf-8")
    return load_settings({}, {}, path)


def container(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return dict(container)
