"""One moment of a training, with everything that a measurement needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from torch_singlim.measure.reasons import Reason
from torch_singlim.noise import NoiseSystem, parts
from torch_singlim.theory import SecondMoments, SGDSettings

__all__ = ["Metric", "Snapshot", "StepSums"]


@dataclass(frozen=True)
class StepSums:
    """Sums over the optimizer steps so far, with the settings of each step.

    Args:
        lr: of the learning rates.
        alpha: of the effective step sizes, in the optimizer's metric.
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
class Metric:
    """The frozen preconditioner S = s r of an adaptive optimizer: descent is plain in the coordinates u = w / sqrt(r).

    Args:
        ratios: r, of harmonic mean 1  ``[P]``.
        scale: s.
        moments: the second moments in these coordinates.
    """

    ratios: Tensor = field(repr=False)
    scale: float
    moments: SecondMoments | None = field(default=None, repr=False)

    @cached_property
    def roots(self) -> Tensor:
        """sqrt(r)  ``[P]``."""
        return self.ratios.sqrt()

    def change(self, later: Metric, displacement: Tensor) -> float:
        """Root mean square of S'/S - 1 over the weights, each weighted by the square of its displacement.

        >>> import torch
        >>> metric = Metric(torch.tensor([1.0, 1.0]), 0.5)
        >>> metric.change(Metric(torch.tensor([2.0, 9.0]), 0.5), torch.tensor([1.0, 0.0]))
        1.0
        """
        relative = (later.scale / self.scale) * later.ratios / self.ratios - 1
        squares = displacement.square()
        total = squares.sum().item()
        return math.sqrt((squares @ relative.square()).item() / total) if total else 0.0


@dataclass(frozen=True)
class Snapshot:
    """One moment of a training, from a Trainer or a checkpoint.

    Args:
        step: optimizer steps so far.
        weights: the weights of the network ``[P]``.
        perturbation: the transient perturbation xi that they contain ``[P]``; None: there is none.
        velocity: the optimizer's momentum ``[P]``; None: there is none.
        sgd: the optimizer's settings at the present learning rate, in its metric; None: they are not known, or the
            learning rate is 0.
        weight_decay: the optimizer's, in its metric.
        step_ratios: learning rate of each measured parameter over the first parameter group's: the optimizer's metric.
        sums: over the steps so far; None: unknown, as for a checkpoint.
        reasons: what of this training the theory does not cover.
        metric: of an adaptive optimizer; None: of another one, or before its first step.
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
    metric: Metric | None = None

    @cached_property
    def iterate(self) -> Tensor:
        """w - xi  ``[P]``: the weights in the recursion of the theory."""
        return self.weights if self.perturbation is None else self.weights - self.perturbation

    def for_noise(self, noise: NoiseSystem) -> Snapshot:
        """The same without second moments, two vectors of the weights' size, unless there is noise of order 2."""
        if self.metric is None or any(part.scale_free and part.order == 2 for part in parts(noise)):
            return self
        return replace(self, metric=replace(self.metric, moments=None))

    def in_metric(self) -> Snapshot:
        """The same moment in the coordinates in which the descent is plain."""
        if self.metric is None:
            return self
        roots = self.metric.roots
        perturbation = None if self.perturbation is None else self.perturbation / roots
        return replace(self, weights=self.weights / roots, perturbation=perturbation, velocity=None, metric=None)
