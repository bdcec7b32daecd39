"""The Go side: stubs as proto/ has them, and the router's scorer tested with Go against this very server."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "integrations" / "llm-d-router"
BUF = Path(sys.executable).with_name("buf")


@pytest.fixture(scope="module")
def go() -> str:
    """Go with the modules it needs, or a skip that says what is missing."""
    found = shutil.which("go")
    if found is None:
        pytest.skip("Go is not installed")
    for folder in (MODULE, MODULE / "plugin"):
        fetched = subprocess.run(
            [found, "mod", "download"], cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
        if fetched.returncode:
            pytest.skip(f"Go modules cannot be fetched: {fetched.stderr.strip()[:200]}")
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("folder", [".", "plugin"])
def test_the_go_module_passes_its_tests(go: str, folder: str) -> None:
    """go vet and go test; the plugin's tests start `python -m kvindex_server` and score against it."""
    where = MODULE / folder
    environment = {**os.environ, "ROUTER_TEST_PYTHON": sys.executable}
    for command in (["vet", "./..."], ["test", "-count=1", "-v", "./..."]):
        done = subprocess.run(
            [go, *command], cwd=where, env=environment, capture_output=True, text=True, timeout=800, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "--- SKIP" not in done.stdout
    if folder == "plugin":
        assert "--- PASS: TestAgainstTheRealServer" in done.stdout


@pytest.mark.timeout(900)
def test_the_stubs_are_those_of_the_proto(go: str, tmp_path: Path) -> None:
    """Generated anew they are the same, byte for byte."""
    subprocess.run(
        [BUF, "generate", ROOT / "proto", "--path", ROOT / "proto" / "kvindex" / "v1", "--output", tmp_path],
        cwd=MODULE,
        check=True,
        timeout=800,
        env={**os.environ, "PATH": f"{Path(go).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    made = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "kvindexpb").iterdir()}
    assert made == {path.name: path.read_text(encoding="utf-8") for path in (MODULE / "kvindexpb").iterdir()}
    assert sorted(made) == ["kvindex.pb.go", "kvindex_grpc.pb.go"]
