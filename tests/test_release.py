"""What a release is made of: one version, wheels for every supported CPython, and workflows that name what exists."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import kvindex_server

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _script(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _workflow(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8")))


def test_the_version_stands_in_one_place() -> None:
    """The package, the chart and the documented image are of the version in pyproject.toml; nothing else has one."""
    version = _script("version").version()
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "kvindex-server" / "Chart.yaml").read_text(encoding="utf-8"))
    assert kvindex_server.__version__ == version
    assert (chart["version"], chart["appVersion"]) == (version, version)
    recipe = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    named = [image or chart for image, chart in re.findall(r"\bkvindex-server:(\S+)|--version (\S+)", recipe)]
    assert len(named) == 3
    assert set(named) == {version}
    for path in (ROOT / "kvindex_server").rglob("*.py"):
        assert f'"{version}"' not in path.read_text(encoding="utf-8"), path


def test_a_tag_must_be_the_version_and_in_the_changelog() -> None:
    script = _script("version")
    log = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-24\n\n### Added\n\n- A.\n\n## [1.2.2]\n\n- B.\n"
    assert script.changes("1.2.3", log) == "### Added\n\n- A.\n"
    assert script.changes("1.2.2", log) == "- B.\n"
    script.check_tag("tag:v1.2.3", "1.2.3", log)
    script.check_tag("branch:main", "9.9.9", log)
    for ref, known in (("tag:v1.2.3", "1.2.2"), ("tag:1.2.3", "1.2.3"), ("tag:v1.3.0", "1.3.0")):
        with pytest.raises(ValueError, match=r"tag is|no section"):
            script.check_tag(ref, known, log)
    with pytest.raises(ValueError, match="no section"):
        script.changes("Unreleased", log)


def test_wheels_are_built_or_tested_for_every_supported_release() -> None:
    """3.11 by itself, 3.12 with the stable ABI and 3.13 and 3.14 with that same wheel; x86-64 and arm64."""
    built = [re.match(r"cp3(\d+)-manylinux", each) for each in PROJECT["tool"]["cibuildwheel"]["build"]]
    assert [int(each[1]) for each in built if each] == [11, 12, 13, 14]
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["tool"]["scikit-build"]["wheel"]["py-api"] == "cp312"
    assert "STABLE_ABI" in (ROOT / "native" / "CMakeLists.txt").read_text(encoding="utf-8")
    runners = _workflow("release.yml")["jobs"]["wheels"]["strategy"]["matrix"]["runner"]
    assert [each.endswith("-arm") for each in runners] == [False, True]
    for source in PROJECT["tool"]["cibuildwheel"]["test-sources"]:
        assert (ROOT / source).is_file(), source


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_name_what_exists(path: Path) -> None:
    """Make targets, scripts and jobs; every job may read the code and, unless it says so, nothing more."""
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        needed = job.get("needs", [])
        assert set([needed] if isinstance(needed, str) else needed) <= set(workflow["jobs"])
        for step in job["steps"]:
            assert re.fullmatch(r"[\w-]+/[\w-]+@\S+", step.get("uses", "a/b@c"))
            command = step.get("run", "")
            # An expression inside a command would be a way in for whoever names a branch.
            assert "${{" not in command
            for target in re.findall(r"^\s*make ([a-z-]+)", command, re.MULTILINE):
                assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
            for script in re.findall(r"\b(scripts/[\w.]+|\.ci/run)", command):
                assert (ROOT / script).is_file(), script


def test_only_a_tag_publishes() -> None:
    """Whatever pushes or uploads stands in a job or step that asks for a tag."""
    for job in _workflow("release.yml")["jobs"].values():
        for step in job["steps"]:
            text = json.dumps(step)
            if re.search(r"docker push|helm push|pypi-publish|gh release", text):
                assert "tag" in str(job.get("if", "")) or "tag" in str(step.get("if", "")), text


def test_the_released_chart_runs_the_released_image(tmp_path: Path) -> None:
    """The publishing job's own line, run over a copy of the chart, makes its image the one that the job has pushed."""
    publish = _workflow("release.yml")["jobs"]["publish"]
    assert publish["env"]["REGISTRY"] == "${{ needs.version.outputs.registry }}"
    commands = [line.strip() for step in publish["steps"] for line in step.get("run", "").splitlines()]
    (line,) = [each for each in commands if each.startswith("sed ")]
    (pushed,) = [each.partition("=")[2].strip('"') for each in commands if each.startswith("image=")]
    chart = Path("deploy", "helm", "kvindex-server")
    shutil.copytree(ROOT / chart, tmp_path / chart)
    environment = {"PATH": os.environ["PATH"], "REGISTRY": "ghcr.io/someone"}
    subprocess.run(["sh", "-eu", "-c", line], cwd=tmp_path, env=environment, check=True, timeout=30)
    values = yaml.safe_load((tmp_path / chart / "values.yaml").read_text(encoding="utf-8"))
    assert values["image"]["repository"] == "ghcr.io/someone/kvindex-server"
    assert pushed == "$REGISTRY/kvindex-server:$VERSION"


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed")
def test_actionlint_accepts_the_workflows() -> None:
    done = subprocess.run(["actionlint", *WORKFLOWS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_bill_of_materials_names_system_packages() -> None:
    """dpkg-query's lines become components with package URLs, sorted and once each; anything else is refused."""
    script = _script("sbom")
    listed = "libstdc++6\t12.2.0-14+deb12u1\tamd64\nbash\t5.2.15-2+b8\tamd64\nbash\t5.2.15-2+b8\tamd64\n"
    first, second = script.system_packages(listed)
    assert first["purl"] == "pkg:deb/debian/bash@5.2.15-2%2Bb8?arch=amd64"
    assert second["purl"] == "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14%2Bdeb12u1?arch=amd64"
    assert (second["name"], second["version"]) == ("libstdc++6", "12.2.0-14+deb12u1")
    with pytest.raises(ValueError, match="unpack"):
        script.system_packages("bash 5.2\n")


def test_the_bill_of_materials_names_the_interpreter() -> None:
    """A scanner must find a fault of CPython's too, which is no package of the system in the official images."""
    found = _script("sbom").python_itself(sys.executable)
    version = platform.python_version()
    assert (found["name"], found["version"], found["purl"]) == ("python", version, f"pkg:generic/python@{version}")
    assert found["cpe"].split(":")[3:6] == ["python", "python", version]


def test_the_image_gets_every_file_that_it_copies() -> None:
    """Each COPY of the Dockerfile is let through by .dockerignore, which otherwise lets nothing in."""
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    copied = [
        source
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_has_everything_that_the_chart_can_turn_on() -> None:
    """Discovery by Kubernetes and the shared store need extras, and the bill of materials its generator."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    extras = set(re.findall(r"\[([a-z,]+)\]'", dockerfile))
    assert extras == {"kubernetes,store,tracing"}
    assert {"kubernetes", "store"} <= set(PROJECT["project"]["optional-dependencies"])
    assert re.search(r"^ARG BASE=python:3\.\d+-slim$", dockerfile, re.MULTILINE)
    # Ours runs as nobody, by number, so that Kubernetes can see that it is not root.
    assert "\nUSER 65532:65532\n" in dockerfile
