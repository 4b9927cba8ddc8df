"""Noise and penalties on the weights: DropConnect, anti-correlated perturbations, weight decay, Langevin noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise.base import BatchLoss, Covariance, NoiseSpace, uniform
from torch_singlim.noise.gaussian import GaussianNoise, WithStd, bernoulli, require_positive

__all__ = ["AntiCorrelated", "DropConnect", "Langevin", "WeightDecay"]


@dataclass(frozen=True)
class DropConnect(WithStd):
    """Multiplicative noise on every weight: L(w * (1 + eta)), one eta for the whole step.

        V = (std^2/2) sum_j w_j^2 d^2 L / d w_j^2

    Order 1. The gradient is that of w -> L(w * (1 + eta)): (1 + eta) * grad L at the perturbed weights.

    Args:
        std: standard deviation of eta.
        form: "gaussian", or "bernoulli": 1 + eta = mask / keep, with keep = 1 / (1 + std^2); see `from_rate`.

    Raises:
        ValueError: a std that is not positive, a rate outside (0, 1).

    >>> DropConnect.from_rate(0.2)
    DropConnect(std=0.5, form='bernoulli')
    """

    form: Literal["gaussian", "bernoulli"] = "gaussian"
    per_sample: ClassVar[bool] = False
    moves_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("gaussian", "bernoulli"):
            raise ValueError(f"form must be 'gaussian' or 'bernoulli', got {self.form!r}")

    @classmethod
    def from_rate(cls, rate: float) -> DropConnect:
        """Each weight is dropped with probability `rate`, the others divided by 1 - rate: std^2 = rate/(1 - rate)."""
        if not 0 < rate < 1:
            raise ValueError(f"the rate must be in (0, 1), got {rate}")
        return cls(math.sqrt(rate / (1 - rate)), "bernoulli")

    @property
    def order(self) -> int:
        return 1

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        return super().quantile(space, u) if self.form == "gaussian" else bernoulli(1 / (1 + self.std**2), u)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        if self.form == "gaussian":
            return super().draw(space, count, generator=generator)
        return self.quantile(space, uniform(space, (count, space.num_weights), generator))

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w * (1 + eta), x, y)


@dataclass(frozen=True)
class AntiCorrelated(WithStd):
    """Anti-correlated perturbed gradient descent: each perturbation of the weights is subtracted a step later.

        w+ = w - alpha grad L(w) + (xi_{k+1} - xi_k)
        z+ = z - alpha grad L(z + xi_k),  z = w - xi:    Lhat = L(w + eta)

    Order 1 with V = (std^2/2) tr H. Here the recursion is written in z; xi is a transient perturbation.

    Raises:
        ValueError: a std that is not positive.

    >>> AntiCorrelated(std=0.01).order
    1
    """

    per_sample: ClassVar[bool] = False
    moves_outputs: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    transient: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 1

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w + eta, x, y)


@dataclass(frozen=True)
class WeightDecay(GaussianNoise):
    """L + (lambda/2) |w|^2, the optimizer's weight decay: no noise, but a drift of order 1, with sigma^2 = lambda.

    Raises:
        ValueError: a coefficient that is not positive.

    >>> from torch_singlim.noise import Dropout
    >>> (Dropout() + WeightDecay(5e-4)).order
    1
    """

    coefficient: float
    additive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False
    done_by: ClassVar[str | None] = "the optimizer does it: torch.optim.SGD(..., weight_decay=...)"

    def __post_init__(self) -> None:
        require_positive("coefficient", self.coefficient)

    @property
    def order(self) -> int:
        return 1

    def variance(self, space: NoiseSpace) -> float:
        return self.coefficient

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y) + 0.5 * self.coefficient * w.square().sum()


@dataclass(frozen=True)
class Langevin(WithStd):
    """Stochastic gradient Langevin noise: w+ = w - alpha grad L - alpha std xi, that is Lhat = L + eta . w.

        Sigma = std^2 I,     V = (std^2/4) log pdet H (its tangential gradient),     diffusion alpha^2 std^2 along Gamma

    Order 2, one eta for the whole step.

    Raises:
        ValueError: a std that is not positive.

    >>> Langevin(std=0.1).order
    2
    """

    per_sample: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 2

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y) + eta @ w

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(identity=self.std**2)
