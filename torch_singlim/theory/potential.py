"""The effective potential V of noises of order 1, its gradient, and the average gradient of noise of finite size."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from torch_singlim.geometry import gauss_newton
from torch_singlim.linalg import Estimate, VectorEstimate, rademacher
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.noise import AntiCorrelated, NoiseSystem, noisy_loss, parts, stratified_noise
from torch_singlim.theory.bouncing import stiffest_mode
from torch_singlim.theory.directions import directions_at_once, for_directions, mean_at

__all__ = [
    "Potential",
    "averaged_gradient",
    "chunk_gradient",
    "noisy_gradient",
    "noisy_gradients",
    "of_chunk",
    "part_potential",
    "potential",
    "random_direction",
    "sampled_potential",
    "second_order_gradient",
    "total",
    "traced",
]


_GROUPS = 4  # number of independent averages from which the standard error of a sampled gradient is computed


@dataclass(frozen=True)
class Potential:
    """V(w) in units of the loss and grad V ``[P]``, each with its error, and the number of derivative passes taken."""

    value: Estimate
    gradient: VectorEstimate
    passes: int

    def __add__(self, other: Potential) -> Potential:
        return Potential(self.value + other.value, self.gradient + other.gradient, self.passes + other.passes)

    def scaled(self, factor: float) -> Potential:
        """Its multiple."""
        return Potential(self.value.scaled(factor), self.gradient.map(lambda g: factor * g), self.passes)


def total(terms: Iterable[Potential]) -> Potential:
    """The sum of one or more potentials."""
    return functools.reduce(operator.add, terms)


def traced(
    direction: Callable[[int | None], Tensor],
    derivative: Callable[[Tensor], Tensor],
    dimension: int,
    num_draws: int,
    *,
    at_once: int,
    like: Tensor,
) -> Potential:
    """A trace and its gradient from single directions: a sum over a basis (exact), or a mean over random directions.

    Args:
        direction: the basis vector with the given index, or (None) a random direction.
        derivative: directions, stacked ``[k, ...]`` -> gradient and value for each of them ``[k, P + 1]``.
        dimension: of the trace; a basis is used if num_draws is at least as large.
        num_draws: otherwise, number of random directions, at least 2, rounded up to a multiple of four.
        at_once: number of directions that are passed to `derivative`.
        like: a vector ``[P]`` with the gradient's dtype and device.

    Raises:
        ValueError: a single random direction.
    """
    exact = num_draws >= dimension
    if not exact and num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 for a standard error, got {num_draws}")
    groups = 1 if exact else min(_GROUPS, num_draws)
    count = dimension if exact else groups * math.ceil(num_draws / groups)
    gradients, values = like.new_zeros(groups, like.numel()), []
    directions = ((direction(i if exact else None),) for i in range(count))
    for i, both in enumerate(for_directions(directions, at_once, lambda stacked: derivative(*stacked))):
        gradients[i % groups].add_(both[:-1], alpha=1 if exact else groups / count)
        values.append(both[-1].clone())  # a view would keep every gradient in memory
    trace = torch.stack(values)
    value = Estimate(trace.sum().item(), 0.0) if exact else Estimate.from_draws(trace)
    return Potential(value, VectorEstimate(gradients), count)


def _shape(part: NoiseSystem, problem: ZeroLossProblem) -> tuple[int, ...]:
    dimension = part.scale(problem).numel()
    return (problem.num_samples, dimension) if part.per_sample else (dimension,)


def of_chunk(system: NoiseSystem, etas: Sequence[Tensor], chunk: slice) -> tuple[Tensor, ...]:
    """The noise of the samples in a chunk."""
    return tuple(eta[chunk] if part.per_sample else eta for part, eta in zip(parts(system), etas, strict=True))


def random_direction(
    system: NoiseSystem, problem: ZeroLossProblem, *, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    """sigma_j times random signs, for each part ``[N, D]`` or ``[D]``. The mean of the second derivative along this
    direction is the trace sum_j sigma_j^2 d^2/d eta_j^2 (Hutchinson), for all samples at once, as they are independent.
    """
    return tuple(
        part.scale(problem) * rademacher(_shape(part, problem), generator=generator, like=part.scale(problem))
        for part in parts(system)
    )


def chunk_gradient(
    system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, etas: Sequence[Tensor], chunk: slice
) -> Tensor:
    """grad_w Lhat(w, eta) over the samples in a chunk  ``[P]``; eta is the noise of these samples."""
    x, y = problem.inputs[chunk], problem.targets[chunk]
    return grad(lambda v: noisy_loss(system, problem.batch_loss, v, x, y, etas))(w)


def noisy_gradient(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, etas: Sequence[Tensor]) -> Tensor:
    """grad_w Lhat(w, eta) over all samples  ``[P]``, with one eta for each part ``[N, D]`` or ``[D]``."""

    return problem.mean(lambda chunk: chunk_gradient(system, problem, w, of_chunk(system, etas, chunk), chunk))


def noisy_gradients(
    system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, draws: Iterable[tuple[Tensor, ...]]
) -> Iterator[Tensor]:
    """grad_w Lhat(w, eta) ``[P]`` for each of several draws of eta, as many at once as memory allows."""

    def one(chunk: slice, *eta: Tensor) -> Tensor:
        return chunk_gradient(system, problem, w, of_chunk(system, eta, chunk), chunk)

    def gradients(stacked: tuple[Tensor, ...]) -> Tensor:
        return mean_at(problem, one, *stacked)

    return for_directions(draws, directions_at_once(problem), gradients)


def _chunk_second_order(
    system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, s: Sequence[Tensor], chunk: slice
) -> Tensor:
    """d^2/dt^2 of grad_w Lhat(w, t s) and of Lhat(w, t s) at t = 0, over the samples in a chunk  ``[P + 1]``.

    Forward over forward over reverse mode: two directional derivatives of the gradient, so that the cost is a few
    gradients, independent of P and D.
    """
    x, y, own = problem.inputs[chunk], problem.targets[chunk], of_chunk(system, s, chunk)
    zeros = tuple(torch.zeros_like(direction) for direction in own)

    def at(*etas: Tensor) -> tuple[Tensor, Tensor]:
        return grad_and_value(lambda v: noisy_loss(system, problem.batch_loss, v, x, y, etas))(w)

    def slope(*etas: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(at, etas, own)[1]

    gradient, value = jvp(slope, zeros, own)[1]
    return torch.cat([gradient, value[None]])


def second_order_gradient(
    system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, s: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """d^2/dt^2 of grad_w Lhat(w, t s) ``[P]`` and of Lhat(w, t s), a scalar, at t = 0.

    Args:
        system: the noise.
        problem: loss and N samples.
        w: weights ``[P]``.
        s: the direction, for each part ``[N, D]`` or ``[D]``.
    """
    both = problem.mean(lambda chunk: _chunk_second_order(system, problem, w, s, chunk))
    return both[:-1], both[-1]


def _penalty(part: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and value of Lhat(w, 0) - L(w), which does not depend on the samples: one sample is enough."""
    x, y = problem.inputs[:1], problem.targets[:1]
    zero = part.scale(problem).new_zeros(_shape(part, problem))[:1] if part.per_sample else 0 * part.scale(problem)
    return grad_and_value(
        lambda v: noisy_loss(part, problem.batch_loss, v, x, y, [zero]) - problem.batch_loss(v, x, y)
    )(w)


def _of_sharpness(part: NoiseSystem, problem: ZeroLossProblem, w: Tensor) -> Potential:
    """(sigma^2/2) lambda_1(H), and (sigma^2/2) grad of u^T D^2 L u with the eigenvector u of lambda_1 held fixed.

    Since u maximises u^T H u, its own derivative does not contribute. Of D^2 L, the part with the curvature of the
    outputs has a gradient normal to Gamma, on Gamma.
    """
    u = stiffest_mode(gauss_newton(problem, w), like=w)
    gradient, value = second_order_gradient(AntiCorrelated(1.0), problem, w, (u,))
    half = 0.5 * part.variance(problem)
    return Potential(Estimate(half * value.item(), 0.0), VectorEstimate((half * gradient)[None]), 1)


def part_potential(
    part: NoiseSystem, problem: ZeroLossProblem, w: Tensor, *, num_draws: int, generator: torch.Generator | None
) -> Potential:
    """`potential` of a single system, which is not checked."""
    if part.ascends:
        return _of_sharpness(part, problem, w)
    scale = part.scale(problem)

    def direction(i: int | None) -> Tensor:
        if i is None:
            return random_direction(part, problem, generator=generator)[0]
        s = torch.zeros_like(scale)
        s[i] = scale[i]
        return s.expand(_shape(part, problem))

    def curvature(stacked: Tensor) -> Tensor:
        return 0.5 * mean_at(problem, lambda chunk, s: _chunk_second_order(part, problem, w, [s], chunk), stacked)

    laplacian = None
    if scale.numel():
        at_once = directions_at_once(problem)
        laplacian = traced(direction, curvature, scale.numel(), num_draws, at_once=at_once, like=w)
    gradient, penalty = _penalty(part, problem, w)
    fixed = Potential(Estimate(penalty.item(), 0.0), VectorEstimate(gradient[None]), 1)
    return fixed if laplacian is None else fixed + laplacian


def potential(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """V(w) = Lhat(w, 0) - L(w) + (1/2) sum_j sigma_j^2 d^2 Lhat(w, 0)/d eta_j^2, and its gradient.

    This is sigma^2 Reg of the paper, plus a penalty if the system has one. It is the full Laplacian, with the curvature
    of the outputs times the residual, which matters off Gamma. The potentials of the parts of a sum add up, because
    their noises are independent.

    Args:
        system: the noise.
        problem: loss and N samples.
        w: weights ``[P]``.
        num_draws: number of directions for the trace of each part. With at least D, the number of components of eta
            (of one sample or of the step), the trace is exact. Fewer, at least 2, are rounded up to a multiple of four.
        generator: of the random directions.
    """
    system.check(problem)
    return total(part_potential(part, problem, w, num_draws=num_draws, generator=generator) for part in parts(system))


def sampled_potential(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """`potential`, by derivatives in single precision if all traces are sampled.

    Rounding errors are then far below sampling errors: second derivatives are evaluated as such, not as differences.
    """
    if any(0 < part.scale(problem).numel() <= num_draws for part in parts(system)):
        return potential(system, problem, w, num_draws=num_draws, generator=generator)
    single = problem.at_precision(torch.float32)
    found = potential(system, single, w.float(), num_draws=num_draws, generator=generator)
    return replace(found, gradient=VectorEstimate(found.gradient.groups.to(w)))


def averaged_gradient(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> VectorEstimate:
    """E_eta grad Lhat(w, eta) - grad L(w)  ``[P]``, the average gradient of noise of finite size; grad V expands it.

    Args:
        system: the noise.
        problem: loss and samples.
        w: weights ``[P]``.
        num_draws: number of draws of the noise, at least 2. They form up to four stratified blocks (see
            `stratified_noise`); the number of draws in a block is rounded up to a prime.
        generator: of the draws.

    Raises:
        ValueError: a single draw.
    """
    system.check(problem)
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2 for a standard error, got {num_draws}")
    is_random = any(part.scale(problem).numel() for part in parts(system))
    groups = min(_GROUPS, num_draws) if is_random else 1
    each = math.ceil(num_draws / groups) if is_random else 1
    means = w.new_zeros(groups, w.numel())
    for mean in means:
        draws = list(stratified_noise(system, problem, problem.num_samples, strata=each, generator=generator))
        for gradient in noisy_gradients(system, problem, w, draws):
            mean.add_(gradient, alpha=1 / len(draws))
    means -= problem.gradient(w)
    return VectorEstimate(means)
