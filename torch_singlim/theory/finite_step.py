"""Noise at finite step size: drifts exactly in alpha, at leading order in sigma^2.

    drift = -alpha P_T (grad V + (1/2) T[X]),       T = D^3 L

where V is the potential of order 1, X the covariance of the fluctuations of the recursion about a point of Gamma, which
is of the order of alpha sigma^2, and alpha outside X is the effective step size. So X adds to a drift of order 1 what
vanishes with alpha; a drift of order 2 is due to X alone. In the singular limit X = (alpha c / 2) P_N for Sigma = c H;
at finite step size stiff modes fluctuate more, and so they do under batches.

Source: A. Damian, T. Ma, J. Lee, arXiv 2106.06530, for full-batch label noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_singlim.linalg import DenseFactored, Estimate, FactoredOperator
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import AntiCorrelated, NoiseSystem, parts
from torch_singlim.theory.bouncing import bouncing
from torch_singlim.theory.directions import directions_at_once
from torch_singlim.theory.fluctuations import FEW_RESIDUALS, UnstableStepError, fluctuation_covariance
from torch_singlim.theory.gradient_noise import gradient_noise, of_hessian
from torch_singlim.theory.on_gamma import fluctuation_gradient, tangential_potential
from torch_singlim.theory.potential import Potential, part_potential, traced
from torch_singlim.theory.second_order import quadratic_gradients, residual_direction
from torch_singlim.theory.sgd import SGDSettings, stationary_variance

__all__ = ["finite_step_potential", "has_finite_step", "step_ratio"]

# nodes of Gauss-Legendre quadrature
_NODES = 32


def has_finite_step(noise: NoiseSystem, problem: ZeroLossProblem, sgd: SGDSettings) -> bool:
    """Whether `finite_step_potential` is known, and takes seconds, for all parts that move the weights."""
    N = problem.num_samples
    B = sgd.batch(N)
    full = B == N

    few = problem.num_residuals <= FEW_RESIDUALS and (full or not sgd.momentum)

    def known(part: NoiseSystem) -> bool:
        if not part.scale(problem).numel():
            return True
        if part.ascends:
            return full and not sgd.momentum
        if isinstance(part, AntiCorrelated):
            return full
        return few if part.moves_outputs else of_hessian(part, problem, B) > 0 and (full or few)

    return noise.order is not None and all(known(part) for part in parts(noise) if part.order is not None)


def step_ratio(sgd: SGDSettings, curvature: Tensor, *, transient: bool = False) -> Tensor:
    """Variance of full-batch fluctuations along modes of curvature l ``[r]``, as a multiple of that as alpha l -> 0.

        2 l s(l) / alpha,    s: `stationary_variance`          gradient noise:  1 / (1 - alpha l / 2) without momentum
        1 + l^2 s(l)                                           transient noise: the same

    Infinite if a mode is unstable.

    Args:
        sgd: step size and momentum.
        curvature: l.
        transient: of the weights at which the gradient is evaluated, under a perturbation that is taken back.

    >>> l = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    >>> step_ratio(SGDSettings(lr=0.5), l), step_ratio(SGDSettings(lr=0.5), l, transient=True)
    (tensor([1.0000, 1.3333, 4.0000], dtype=torch.float64), tensor([1.0000, 1.3333, 4.0000], dtype=torch.float64))
    """
    positive = curvature.where(curvature > 0, 1.0)
    s = stationary_variance(sgd, positive)
    ratio = 1 + positive.square() * s if transient else 2 * positive * s / sgd.effective_lr
    return torch.where(curvature > 0, ratio, 1.0)


def _integral(function: Callable[[Tensor], Tensor], stop: Tensor) -> Tensor:
    """The integral of a function from 0 to each number ``[r]``; nodes by G. Golub and J. Welsch, 1969."""
    k = torch.arange(1, _NODES, dtype=stop.dtype)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square().to(stop.device)  # they sum to 1
    x = stop[:, None] * (nodes.to(stop.device) + 1) / 2
    return stop * (function(x.reshape(-1)).reshape(x.shape) @ weights)


def _of_modes(
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: FactoredOperator,
    rho: Callable[[Tensor], Tensor],
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> Potential:
    """A potential with the gradient sum_j rho(l_j) grad l_j ``[P]`` along Gamma; its value is not computed."""
    if isinstance(hessian, DenseFactored):
        U, values = hessian.eigenvectors, hessian.eigenvalues
        return fluctuation_gradient(
            problem, w, hessian, U * rho(values) @ U.T, num_draws=num_draws, generator=generator
        )
    M = problem.num_residuals

    def root(u: Tensor) -> Tensor:
        return hessian.gram_function(lambda values: (rho(values) / values).sqrt(), u)

    def derivative(z: Tensor) -> Tensor:
        t = torch.stack([hessian.operator.rmatvec(root(one)) for one in z])
        return torch.cat([quadratic_gradients(problem, w, t), w.new_zeros(len(z), 1)], 1)

    direction = residual_direction(M, like=w, generator=generator)
    return traced(direction, derivative, M, num_draws, at_once=directions_at_once(problem), like=w)


def _of_fluctuations(
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: FactoredOperator,
    source: Callable[[DenseFactored], Tensor],
    sgd: SGDSettings,
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> Potential:
    """The gradient (1/2) T[X] ``[P]`` along Gamma for Sigma = B^T S B; it is that of no potential in general."""
    N, M = problem.num_samples, problem.num_residuals
    if not isinstance(hessian, DenseFactored) or M > FEW_RESIDUALS:
        raise ValueError(
            f"at finite step size, this noise and batches are covered for up to {FEW_RESIDUALS} residuals and with all "
            f"eigenvectors of B B^T, got {type(hessian).__name__} and {M} residuals: use fewer samples, or "
            "finite_step=False"
        )
    U = hessian.eigenvectors
    Y = fluctuation_covariance(hessian, source(hessian), sgd, num_samples=N)
    YK = U @ (Y * hessian.eigenvalues) @ U.T
    found = fluctuation_gradient(problem, w, hessian, YK, num_draws=num_draws, generator=generator)
    return Potential(Estimate(0.0, 0.0), found.gradient.map(lambda g: g / 2), found.passes)


def _of_ascent(
    noise: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    **options: Any,
) -> Potential:
    """rho^2 -> (rho + x)^2 with the distance x at which w bounces, since the gradient is that so far from Gamma."""
    bounce = bouncing(sgd, hessian.largest)
    if math.isinf(bounce):
        raise UnstableStepError(f"the step size {sgd.lr} is unstable: the largest eigenvalue is {hessian.largest:.3g}")
    V, factor = part_potential(noise, problem, w, **options), (1 + bounce) ** 2
    return V.scaled(factor)


def finite_step_potential(
    noise: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """V and grad V of a noise at this step size: the drift per step is -alpha^order P_T grad V, as in the limit.

        label noise, flips (Sigma = c H)    V = (c/4) sum_j int_0^{l_j} rho dl,       rho: `step_ratio`
        anti-correlated noise               V = (sigma^2/2) sum_j int_0^{l_j} rho dl,  for transient noise
        noise that moves the outputs        grad V + (1/2) T[X],    V of the limit, X: `fluctuation_covariance`
        no noise, as weight decay           V of the limit
        SAM                                 V of the limit times (2/(2 - alpha lambda_1))^2: w itself bounces, too

    Without momentum the first two are -(c/(2 alpha)) tr log(1 - alpha H/2) and -(sigma^2/alpha) tr log(1 - alpha H/2).
    With batches smaller than the data the Hessian is random, and label noise has (1/(2 alpha)) T[X] instead of grad V.
    T[X] is the gradient of no potential in general: the value returned is then V of the limit.

    Args:
        noise: one system.
        problem: loss and samples.
        w: weights on Gamma ``[P]``.
        sgd: step size, momentum, batch size.
        hessian: H there.
        num_draws: number of directions for the gradient: exact with as many as outputs, if H is decomposed, else with
            as many as residuals.
        generator: of random directions.

    Raises:
        ValueError: another noise, an unstable step size, batches together with momentum or anti-correlated noise, or
            too many residuals for T[X].
    """
    N, B, transient = problem.num_samples, sgd.batch(problem.num_samples), isinstance(noise, AntiCorrelated)
    c = of_hessian(noise, problem, B)
    options: dict[str, Any] = {"num_draws": num_draws, "generator": generator}
    alone = len(parts(noise)) == 1
    if noise.ascends:
        return _of_ascent(noise, problem, w, sgd, hessian, **options)
    if alone and not noise.scale(problem).numel():
        return tangential_potential(noise, problem, w, **options)
    if not alone or not (transient or c > 0 or noise.moves_outputs):
        raise ValueError(
            "drifts at finite step size are known for noise on outputs and labels (dropout, DropConnect, input noise, "
            f"label noise, flips) and for anti-correlated noise, got {noise}: use finite_step=False"
        )
    if transient and B < N:
        raise ValueError(
            f"at finite step size, anti-correlated noise is covered on full batches, got batches of {B} of {N} "
            "samples: use the full batch, or finite_step=False"
        )
    if noise.moves_outputs and not transient:
        sigma = gradient_noise(noise, problem, w, batch_size=B, **options)
        V = tangential_potential(noise, problem, w, **options)
        return V + _of_fluctuations(problem, w, hessian, sigma.source, sgd, **options)
    if B < N:
        eye = torch.eye(problem.num_residuals, dtype=w.dtype, device=w.device)
        found = _of_fluctuations(problem, w, hessian, lambda _: c * eye, sgd, **options)
        value = hessian.trace(lambda values: values).scaled(c / 4)
        return Potential(value, found.gradient.map(lambda g: g / sgd.lr), found.passes)
    scale = noise.variance(problem) / 2 if transient else c / 4
    rho = functools.partial(step_ratio, sgd, transient=transient)
    if math.isinf(rho(torch.tensor([hessian.largest], dtype=torch.float64)).item()):
        raise UnstableStepError(f"the step size {sgd.lr} is unstable: the largest eigenvalue is {hessian.largest:.3g}")
    value = hessian.trace(lambda values: _integral(rho, values))
    found = _of_modes(problem, w, hessian, rho, **options)
    return Potential(value, found.gradient, found.passes).scaled(scale)
