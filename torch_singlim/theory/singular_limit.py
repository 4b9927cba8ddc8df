"""The singular limit of arXiv 2404.12293: drift along Gamma as step size and noise go to zero."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate, FactoredOperator, VectorEstimate
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory.descent import SGDSettings, time_scale
from torch_singlim.theory.distance import ExpectedDistance, expected_distance
from torch_singlim.theory.noise import NoiseSystem
from torch_singlim.theory.potential import Potential, noise_gram, potential

__all__ = ["LimitPrediction", "singular_limit"]


@dataclass(frozen=True)
class LimitPrediction:
    """What the limit says at a point of Gamma.

    Args:
        order: 1: drift -alpha P_T grad V per step; 2: -alpha^2 P_T grad V and diffusion; None: no motion.
        time_scale: optimizer steps per unit of slow time, 1 / (alpha^order sigma^2).
        potential: V, in units of the loss.
        drift: mean displacement of the weights per optimizer step ``[P]``, tangent to Gamma.
        drift_stderr: norm of its error (0: exact).
        diffusion: variance per optimizer step in each tangent direction, in squared weight norm.
        normal_variance: trace of the covariance across Gamma.
        mean_offset_norm: norm of the mean of w minus its nearest point.
        distance: expected root mean square distance to Gamma, every mode settled: sqrt(offset^2 + normal variance).
        passes: derivative passes over the probe set that it took.
    """

    order: int | None
    time_scale: float
    potential: Estimate
    drift: Tensor = field(repr=False)
    drift_stderr: float
    diffusion: float
    normal_variance: float
    mean_offset_norm: float
    distance: float
    passes: int
    gradient: VectorEstimate = field(repr=False)
    noise_gram: Tensor = field(repr=False)

    @property
    def degenerate(self) -> bool:
        """Whether nothing moves on the first clock."""
        return self.order != 1

    def distance_on(
        self, hessian: FactoredOperator, sgd: SGDSettings, *, num_samples: int, smallest: float
    ) -> ExpectedDistance:
        """The expected distance over the modes with lambda >= smallest alone: those that had the time to settle."""
        return expected_distance(
            hessian,
            self.gradient,
            self.noise_gram,
            alpha=sgd.effective_lr,
            order=self.order or 1,
            batch_size=sgd.batch(num_samples),
            smallest=smallest,
        )


def singular_limit(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    num_draws: int = 64,
    hessian: FactoredOperator | None = None,
    generator: torch.Generator | None = None,
) -> LimitPrediction:
    """The drift, clock and distance that the singular limit predicts at a point taken to lie on Gamma.

        order 1:  dW/dt = -P_T grad Reg,  t = alpha sigma^2 k    =>    drift per step = -alpha P_T grad V

    Args:
        problem: loss and probe set.
        point: weights ``[P]``, on Gamma (see `nearest_point`).
        noise: the system.
        sgd: step size, momentum, batch size.
        num_draws: directions for the trace in V; at least D, the noise components of one sample: exact, below:
            Rademacher draws with a standard error.
        hessian: ``problem.gauss_newton(point)``, if it is there already.
        generator: of the draws.

    Raises:
        ValueError: the noise does not fit the problem.

    Source: arXiv 2404.12293, theorem on non-degenerate noise.

    >>> from torch import nn
    >>> from torch_singlim.theory import Dropout
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> limit = singular_limit(problem, torch.tensor([0.75, 0.25]).double(), Dropout(), SGDSettings(lr=0.1))
    >>> limit.potential.mean, limit.drift  # V = w_1^2 + w_2^2 on the line w_1 + w_2 = 1
    (0.625, tensor([-0.0500,  0.0500], dtype=torch.float64))
    """
    if point.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(point.shape)}")
    noise.check(problem)
    order, alpha = noise.order, sgd.effective_lr
    if order is None:
        nothing = Potential(Estimate(0.0, 0.0), VectorEstimate(torch.zeros_like(point)[None]), 0)
        gram = problem.outputs(point).new_zeros(problem.num_samples, 1, 1)
        return LimitPrediction(
            None, math.inf, nothing.value, nothing.gradient.mean, 0.0, 0.0, 0.0, 0.0, 0.0, 0, nothing.gradient, gram
        )
    hessian = problem.gauss_newton(point) if hessian is None else hessian
    V = potential(noise, problem, point, num_draws=num_draws, generator=generator)
    gram = noise_gram(noise, problem, point)
    drift = V.gradient.map(lambda g: -(alpha**order) * hessian.project_kernel(g))
    expected = expected_distance(
        hessian,
        V.gradient,
        gram,
        alpha=alpha,
        order=order,
        batch_size=sgd.batch(problem.num_samples),
        generator=generator,
    )
    return LimitPrediction(
        order=order,
        time_scale=time_scale(sgd, order, noise.variance(problem)),
        potential=V.value,
        drift=drift.mean,
        drift_stderr=drift.stderr,
        diffusion=0.0,  # order 1 moves deterministically
        normal_variance=expected.variance,
        mean_offset_norm=expected.offset.norm,
        distance=expected.rms,
        passes=V.passes,
        gradient=V.gradient,
        noise_gram=gram,
    )
