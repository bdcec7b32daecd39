"""The simulated fleet behind docs/routing.md: its times by hand, and an index that agrees with its engines."""

import json
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("kvindex_server._core")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from fleet.engine import Speed
from fleet.policies import Approximate, Blind, Precise
from fleet.requests import BLOCK, SPAN, Chats, Documents, Request, Trace
from fleet.simulation import Load, Simulation

SPEED = Speed(prefill_tokens_per_second=1000, overhead_seconds=0.5, seconds_per_output_token=0.1)


class Listed:
    """These requests at these times."""

    def __init__(self, *requests: tuple[float, Request]) -> None:
        self._requests = requests

    def begin(self) -> Iterator[tuple[float, Request]]:
        yield from self._requests

    def after(self, request: Request, now: float) -> None:
        return None


def _request(first: int, prompt: int, output: int = 10) -> Request:
    return Request(0, array("I", range(first, first + prompt + output)), prompt)


def test_times_are_what_the_model_says() -> None:
    """Overhead and prefill; then the same prompt again, of which all but the last token is cached; then waiting."""
    load = Listed((0.0, _request(0, 1000)), (10.0, _request(0, 1000)), (10.0, _request(5000, 500)))
    outcome = Simulation(load, Blind("round robin", 1), 1, 100, 0.0, SPEED).run()
    cached = 1000 // BLOCK * BLOCK
    again = 0.5 + (1000 - cached) / 1000
    assert outcome.first_token_seconds == pytest.approx([1.5, again, again + 1.0])
    assert (outcome.prompt_tokens, outcome.cached_tokens) == (2500, cached)


def test_a_prompt_of_whole_blocks_still_computes_one_token() -> None:
    """An engine always computes the last token of a prompt."""
    load = Listed((0.0, _request(0, 2 * BLOCK)), (10.0, _request(0, 2 * BLOCK)))
    outcome = Simulation(load, Blind("round robin", 1), 1, 100, 0.0, SPEED).run()
    assert outcome.cached_tokens == 2 * BLOCK - 1


def test_what_was_used_longest_ago_is_evicted() -> None:
    """Of two prompts that fill the cache the third one takes the place of the first."""
    first, second, third = (_request(number * 10_000, 4 * BLOCK, BLOCK) for number in range(3))
    load = Listed((0.0, first), (100.0, second), (200.0, third), (300.0, second), (400.0, first))
    outcome = Simulation(load, Blind("round robin", 1), 1, 10, 0.0, SPEED).run()
    assert outcome.cached_tokens == 4 * BLOCK - 1


def test_a_full_engine_waits_for_blocks() -> None:
    """A request that finds no room begins when a decoding one has ended."""
    load = Listed((0.0, _request(0, 4 * BLOCK, BLOCK)), (0.0, _request(9999, 4 * BLOCK, BLOCK)))
    outcome = Simulation(load, Blind("round robin", 1), 1, 7, 0.0, SPEED).run()
    prefill, decode = 0.5 + 4 * BLOCK / 1000, BLOCK * 0.1
    assert outcome.first_token_seconds == pytest.approx([prefill, prefill + decode + prefill])


@pytest.mark.parametrize("load", [Chats(2.0, 60.0, 3), Documents(0.5, 60.0, 3)])
@pytest.mark.parametrize("by_load", [False, True])
def test_without_lag_the_index_believes_what_the_engines_hold(load: Load, by_load: bool) -> None:
    """At the end, evictions included, the index has exactly the engines' cached blocks."""
    policy = Precise(4, BLOCK, by_load, 0.0, "index")
    simulation = Simulation(load, policy, 4, 900, 0.0, Speed())
    outcome = simulation.run()
    assert outcome.cached_tokens > 0
    held = [set(engine._idle) for engine in simulation._engines]
    assert all(not engine._used for engine in simulation._engines)
    assert [stream.claims for stream in policy._streams] == [len(each) for each in held]
    for number, each in enumerate(held):
        keys = sorted(each)
        found = policy._index.holders(array("Q", keys).tobytes(), [str(number)])
        assert all(len(holders) == 1 for holders in found)


def test_runs_repeat() -> None:
    """The same seed gives the same times; another one does not."""
    runs = [
        Simulation(Chats(2.0, 30.0, seed), Approximate(4, 500, 2, True), 4, 500, 0.0, Speed()).run()
        for seed in (1, 1, 2)
    ]
    assert runs[0].first_token_seconds == runs[1].first_token_seconds != runs[2].first_token_seconds


def test_sessions_of_a_trace_are_those_that_share_more_than_the_first_span(tmp_path: Path) -> None:
    """Two requests that go on from one another are one session; a common system prompt alone makes none."""
    rows = [([0, 1, 2], 0), ([0, 3], 1000), ([0, 1, 2, 4], 2000)]
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "".join(
            json.dumps({"timestamp": at, "input_length": len(ids) * SPAN - 5, "output_length": 7, "hash_ids": ids})
            + "\n"
            for ids, at in rows
        )
    )
    asked = list(Trace(path, 10, 2.0).begin())
    assert [moment for moment, _ in asked] == [0.0, 0.5, 1.0]
    assert [request.session for _, request in asked] == [0, 1, 0]
    assert [request.prompt_tokens for _, request in asked] == [3 * SPAN - 5, 2 * SPAN - 5, 4 * SPAN - 5]
    first, other, later = (request.keys for _, request in asked)
    shared = 2 * SPAN // BLOCK
    assert first[:shared] == later[:shared]
    assert (first[0], first[shared // 2]) == (other[0], later[shared // 2])
    assert first[shared // 2] != other[shared // 2]
