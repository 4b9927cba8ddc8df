"""On which clock each noise moves the weights: exponents (a, b) of alpha^a sigma^b, measured on a small network.

Ensembles of noisy training run along the zero-loss set at several step sizes and noise levels. The drift of their
nearest points along the limit (for Langevin noise also their spread) is fitted by a power law and held against the
theorems of arXiv 2404.12293: (1, 2) for non-degenerate noise, (2, 2) for degenerate noise, no motion for minibatches
alone. Under Adam noise of order 1 divides itself by its own size, and the exponents are (1, 1).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from shell import command, require
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
    NoiseSystem,
    Rate,
    Scaling,
    SGDSettings,
    ZeroLossProblem,
    fit_exponents,
    nearest_point,
    scaling_figure,
    scaling_table,
    simulate,
    singular_limit,
    tangent_space,
)


@dataclass(frozen=True)
class Sweep:
    """One noise system, over step sizes and noise levels.

    Args:
        name: in tables and figures.
        noise: the system at a noise level.
        sigmas: the levels.
        slow_time: of each run.
        expected: the exponents of step size and noise that the theorem states.
        spreads: the spread of the ensemble is measured, not its drift.
        antithetic: in pairs of runs with opposite noise, so that diffusion cancels to first order.
        runs: how many times the usual number of replicas that takes.
        adam: the steps are those of torch.optim.Adam, at step sizes that are a part of the given ones.
    """

    name: str
    noise: Callable[[float], NoiseSystem]
    sigmas: tuple[float, ...]
    slow_time: float
    expected: tuple[int, int]
    spreads: bool = False
    antithetic: bool = False
    runs: float = 1
    adam: bool = False


# the normal modes have eigenvalues 1 to 4 (rate 1/(alpha lambda)): every run below is many times longer than that
SWEEPS = (
    Sweep("Dropout", lambda sigma: Dropout(), (0.04, 0.07, 0.12), 0.1, (1, 2)),
    Sweep("DropConnect", DropConnect, (0.04, 0.07, 0.12), 0.1, (1, 2)),
    Sweep("anti-correlated", AntiCorrelated, (0.04, 0.07, 0.12), 0.05, (1, 2)),
    Sweep("label noise", LabelNoise, (0.2, 0.3, 0.5), 0.2, (2, 2)),
    Sweep("Langevin (spread)", Langevin, (0.15, 0.25, 0.45), 0.02, (2, 2), spreads=True, runs=4),
    # while the weights diffuse, their drift changes: a short time, whose error is the same share of the drift
    Sweep("Langevin (drift)", Langevin, (0.06, 0.1, 0.15), 0.005, (2, 2), antithetic=True, runs=16),
    Sweep("Adam, DropConnect", DropConnect, (0.04, 0.08, 0.16), 0.12, (1, 1), runs=0.5, adam=True),
    Sweep("Adam, dropout", lambda sigma: Dropout(), (0.04, 0.08, 0.16), 0.12, (1, 1), runs=0.5, adam=True),
)
# Adam's steps are alpha for each weight, whatever the gradient: in its metric the stiffest mode has lr lambda = 0.05 at
# the largest of the default step sizes and the smallest noise. beta2 = 0.999: biases are of the order of 1 - beta2
ADAM_SHARE, BETAS, EPS = 0.0025, (0.9, 0.999), 1e-10
SMALLEST = 1.0  # eigenvalue of a normal mode


def tanh_problem(rate: float, seed: int) -> tuple[ZeroLossProblem, Tensor]:
    """A 4-16-1 tanh network with dropout on three orthogonal inputs, and a point on its zero-loss set."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Tanh(), nn.Dropout(rate), nn.Linear(16, 1, bias=False))
    for p in net.parameters():
        nn.init.normal_(p, std=p.shape[1] ** -0.5)
    problem = ZeroLossProblem(net, "mse", torch.eye(4)[:3], torch.tensor([[0.5], [-0.5], [0.25]]))
    return problem, nearest_point(problem, problem.weights(), rtol=1e-8, max_steps=100).point


def adam_ensemble(
    problem: ZeroLossProblem, point: Tensor, noise: NoiseSystem, *, replicas: int, seed: int
) -> tuple[nn.Parameter, torch.optim.Adam, Callable[[int], None]]:
    """Replicas at a point, with second moments that are stationary there, and a function that makes steps of Adam.

    Adam acts on each number alone: on a matrix of weights with a row for each replica it is as many optimizers.
    """
    generator, x, y = torch.Generator().manual_seed(seed), problem.inputs, problem.targets
    rows = len(x) if noise.per_sample else 1

    def loss(w: Tensor, eta: Tensor) -> Tensor:
        return noise.noisy_loss(problem.batch_loss, w, x, y, eta if noise.per_sample else eta[0])

    def draw() -> Tensor:
        return noise.draw(problem, replicas * rows, generator=generator).view(replicas, rows, -1)

    weights, gradient = nn.Parameter(point.repeat(replicas, 1)), torch.func.vmap(torch.func.grad(loss))
    adam = torch.optim.Adam([weights], lr=0.0, betas=BETAS, eps=EPS)

    def train(steps: int) -> None:
        for _ in range(steps):
            weights.grad = gradient(weights.detach(), draw())
            adam.step()

    train(round(3 / (1 - BETAS[1])))
    return weights, adam, train


def measure_adam(sweep: Sweep, alpha: float, sigma: float, *, replicas: int, seed: int) -> Rate:
    """The same under Adam: its limit is that of plain descent in the metric of its second moments."""
    (problem, point), noise = tanh_problem(sigma**2 / (1 + sigma**2), seed), sweep.noise(sigma)
    weights, adam, train = adam_ensemble(problem, point, noise, replicas=round(sweep.runs * replicas), seed=seed)
    S = 1 / (adam.state[weights]["exp_avg_sq"].mean(0).sqrt() + EPS)
    lr, scale = ADAM_SHARE * alpha, 1 / (1 / S).mean().item()
    roots = (S / scale).sqrt()
    plain, origin = problem.in_metric(S / scale), point / roots
    sgd = SGDSettings(scale * lr, momentum=BETAS[0], dampening=BETAS[0])
    limit = singular_limit(plain, origin, noise, sgd, num_draws=problem.num_weights)
    adam.param_groups[0]["lr"] = lr
    train(round(4 / (sgd.lr * tangent_space(plain, origin).spectrum()[-1].item())))

    def nearest() -> Tensor:
        return torch.stack([nearest_point(plain, w / roots, rtol=1e-4).point for w in weights.detach()])

    start = nearest()
    steps = round(sweep.slow_time / (lr * scale * sigma**2))
    train(steps)
    along = Estimate.from_draws((nearest() - start) @ limit.drift / limit.drift.norm())
    return Rate(alpha, sigma, along.scaled(1 / steps), limit.drift.norm().item())


def measure(sweep: Sweep, alpha: float, sigma: float, *, replicas: int, seed: int) -> Rate:
    """One ensemble: its normal modes relax first, then its motion along the zero-loss set is measured."""
    if sweep.adam:
        return measure_adam(sweep, alpha, sigma, replicas=replicas, seed=seed)
    problem, point = tanh_problem(sigma**2 / (1 + sigma**2), seed)
    noise, sgd = sweep.noise(sigma), SGDSettings(lr=alpha)
    limit = singular_limit(problem, point, noise, sgd, num_draws=problem.num_weights)
    generator = torch.Generator().manual_seed(seed)
    run = partial(
        simulate,
        problem,
        noise=noise,
        sgd=sgd,
        replicas=round(sweep.runs * replicas),
        antithetic=sweep.antithetic,
        generator=generator,
    )
    relaxed = run(point, steps=round(4 / (alpha * SMALLEST)))
    steps = round(sweep.slow_time * limit.time_scale)
    # displacements leave out the transient perturbation of the last step, which the next run adds anew
    ensemble = run(
        point + relaxed.displacements, steps=steps, retract=lambda w: nearest_point(problem, w, rtol=1e-4).point
    )
    if sweep.spreads:
        return Rate(alpha, sigma, ensemble.spread.scaled(1 / steps), limit.diffusion * limit.dimension)
    along = Estimate.from_draws(ensemble.independent @ limit.drift / limit.drift.norm())
    return Rate(alpha, sigma, along.scaled(1 / steps), limit.drift.norm().item())


def rest(alpha: float, seed: int) -> tuple[float, float]:
    """Minibatches of one sample, from a tenth off Gamma: distance at the end, motion over the second half."""
    problem, point = tanh_problem(0.1, seed)
    generator = torch.Generator().manual_seed(seed)
    start = point + 0.1 * torch.randn(len(point), generator=generator, dtype=point.dtype) / math.sqrt(len(point))
    sgd = SGDSettings(lr=alpha, batch_size=1)
    run = partial(simulate, problem, noise=Minibatch(), sgd=sgd, steps=600, replicas=1, generator=generator)
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

    # one ensemble for each system, step size and noise level
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

    # result
    table = scaling_table(scalings, level=level)
    resting = (
        f"minibatches alone: distance {distance:.1e} after 1200 steps, nearest point moved {moved:.1e} over the last "
        "600"
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
        promised = {
            f"{each.name}: exponents within 0.1 of theory, which their intervals cover": each.holds(
                tolerance=0.1, level=level, comparisons=2 * len(scalings)
            )
            for each in scalings
        }
        require(promised | {"minibatches alone come to rest": distance <= 1e-6 and moved <= 1e-6})


if __name__ == "__main__":
    command(main)
