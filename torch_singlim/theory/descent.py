"""The descent settings, one step of descent on flat vectors, and the slow clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["SGDSettings", "time_scale"]


@dataclass(frozen=True)
class SGDSettings:
    """Settings of stochastic gradient descent as ``torch.optim.SGD`` has them.

    Args:
        lr: step size alpha > 0, in squared weight norm per unit of loss.
        momentum: mu in [0, 1).
        dampening: d in [0, 1).
        nesterov: Nesterov's form of momentum.
        batch_size: B, samples per step; None: full batch.

    Raises:
        ValueError: a value outside its range.

    >>> SGDSettings(lr=0.1, momentum=0.9).effective_lr
    1.0000000000000002
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("momentum", "dampening"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 or None for the full batch, got {self.batch_size}")

    @property
    def effective_lr(self) -> float:
        """alpha (1 - d) / (1 - mu): the step size of the slow motion; alpha means this in the formulas."""
        return self.lr * (1 - self.dampening) / (1 - self.momentum)

    def batch(self, num_samples: int) -> int:
        """B for a data set of N samples."""
        return num_samples if self.batch_size is None else min(self.batch_size, num_samples)

    def step(self, w: Tensor, velocity: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step: (w, velocity) -> (w, velocity), the recursion of torch.optim.SGD, whose first velocity is g.

        v <- mu v + (1 - d) g;    w <- w - alpha v     (Nesterov: w - alpha (g + mu v))
        """
        if self.momentum == 0.0:
            return w - self.lr * gradient, None
        velocity = gradient if velocity is None else self.momentum * velocity + (1 - self.dampening) * gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return w - self.lr * direction, velocity


def time_scale(sgd: SGDSettings, order: int | None, variance: float) -> float:
    """Optimizer steps per unit of slow time, 1 / (alpha^order sigma^2); infinite where nothing moves.

    >>> time_scale(SGDSettings(lr=0.1), 1, 0.25)
    40.0
    """
    if order is None or variance == 0.0:
        return math.inf
    return 1 / (sgd.effective_lr**order * variance)
