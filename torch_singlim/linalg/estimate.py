"""Random estimates with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "VectorEstimate", "rademacher"]


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error (0 where it is exact), in the same unit.

    >>> Estimate.from_draws(torch.tensor([1.0, 2.0, 3.0]))
    Estimate(mean=2.0, stderr=0.5773502691896258)
    """

    mean: float
    stderr: float

    @classmethod
    def from_draws(cls, draws: Tensor) -> Estimate:
        """Mean of independent draws ``[k]`` and s / sqrt(k). A single draw gives no standard error: nan."""
        values = draws.double()
        count = values.numel()
        stderr = (values.std() / math.sqrt(count)).item() if count > 1 else math.nan
        return cls(values.mean().item(), stderr)

    def __add__(self, other: Estimate) -> Estimate:
        """Sum of independent estimates."""
        return Estimate(self.mean + other.mean, math.hypot(self.stderr, other.stderr))

    def scaled(self, factor: float) -> Estimate:
        """The estimate of `factor` times the number."""
        return Estimate(factor * self.mean, abs(factor) * self.stderr)


@dataclass(frozen=True)
class VectorEstimate:
    """A vector given by k independent, equally good estimates of it ``[k, n]``; k = 1 means that it is exact.

        mean = (1/k) sum_i g_i,      stderr^2 = sum_i |g_i - mean|^2 / (k (k - 1))  estimates  E |mean - truth|^2

    The estimates are stored separately, so that the error is known after a linear map, too.

    >>> g = VectorEstimate(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    >>> g.mean, g.stderr, g.map(lambda v: 10 * v).stderr
    (tensor([2., 1.]), 1.0, 10.0)
    """

    groups: Tensor

    @property
    def mean(self) -> Tensor:
        """The estimate ``[n]``."""
        return self.groups.mean(0)

    @property
    def stderr(self) -> float:
        """Root mean square norm of the mean's error; 0 where exact."""
        k, mean = len(self.groups), self.mean
        if k == 1:
            return 0.0
        return math.sqrt(sum((g - mean).square().sum().item() for g in self.groups) / (k * (k - 1)))

    @property
    def norm(self) -> float:
        """Norm of the true vector, sqrt(|mean|^2 - stderr^2): the squared norm of the sampling error is subtracted."""
        return math.sqrt(max(self.mean.square().sum().item() - self.stderr**2, 0.0))

    def __add__(self, other: VectorEstimate) -> VectorEstimate:
        """Sum of independent estimates with the same number of groups, or of an estimate and an exact vector."""
        return VectorEstimate(self.groups + other.groups)

    def halves(self) -> VectorEstimate:
        """The same mean from two groups, the means of the two halves, for linear maps that are expensive.

        With four groups, the standard error then rests on one difference of vectors instead of three. One difference is
        enough where the error has many components.
        """
        k = len(self.groups)
        if k < 4 or k % 2:
            return self
        return VectorEstimate(self.groups.view(2, k // 2, -1).mean(1))

    def map(self, linear: Callable[[Tensor], Tensor]) -> VectorEstimate:
        """The estimate of the image under a linear map that preserves the dimension."""
        images = torch.empty_like(self.groups)
        for image, g in zip(images, self.groups, strict=True):
            image.copy_(linear(g))
        return VectorEstimate(images)


def rademacher(shape: tuple[int, ...], *, generator: torch.Generator | None, like: Tensor) -> Tensor:
    """Independent signs +1 and -1 with equal probability: E[s] = 0, E[s s^T] = I (Hutchinson 1990).

    The draw is made on the generator's device and moved to `like`'s device and dtype.
    """
    device = generator.device if generator is not None else like.device
    bits = torch.randint(0, 2, shape, generator=generator, device=device)
    return (2 * bits - 1).to(like)
