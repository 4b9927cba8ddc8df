"""The singular limit of arXiv 2404.12293: drift and diffusion along Gamma as step size and noise go to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry import MAX_DENSE, gauss_newton
from torch_singlim.linalg import Estimate, FactoredOperator, VectorEstimate
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem, Sum, leading, parts
from torch_singlim.theory.bouncing import bouncing, bouncing_offset
from torch_singlim.theory.distance import expected_distance
from torch_singlim.theory.gradient_noise import gradient_noise
from torch_singlim.theory.limit_drift import limit_drift
from torch_singlim.theory.order import with_measured_order
from torch_singlim.theory.potential import potential
from torch_singlim.theory.second_moments import SecondMoments
from torch_singlim.theory.sgd import SGDSettings, time_scale

__all__ = ["LimitPrediction", "singular_limit"]


@dataclass(frozen=True)
class LimitPrediction:
    """The prediction of the singular limit at a point of Gamma.

    Args:
        order: 1: drift -alpha P_T grad V per step; 2: -alpha^2 P_T grad V and diffusion; None: no motion.
        time_scale: optimizer steps per unit of slow time, 1 / (alpha^order sigma^2).
        potential: V, in units of the loss; nan for a noise of order 2 without closed form.
        drift: mean displacement of the weights per optimizer step ``[P]``, tangent to Gamma.
        drift_stderr: norm of the drift's sampling error (0: exact).
        diffusion: variance per optimizer step and tangent direction, in squared weight norm.
        dimension: of Gamma, the number of tangent directions.
        normal_variance: trace of the covariance normal to Gamma.
        mean_offset_norm: norm of the mean of w minus its nearest point; set to 0 at order 2, where the variance
            dominates.
        distance: expected root mean square distance to Gamma with all modes relaxed, sqrt(offset^2 + normal variance);
            nan, like the two above, if H was too large to be decomposed.
        passes: number of derivative passes over all samples for V.
        noise: the system, with the order of each part determined.
        finite_step: whether the drift is that at this step size, exactly in alpha.
    """

    order: int | None
    time_scale: float
    potential: Estimate
    drift: Tensor = field(repr=False)
    drift_stderr: float
    diffusion: float
    dimension: int
    normal_variance: Estimate
    mean_offset_norm: float
    distance: float
    passes: int
    noise: NoiseSystem = field(repr=False)
    finite_step: bool = False

    @property
    def degenerate(self) -> bool:
        """Whether there is no drift of order 1."""
        return self.order != 1

    def spread(self, steps: int) -> float:
        """Root mean square distance that the weights diffuse along Gamma in so many steps."""
        return math.sqrt(steps * self.diffusion * self.dimension)


def singular_limit(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    num_draws: int = 64,
    finite_step: bool = False,
    moments: SecondMoments | None = None,
    hessian: FactoredOperator | None = None,
    generator: torch.Generator | None = None,
) -> LimitPrediction:
    """The drift, diffusion, clock and distance that the singular limit predicts at a point, assumed to be on Gamma.

        order 1:  dW/dt = -P_T grad Reg,                                  t = alpha sigma^2 k
        order 2:  dW = P_T Sigma^{1/2} dB + (1/2) D^2 Phi[Sigma] dt,      t = alpha^2 sigma^2 k
        per step: drift = -alpha^order P_T grad V,  diffusion alpha^2 Sigma_T

    The drift of a sum is that of the parts of the lowest order; the others do not move the weights on that clock. At
    finite step size, all parts count.

    Args:
        problem: loss and samples.
        point: weights ``[P]``, on Gamma (see `nearest_point`).
        noise: the system.
        sgd: step size, momentum, batch size.
        num_draws: number of directions for the trace in V. With at least as many as its dimension it is exact: outputs
            for tr H and noise that moves the outputs, components of eta for your own noise, residuals for log pdet H;
            with fewer, they are random and the result has a standard error. The mean offset takes the trace over the
            components of eta.
        finite_step: the drift at this step size, exactly in alpha, instead of that as alpha -> 0, see
            `finite_step_potential`. The variance then has the random Hessians of batches, too.
        moments: of an adaptive optimizer, if the problem and `sgd` are those of its metric, see `frozen_metric`: drifts
            of order 2 then have what its step sizes add by following the excursions of the weights from Gamma.
        hessian: ``gauss_newton(problem, point)``, if it was computed already.
        generator: of the draws.

    Raises:
        ValueError: the noise does not fit the problem, its loss never reaches its infimum, or its drift at finite step
            size, or under an adaptive optimizer, is not known.

    Source: arXiv 2404.12293, theorems on non-degenerate and degenerate noise; second order: arXiv 2110.06914.

    >>> from torch import nn
    >>> from torch_singlim.noise import Dropout
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> limit = singular_limit(problem, torch.tensor([0.75, 0.25]).double(), Dropout(), SGDSettings(lr=0.1))
    >>> round(limit.potential.mean, 9), limit.drift  # V = w_1^2 + w_2^2 on the line w_1 + w_2 = 1
    (0.625, tensor([-0.0500,  0.0500], dtype=torch.float64))
    """
    if point.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(point.shape)}")
    problem.check_attained()
    noise.check(problem)
    plain = not sgd.momentum and sgd.batch(problem.num_samples) == problem.num_samples
    if any(part.ascends for part in parts(noise)) and not plain:
        raise ValueError(f"SAM's limit is known for full batches without momentum, got {sgd}")
    hessian = gauss_newton(problem, point) if hessian is None else hessian
    noise = with_measured_order(noise, problem, point, num_draws=num_draws, hessian=hessian, generator=generator)
    order, alpha, batch_size = noise.order, sgd.effective_lr, sgd.batch(problem.num_samples)
    found = limit_drift(
        problem,
        point,
        noise,
        sgd,
        hessian,
        num_draws=num_draws,
        finite_step=finite_step,
        moments=moments,
        generator=generator,
    )
    Sigma = gradient_noise(noise, problem, point, batch_size=batch_size, num_draws=num_draws, generator=generator)
    # noise of order 1 is normal to Gamma, up to rounding and sampling
    along = Sigma.diffusion(hessian, num_weights=problem.num_weights) if order == 2 else Sigma.closed.identity
    # over all modes, which are known only if H was decomposed, or has so few that Lanczos finds all
    offset, variance, passes = math.nan, Estimate(math.nan, 0.0), found.passes
    if hessian.decomposed or (hessian.operator.shape[0] <= MAX_DENSE and hessian.exact):
        gradient = VectorEstimate(torch.zeros_like(point)[None])
        if order == 1:  # at order 2 the variance dominates, and the offset is of higher order
            V = potential(Sum(leading(noise)), problem, point, num_draws=num_draws, generator=generator)
            gradient, passes = V.gradient, passes + V.passes
        expected = expected_distance(hessian, gradient, Sigma, sgd=sgd, random_batches=finite_step, generator=generator)
        offset, variance = expected.offset.norm, expected.variance
        ascending = [part for part in leading(noise) if part.ascends]
        if ascending:
            bounce = bouncing(sgd, hessian.largest)
            variance = variance + Estimate(bounce**2 * ascending[0].variance(problem), 0.0)
            offset = torch.linalg.vector_norm(bouncing_offset(hessian, gradient.mean, bounce)).item()
    return LimitPrediction(
        order=order,
        time_scale=time_scale(sgd, order, noise.variance(problem)),
        potential=found.potential,
        drift=found.drift.mean,
        drift_stderr=found.drift.stderr,
        diffusion=alpha**2 * along,
        dimension=problem.num_weights - hessian.rank,
        normal_variance=variance,
        mean_offset_norm=offset,
        distance=math.sqrt(offset**2 + variance.mean),
        passes=passes,
        noise=noise,
        finite_step=finite_step,
    )
