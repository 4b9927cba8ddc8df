"""Everything that was measured at one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_singlim.linalg import Solution
from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.measure.window import Window
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory import time_scale

__all__ = ["Clock", "Measurement"]


@dataclass(frozen=True)
class Clock:
    """Step size, noise level, and where the noise moves the weights, the slow clock.

    Args:
        step_size: the effective alpha.
        noise_level: sigma (None where nothing moves).
        slow_time: t = sum_k alpha_k^order sigma^2 over the steps so far (None where the sums are not known, either).
        time_scale: optimizer steps per unit of slow time.
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
    """What was measured at one step; None: it was not.

    Args:
        step: optimizer steps so far.
        excess_loss: L(w).
        distance: nearest point, relaxed part, the limit's prediction.
        linearised: the displacement by one linearisation, where there was no time for that.
        window: the one that ends here.
        clock: step size, noise level, slow time.
        overhead: share of the wall time that was spent on measuring, all of it so far.
    """

    step: int
    excess_loss: float | None = None
    distance: DistanceMeasurement | None = None
    linearised: Solution | None = None
    window: Window | None = None
    clock: Clock | None = None
    overhead: float | None = None
