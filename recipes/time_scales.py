"""On which clock each noise moves the weights: exponents (a, b) of alpha^a sigma^b, measured on a small network.

Ensembles of noisy training run along the zero-loss set at several step sizes and noise levels; the drift of their foot
points (for Langevin noise their spread) is fitted by a power law and held against the theorems of arXiv 2404.12293:
(1, 2) for non-degenerate noise, (2, 2) for degenerate noise, no motion for minibatches alone.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import command
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torch_singlim import (
    AntiCorrelated,
    DropConnect,
    Dropout,
    Estimate,
    LabelNoise,
    Langevin,
    Minibatch,
    SGDSettings,
    ZeroLossProblem,
    nearest_point,
    simulate,
    singular_limit,
)
from torch_singlim.report import scaling_figure
from torch_singlim.measure.scaling import Rate, Scaling, fit_exponents, scaling_table
from torch_singlim.theory import NoiseSystem


@dataclass(frozen=True)
class Sweep:
    """One system: its noise at level sigma, the levels, slow time of a run, the exponents of theory, drift or spread
    that is measured, and how many times the usual number of runs that takes.
    """

    name: str
    noise: Callable[[float], NoiseSystem]
    sigmas: tuple[float, ...]
    slow_time: float
    expected: tuple[int, int]
    spreads: bool = False
    crowd: int = 1


# the normal modes have eigenvalues 1 to 4 (rate 1/(alpha lambda)): every run below is many times longer than that
SWEEPS = (
    Sweep("Dropout", lambda sigma: Dropout(), (0.04, 0.07, 0.12), 0.1, (1, 2)),
    Sweep("DropConnect", DropConnect, (0.04, 0.07, 0.12), 0.1, (1, 2)),
    Sweep("anti-correlated", AntiCorrelated, (0.04, 0.07, 0.12), 0.05, (1, 2)),
    Sweep("label noise", LabelNoise, (0.2, 0.3, 0.5), 0.2, (2, 2)),
    Sweep("Langevin (spread)", Langevin, (0.15, 0.25, 0.45), 0.02, (2, 2), spreads=True, crowd=4),
)
SLOWEST = 1.0


def tanh_problem(rate: float, seed: int) -> tuple[ZeroLossProblem, Tensor]:
    """A 4-16-1 tanh network with dropout on three orthogonal inputs, and a point on its zero-loss set."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Tanh(), nn.Dropout(rate), nn.Linear(16, 1, bias=False))
    for p in net.parameters():
        nn.init.normal_(p, std=p.shape[1] ** -0.5)
    problem = ZeroLossProblem(net, "mse", torch.eye(4)[:3], torch.tensor([[0.5], [-0.5], [0.25]]))
    return problem, nearest_point(problem, problem.weights(), rtol=1e-8, max_steps=100).point


def foot_of(problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """The foot point of w on the zero-loss set."""
    return nearest_point(problem, w, rtol=1e-4).point


def measure(sweep: Sweep, alpha: float, sigma: float, *, replicas: int, seed: int) -> Rate:
    """One ensemble: let it settle across the zero-loss set, then measure how it moves along it."""
    problem, point = tanh_problem(sigma**2 / (1 + sigma**2), seed)
    noise, sgd = sweep.noise(sigma), SGDSettings(lr=alpha)
    limit = singular_limit(problem, point, noise, sgd, num_draws=problem.num_weights)
    generator = torch.Generator().manual_seed(seed)
    run = functools.partial(
        simulate, problem, noise=noise, sgd=sgd, replicas=sweep.crowd * replicas, generator=generator
    )
    settled = run(point, steps=round(4 / (alpha * SLOWEST)))
    steps = round(sweep.slow_time * limit.time_scale)
    # without what the weights carry for a step alone, which every run puts on top
    ensemble = run(point + settled.displacements, steps=steps, foot=functools.partial(foot_of, problem))
    if sweep.spreads:
        return Rate(alpha, sigma, ensemble.spread.scaled(1 / steps), limit.diffusion * limit.dimension)
    mean = ensemble.mean.mean
    along = Estimate.from_draws(ensemble.displacements @ (mean / mean.norm()))
    return Rate(alpha, sigma, along.scaled(1 / steps), limit.drift.norm().item())


def rest(alpha: float, seed: int) -> tuple[float, float]:
    """Minibatches of one sample, from a tenth off Gamma: distance at the end, motion over the second half."""
    problem, point = tanh_problem(0.1, seed)
    generator = torch.Generator().manual_seed(seed)
    start = point + 0.1 * torch.randn(len(point), generator=generator, dtype=point.dtype) / math.sqrt(len(point))
    sgd = SGDSettings(lr=alpha, batch_size=1)
    run = functools.partial(simulate, problem, noise=Minibatch(), sgd=sgd, steps=600, replicas=1, generator=generator)
    middle = run(start).weights[0]
    a, b = (nearest_point(problem, w, rtol=1e-8, max_steps=50) for w in (middle, run(middle).weights[0]))
    return b.distance, torch.linalg.vector_norm(b.point - a.point).item()


def main(
    replicas: int = 64,
    alphas: tuple[float, ...] = (0.01, 0.02, 0.04),
    seed: int = 0,
    level: float = 0.95,
    out: Path = Path("runs/time_scales"),
    check: bool = True,
) -> None:
    """Measure on which clock each noise system moves a small network along its zero-loss set.

    Args:
        replicas: independent runs in each ensemble.
        alphas: step sizes; the stiffest mode has eigenvalue 3 to 4.
        seed: of network and noise.
        level: at which all intervals together hold.
        out: folder for TensorBoard's event files and the figure.
        check: fail unless every exponent is within 0.1 of theory, its interval covers it, and minibatches rest.
    """
    began = time.perf_counter()
    grid = [(sweep, alpha, sigma) for sweep in SWEEPS for alpha in alphas for sigma in sweep.sigmas]
    rates: dict[str, list[Rate]] = {sweep.name: [] for sweep in SWEEPS}
    with tqdm(grid, unit="ensemble") as bar:
        for sweep, alpha, sigma in bar:
            bar.set_description(f"{sweep.name}, step size {alpha:g}, noise {sigma:g}")
            rates[sweep.name].append(measure(sweep, alpha, sigma, replicas=replicas, seed=seed))
    scalings = [
        Scaling(sweep.name, tuple(rates[sweep.name]), fit_exponents(rates[sweep.name]), sweep.expected)
        for sweep in SWEEPS
    ]
    distance, moved = rest(min(alphas), seed)

    table = scaling_table(scalings, level=level)
    resting = (
        f"minibatches alone: distance {distance:.1e} after 1200 steps, foot point moved {moved:.1e} over the last 600"
    )
    print(f"\nexponents of step size^a noise^b, intervals jointly at {level:.0%}\n\n{table}\n\n{resting}")
    figure = scaling_figure(
        scalings, title="Motion along the zero-loss set: ensembles (points), singular limit (dashed)"
    )
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "time_scales.png")
    with SummaryWriter(str(out)) as writer:
        writer.add_text("time_scales/exponents", f"{table}\n\n{resting}")
        writer.add_figure("time_scales/rates", figure)
        for scaling in scalings:
            name = scaling.name.replace(" ", "_").replace("(", "").replace(")", "")
            for i, rate in enumerate(scaling.rates):
                writer.add_scalar(f"time_scales/{name}", rate.measured.mean / rate.predicted, i)
    minutes = (time.perf_counter() - began) / 60
    print(f"figure: {out / 'time_scales.png'}\nlook:   tensorboard --logdir {out}\n{minutes:.1f} minutes")

    if check:
        comparisons = 2 * len(scalings)
        missed = [s.name for s in scalings if not s.holds(tolerance=0.1, level=level, comparisons=comparisons)]
        missed += ["minibatches"] if distance > 1e-6 or moved > 1e-6 else []
        if missed:
            raise SystemExit(f"not as the theorems say: {', '.join(missed)}")
        print("agreement: every exponent within 0.1 of theory, every interval covers it, minibatches come to rest")


if __name__ == "__main__":
    command(main)
