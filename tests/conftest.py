"""Fixtures that several test files share."""

import subprocess

import pytest
from publisher import free_port
from rendered import ROOT, fetched


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of the Helm binary."""
    return fetched("4")


@pytest.fixture(scope="session", params=["3", "4"])
def any_helm(request: pytest.FixtureRequest) -> str:
    """Path of the Helm binary, of each release that is in use."""
    return fetched(request.param)


@pytest.fixture(scope="session")
def promtool() -> str:
    """Path of promtool."""
    found = subprocess.run([ROOT / "scripts" / "promtool.sh"], capture_output=True, text=True, timeout=110, check=False)
    if found.returncode != 0:
        pytest.skip(f"promtool cannot be had: {found.stderr.strip()[-300:]}")
    return found.stdout.strip()


@pytest.fixture
def pod() -> dict[str, object]:
    """A registration at free ports, for tests that start real processes."""
    return {
        "pod": "pod",
        "model": "m",
        "endpoint": f"tcp://127.0.0.1:{free_port()}",
        "replay_endpoint": f"tcp://127.0.0.1:{free_port()}",
    }
