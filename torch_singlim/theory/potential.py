"""The effective potential V of a noise system, its gradient, and the gradient noise on Gamma in residual space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp

from torch_singlim.linalg import Estimate, VectorEstimate, rademacher
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory.noise import NoiseSystem, NoisyBatch, noisy_loss

__all__ = [
    "Potential",
    "averaged_gradient",
    "noise_gram",
    "noisy_gradient",
    "potential",
    "second_order_gradient",
    "trace_directions",
]


_GROUPS = 4  # independent averages from which the standard error of a sampled gradient is told


@dataclass(frozen=True)
class Potential:
    """V(w) in units of the loss, grad V ``[P]``, each with its error, and the derivative passes over the data spent."""

    value: Estimate
    gradient: VectorEstimate
    passes: int


def trace_directions(
    system: NoiseSystem, problem: ZeroLossProblem, *, num_draws: int, generator: torch.Generator | None
) -> tuple[Iterator[Tensor], int]:
    """Noise directions s ``[N, D]`` whose second derivatives give sum_j sigma_j^2 d^2/d eta_j^2, and how many.

    Samples are independent, so one direction serves all of them at once: with num_draws >= D the scaled basis
    sigma_j e_j, to be summed (exact); below, sigma times Rademacher signs, to be averaged (Hutchinson).
    """
    scale = system.scale(problem)
    dimension = scale.numel()
    shape = (problem.num_samples, dimension)
    if num_draws >= dimension:
        return (s.expand(shape) for s in torch.diag(scale)), dimension
    signs = (rademacher(shape, generator=generator, like=scale) for _ in range(num_draws))
    return (scale * sign for sign in signs), num_draws


def noisy_gradient(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, eta: Tensor) -> Tensor:
    """grad_w Lhat(w, eta) over the whole probe set  ``[P]``, eta ``[N, D]``."""

    def over(part: slice) -> Tensor:
        x, y = problem.inputs[part], problem.targets[part]
        return grad(lambda v: noisy_loss(system, problem, v, x, y, eta[part]))(w)

    return problem.mean(over)


def second_order_gradient(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """d^2/dt^2 of grad_w Lhat(w, t s) ``[P]`` and of Lhat(w, t s) (scalar) at t = 0, s ``[N, D]``.

    Forward over forward over reverse: two directional derivatives of the gradient, so the cost is a few gradients
    whatever P and D are.
    """

    def over(part: slice) -> Tensor:
        x, y, direction = problem.inputs[part], problem.targets[part], s[part]

        def at(t: Tensor) -> Tensor:
            gradient, value = grad_and_value(lambda v: noisy_loss(system, problem, v, x, y, t * direction))(w)
            return torch.cat([gradient, value[None]])

        zero, one = w.new_zeros(()), w.new_ones(())

        def slope(t: Tensor) -> Tensor:
            return jvp(at, (t,), (one,))[1]  # type: ignore[return-value]  # jvp is typed for any number of outputs

        return jvp(slope, (zero,), (one,))[1]  # type: ignore[return-value]

    both = problem.mean(over)
    return both[:-1], both[-1]


def potential(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """V(w) = Lhat(w, 0) - L(w) + (1/2) sum_j sigma_j^2 d^2 Lhat(w, 0)/d eta_j^2, and its gradient.

    The whole Laplacian, the residual's own curvature included: off Gamma that part matters.

    Args:
        system: the noise.
        problem: loss and probe set, N samples.
        w: weights ``[P]``.
        num_draws: directions to spend on the trace; at least D (noise components per sample): exact. Fewer, and at
            least 2, are rounded up to a multiple of four.
        generator: of the random directions.
    """
    system.check(problem)
    penalty_gradient, penalty = _penalty(system, problem, w)
    dimension = system.scale(problem).numel()
    groups = 1 if num_draws >= dimension else min(_GROUPS, num_draws)
    if num_draws < 2 <= dimension:
        raise ValueError(f"num_draws must be at least 2 to tell a standard error, got {num_draws}")
    gradients, values = penalty_gradient.repeat(groups, 1), []
    directions, count = trace_directions(
        system, problem, num_draws=groups * math.ceil(num_draws / groups), generator=generator
    )
    weight = 0.5 if groups == 1 else 0.5 * groups / count  # a sum over the basis, or an average over draws
    for i, s in enumerate(directions):
        gradient, value = second_order_gradient(system, problem, w, s)
        gradients[i % groups] += weight * gradient
        values.append(0.5 * value)
    if groups == 1:
        value = Estimate(penalty.item() + sum(v.item() for v in values), 0.0)
    else:
        sampled = Estimate.from_draws(torch.stack(values))
        value = Estimate(penalty.item() + sampled.mean, sampled.stderr)
    return Potential(value, VectorEstimate(gradients), count)


def _penalty(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and value of Lhat(w, 0) - L(w), which no sample enters: one sample is enough."""
    x, y = problem.inputs[:1], problem.targets[:1]
    zero = system.scale(problem).new_zeros(1, system.scale(problem).numel())
    return grad_and_value(lambda v: noisy_loss(system, problem, v, x, y, zero) - problem.batch_loss(v, x, y))(w)


def averaged_gradient(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> VectorEstimate:
    """E_eta grad Lhat(w, eta) - grad L(w)  ``[P]``: the noise's pull at its finite size, which grad V expands.

    Args:
        system: the noise.
        problem: loss and probe set.
        w: weights ``[P]``.
        num_draws: draws of the noise, at least 2, rounded up to a multiple of four (one where nothing is random).
        generator: of the draws.
    """
    system.check(problem)
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 to tell a standard error, got {num_draws}")
    groups = min(_GROUPS, num_draws) if system.scale(problem).numel() else 1
    each = math.ceil(num_draws / groups) if groups > 1 else 1
    quiet, means = problem.gradient(w), []
    for _ in range(groups):
        draws = (system.draw(problem, problem.num_samples, generator=generator) for _ in range(each))
        means.append(sum((noisy_gradient(system, problem, w, eta) for eta in draws), start=torch.zeros_like(w)) / each)
    return VectorEstimate(torch.stack(means) - quiet)


def noise_gram(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """G_n = R_n D_n diag(sigma^2) D_n^T R_n^T ``[N, rows, rows]``, D_n = df_n/d eta at eta = 0.

    The covariance of the whitened output under the noise, per sample; on Gamma the covariance of the gradient noise
    per step is S = B^T blockdiag(G_n) B / (batch size), because there grad l has no part from the residual.
    """
    scale = system.scale(problem)
    f = problem.outputs(w)
    if scale.numel() == 0:
        rows = problem.num_residuals // problem.num_samples
        return f.new_zeros(problem.num_samples, rows, rows)
    blocks = []
    for part in problem.chunks():
        x, y = problem.inputs[part], problem.targets[part]

        def noisy_outputs(eta: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            batch = system.perturb(problem, NoisyBatch(w, x, y), eta)
            return problem.function(batch.weights, batch.inputs, batch.activations)

        zero = scale.new_zeros(len(x), scale.numel())
        pull = torch.func.vjp(noisy_outputs, zero)[1]
        R = problem.output_factor(f, part)  # [n, rows, C]
        RD = torch.stack([pull(row)[0] for row in R.unbind(1)], 1) * scale  # [n, rows, D]
        blocks.append(RD @ RD.mT)
    return torch.cat(blocks)
