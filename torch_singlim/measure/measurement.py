"""Everything that was measured at one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch_singlim.geometry import LevelPoint
from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.levels import Level
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.measure.window import Window
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory import time_scale

__all__ = ["Clock", "Measurement"]


@dataclass(frozen=True)
class Clock:
    """Step size, noise level, and the slow clock of the noise if it causes a drift.

    Args:
        step_size: the effective alpha.
        noise_level: sigma (None without drift).
        slow_time: t = sum_k alpha_k^order sigma^2 over the steps so far (None without drift, or without these sums).
        time_scale: optimizer steps per unit of slow time (None without drift).
    """

    step_size: float
    noise_level: float | None = None
    slow_time: float | None = None
    time_scale: float | None = None

    @classmethod
    def at(cls, snapshot: Snapshot, noise: NoiseSystem, variance: float) -> Clock | None:
        """The clock of a noise of this variance at a snapshot (None without SGD settings)."""
        sgd, order, sums = snapshot.sgd, noise.order, snapshot.sums
        if sgd is None:
            return None
        if order is None:
            return cls(sgd.effective_lr)
        slow_time = None if sums is None else sums.slow_time(order, variance)
        return cls(sgd.effective_lr, math.sqrt(variance), slow_time, time_scale(sgd, order, variance))


@dataclass(frozen=True)
class Measurement:
    """What was measured at one step; None: not measured.

    Args:
        step: optimizer steps so far.
        excess_loss: L(w).
        levels: the nearest points of lower levels of the loss, as far as there was time.
        whole: excess loss of the whole training set at each of these points, as a share of that at the weights, where
            a part of the training set is measured.
        stability: lambda_1 over the largest curvature at which the optimizer is stable.
        distance: nearest point, relaxed part, the limit's prediction.
        in_metric: the same in the metric of an adaptive optimizer: `distance` then has the nearest point alone.
        of_samples: number of samples -> distance of the nearest point for so many of them, nested, where a part of the
            training set is measured.
        window: the window that ends here.
        clock: step size, noise level, slow time.
        overhead: share of the wall time so far that was spent on measurements.
    """

    step: int
    excess_loss: float | None = None
    levels: Mapping[Level, LevelPoint] = field(default_factory=dict)
    whole: Mapping[Level, float] = field(default_factory=dict)
    stability: float | None = None
    distance: DistanceMeasurement | None = None
    in_metric: DistanceMeasurement | None = None
    of_samples: Mapping[int, float] = field(default_factory=dict)
    window: Window | None = None
    clock: Clock | None = None
    overhead: float | None = None

    @property
    def of_limit(self) -> DistanceMeasurement | None:
        """The measurement in the coordinates in which the descent is plain, of which the singular limit speaks."""
        return self.in_metric or self.distance
