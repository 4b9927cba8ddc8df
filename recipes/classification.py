"""Is a noise degenerate, and does it diffuse? Decided by measurement on random networks, and held against the theory.

The paper sorts noises by how they move the weights along the zero-loss set: on the first clock (non-degenerate noise,
order 1), on the second one (order 2), with or without diffusion, or not at all. Here three ensembles decide, without
any formula: at (step size, noise level) = (alpha, sigma), (alpha, sigma/2), (alpha/2, sigma), for K, 4 K and 2 K steps.

    rest         the nearest points do not move
    clock        their mean motion, or where that is not seen their variance, is constant at fixed K alpha^a sigma^2:
                 a = 1 or 2
    diffusion    if a = 2, their variance is ~ sigma^s at fixed K sigma^2: s = 0 if they diffuse, else 2 or more

What theory says of the same network: the order from grad V and the gradient noise at the point (`degeneracy`), the
diffusion from `singular_limit`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from shell import command, require
from torch import Tensor, nn
from tqdm import tqdm

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    NoiseSystem,
    SGDSettings,
    ZeroLossProblem,
    degeneracy,
    nearest_point,
    simulate,
    singular_limit,
    tangent_space,
)

REST, FIRST, SECOND, DIFFUSING = "rest", "order 1", "order 2, deterministic", "order 2, diffusing"
STEP = 0.25  # alpha lambda_1
MOTION = 0.1  # along the zero-loss set, as a share of the weights' norm, by the theory's rate at the start
AWAY = 0.01  # distance of the initial weights, as a share of their norm
STILL = 0.01  # of that distance: nearest points that move less are at rest
RATE = 0.1  # of label flips, a part of the problem
MOST = 250  # steps for the modes to relax, and for the motion, at the largest step size and level
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#E69F00", "#CC79A7")  # Okabe and Ito's


@dataclass(frozen=True)
class System:
    """One noise system.

    Args:
        noise: the system at a noise level.
        sigma: the larger of two levels; flips and minibatches have none.
        loss: of the network.
        batch: samples per step; None: all.
    """

    noise: Callable[[float], NoiseSystem]
    sigma: float = 0.1
    loss: str = "mse"
    batch: int | None = None


SYSTEMS = {
    "dropout": System(lambda sigma: Dropout()),
    "DropConnect": System(DropConnect),
    "anti-correlated": System(AntiCorrelated, 0.05),
    "input noise": System(InputNoise),
    "label noise": System(LabelNoise, 0.3),
    "label flips": System(lambda sigma: LabelFlips(RATE), loss="cross_entropy"),
    "Langevin": System(Langevin, 0.3),
    "minibatches": System(lambda sigma: Minibatch(), batch=1),
}


@dataclass(frozen=True)
class Decision:
    """What moves a network along its zero-loss set, by theory and by measurement.

    Args:
        system: name of the noise.
        expected: the class by theory.
        measured: the class by the ensembles.
        clock: a, the exponent of the step size; nan at rest.
        variance: s, the exponent of the noise level in the variance at fixed slow time; nan at rest.
    """

    system: str
    expected: str
    measured: str
    clock: float
    variance: float


def random_problem(system: System, sigma: float, copies: int, seed: int) -> ZeroLossProblem:
    """A random network, wide enough to fit a few random samples, with dropout of this level.

    Args:
        system: which noise.
        sigma: its level.
        copies: of each sample. Four copies with independent noise halve the level of a noise that has none, such as
            label flips at fixed targets.
        seed: of sizes, activation, weights and samples.
    """
    torch.manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, ()))

    samples, inputs, hidden, outputs = between(2, 5), between(4, 8), between(16, 32), between(1, 3)
    classes = outputs + 1 if system.loss == "cross_entropy" else outputs
    activation = (nn.Tanh, nn.GELU, nn.Softplus)[between(0, 2)]
    net = nn.Sequential(
        nn.Linear(inputs, hidden), activation(), nn.Dropout(sigma**2 / (1 + sigma**2)), nn.Linear(hidden, classes)
    )
    x, y = torch.randn(samples, inputs), torch.randn(samples, classes)
    if system.loss == "mse":
        return ZeroLossProblem(net, "mse", x.repeat(copies, 1), y.repeat(copies, 1))
    loss = nn.CrossEntropyLoss(label_smoothing=RATE)
    return ZeroLossProblem(net, loss, x.repeat(copies, 1), y.argmax(1).repeat(copies))


def class_of(order: int | None, diffuses: bool) -> str:
    """In the words of the table."""
    if order is None:
        return REST
    return FIRST if order == 1 else DIFFUSING if diffuses else SECOND


def on_gamma(problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """The nearest point, so accurate that its error is no motion."""
    return nearest_point(problem, w, rtol=1e-6, max_steps=100).point


def expect(problem: ZeroLossProblem, point: Tensor, noise: NoiseSystem, sgd: SGDSettings) -> tuple[str, int]:
    """The class by theory, and after how many steps the motion can be seen."""
    draws = problem.num_weights  # exact traces
    order = degeneracy(problem, point, noise, num_draws=draws).order
    limit = singular_limit(problem, point, noise, sgd, num_draws=draws)
    seen = MOTION * torch.linalg.vector_norm(point).item()
    rate = max(torch.linalg.vector_norm(limit.drift).item() / seen, (limit.spread(1) / seen) ** 2)
    return class_of(order, limit.diffusion > 0), min(MOST, max(MOST // 5, round(1 / rate))) if rate else MOST


def total_variance(motions: Tensor) -> float:
    """Trace of the covariance."""
    return motions.var(0).sum().item()


def measured(motions: Sequence[Tensor], still: float) -> tuple[str, float, float]:
    """The class by the motion of nearest points, and the exponents of the clock and of the variance.

    Args:
        motions: of the runs ``[R, P]`` at (alpha, sigma), (alpha, sigma/2), (alpha/2, sigma), after K, 4 K, 2 K steps.
        still: root mean square motion below which nothing moves.
    """
    if max(m.square().sum(1).mean().sqrt().item() for m in motions) < still:
        return REST, math.nan, math.nan
    usual, _, slower = motions
    spread, at_weaker, at_slower = map(total_variance, motions)
    variance = math.log2(spread / at_weaker)
    # squares of means; the product of independent means has no bias, a square has the variance of its mean
    own = (usual.mean(0).square().sum() - spread / len(usual)).item()
    shared = (usual.mean(0) @ slower.mean(0)).item()
    if min(own, shared) > spread / 4:  # the drift is seen in every run
        clock = 1 + math.log2(own / shared)
        return class_of(1 if clock < 1.5 else 2, variance < 1), clock, variance
    clock = 1 + math.log2(spread / at_slower)
    return class_of(2, variance < 1), clock, variance


def decide(name: str, *, runs: int, seed: int) -> Decision:
    """One system on one network: by theory, and by three ensembles that start a little away from the set."""
    system, generator = SYSTEMS[name], torch.Generator().manual_seed(seed)
    problem = random_problem(system, system.sigma, 1, seed)
    point = nearest_point(problem, problem.weights(), rtol=1e-6, max_steps=200).point
    spectrum = tangent_space(problem, point).spectrum()
    alpha = STEP / spectrum[0].item()
    noise = system.noise(system.sigma)
    expected, steps = expect(problem, point, noise, SGDSettings(lr=alpha, batch_size=system.batch))
    relaxing = min(MOST, round(4 / (alpha * spectrum[-1].item())))
    away = AWAY * torch.linalg.vector_norm(point).item()
    off = torch.randn(len(point), generator=generator, dtype=point.dtype)
    start = point + away * off / torch.linalg.vector_norm(off)

    motions = []  # of nearest points, which neither the level nor copies change
    for slower, weaker in ((1, 1), (1, 2), (2, 1)):
        copies, level = (weaker**2, 1) if isinstance(noise, LabelFlips) else (1, weaker)
        own = random_problem(system, system.sigma / level, copies, seed)
        run = partial(
            simulate,
            own,
            noise=system.noise(system.sigma / level),
            sgd=SGDSettings(lr=alpha / slower, batch_size=system.batch),
            replicas=runs,
            generator=generator,
        )
        relaxed = start + run(start, steps=slower * relaxing).displacements
        ensemble = run(relaxed, steps=weaker**2 * slower * steps, retract=partial(on_gamma, problem))
        motions.append(ensemble.displacements)
    found, clock, variance = measured(motions, STILL * away)
    return Decision(name, expected, found, clock, variance)


def summary(decisions: Sequence[Decision]) -> str:
    """A row for each system, in markdown: classes and exponents, medians over the networks."""
    lines = [
        "| noise | theory | measured | networks | false | clock: alpha^a | variance: sigma^s |",
        "|:---|:---|:---|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(d.system for d in decisions):
        own = [d for d in decisions if d.system == name]
        expected, found = (
            ", ".join(f"{what} ({n})" if n < len(own) else what for what, n in Counter(values).most_common())
            for values in ([d.expected for d in own], [d.measured for d in own])
        )
        false = sum(d.expected != d.measured for d in own)
        exponents = [median_range([getattr(d, of) for d in own]) for of in ("clock", "variance")]
        lines.append(f"| {name} | {expected} | {found} | {len(own)} | {false} | {' | '.join(exponents)} |")
    return "\n".join(lines)


def median_range(values: Sequence[float]) -> str:
    """Median and range in words; a dash if nothing moved."""
    finite = torch.tensor([v for v in values if not math.isnan(v)])
    if not len(finite):
        return "-"
    return f"{finite.median().item():.2f} ({finite.min().item():.2f} to {finite.max().item():.2f})"


def draw(decisions: Sequence[Decision]) -> Figure:
    """Both exponents of each network and system, and the thresholds between the classes."""
    figure = Figure(figsize=(5, 4), layout="constrained", dpi=160)
    axes = figure.subplots()
    moving = [d for d in decisions if not math.isnan(d.clock)]
    right, top = (
        max([least, *(getattr(d, of) + 0.1 for d in moving)]) for least, of in ((2.5, "clock"), (5, "variance"))
    )
    axes.axvline(1.5, color="black", lw=0.8, ls=":")
    axes.plot([1.5, right], [1, 1], color="black", lw=0.8, ls=":")
    for colour, name in zip(COLOURS, dict.fromkeys(d.system for d in moving), strict=False):
        own = [d for d in moving if d.system == name]
        axes.plot([d.clock for d in own], [d.variance for d in own], "o", ms=3.5, color=colour, label=name)
    for x, y, label in ((0.55, top - 0.4, FIRST), (right - 0.05, top - 0.4, SECOND), (right - 0.05, 0.6, DIFFUSING)):
        axes.text(x, y, label, ha="left" if x < 1 else "right", fontsize=8)
    axes.set(xlim=(0.5, right), ylim=(-1, top), xlabel="clock: exponent $a$ of the step size")
    axes.set_ylabel("variance: exponent $s$ of the noise level")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7.5)
    return figure


def main(
    networks: int | None = None,
    runs: int = 16,
    seed: int = 0,
    out: Path = Path("runs/classification"),
    quick: bool = False,
    full: bool = False,
    check: bool = True,
) -> None:
    """Sort noises by how they move random networks along their zero-loss set: by theory, and by measurement.

    Args:
        networks: how many random networks; default: 5, with --quick 1, with --full 50.
        runs: of each ensemble.
        seed: of the first network.
        out: folder for the figure and the table.
        quick: minutes on two cores: one network.
        full: hours: 50 networks.
        check: fail if more than 5 % of the decisions are false.
    """
    began = time.perf_counter()
    networks = networks or (1 if quick else 50 if full else 5)
    grid = [(i, name) for i in range(networks) for name in SYSTEMS]
    decisions = []
    with tqdm(grid, unit="decision") as bar:
        for i, name in bar:
            bar.set_description(f"network {i + 1}, {name}")
            decisions.append(decide(name, runs=runs, seed=seed + i))

    # result
    false = sum(d.expected != d.measured for d in decisions)
    table = summary(decisions)
    out.mkdir(parents=True, exist_ok=True)
    (out / "classification.md").write_text(f"{table}\n")
    draw(decisions).savefig(out / "classification.png")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{table}\n\n{false} of {len(decisions)} decisions differ from theory")
    print(f"figure: {out / 'classification.png'}\n{minutes:.1f} minutes")
    if check:
        require({"at most 5 % of the decisions are false": false <= 0.05 * len(decisions)})


if __name__ == "__main__":
    command(main)
