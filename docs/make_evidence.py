"""Draw evidence.png, the first one of the page on limits, from the results of two recipes.

python recipes/limit.py && python recipes/digits.py
python docs/make_evidence.py runs/limit runs/digits/version_0
"""

import json
import sys
from pathlib import Path
from typing import Any

from make_picture import BLACK, BLUE, GREEN, GREY, ORANGE, STYLE
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_singlim.measure import History, tags
from torch_singlim.report import read_run

PICTURE = Path(__file__).with_name("pages") / "figures" / "evidence.png"


def ensembles(axes: Axes, rows: list[dict]) -> None:
    """Direction and speed of the nearest points against the limit, at the least noise of each system that drifts."""
    drifting = [row for row in rows if row["cosine"] == row["cosine"]]  # not nan
    names = list(dict.fromkeys(row["system"] for row in drifting))
    last = [max((r for r in drifting if r["system"] == name), key=lambda r: r["steps"]) for name in names]
    at = list(range(len(last)))
    axes.axvline(1, color=BLACK, lw=0.8)
    errors = [2 * row["speed"]["stderr"] for row in last]
    speeds = [row["speed"]["mean"] for row in last]
    axes.errorbar(speeds, at, xerr=errors, fmt="o", color=BLUE, ms=5, label="speed")
    axes.plot([row["cosine"] / row["ceiling"] for row in last], at, "D", color=GREEN, ms=5, label="cosine / ceiling")
    axes.set_yticks(at, names)
    axes.set(xlim=(0.88, 1.12), ylim=(len(last) - 0.5, -0.5), xlabel="measured / singular limit")
    axes.set_title("Where the limit holds:\n20 digits, from the zero-loss set")
    axes.legend(loc="lower left", fontsize=8)


def training(axes: Axes, history: History) -> None:
    """Cosine of the measured drift with the averaged path, the singular limit and the baseline."""
    lines = (
        (tags.DRIFT_CEILING, BLACK, "noise ceiling"),
        (tags.DRIFT_COSINE, ORANGE, "descent on the averaged loss"),
        (tags.LIMIT_COSINE, GREEN, "singular limit"),
        (tags.DRIFT_BASELINE_COSINE, GREY, "without noise"),
    )
    for tag, colour, label in lines:
        curves = [[s for s in steps if tag.name in history[s]] for steps in tags.windows(history).values()]
        for i, steps in enumerate(filter(None, curves)):
            style: dict[str, Any] = {"marker": "D", "ms": 5, "lw": 0} if len(steps) == 1 else {"lw": 1.4}
            values = [history[step][tag.name] for step in steps]
            axes.plot(steps, values, color=colour, label=None if i else label, **style)
    axes.set(ylim=(0, 1.04), xlabel="optimizer steps", ylabel="cosine with the measured drift")
    axes.set_title("A real training: 200 digits\nfrom random weights")
    axes.legend(loc="lower left", fontsize=8)


def shares(axes: Axes, rows: list[dict]) -> None:
    """Cosine of the weights' motion with the limit over the share of it that theory expects."""
    sizes = list(dict.fromkeys(row["samples"] for row in rows))
    axes.plot([0.5, 1], [0.5, 1], color=BLACK, lw=0.8)
    for colour, size in zip((BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9"), sizes, strict=False):
        own = [row for row in rows if row["samples"] == size]
        axes.plot(
            [r["share"] for r in own], [r["weights"] for r in own], "o", color=colour, ms=5, label=f"{size} digits"
        )
        axes.plot([r["share"] for r in own], [r["nearest"] for r in own], "s", color=colour, ms=4, mfc="none")
    axes.set(xlim=(0.6, 1.02), ylim=(0.6, 1.02), xlabel="tangential share, by theory")
    axes.set_ylabel("cosine with the limit / ceiling")
    axes.set_title("The number that tells which\n(squares: nearest points)")
    axes.legend(loc="lower right", fontsize=8)


def draw(limit: Path, digits: Path) -> Figure:
    """Three panels, from the folder of each recipe's results."""
    found = json.loads((limit / "limit.json").read_text(encoding="utf-8"))
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4), layout="constrained", dpi=150)
        left, middle, right = figure.subplots(1, 3)
        ensembles(left, found["ensembles"])
        training(middle, read_run(digits).history)
        shares(right, found["samples"])
    return figure


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:])).savefig(PICTURE)
