"""SVG files of what benchmarks/scaling.py found."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "kvindex", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE = "#1f6fb4", "#d98026"


def draw(
    claims: Sequence[tuple[int, ...]],
    pods: Sequence[tuple[int, float, float]],
    prompts: Sequence[tuple[int, float, float]],
    where: Path,
) -> None:
    """Memory by claims, matching by pods, hashing and matching by prompt length."""
    where.mkdir(parents=True, exist_ok=True)
    figure, (memory, cost) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    memory.plot([each[0] / 1e6 for each in claims], [each[1] / (1 << 30) for each in claims], "o-", color=BLUE)
    memory.set(xlabel="million claims", ylabel="resident GiB", xscale="log", yscale="log")
    cost.plot([each[0] / 1e6 for each in claims], [each[1] / each[0] for each in claims], "o-", color=BLUE, label="RSS")
    cost.plot(
        [each[0] / 1e6 for each in claims],
        [each[2] / each[0] for each in claims],
        "o-",
        color=ORANGE,
        label="own account",
    )
    cost.set(xlabel="million claims", ylabel="bytes per claim", xscale="log", ylim=(0, None))
    cost.legend(frameon=False)
    _save(figure, where / "scaling-claims.svg")

    _pair(pods, ("pods", "all hold the 512 blocks", "one holds them"), where / "scaling-pods.svg")
    _pair(prompts, ("tokens of the prompt", "one holder", "64 holders"), where / "scaling-prompts.svg")


def _pair(rows: Sequence[tuple[int, float, float]], labels: tuple[str, str, str], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for column, colour in ((1, BLUE), (2, ORANGE)):
        axes.plot([row[0] for row in rows], [row[column] for row in rows], "o-", color=colour, label=labels[column])
    axes.set(xlabel=labels[0], ylabel="p50, µs", xscale="log", yscale="log")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
