"""What the drift along the zero-loss set is good for: test error, potential, sharpness, norm and sparsity along it.

All networks of one seed start at one point of the zero-loss set of a few handwritten digits, where the training error
is zero, and stay near it; the noises move them along it by their drifts. Slow time is counted in units in which the
drift at the start would move the weights by their own norm, so that every noise gets as much motion as any other.
Langevin noise is the control: its drift is negligible, and it diffuses by as much instead.

Everything is measured at the nearest points, which fit the digits exactly: what changes is where on the set they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from data import digits
from matplotlib.figure import Figure
from networks import digits_mlp
from shell import command, require
from torch import Tensor, nn
from tqdm import tqdm

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    Estimate,
    InputNoise,
    LabelNoise,
    Langevin,
    LimitPrediction,
    NoiseSystem,
    SGDSettings,
    ZeroLossProblem,
    nearest_point,
    simulate,
    singular_limit,
    tangent_space,
)

HIDDEN = 256
MARKS = 4  # measurements after the one at the start
TOLERANCE = 1e-2  # of nearest points
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's


@dataclass(frozen=True)
class System:
    """One noise, at a level at which it drifts far in thousands of steps.

    Args:
        noise: the system.
        dropout: rate of the network's dropout layer.
        step: alpha lambda_1 at the start.
    """

    noise: NoiseSystem
    dropout: float = 0.0
    step: float = 0.5


SYSTEMS = {
    "dropout": System(Dropout(), dropout=0.15),
    "DropConnect": System(DropConnect(0.3)),
    "anti-correlated": System(AntiCorrelated(0.02)),
    "input noise": System(InputNoise(0.3)),
    "label noise": System(LabelNoise(1.0), step=1.0),
    "Langevin": System(Langevin(0.01)),
}


@dataclass(frozen=True)
class State:
    """One network at one point of the zero-loss set.

    Args:
        system: name of the noise.
        seed: of network, digits and noise.
        time: slow time, in units in which the drift at the start would move the weights by their own norm (Langevin
            noise: in which they would diffuse by it).
        steps: of the optimizer.
        moved: distance from the start along the set, in weight norm.
        test_error: share of the digits that it has not seen and does not recognise.
        potential: V of its noise, relative to that at the start; for Langevin noise, whose V is a logarithm, nan.
        trace: tr H.
        largest: lambda_1.
        norm: of the weights.
        spread: share of the weights that carry the norm, (sum w^2)^2 / (P sum w^4): small for sparse weights.
    """

    system: str
    seed: int
    time: float
    steps: int
    moved: float
    test_error: float
    potential: float
    trace: float
    largest: float
    norm: float
    spread: float


# what is drawn and tabulated
QUANTITIES: dict[str, Callable[[State], float]] = {
    "test error": lambda s: s.test_error,
    "V / V at the start": lambda s: s.potential,
    "tr H": lambda s: s.trace,
    "lambda_1": lambda s: s.largest,
    "norm of the weights": lambda s: s.norm,
    "share of weights that carry it": lambda s: s.spread,
}


def problem_of(samples: int, rate: float, seed: int) -> tuple[ZeroLossProblem, Tensor, Tensor]:
    """Digits in an order of this seed: the problem of the first, images and labels of all others."""
    images, targets = digits(1797, one_hot=True).tensors
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, targets = images[order], targets[order]
    torch.manual_seed(seed)
    net = digits_mlp(HIDDEN, rate, nn.Tanh)
    problem = ZeroLossProblem(net, "mse", images[:samples], targets[:samples])
    return problem, images[samples:].to(problem.dtype), targets[samples:].argmax(1)


def run(name: str, *, slow_time: float, samples: int, seed: int, done: Callable[[], object]) -> list[State]:
    """One noise from the start of this seed over the slow time, with measurements in between."""
    system, generator = SYSTEMS[name], torch.Generator().manual_seed(seed)
    problem, images, labels = problem_of(samples, system.dropout, seed)
    start = nearest_point(problem, problem.weights(), rtol=1e-4, max_steps=100).point
    alpha = system.step / tangent_space(problem, start).spectrum()[0].item()
    sgd, size = SGDSettings(lr=alpha), torch.linalg.vector_norm(start).item()

    def limit_at(w: Tensor) -> LimitPrediction:
        return singular_limit(problem, w, system.noise, sgd, num_draws=HIDDEN, generator=generator)

    first = limit_at(start)
    diffuses = first.diffusion > 0
    rate = (first.spread(1) if diffuses else torch.linalg.vector_norm(first.drift).item()) / size
    power = 0.5 if diffuses else 1.0  # of the number of steps, in the motion

    def state(point: Tensor, limit: LimitPrediction, steps: int) -> State:
        spectrum, wrong = tangent_space(problem, point).spectrum(), problem.function(point, images).argmax(1) != labels
        return State(
            name,
            seed,
            steps**power * rate,
            steps,
            torch.linalg.vector_norm(point - start).item(),
            wrong.double().mean().item(),
            math.nan if diffuses else limit.potential.mean / first.potential.mean,
            spectrum.sum().item(),
            spectrum[0].item(),
            torch.linalg.vector_norm(point).item(),
            (point.square().sum().square() / (len(point) * point.pow(4).sum())).item(),
        )

    each = max(1, round((slow_time / rate) ** (1 / power) / MARKS))
    states, w = [state(start, first, 0)], start
    for mark in range(1, MARKS + 1):
        w = w + simulate(problem, w, system.noise, sgd, steps=each, replicas=1, generator=generator).displacements[0]
        point = nearest_point(problem, w, rtol=TOLERANCE, max_steps=100).point
        states.append(state(point, limit_at(point), mark * each))
        done()
    return states


def changes(states: Sequence[State], name: str) -> dict[str, tuple[Estimate, Estimate]]:
    """Of each quantity over one noise: its mean over the seeds at the start, and its mean change until the end."""
    own = [s for s in states if s.system == name]
    seeds = sorted({s.seed for s in own})
    pairs = [[s for s in own if s.seed == seed] for seed in seeds]
    found = {}
    for what, of in QUANTITIES.items():
        first, last = (torch.tensor([of(pair[i]) for pair in pairs], dtype=torch.float64) for i in (0, -1))
        found[what] = (Estimate.from_draws(first), Estimate.from_draws(last - first))
    return found


def summary(states: Sequence[State]) -> str:
    """A row for each noise, in markdown: motion, and the change of each quantity with its standard error over seeds."""

    def words(value: Estimate) -> str:
        if math.isnan(value.mean):
            return "-"
        return f"{value.mean:+.3g}" + (f" ± {value.stderr:.1g}" if value.stderr > 0 else "")

    names = list(dict.fromkeys(s.system for s in states))
    lines = [
        f"| noise | steps | moved | {' | '.join(QUANTITIES)} |",
        "|:---|---:|---:|" + "---:|" * len(QUANTITIES),
    ]
    start = [f"{first.mean:.3g}" for first, _ in changes(states, names[0]).values()]
    lines.append(f"| *at the start* | 0 | 0 | {' | '.join(start)} |")
    for name in names:
        last = list({s.seed: s for s in states if s.system == name}.values())
        steps, moved = (sum(getattr(s, of) for s in last) / len(last) for of in ("steps", "moved"))
        row = [words(change) for _, change in changes(states, name).values()]
        lines.append(f"| {name} | {steps:,.0f} | {moved:.2f} | {' | '.join(row)} |")
    return "\n".join(lines)


def draw(states: Sequence[State]) -> Figure:
    """The change of each quantity along the slow time: mean over the seeds, with its standard error."""
    figure = Figure(figsize=(9, 5), layout="constrained", dpi=160)
    figure.suptitle("Along the zero-loss set: change since the start, mean and error over networks", fontsize=9)
    panels = figure.subplots(2, 3).flat
    seeds = sorted({s.seed for s in states})
    for axes, (what, of) in zip(panels, QUANTITIES.items(), strict=True):
        axes.axhline(0, color="black", lw=0.8)
        for colour, name in zip(COLOURS, dict.fromkeys(s.system for s in states), strict=False):
            paths = [[s for s in states if s.system == name and s.seed == seed] for seed in seeds]
            change = torch.tensor([[of(s) - of(path[0]) for s in path] for path in paths], dtype=torch.float64)
            if not change.isnan().any():
                values = [Estimate.from_draws(column) for column in change.T]
                axes.errorbar(
                    [s.time for s in paths[0]],
                    [v.mean for v in values],
                    [v.stderr for v in values],
                    color=colour,
                    lw=1,
                    marker="o",
                    ms=3,
                    capsize=2,
                    label=name,
                )
        axes.set_title(what.replace("lambda_1", r"$\lambda_1$"), fontsize=8.5)
        axes.set_xlabel("slow time", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def promises(states: Sequence[State]) -> dict[str, bool]:
    """What theory promises: the drift is descent on the potential. It promises nothing about the test error."""
    promised = {}
    for name in dict.fromkeys(s.system for s in states):
        _, change = changes(states, name)["V / V at the start"]
        if not math.isnan(change.mean):
            promised[f"{name}: V falls"] = change.mean + 2 * change.stderr < 0
    return promised


def main(
    noises: str = "",
    samples: int = 100,
    seeds: int | None = None,
    slow_time: float | None = None,
    out: Path = Path("runs/generalisation"),
    quick: bool = False,
    full: bool = False,
    check: bool = True,
) -> None:
    """Follow several noises along the zero-loss set of real handwritten digits; see what becomes of the network.

    Args:
        noises: which, with commas in between; default: all, with --quick dropout and label noise.
        samples: training digits; all others are the test set.
        seeds: independent networks and training sets; default: 3, with --quick 2, with --full 5.
        slow_time: motion of the initial drift in units of the weights' norm; default: 0.1, with --quick 0.02, with
            --full 0.2.
        out: folder for the figure and the table.
        quick: minutes on two cores: two noises, two seeds, a short time.
        full: an hour: five seeds, twice the time.
        check: fail unless the potential of each noise falls.
    """
    began = time.perf_counter()
    names = noises.split(",") if noises else ["dropout", "label noise"] if quick else list(SYSTEMS)
    seeds = seeds or (2 if quick else 5 if full else 3)
    slow_time = slow_time or (0.02 if quick else 0.2 if full else 0.1)
    states: list[State] = []
    with tqdm(total=len(names) * seeds * MARKS, unit="measurement") as bar:
        for seed in range(seeds):
            for name in names:
                bar.set_description(f"{name}, seed {seed}")
                states += run(name, slow_time=slow_time, samples=samples, seed=seed, done=bar.update)

    # result
    table = summary(states)
    out.mkdir(parents=True, exist_ok=True)
    (out / "generalisation.md").write_text(f"{table}\n")
    draw(states).savefig(out / "generalisation.png")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{table}\n\nfigure: {out / 'generalisation.png'}\n{minutes:.1f} minutes")
    if check:
        require(promises(states))


if __name__ == "__main__":
    command(main)
