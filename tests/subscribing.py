"""Subscriptions of tests."""

import pytest

from kvindex_server import subscription


def leave_to_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on and until the test ends, ZeroMQ's library subscribes to everything."""

    def connected(host: str, port: int, topic: str) -> subscription.Subscription:
        return subscription._OfLibrary(f"tcp://{host}:{port}", topic, bind=False)

    monkeypatch.setattr(subscription, "_Connected", connected)
