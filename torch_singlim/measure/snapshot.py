"""One moment of a training, with everything that a measurement needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from torch_singlim.measure.reasons import Reason
from torch_singlim.theory import SGDSettings

__all__ = ["Snapshot", "StepSums"]


@dataclass(frozen=True)
class StepSums:
    """Sums over the optimizer steps so far, with the settings of each step.

    Args:
        lr: of the learning rates.
        alpha: of the effective step sizes.
        alpha_squared: of their squares.
        clipped: number of steps whose gradient was clipped.
    """

    lr: float = 0.0
    alpha: float = 0.0
    alpha_squared: float = 0.0
    clipped: int = 0

    def slow_time(self, order: int, variance: float) -> float:
        """t = sum_k alpha_k^order sigma^2, for a noise of this order and variance.

        >>> StepSums(lr=2.0, alpha=4.0, alpha_squared=8.0).slow_time(1, 0.5)
        2.0
        """
        return variance * (self.alpha if order == 1 else self.alpha_squared)


@dataclass(frozen=True)
class Snapshot:
    """One moment of a training, from a Trainer or a checkpoint.

    Args:
        step: optimizer steps so far.
        weights: the weights of the network ``[P]``.
        perturbation: the transient perturbation xi that they contain ``[P]``; None: there is none.
        velocity: the optimizer's momentum ``[P]``; None: there is none.
        sgd: the optimizer's settings at the present learning rate; None: not SGD, or the learning rate is 0.
        weight_decay: the optimizer's.
        step_ratios: learning rate of each measured parameter over the first parameter group's: the optimizer's metric.
        sums: over the steps so far; None: unknown, as for a checkpoint.
        reasons: what of this training the theory does not cover.
    """

    step: int
    weights: Tensor = field(repr=False)
    perturbation: Tensor | None = field(default=None, repr=False)
    velocity: Tensor | None = field(default=None, repr=False)
    sgd: SGDSettings | None = None
    weight_decay: float = 0.0
    step_ratios: Mapping[str, float] = field(default_factory=dict, repr=False)
    sums: StepSums | None = None
    reasons: tuple[Reason, ...] = ()

    @cached_property
    def iterate(self) -> Tensor:
        """w - xi  ``[P]``: the weights in the recursion of the theory."""
        return self.weights if self.perturbation is None else self.weights - self.perturbation
