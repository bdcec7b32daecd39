"""Fixtures that several test files share."""

import pytest
from rendered import fetched


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of the Helm binary."""
    return fetched("4")


@pytest.fixture(scope="session", params=["3", "4"])
def any_helm(request: pytest.FixtureRequest) -> str:
    """Path of the Helm binary, of each release that is in use."""
    return fetched(request.param)
