"""Noise systems: what is injected, and at which order it moves the weights along Gamma.

A system perturbs a batch with mean-zero noise eta of independent components, which makes a noisy loss Lhat(w, eta).
Everything else follows from that: the regulariser, its gradient, the gradient noise on Gamma.

    V(w) = Lhat(w, 0) - L(w) + (1/2) sum_j sigma_j^2 d^2 Lhat(w, 0) / d eta_j^2

V is the effective potential, the noise's variance inside (sigma^2 Reg of arXiv 2404.12293, and a penalty where the
system has one); per step the weights move by -alpha^order P_T grad V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_singlim.problem import ZeroLossProblem

__all__ = ["Dropout", "Minibatch", "NoiseSystem", "NoisyBatch", "Sum", "WeightDecay", "noisy_loss"]


@dataclass(frozen=True)
class NoisyBatch:
    """What a noise system may perturb: weights ``[P]``, a batch, the noise on its activations, an additive penalty."""

    weights: Tensor
    inputs: Tensor
    targets: Tensor
    activations: Tensor | None = None
    penalty: Tensor | float = 0.0


class NoiseSystem(ABC):
    """A noise (or a penalty): how eta ``[n, D]``, independent over samples and components, perturbs a batch of n."""

    @property
    @abstractmethod
    def order(self) -> int | None:
        """Power of the step size in the drift along Gamma: 1, 2, or None where nothing moves on either clock."""

    @abstractmethod
    def variance(self, problem: ZeroLossProblem) -> float:
        """sigma^2 of the slow clock; with several layers or systems the largest, which sets the pace."""

    def check(self, problem: ZeroLossProblem) -> None:  # noqa: B027  # most systems fit every problem
        """Raise ValueError, with what to do, if the system does not fit the problem."""

    def scale(self, problem: ZeroLossProblem) -> Tensor:
        """sigma_j, the standard deviation of each of the D noise components of a sample ``[D]``."""
        return torch.zeros(0, dtype=problem.dtype, device=problem.device)

    def draw(self, problem: ZeroLossProblem, count: int, *, generator: torch.Generator | None) -> Tensor:
        """Independent noise for `count` samples ``[count, D]``, from the distribution that training uses."""
        return torch.zeros(count, 0, dtype=problem.dtype, device=problem.device)

    def perturb(self, problem: ZeroLossProblem, batch: NoisyBatch, eta: Tensor) -> NoisyBatch:
        """The batch under noise eta ``[n, D]``; differentiable in the weights and in eta."""
        return batch

    def __add__(self, other: NoiseSystem) -> NoiseSystem:
        """Both, independently: their potentials add."""
        return Sum((*_parts(self), *_parts(other)))


def _parts(system: NoiseSystem) -> tuple[NoiseSystem, ...]:
    return system.systems if isinstance(system, Sum) else (system,)


def noisy_loss(system: NoiseSystem, problem: ZeroLossProblem, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
    """Lhat(w, eta): mean loss of a batch under the noise, plus its penalty; a scalar, differentiable in w and eta."""
    batch = system.perturb(problem, NoisyBatch(w, x, y), eta)
    return problem.batch_loss(batch.weights, batch.inputs, batch.targets, batch.activations) + batch.penalty


@dataclass(frozen=True)
class Dropout(NoiseSystem):
    """Dropout with the rates of the module's own ``nn.Dropout`` layers: activations times 1 + eta.

        1 + eta = Bernoulli(1 - p) / (1 - p),      sigma_j^2 = p_j / (1 - p_j)

    Order 1. Every call of a dropout layer has its own noise, per sample and unit (per channel for ``Dropout2d``).

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2), nn.Linear(3, 1))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> Dropout().scale(problem)
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    @property
    def order(self) -> int:
        return 1

    def check(self, problem: ZeroLossProblem) -> None:
        if not problem.sites:
            raise ValueError(
                "Dropout() needs nn.Dropout layers with a positive rate that the forward pass calls, found none: add "
                "them to the module (functional dropout cannot be seen), or use another noise"
            )

    def variance(self, problem: ZeroLossProblem) -> float:
        self.check(problem)
        return max(site.variance for site in problem.sites)

    def scale(self, problem: ZeroLossProblem) -> Tensor:
        self.check(problem)
        parts = [torch.full((site.dimension,), site.variance**0.5, dtype=problem.dtype) for site in problem.sites]
        return torch.cat(parts).to(problem.device)

    def draw(self, problem: ZeroLossProblem, count: int, *, generator: torch.Generator | None) -> Tensor:
        self.check(problem)
        keep = torch.cat([torch.full((site.dimension,), 1 - site.rate, dtype=problem.dtype) for site in problem.sites])
        kept = torch.rand(count, keep.numel(), generator=generator) < keep
        return (kept.to(problem.dtype) / keep - 1).to(problem.device)

    def perturb(self, problem: ZeroLossProblem, batch: NoisyBatch, eta: Tensor) -> NoisyBatch:
        return replace(batch, activations=eta)


@dataclass(frozen=True)
class Minibatch(NoiseSystem):
    """Minibatch sampling and nothing else: the loss of the batch as it is.

    Trivial: on Gamma every sample's gradient is zero, so the noise dies as the weights arrive. No order, no drift.

    >>> Minibatch().order is None
    True
    """

    @property
    def order(self) -> None:
        return None

    def variance(self, problem: ZeroLossProblem) -> float:
        return 0.0


@dataclass(frozen=True)
class WeightDecay(NoiseSystem):
    """L + (lambda/2) |w|^2, the optimizer's weight decay: no noise, but the clock of order 1 with lambda for sigma^2.

    Raises:
        ValueError: a coefficient that is not positive.

    >>> (Dropout() + WeightDecay(5e-4)).order
    1
    """

    coefficient: float

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ValueError(
                f"the weight decay coefficient must be positive, got {self.coefficient}; for none, leave it out"
            )

    @property
    def order(self) -> int:
        return 1

    def variance(self, problem: ZeroLossProblem) -> float:
        return self.coefficient

    def perturb(self, problem: ZeroLossProblem, batch: NoisyBatch, eta: Tensor) -> NoisyBatch:
        return replace(batch, penalty=batch.penalty + 0.5 * self.coefficient * batch.weights.square().sum())


@dataclass(frozen=True)
class Sum(NoiseSystem):
    """Several independent systems at once; written ``a + b``. Their noises stand side by side in the columns of eta."""

    systems: tuple[NoiseSystem, ...]

    def __post_init__(self) -> None:
        kinds = [type(system).__name__ for system in self.systems]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"a sum takes systems of different kinds, one each, got {' + '.join(kinds)}")

    @property
    def order(self) -> int | None:
        return min((s.order for s in self.systems if s.order is not None), default=None)

    def check(self, problem: ZeroLossProblem) -> None:
        for system in self.systems:
            system.check(problem)

    def variance(self, problem: ZeroLossProblem) -> float:
        return max(s.variance(problem) for s in self.systems if s.order == self.order)

    def scale(self, problem: ZeroLossProblem) -> Tensor:
        return torch.cat([s.scale(problem) for s in self.systems])

    def draw(self, problem: ZeroLossProblem, count: int, *, generator: torch.Generator | None) -> Tensor:
        return torch.cat([s.draw(problem, count, generator=generator) for s in self.systems], 1)

    def perturb(self, problem: ZeroLossProblem, batch: NoisyBatch, eta: Tensor) -> NoisyBatch:
        sizes = [s.scale(problem).numel() for s in self.systems]
        for system, part in zip(self.systems, eta.split(sizes, dim=1), strict=True):
            batch = system.perturb(problem, batch, part)
        return batch
