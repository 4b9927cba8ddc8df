"""Noise with independent components of given standard deviations, and helpers that several systems share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.noise.base import BatchLoss, NoiseSpace, NoiseSystem

__all__ = ["GaussianNoise", "WithStd", "bernoulli", "require_positive"]


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless the value is positive and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}; for no noise do not use the system")


def bernoulli(keep: Tensor | float, u: Tensor) -> Tensor:
    """eta = mask / keep - 1 with P(mask = 1) = keep, as a function of uniform u: -1 below 1 - keep."""
    return (u >= 1 - keep).to(u.dtype) / keep - 1


class GaussianNoise(NoiseSystem[Tensor]):
    """Independent components of eta, Gaussian unless a system overrides `draw` and `quantile`; by default none."""

    def scale(self, space: NoiseSpace) -> Tensor:
        return torch.zeros(0, dtype=space.dtype, device=space.device)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        scale = self.scale(space)
        device = "cpu" if generator is None else generator.device
        return scale * torch.randn(count, scale.numel(), generator=generator, dtype=space.dtype, device=device).to(
            scale
        )

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        return self.scale(space) * torch.special.ndtri(u)

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y)


@dataclass(frozen=True)
class WithStd(GaussianNoise):
    """A system whose components of eta all have the same standard deviation, which is also that of the slow clock."""

    std: float

    def __post_init__(self) -> None:
        require_positive("std", self.std)

    @abstractmethod
    def dimension(self, space: NoiseSpace) -> int:
        """D, the number of components of eta."""

    def variance(self, space: NoiseSpace) -> float:
        return self.std**2

    def scale(self, space: NoiseSpace) -> Tensor:
        return torch.full((self.dimension(space),), self.std, dtype=space.dtype, device=space.device)
