"""Subscriptions of tests."""

import re

import pytest

from kvindex_server import subscription


def leave_to_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on and until the test ends, ZeroMQ's library subscribes to everything."""
    monkeypatch.setattr(subscription, "_PLAIN", re.compile("(?!)"))
