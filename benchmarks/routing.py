"""Does it route better? A simulated fleet under several ways of routing; docs/routing.md has the model and results.

Give the public conversation trace with --trace FILE; without it only the chats are run.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fleet.engine import Speed
from fleet.policies import Approximate, Blind, Policy, Precise
from fleet.requests import BLOCK, Chats, Documents, Trace
from fleet.simulation import Load, Outcome, Simulation
from load import machine

LAG = 0.05
SLOW_LAG = 1.0
PLACE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load on one fleet."""

    name: str
    load: Callable[[], Load]
    pods: int = 8
    blocks: int = 2048
    """Of each engine's cache."""
    remembered: int = 2048
    """Blocks per pod that an approximate router remembers."""
    routers: int = 1


@dataclass(frozen=True, slots=True)
class Contestant:
    """A policy, and the lag of the events it is told."""

    name: str
    make: Callable[[Scenario], Policy]
    lag: float = LAG


def contestants() -> Iterator[Contestant]:
    """Blind ones first."""
    for name in ("random", "round robin", "least load", "session affinity"):
        yield Contestant(name, lambda scenario, name=name: Blind(name, scenario.pods))
    for by_load in (False, True):
        load = " + load" if by_load else ""
        yield Contestant(
            f"approximate{load}",
            lambda scenario, by_load=by_load: Approximate(
                scenario.pods, scenario.remembered, scenario.routers, by_load
            ),
        )
        lags = (LAG, SLOW_LAG) if by_load else (LAG,)
        for lag, place in itertools.product(lags, (0.0, PLACE_SECONDS)):
            late = ", 1 s late" if lag == SLOW_LAG else ""
            name = f"index{' + placements' if place else ''}{load}{late}"
            yield Contestant(
                name,
                lambda scenario, by_load=by_load, place=place, name=name: Precise(
                    scenario.pods, BLOCK, by_load, place, name
                ),
                lag,
            )


def play(scenario: Scenario, contestant: Contestant) -> Outcome:
    """One run."""
    policy = contestant.make(scenario)
    return Simulation(scenario.load(), policy, scenario.pods, scenario.blocks, contestant.lag, Speed()).run()


def scenarios(given: argparse.Namespace) -> Iterator[Scenario]:
    """In the order of the page."""
    if given.trace:
        speed, requests = given.speed, given.requests
        yield Scenario("trace", lambda: Trace(given.trace, requests, speed), blocks=8192, remembered=8192)
    chats = Scenario("chats", lambda: Chats(given.rate, given.seconds, given.seed))
    yield chats
    yield Scenario(
        "documents", lambda: Documents(given.rate / 5, given.seconds, given.seed), blocks=8192, remembered=8192
    )
    yield replace(chats, name="chats, 4 routers", routers=4)
    yield replace(chats, name="chats, small caches", blocks=1024, remembered=4096)


def compare(scenario: Scenario) -> dict[str, Outcome]:
    """Every contestant once; prints the table."""
    print(f"\n### {scenario.name}\n")
    print("| routing | hit ratio | believed | TTFT p50 s | p90 s | p99 s | mean s |\n|---|---|---|---|---|---|---|")
    results = {}
    for each in contestants():
        outcome = results[each.name] = play(scenario, each)
        times = outcome.first_token_seconds
        cells = [f"{outcome.percentile(share):.2f}" for share in (0.5, 0.9, 0.99)]
        believed = outcome.believed_tokens / outcome.prompt_tokens
        print(
            f"| {each.name} | {outcome.hit_ratio:.3f} | {believed:.3f} | {' | '.join(cells)} "
            f"| {sum(times) / len(times):.2f} |",
            flush=True,
        )
    sizes = f"{len(times)} requests, {outcome.prompt_tokens / 1e6:.1f} M prompt tokens"
    print(f"\n{sizes}, {scenario.pods} pods of {scenario.blocks} blocks of {BLOCK} tokens", flush=True)
    return results


SWEPT = ("random", "least load", "session affinity", "approximate + load", "index + placements + load")


def sweep(given: argparse.Namespace) -> dict[str, list[tuple[float, Outcome]]]:
    """The chats at rising rates."""
    curves: dict[str, list[tuple[float, Outcome]]] = {name: [] for name in SWEPT}
    print("\n### chats at rising rates: TTFT p90 in seconds\n\n| sessions/s | " + " | ".join(SWEPT) + " |")
    print("|---" * (len(SWEPT) + 1) + "|")
    for share in (0.5, 1.0, 1.5, 2.0, 3.0):
        rate = given.rate * share
        scenario = Scenario("rates", lambda rate=rate: Chats(rate, given.seconds / 2, given.seed))
        cells = []
        for each in contestants():
            if each.name in SWEPT:
                outcome = play(scenario, each)
                curves[each.name].append((rate, outcome))
                cells.append(f"{outcome.percentile(0.9):.2f}")
        print(f"| {rate:.2f} | " + " | ".join(cells) + " |", flush=True)
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="requests with hash_ids, one JSON object a line")
    parser.add_argument("--requests", type=int, default=1_000_000, help="of the trace, at most")
    parser.add_argument("--speed", type=float, default=1.0, help="of the trace; 2 halves all times between requests")
    parser.add_argument("--rate", type=float, default=2.0, help="chats that begin per second")
    parser.add_argument("--seconds", type=float, default=600.0, help="for which chats begin")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="a directory for SVG files")
    given = parser.parse_args()
    if given.plots:
        from fleet.plots import draw  # before minutes have gone: it needs matplotlib (make bench-routing installs it)
    began = time.monotonic()
    print(machine())
    results = {scenario.name: compare(scenario) for scenario in scenarios(given)}
    curves = sweep(given)
    if given.plots:
        draw(results, curves, given.plots)
    print(f"\n{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
