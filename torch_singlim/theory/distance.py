"""The expected distance of the iterates from Gamma: the mean offset and the variance of the normal modes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.geometry import relaxed_filter
from torch_singlim.linalg import Estimate, FactoredOperator, VectorEstimate
from torch_singlim.theory.gradient_noise import GradientNoise
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["ExpectedDistance", "expected_distance"]


@dataclass(frozen=True)
class ExpectedDistance:
    """Root mean square distance to Gamma, sqrt(|offset|^2 + variance), in units of the weights' norm.

    `offset` is the mean of w minus its nearest point ``[P]``, `variance` is the trace of the covariance (infinite if
    a mode is unstable, alpha lambda >= 2).
    """

    offset: VectorEstimate
    variance: Estimate

    @property
    def rms(self) -> float:
        """sqrt(|offset|^2 + variance)."""
        return math.sqrt(self.offset.norm**2 + self.variance.mean)


def expected_distance(
    hessian: FactoredOperator,
    gradient: VectorEstimate,
    noise: GradientNoise,
    *,
    sgd: SGDSettings,
    level: float = 0.0,
    random_batches: bool = False,
    num_draws: int = 16,
    generator: torch.Generator | None = None,
) -> ExpectedDistance:
    """Mean and variance of the iterates around Gamma, over the modes that are relaxed at a level.

        offset    = -f(H) H^+ g,      g = alpha^(order-1) grad V,      f: `relaxed_filter`
        variance  = sum_i f(l_i)^2 alpha Sigma_ii / (2 l_i - alpha l_i^2)     (with momentum: `stationary_variance`)

    Args:
        hessian: H = B^T B at the point of Gamma.
        gradient: g there ``[P]``.
        noise: Sigma there.
        sgd: step size and momentum.
        level: modes with smaller eigenvalues do not count; those below 1 / (alpha steps) have not relaxed yet.
            0: all modes.
        random_batches: the variance with the random Hessians of batches, where it is known (`batch_covariance`).
        num_draws: number of random vectors for the variance if H is not decomposed.
        generator: of these vectors.

    Source: stationary state of the linearised recursion; arXiv 2404.12293.
    """

    def inverse(values: Tensor) -> Tensor:
        return relaxed_filter(values, level) / values

    # if H is not decomposed, a matrix function takes many products
    sampled = gradient if hessian.decomposed else gradient.halves()
    offset = sampled.map(lambda g: -hessian.normal_function(inverse, g))
    variance = noise.normal_variance(
        hessian, sgd, level=level, random_batches=random_batches, num_draws=num_draws, generator=generator
    )
    return ExpectedDistance(offset, variance)
