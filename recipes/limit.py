"""The singular limit on real digits: how it is approached, and what it explains where it is not.

The paper's theorems are about step size and noise that go to zero on data that are fitted exactly. Here a real network
starts on its zero-loss set of a few handwritten digits, and ensembles of noisy training run from there:

(a) over the same slow time, with less and less noise, or with smaller and smaller steps: direction, speed and distance
    of the nearest points against the limit, integrated along the set, and against its form at the step size;
(b) with more and more digits: the two time scales no longer separate. The weights then move along modes that have not
    relaxed, and agree with the limit by the share that these leave; their nearest points still follow it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from data import digits
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from networks import digits_mlp
from shell import command, require
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    Ensemble,
    Estimate,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    LimitPrediction,
    Minibatch,
    NearestPoint,
    NoiseSystem,
    SGDSettings,
    ZeroLossProblem,
    has_finite_step,
    limit_flow,
    nearest_point,
    simulate,
    singular_limit,
    tangent_space,
    tangential_share,
)

HIDDEN = 256
TOLERANCE = 1e-3  # of nearest points
REST = 4_000  # steps with minibatches alone
# numbers of digits, and the steps after which they are measured
SIZES = {
    "quick": ((10, 20, 50), (100, 400)),
    "default": ((10, 20, 50, 100, 200), (100, 400, 1_000)),
    "full": ((10, 20, 50, 100, 200, 500), (100, 400, 1_600, 6_400)),
}
# Okabe and Ito's colours
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class System:
    """One noise system and how it is swept.

    Args:
        name: in tables and figures.
        noise: the system at a noise level.
        sigma: the largest level; each further one is a half of the one before.
        slow_time: of each run.
        step: alpha lambda_1, the step size in units of the inverse of the largest curvature.
        batch: images per step; None: all.
        flips: the network is trained with cross-entropy, and the level is the rate of flips. The rate changes the
            problem: step sizes are swept instead of it.
    """

    name: str
    noise: Callable[[float], NoiseSystem]
    sigma: float
    slow_time: float
    step: float = 0.5
    batch: int | None = None
    flips: bool = False


# chosen so that the weights move by about as much as they are away from their initial values, or a tenth of it
SYSTEMS = {
    "dropout": System("dropout", lambda sigma: Dropout(), 0.23, 2.0),
    "label_noise": System("label noise", LabelNoise, 0.4, 5.0, step=1.0),
    "drop_connect": System("DropConnect", DropConnect, 0.4, 10.0),
    "anti_correlated": System("anti-correlated", AntiCorrelated, 0.02, 0.05),
    "input_noise": System("input noise", InputNoise, 0.08, 0.5),
    "label_flips": System("label flips", LabelFlips, 0.2, 2.3, step=0.1, flips=True),
    "langevin": System("Langevin (variance)", Langevin, 0.0025, 1.3e-5),
    "batches": System("dropout, batches of 5", lambda sigma: Dropout(), 0.23, 2.0, batch=5),
}


@dataclass(frozen=True)
class Cell:
    """An ensemble against the integrated limit, at one step size and noise level.

    Args:
        system: which noise.
        alpha: step size.
        sigma: noise level.
        steps: of each run.
        relaxed: alpha lambda_min K: all modes have relaxed if it is well above 1.
        cosine: of the motion of one run's nearest point with the limit, mean over the runs; nan if it diffuses.
        ceiling: the noise ceiling, the best cosine that any deterministic prediction can have with one run.
        of_mean: cosine of the mean motion.
        speed: <measured, limit> / <limit, limit>; of diffusion the variance, measured over predicted.
        asymptotic: the same with the limit as alpha -> 0, where the others are of that at this step size.
        distance: root mean square distance to the zero-loss set at the end.
        expected: the same by theory, with all modes relaxed.
    """

    system: System
    alpha: float
    sigma: float
    steps: int
    relaxed: float
    cosine: float
    ceiling: float
    of_mean: float
    speed: Estimate
    asymptotic: Estimate
    distance: float
    expected: float


@dataclass(frozen=True)
class Sample:
    """Weights and nearest points against the limit, for N digits after K steps.

    Args:
        samples: N.
        steps: K.
        relaxed: alpha lambda_min K.
        share: `tangential_share`, the cosine that theory expects of the weights.
        weights: cosine of the weights' motion with the limit, mean over the runs, as a share of the noise ceiling.
        nearest: the same of the motion of their nearest points.
        speed: of the nearest points.
    """

    samples: int
    steps: int
    relaxed: float
    share: float
    weights: float
    nearest: float
    speed: Estimate


def problem_of(samples: int, sigma: float, seed: int, *, flips: bool = False) -> ZeroLossProblem:
    """The first digits, a tanh network with dropout of this level, 19,210 weights, mse on one-hot targets.

    With label flips at this rate it is cross-entropy, smoothed by the rate.
    """
    torch.manual_seed(seed)
    images, targets = digits(samples, one_hot=not flips).tensors
    loss = nn.CrossEntropyLoss(label_smoothing=sigma) if flips else "mse"
    return ZeroLossProblem(digits_mlp(HIDDEN, sigma**2 / (1 + sigma**2), nn.Tanh), loss, images, targets)


def start_of(problem: ZeroLossProblem) -> Tensor:
    """The point of the zero-loss set nearest to the initial weights  ``[P]``."""
    return nearest_point(problem, problem.weights(), rtol=1e-6, max_steps=100).point


def nearest_points(problem: ZeroLossProblem, weights: Tensor) -> list[NearestPoint]:
    """Of the weights of each run  ``[R, P]``."""
    return [nearest_point(problem, w, rtol=TOLERANCE, max_steps=100) for w in weights]


def agreement(motions: Tensor, limit: Tensor) -> tuple[float, float, float, Estimate]:
    """Cosine of one run (mean over the runs ``[R, P]``), noise ceiling, cosine of the mean, speed.

    The noise ceiling is the square root of the mean cosine between two independent runs.
    """
    runs, unit = len(motions), F.normalize(motions)
    between = (unit.sum(0).square().sum().item() - runs) / (runs * (runs - 1))
    single = (unit @ F.normalize(limit, dim=0)).mean().item()
    of_mean = F.cosine_similarity(motions.mean(0), limit, dim=0).item()
    speed = Estimate.from_draws(motions @ limit / limit.square().sum())
    return single, math.sqrt(max(between, 0.0)), of_mean, speed


@dataclass(frozen=True)
class Run:
    """An ensemble from a point of the zero-loss set.

    Args:
        problem: the digits.
        start: weights on the zero-loss set.
        noise: at its level.
        sgd: step size and batch size.
        limit: its prediction at the start.
        steps: of each run.
        ensemble: the runs.
    """

    problem: ZeroLossProblem
    start: Tensor
    noise: NoiseSystem
    sgd: SGDSettings
    limit: LimitPrediction
    steps: int
    ensemble: Ensemble


def train(system: System, sigma: float, *, samples: int, runs: int, seed: int) -> Run:
    """Over the slow time of the system."""
    problem = problem_of(samples, sigma, seed, flips=system.flips)
    start = start_of(problem)
    noise, generator = system.noise(sigma), torch.Generator().manual_seed(seed)
    alpha = system.step / tangent_space(problem, start).spectrum()[0].item()
    sgd = SGDSettings(lr=alpha, batch_size=system.batch)
    limit = singular_limit(problem, start, noise, sgd, num_draws=HIDDEN)
    steps = round(system.slow_time * limit.time_scale)
    ensemble = simulate(problem, start, noise, sgd, steps=steps, replicas=runs, generator=generator)
    return Run(problem, start, noise, sgd, limit, steps, ensemble)


def judge(system: System, sigma: float, run: Run) -> Cell:
    """The nearest points of an ensemble against the limit, integrated from their start."""
    problem, start, noise, sgd, steps = run.problem, run.start, run.noise, run.sgd, run.steps
    nearest = nearest_points(problem, start + run.ensemble.displacements)
    motions = torch.stack([each.point - start for each in nearest])
    finite = has_finite_step(noise, problem, sgd)
    relaxed = sgd.lr * tangent_space(problem, start).spectrum()[-1].item() * steps
    if run.limit.diffusion:  # the drift over this time is much smaller
        single = ceiling = of_mean = math.nan
        measured = replace(run.ensemble, displacements=motions).spread
        speed = asymptotic = measured.scaled(1 / run.limit.spread(steps) ** 2)
        end = run.limit
    else:
        flow, slow = (
            limit_flow(problem, start, noise, sgd, steps=steps, num_draws=HIDDEN, finite_step=each).displacement
            for each in (finite, False)
        )
        single, ceiling, of_mean, speed = agreement(motions, flow)
        asymptotic = agreement(motions, slow)[3]
        end = singular_limit(problem, start + flow, noise, sgd, num_draws=HIDDEN, finite_step=finite)
    # the distance includes transient perturbations, the motion does not
    ends = nearest_points(problem, run.ensemble.weights) if noise.transient else nearest
    distance = math.sqrt(sum(each.distance**2 for each in ends) / len(ends))
    return Cell(
        system, sgd.lr, sigma, steps, relaxed, single, ceiling, of_mean, speed, asymptotic, distance, end.distance
    )


def grow(samples: int, marks: Sequence[int], *, sigma: float, runs: int, seed: int) -> list[Sample]:
    """Dropout on N digits: the weights and their nearest points after each number of steps, at alpha = 1 / lambda_1."""
    problem = problem_of(samples, sigma, seed)
    start, noise = start_of(problem), Dropout()
    spectrum = tangent_space(problem, start).spectrum()
    sgd, generator = SGDSettings(lr=1 / spectrum[0].item()), torch.Generator().manual_seed(seed)
    flow = limit_flow(problem, start, noise, sgd, steps=marks[-1], marks=marks, rtol=1e-2)
    shares = tangential_share(problem, start, noise, sgd, steps=marks, num_draws=HIDDEN)
    found, moved, before = [], torch.zeros(runs, len(start), dtype=start.dtype), 0
    for steps, limit, share in zip(marks, flow.path, shares, strict=True):
        run = simulate(problem, start + moved, noise, sgd, steps=steps - before, replicas=runs, generator=generator)
        moved, before = moved + run.displacements, steps
        nearest = nearest_points(problem, start + moved)
        of_weights = agreement(moved, limit)
        of_nearest = agreement(torch.stack([each.point - start for each in nearest]), limit)
        relaxed = sgd.lr * spectrum[-1].item() * steps
        weights, points = (
            cosine / ceiling if ceiling > 0 else math.nan for cosine, ceiling, *_ in (of_weights, of_nearest)
        )
        found.append(Sample(samples, steps, relaxed, share, weights, points, of_nearest[3]))
    return found


def rest(samples: int, *, seed: int) -> tuple[float, float]:
    """Minibatches of 5 alone, from .1 off the set: final distance, motion of the nearest point in the last half."""
    problem = problem_of(samples, 0.1, seed)
    start, generator = start_of(problem), torch.Generator().manual_seed(seed)
    off = torch.randn(len(start), generator=generator, dtype=start.dtype)
    sgd = SGDSettings(lr=0.5 / tangent_space(problem, start).spectrum()[0].item(), batch_size=5)
    w, points = start + 0.1 * off / off.norm(), []
    for _ in range(2):
        w = simulate(problem, w, Minibatch(), sgd, steps=REST // 2, replicas=1, generator=generator).weights[0]
        points.append(nearest_point(problem, w, rtol=1e-6, max_steps=100))
    return points[1].distance, torch.linalg.vector_norm(points[1].point - points[0].point).item()


def rate(xs: Sequence[float], values: Sequence[Estimate]) -> Estimate | None:
    """The exponent p of value ~ x^p by weighted least squares; None unless two values are above two standard errors."""
    clear = [(x, v) for x, v in zip(xs, values, strict=True) if v.mean > 2 * v.stderr]
    if len(clear) < 2:
        return None
    x = torch.tensor([[1.0, math.log(x)] for x, _ in clear], dtype=torch.float64)
    y = torch.tensor([math.log(v.mean) for _, v in clear], dtype=torch.float64)
    weight = torch.tensor([v.mean / v.stderr for _, v in clear], dtype=torch.float64)
    covariance = torch.linalg.inv(x.T @ (weight.square()[:, None] * x))
    p = (covariance @ (x.T @ (weight.square() * y)))[1].item()
    return Estimate(p, covariance[1, 1].sqrt().item())


def rates(cells: Sequence[Cell]) -> list[str]:
    """Exponents of |speed - 1|: over the noise level, and over the step size for the limit as alpha -> 0."""
    lines = []
    for name in dict.fromkeys(cell.system.name for cell in cells):
        own = [cell for cell in cells if cell.system.name == name]
        if math.isnan(own[0].cosine):
            continue
        levels = [c for c in own if c.system.step == own[0].system.step]
        steps = [c for c in own if c.sigma == own[0].sigma]
        for what, sweep, of in (
            ("noise level, at the step size", levels, lambda c: (c.sigma, c.speed)),
            ("step size, of the limit", steps, lambda c: (c.alpha, c.asymptotic)),
        ):
            if len(sweep) < 2:
                continue
            x, speeds = zip(*map(of, sweep), strict=True)
            p = rate(x, [Estimate(abs(each.mean - 1), each.stderr) for each in speeds])
            order = "below its standard errors" if p is None else f"exponent {p.mean:.2f} +- {p.stderr:.2f}"
            lines.append(f"{name}, |speed - 1| over the {what}, {len(sweep)} values: {order}")
    return lines


def limit_table(cells: Sequence[Cell]) -> str:
    """A row for each ensemble, in markdown."""
    lines = [
        "| noise | level | step size | steps | alpha lambda_min K | one run: cosine of ceiling | mean | speed "
        "| of the limit | distance, expected |",
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for c in cells:
        drifts = not math.isnan(c.cosine)
        cosines = f"{c.cosine:.4f} of {c.ceiling:.4f} | {c.of_mean:.4f}" if drifts else "- | -"
        asymptotic = f"{c.asymptotic.mean:.3f}" if drifts else "-"
        lines.append(
            f"| {c.system.name} | {c.sigma:.3g} | {c.alpha:.3g} | {c.steps} | {c.relaxed:.2g} | {cosines} | "
            f"{c.speed.mean:.3f} ± {c.speed.stderr:.3f} | {asymptotic} | {c.distance:.3g}, {c.expected:.3g} |"
        )
    return "\n".join(lines)


def sample_table(found: Sequence[Sample]) -> str:
    """A row for each number of digits and steps, in markdown."""
    lines = [
        "| digits | steps | alpha lambda_min K | weights: cosine / ceiling | expected "
        "| nearest points: cosine / ceiling | speed |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s.samples} | {s.steps} | {s.relaxed:.2g} | {s.weights:.3f} | {s.share:.3f} | {s.nearest:.3f} | "
        f"{s.speed.mean:.3f} ± {s.speed.stderr:.3f} |"
        for s in found
    ]
    return "\n".join(lines)


def draw(cells: Sequence[Cell], found: Sequence[Sample], samples: int) -> Figure:
    """Speed and direction over the noise level; distance against its law; weights and nearest points for N digits."""
    figure = Figure(figsize=(11, 3.9), layout="constrained", dpi=160)
    figure.suptitle(
        f"The singular limit on real digits: {samples} of them (left, middle), and more (right)", fontsize=10
    )
    left, middle, right = figure.subplots(1, 3)
    for colour, name in zip(COLOURS, dict.fromkeys(c.system.name for c in cells), strict=False):
        own = [c for c in cells if c.system.name == name]
        left.errorbar(
            [c.steps for c in own],
            [c.speed.mean for c in own],
            [2 * c.speed.stderr for c in own],
            color=colour,
            fmt="o",
            ms=4,
            label=name,
        )
        left.plot(
            [c.steps for c in own], [c.asymptotic.mean for c in own], "o", color=colour, ms=4, mfc="none", alpha=0.6
        )
        middle.plot([c.relaxed for c in own], [c.distance / c.expected for c in own], "o", color=colour, ms=4)
    left.axhline(1, color="black", lw=0.8)
    left.set(xlabel="steps $K$ (more with less noise, or smaller steps)", ylabel="speed, measured / limit")
    left.set_title(r"limit at the step size (dots), as $\alpha \to 0$ (circles)", fontsize=8)
    left.set_xscale("log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=7.5)
    middle.axhline(1, color="black", lw=0.8)
    middle.axvline(1, color="black", lw=0.8, ls=":")
    middle.set(xscale="log", ylim=(0, 1.2), xlabel=r"$\alpha\lambda_{\min}K$ (above 1: all modes have relaxed)")
    middle.set(ylabel="distance, measured / expected")
    for colour, size in zip(COLOURS, dict.fromkeys(s.samples for s in found), strict=False):
        own = [s for s in found if s.samples == size]
        right.plot([s.share for s in own], [s.weights for s in own], "o", color=colour, ms=4, label=f"{size} digits")
        right.plot([s.share for s in own], [s.nearest for s in own], "s", color=colour, ms=4, mfc="none")
    ends = (0.5, 1.0)
    right.plot(ends, ends, color="black", lw=0.8)
    right.set(xlim=(0.5, 1.03), ylim=(0.5, 1.03), xlabel="share of the tangential motion, by theory")
    right.set(ylabel="cosine with the limit / noise ceiling")
    right.set_title("weights (dots), nearest points (squares)", fontsize=8)
    right.legend(frameon=False, fontsize=7)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def promises(cells: Sequence[Cell], found: Sequence[Sample]) -> dict[str, bool]:
    """What theory promises of the ensembles with the least noise, and for growing data."""
    promised = {}
    for name in dict.fromkeys(c.system.name for c in cells):
        last = max((c for c in cells if c.system.name == name), key=lambda c: c.steps)
        if not math.isnan(last.cosine):
            promised[f"{name}: cosine >= 0.99 of the noise ceiling"] = last.cosine >= 0.99 * last.ceiling
        off = max(abs(last.speed.mean - 1) - 2 * last.speed.stderr, 0.0)
        promised[f"{name}: speed within 3 % at two standard errors"] = off <= 0.03
        if last.relaxed >= 2:
            promised[f"{name}: distance within 10 % of its law"] = abs(last.distance / last.expected - 1) <= 0.1
    if found:
        worst = max(abs(s.weights - s.share) for s in found)
        promised["the weights agree with the limit by the tangential share, within 0.1"] = worst <= 0.1
        promised["nearest points: cosine >= 0.97 of the noise ceiling"] = min(s.nearest for s in found) >= 0.97
    return promised


def main(
    systems: str = "",
    samples: int = 20,
    runs: int | None = None,
    seed: int = 0,
    out: Path = Path("runs/limit"),
    quick: bool = False,
    full: bool = False,
    check: bool = True,
) -> None:
    """Approach the singular limit on real handwritten digits, and leave it by taking more of them.

    Args:
        systems: which noises of dropout, label_noise, drop_connect, anti_correlated, input_noise, label_flips,
            langevin, batches, with commas in between; default: all; with --quick dropout and label noise.
        samples: digits of the first part.
        runs: independent runs of each ensemble; default: 4, with --full 12.
        seed: of network and noise.
        out: folder for the figure and the tables.
        quick: two minutes on two cores: two noises, up to 50 digits.
        full: hours: more noise levels and step sizes, 12 runs, up to 500 digits.
        check: fail unless direction, speed and distance agree with the theory where noise is smallest.
    """
    began = time.perf_counter()
    names = systems.split(",") if systems else ["dropout", "label_noise"] if quick else list(SYSTEMS)
    runs = runs or (12 if full else 4)
    levels = 3 if full else 2
    ensembles = [
        (replace(SYSTEMS[name], step=SYSTEMS[name].step / 2**i), SYSTEMS[name].sigma)
        if SYSTEMS[name].flips
        else (SYSTEMS[name], SYSTEMS[name].sigma / 2**i)
        for name in names
        for i in range(levels)
    ]
    if not quick:
        factors = (0.5, 0.25) if full else (0.5,)  # of the step size
        few = names if full or systems else ["dropout", "drop_connect", "input_noise"]
        ensembles += [
            (replace(SYSTEMS[name], step=factor * SYSTEMS[name].step), SYSTEMS[name].sigma)
            for name in few
            for factor in factors
            if not SYSTEMS[name].flips
        ]
    sizes, marks = SIZES["quick" if quick else "full" if full else "default"]

    cells: list[Cell] = []
    found: list[Sample] = []
    with tqdm(total=len(ensembles) + len(sizes), unit="ensemble") as bar:
        for system, sigma in ensembles:
            bar.set_description(f"{system.name}, level {sigma:.3g}")
            run = train(system, sigma, samples=samples, runs=runs, seed=seed)
            cells.append(judge(system, sigma, run))
            bar.update()
        for size in sizes:
            bar.set_description(f"{size} digits")
            found += grow(size, marks, sigma=0.115, runs=max(runs // 2, 2), seed=seed)
            bar.update()
    distance, moved = rest(samples, seed=seed)

    # result
    table = "\n\n".join([limit_table(cells), "\n".join(rates(cells)), sample_table(found)])
    resting = f"minibatches of 5 alone: distance {distance:.1e}, nearest point moved {moved:.1e} over the last half"
    out.mkdir(parents=True, exist_ok=True)
    (out / "limit.md").write_text(f"{table}\n\n{resting}\n")
    numbers = {"ensembles": [vars(c) | {"system": c.system.name} for c in cells], "samples": [vars(s) for s in found]}
    (out / "limit.json").write_text(json.dumps(numbers, indent=1, default=vars))
    draw(cells, found, samples).savefig(out / "limit.png")
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{table}\n\n{resting}\n\nfigure: {out / 'limit.png'}\n{minutes:.1f} minutes")
    if check:
        require(promises(cells, found) | {"minibatches alone come to rest": moved <= 1e-3 * 0.1})


if __name__ == "__main__":
    command(main)
