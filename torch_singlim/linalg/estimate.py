"""Random estimates that carry their standard error."""

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
        """Mean of independent draws ``[k]`` and s / sqrt(k); the error of a single draw is unknown: nan."""
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
    """A vector known by k independent, equally good estimates of it ``[k, n]``; k = 1 means that it is exact.

        mean = (1/k) sum_i g_i,      stderr^2 = sum_i |g_i - mean|^2 / (k (k - 1))  estimates  E |mean - truth|^2

    Kept apart so that the error can follow the vector through a linear map.

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
        """Norm of the truth, sqrt(|mean|^2 - stderr^2): sampling error alone does not make it grow."""
        return math.sqrt(max(self.mean.square().sum().item() - self.stderr**2, 0.0))

    def __add__(self, other: VectorEstimate) -> VectorEstimate:
        """Sum of independent estimates with equally many groups, or one of them exact."""
        return VectorEstimate(self.groups + other.groups)

    def halves(self) -> VectorEstimate:
        """The same mean from the means of the two halves of the groups, for linear maps that are expensive.

        The error is then known from one difference instead of three (four groups), each of as many dimensions as the
        error spreads over.
        """
        k = len(self.groups)
        if k < 4 or k % 2:
            return self
        return VectorEstimate(self.groups.view(2, k // 2, -1).mean(1))

    def map(self, linear: Callable[[Tensor], Tensor]) -> VectorEstimate:
        """The estimate of a linear image, of the same dimension."""
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
