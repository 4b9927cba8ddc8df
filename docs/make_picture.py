"""Draw picture.png, the first one of README and site: what is measured, and what one sees of it in a real training.

python -m torch_singlim digits
python docs/make_picture.py runs/demo
"""

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from torch_singlim.measure import History, tags
from torch_singlim.report import read_run

PICTURE = Path(__file__).with_name("pages") / "figures" / "picture.png"
# Okabe and Ito's colours
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#777777", "#000000"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# the network f(x) = a b x with the weights a, b, the target x, and noise that is added to the weights in every gradient
START, RATE, STD, STEPS = (0.75, 2.25), 0.03, 0.3, 400


def path(noise: Tensor) -> Tensor:
    """Weights after each step of descent on (a b - 1)^2 / 2, averaged over draws of the noise ``[steps, draws, 2]``."""
    found = [torch.tensor(START)]
    for xi in noise:
        noisy = found[-1] + xi
        gradient = (noisy.prod(dim=1, keepdim=True) - 1) * noisy.flip(1)
        found.append(found[-1] - RATE * gradient.mean(0))
    return torch.stack(found)


def sketch(axes: Axes) -> None:
    """Two weights: level sets of the loss, a run, the averaged path, the baseline, a nearest point; computed."""
    generator = torch.Generator().manual_seed(7)
    run = path(STD * torch.randn(STEPS, 1, 2, generator=generator))
    averaged = path(STD * torch.randn(STEPS, 4000, 2, generator=generator))
    baseline = path(torch.zeros(STEPS, 1, 2))
    a, b = torch.meshgrid(torch.linspace(0.3, 2.1, 300), torch.linspace(0.35, 2.45, 300), indexing="xy")
    loss = (a * b - 1) ** 2 / 2
    losses = (run.prod(dim=1) - 1) ** 2 / 2
    k = 30 + int(losses[30:].argmax())  # the farthest excursion after the fall
    w, now = run[k], losses[k].item()
    axes.contour(a, b, loss, levels=[now / 2, now, 4 * now, 10 * now], colors="#c9dbe8", linewidths=0.8)
    set_ = torch.linspace(0.41, 2.1, 300)
    axes.plot(set_, 1 / set_, color=BLACK, lw=2.2)
    axes.annotate("zero-loss set", (1.5, 1 / 1.5), xytext=(1.3, 0.52), fontsize=8.5)
    axes.annotate("level sets of the loss", (1.5, 1 / 1.5), xytext=(1.42, 1.02), fontsize=8.5, color="#7fa3bd")
    axes.plot(*run.T, color=BLUE, lw=1, label="run")
    axes.plot(*averaged.T, color=ORANGE, lw=2, label="averaged path: noise averaged")
    axes.plot(*baseline.T, color=GREY, lw=2, label="baseline: noise off")
    axes.plot(*run[0], "o", color=BLACK, ms=5)
    axes.annotate("start", run[0], xytext=(6, 2), textcoords="offset points", fontsize=8.5)
    for end, color in ((run[-1], BLUE), (averaged[-1], ORANGE), (baseline[-1], GREY)):
        axes.plot(*end, "o", color=color, ms=6)
    candidates = torch.stack([set_, 1 / set_], dim=1)
    nearest = candidates[(candidates - w).norm(dim=1).argmin()]
    axes.plot(*torch.stack([w, nearest]).T, color=BLACK, lw=1.6, ls=":")
    label = "distance to the nearest point"
    axes.plot(*nearest, "s", color=BLACK, ms=5, mfc="white", ls=":", lw=1.6, label=label, zorder=5)
    axes.set(xlabel="weight 1", ylabel="weight 2", xlim=(0.3, 2.1), ylim=(0.35, 2.45))
    axes.set_title("A network with two weights, one window:\ndistance to the zero-loss set, and drift along it")
    axes.legend(loc="upper right", fontsize=8)


def training(axes: Axes, history: History) -> None:
    """Cosine of the measured drift with the averaged path, the limit and the baseline, with the noise ceiling."""
    for tag, color, style, label in (
        (tags.DRIFT_CEILING, "0.8", {"lw": 6}, "noise ceiling (estimated upper bound)"),
        (tags.DRIFT_COSINE, ORANGE, {"lw": 1.8}, "averaged path"),
        (tags.DRIFT_BASELINE_COSINE, GREY, {"lw": 1.8}, "baseline: noise off"),
        (tags.LIMIT_COSINE, GREEN, {"ls": "", "marker": "D"}, "singular limit"),
    ):
        for i, steps in enumerate(tags.windows(history).values()):
            there = [step for step in steps if tag.name in history[step]]
            values = [history[step][tag.name] for step in there]
            axes.plot(there, values, color=color, label=None if i else label, **style)
    starts = list(tags.windows(history))
    for start in starts[1:]:
        axes.axvline(start, color="0.85", lw=0.8, zorder=0)
    axes.annotate("a new window: paths\nrestart from the run", (starts[1] + 40, 0.3), fontsize=8.5, color="0.4")
    axes.set(ylim=(0, 1.04), xlabel="optimizer step", ylabel="cosine with the displacement of the run")
    axes.set_title("A real training: 200 handwritten digits,\ndropout, a network with 19,210 weights")
    axes.legend(loc="lower left", fontsize=8, ncols=2)


def draw(run: Path) -> Figure:
    """Two panels, from the folder of the demonstration's run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
        left, right = figure.subplots(1, 2)
        sketch(left)
        training(right, read_run(run).history)
    return figure


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:])).savefig(PICTURE)
