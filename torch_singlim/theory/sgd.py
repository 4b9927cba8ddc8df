"""The settings of SGD, one step of it on flat vectors, and the slow clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SGDSettings", "stationary_covariance", "stationary_variance", "time_scale"]


@dataclass(frozen=True)
class SGDSettings:
    """Settings of stochastic gradient descent, as in ``torch.optim.SGD``.

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
        """alpha (1 - d) / (1 - mu), the step size of the slow motion; this is the alpha of the formulas.

        As in torch, dampening has no effect without momentum.
        """
        return self.lr * (1 - self.dampening) / (1 - self.momentum) if self.momentum else self.lr

    @property
    def largest_stable_curvature(self) -> float:
        """The curvature of a mode above which full-batch descent on it diverges.

            2 (1 + mu) / (lr (1 - d));        Nesterov: 2 (1 + mu) / (lr (1 + 2 mu))

        Source: J. Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability, 2021,
        appendix B, for d = 0.

        >>> round(SGDSettings(lr=0.1, momentum=0.9).largest_stable_curvature, 9)
        38.0
        """
        mu = self.momentum
        factor = (1 + 2 * mu) if self.nesterov else (1 - self.dampening if mu else 1.0)
        return 2 * (1 + mu) / (self.lr * factor)

    def batch(self, num_samples: int) -> int:
        """B for a data set of N samples."""
        return num_samples if self.batch_size is None else min(self.batch_size, num_samples)

    def step(self, w: Tensor, velocity: Tensor | None, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step (w, velocity) -> (w, velocity) of the recursion of torch.optim.SGD, whose first velocity is g.

        v <- mu v + (1 - d) g;    w <- w - alpha v     (Nesterov: w - alpha (g + mu v))
        """
        if self.momentum == 0.0:
            return w - self.lr * gradient, None
        velocity = gradient if velocity is None else self.momentum * velocity + (1 - self.dampening) * gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        return w - self.lr * direction, velocity


def stationary_covariance(sgd: SGDSettings, curvature: Tensor, other: Tensor) -> Tensor:
    """Covariance of w along modes of curvature l and l' ``[r]``, per unit covariance of the noise xi; inf if unstable.

        v+ = mu v + (1 - d) (l w + xi),     w+ = w - lr v+        (Nesterov: w - lr (l w + xi + mu v+))

    With s = (w, v) and s+ = A s + b xi, it is P_ww for P = A P A'^T + b b'^T. Without momentum this is
    alpha/(l + l' - alpha l l'); with momentum it tends to alpha/(l + l') as lr l -> 0, where alpha is the effective
    step size.

    >>> stationary_covariance(SGDSettings(lr=0.5), torch.tensor([1.0]), torch.tensor([2.0]))
    tensor([0.2500])
    """
    if not sgd.momentum:
        found = sgd.lr / (curvature + other - sgd.lr * curvature * other)
        return torch.where(sgd.lr * torch.maximum(curvature, other) < 2, found, math.inf)
    (A, b), (A_, b_) = _recursion(sgd, curvature), _recursion(sgd, other)
    AA = torch.einsum("rij,rkl->rikjl", A, A_).reshape(-1, 4, 4)
    bb = torch.einsum("ri,rk->rik", b, b_).reshape(-1, 4)
    stable = torch.maximum(curvature, other) < sgd.largest_stable_curvature
    system = torch.eye(4, dtype=A.dtype, device=A.device) - AA.where(stable[:, None, None], torch.zeros_like(AA))
    return torch.where(stable, torch.linalg.solve(system, bb)[:, 0], math.inf)


def _recursion(sgd: SGDSettings, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[r, 2, 2]`` and b ``[r, 2]`` of (w, v)+ = A (w, v) + b xi, with momentum."""
    l, lr, mu = curvature, sgd.lr, sgd.momentum  # noqa: E741  # the notation of the formulas
    take = 1 - sgd.dampening
    one, zero = torch.ones_like(l), torch.zeros_like(l)
    velocity, push = torch.stack([take * l, mu * one], -1), take * one
    if sgd.nesterov:
        position = torch.stack([1 - lr * l, zero], -1) - lr * mu * velocity
        kick = -lr * (one + mu * push)
    else:
        position, kick = torch.stack([one, zero], -1) - lr * velocity, -lr * push
    return torch.stack([position, velocity], -2), torch.stack([kick, push], -1)


def stationary_variance(sgd: SGDSettings, curvature: Tensor) -> Tensor:
    """Variance of w along modes of curvature l ``[r]``, per unit variance of the gradient noise; inf if unstable.

    `stationary_covariance` of a mode with itself: alpha/(2 l - alpha l^2) without momentum.

    >>> stationary_variance(SGDSettings(lr=0.5), torch.tensor([1.0, 4.0], dtype=torch.float64))
    tensor([0.3333,    inf], dtype=torch.float64)
    """
    return stationary_covariance(sgd, curvature, curvature)


def time_scale(sgd: SGDSettings, order: int | None, variance: float) -> float:
    """Optimizer steps per unit of slow time, 1 / (alpha^order sigma^2); infinite if there is no drift.

    >>> time_scale(SGDSettings(lr=0.1), 1, 0.25)
    40.0
    """
    if order is None or variance == 0.0:
        return math.inf
    return 1 / (sgd.effective_lr**order * variance)
