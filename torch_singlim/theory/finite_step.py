"""Noise at finite step size: drifts exactly in alpha, at leading order in sigma^2.

The fluctuations X of the recursion about a point of Gamma give the drift -(alpha/2) P_T T[X], T = D^3 L, where alpha is
the effective step size. In the singular limit X = (alpha c / 2) P_N for Sigma = c H; at finite step size stiff modes
fluctuate more.

Source: A. Damian, T. Ma, J. Lee, arXiv 2106.06530, for full-batch label noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_singlim.linalg import DenseFactored, FactoredOperator
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import AntiCorrelated, Covariance, NoiseSystem, leading, parts
from torch_singlim.theory.directions import directions_at_once
from torch_singlim.theory.on_gamma import fluctuation_gradient
from torch_singlim.theory.potential import Potential, traced
from torch_singlim.theory.second_order import quadratic_gradients, residual_direction
from torch_singlim.theory.sgd import SGDSettings, stationary_variance

__all__ = ["UnstableStepError", "finite_step_potential", "has_finite_step", "step_ratio"]

# up to so many residuals the covariance under batches takes seconds
_FEW = 500
# nodes of Gauss-Legendre quadrature
_NODES = 32
# the covariance under batches: relative accuracy, and number of iterations
_FIXED_RTOL, _FIXED_STEPS = 1e-10, 2_000


class UnstableStepError(ValueError):
    """The step size is too large for fluctuations about the zero-loss set to have a variance."""


def has_finite_step(noise: NoiseSystem, problem: ZeroLossProblem, sgd: SGDSettings) -> bool:
    """Whether `finite_step_potential` is known for all parts that move the weights, in seconds."""
    N = problem.num_samples
    B = sgd.batch(N)
    full = B == N

    def known(part: NoiseSystem) -> bool:
        if isinstance(part, AntiCorrelated):
            return full
        return _of_hessian(part, problem, B) > 0 and (full or (not sgd.momentum and problem.num_residuals <= _FEW))

    return noise.order is not None and all(map(known, leading(noise)))


def _of_hessian(noise: NoiseSystem, problem: ZeroLossProblem, batch_size: int) -> float:
    """c where Sigma = c H; 0 for any other noise."""
    known = noise.covariance(problem, batch_size) or Covariance()
    return known.hessian if known.identity == 0 else 0.0


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


def _with_batches(problem: ZeroLossProblem, hessian: FactoredOperator, sgd: SGDSettings) -> Tensor:
    """Y K ``[M, M]`` of the covariance X = B^T Y B, for Sigma = H and batches of B of N samples.

        K Y + Y K - alpha (d diag(K Y K) + a K Y K) = alpha I,      a = N (B - 1)/(B (N - 1)),   d = N/B - a

    Here diag keeps the blocks of single samples: batches make the Hessian random. Solved by a fixed-point iteration.

    Args:
        problem: loss and N samples.
        hessian: H on Gamma.
        sgd: step size alpha and batch size B.

    Raises:
        ValueError: momentum, a K that is not decomposed or without full rank, or fluctuations that grow forever.
    """
    N, M, alpha = problem.num_samples, problem.num_residuals, sgd.lr
    if sgd.momentum:
        raise ValueError(
            f"at finite step size, batches of {sgd.batch_size} of {N} samples are covered without momentum, got "
            f"momentum {sgd.momentum}: use the full batch, or finite_step=False"
        )
    if not isinstance(hessian, DenseFactored) or hessian.rank < M:
        raise ValueError(
            "at finite step size, batches need all eigenvectors of a B B^T of full rank, got "
            f"{type(hessian).__name__} of rank {hessian.rank} for {M} residuals: use fewer samples, or "
            "finite_step=False"
        )
    B = sgd.batch(N)
    a = N * (B - 1) / (B * (N - 1))
    U, values = hessian.eigenvectors, hessian.eigenvalues
    denominator = values[:, None] + values - alpha * a * values[:, None] * values
    if bool((denominator <= 0).any()):
        raise UnstableStepError(f"the step size {alpha} is unstable: alpha lambda_1 = {alpha * values[0].item():.3g}")
    eye, samples = (torch.eye(k, dtype=values.dtype, device=values.device) for k in (M, N))
    blocks = torch.kron(samples, values.new_ones(M // N, M // N))  # 1 within each sample
    Y = constant = alpha * eye / denominator  # in the eigenbasis
    for _ in range(_FIXED_STEPS):
        KYK = U @ (values[:, None] * Y * values) @ U.T
        new = constant + alpha * (N / B - a) * (U.T @ (blocks * KYK) @ U) / denominator
        change, Y = torch.linalg.matrix_norm(new - Y) / torch.linalg.matrix_norm(new), new
        if not math.isfinite(change):
            break
        if change <= _FIXED_RTOL:
            return U @ (Y * values) @ U.T
    raise UnstableStepError(
        f"fluctuations under batches of {B} grow without bound at the step size {alpha}: use a smaller one"
    )


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

    Without momentum these are -(c/(2 alpha)) tr log(1 - alpha H/2) and -(sigma^2/alpha) tr log(1 - alpha H/2). With
    batches smaller than the data the Hessian is random, and the gradient is that of no potential in general: V is then
    the one of the limit, (c/4) tr H. For anti-correlated noise this is neglected: its V is that of the full batch.

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
        ValueError: another noise, an unstable step size, batches together with momentum.
    """
    N, B, transient = problem.num_samples, sgd.batch(problem.num_samples), isinstance(noise, AntiCorrelated)
    c = _of_hessian(noise, problem, B)
    if len(parts(noise)) > 1 or not (transient or c > 0):
        raise ValueError(
            "drifts at finite step size are known for label noise, label flips and anti-correlated noise, got "
            f"{noise}: use finite_step=False"
        )
    if c > 0 and B < N:
        covariance = _with_batches(problem, hessian, sgd)
        assert isinstance(hessian, DenseFactored)
        found = fluctuation_gradient(problem, w, hessian, covariance, num_draws=num_draws, generator=generator)
        gradient = found.gradient.map(lambda g: c / (2 * sgd.lr) * g)
        return Potential(hessian.trace(lambda values: values).scaled(c / 4), gradient, found.passes)
    scale = noise.variance(problem) / 2 if transient else c / 4
    rho = functools.partial(step_ratio, sgd, transient=transient)
    if math.isinf(rho(torch.tensor([hessian.largest], dtype=torch.float64)).item()):
        raise UnstableStepError(f"the step size {sgd.lr} is unstable: the largest eigenvalue is {hessian.largest:.3g}")
    value = hessian.trace(lambda values: _integral(rho, values))
    found = _of_modes(problem, w, hessian, rho, num_draws=num_draws, generator=generator)
    return Potential(value.scaled(scale), found.gradient.map(lambda g: scale * g), found.passes)
