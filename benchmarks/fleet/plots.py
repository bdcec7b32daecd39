"""SVG files of what benchmarks/routing.py found."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from fleet.simulation import Outcome

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "kvindex", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
COLOURS = {"index": "#1f6fb4", "approximate": "#d98026", "session affinity": "#5b9a57"}
BLIND = "#9a9a9a"


def draw(
    results: Mapping[str, Mapping[str, Outcome]], curves: Mapping[str, Sequence[tuple[float, Outcome]]], where: Path
) -> None:
    """One file per scenario, and one of the rising rates."""
    for scenario, outcomes in results.items():
        _bars(scenario, outcomes, where / f"routing-{scenario.split(',')[-1].strip().replace(' ', '-')}.svg")
    _rates(curves, where / "routing-rates.svg")


def _bars(scenario: str, outcomes: Mapping[str, Outcome], path: Path) -> None:
    names = list(reversed(outcomes))
    colours = [_colour(name) for name in names]
    figure, (hits, times) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    figure.suptitle(scenario)
    ratios = [outcomes[name].hit_ratio for name in names]
    hits.barh(names, ratios, color=colours)
    hits.set_xlabel("hit ratio (share of prompt tokens found in the cache)")
    hits.set_xlim(0, max(ratios) * 1.15)
    for row, ratio in enumerate(ratios):
        hits.text(ratio, row, f" {ratio:.2f}", va="center", fontsize=8)
    p90 = [outcomes[name].percentile(0.9) for name in names]
    times.barh(names, p90, color=colours)
    times.plot([outcomes[name].percentile(0.5) for name in names], names, "k|", markersize=9, label="p50")
    times.plot([outcomes[name].percentile(0.99) for name in names], names, "k>", markersize=4, label="p99")
    times.set_xscale("log")
    times.set_xlabel("time to first token, seconds, log scale (bar: p90)")
    times.legend(loc="lower right", frameon=False)
    _save(figure, path)


def _rates(curves: Mapping[str, Sequence[tuple[float, Outcome]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for name, points in curves.items():
        rates = [rate for rate, _ in points]
        style = "--" if name == "random" else "-"
        axes.plot(
            rates, [each.percentile(0.9) for _, each in points], style, marker="o", label=name, color=_colour(name)
        )
    axes.set_yscale("log")
    axes.set_xlabel("chats that begin per second")
    axes.set_ylabel("TTFT p90, seconds, log scale")
    axes.legend(frameon=False)
    _save(figure, path)


def _colour(name: str) -> str:
    return next((colour for word, colour in COLOURS.items() if name.startswith(word)), BLIND)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
