"""Decisions at a steady rate while servers are killed and started again: nothing wrong, and what is missing when."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from restart import run


@pytest.mark.parametrize("keep", [False, True], ids=["by replay", "over snapshots"])
def test_one_server_is_never_wrong_and_missing_only_while_it_is_away(keep: bool) -> None:
    """500 decisions a second across SIGKILL: every answer is what the engine held, none is a miss out of ignorance."""
    result = run(1, kills=2, rate=500.0, keep=keep, seed=31)
    assert result.wrong == []
    assert (result.blind, result.stray) == (0, 0)
    assert result.answered > 1000 and result.failed


def test_two_replicas_and_a_client_that_retries_miss_nothing() -> None:
    """While either is killed, every decision is answered rightly."""
    result = run(2, kills=2, rate=500.0, seed=32)
    assert result.wrong == []
    assert (result.blind, result.failed) == (0, [])
    assert result.answered == result.asked > 1000
