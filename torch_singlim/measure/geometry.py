"""What is measured at the weights of one snapshot, part by part, as far as there is time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from torch_singlim.geometry import LevelPoint, NearestPoint, largest_curvature
from torch_singlim.linalg import Result
from torch_singlim.measure.budget import Budget
from torch_singlim.measure.distance import DistanceMeasurement, compare_moments, measure_distance
from torch_singlim.measure.levels import Level, Levels
from torch_singlim.measure.limit import integrated
from torch_singlim.measure.open_window import OpenWindow
from torch_singlim.measure.options import Options
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.samples import TrainingSet, distances_of_subsets
from torch_singlim.measure.schedule import Schedule
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory import SGDSettings, WindowPrediction

__all__ = ["Geometry"]

# the part of the time that is left that lower levels than a half may take
_LOWER = 0.9
# what a search costs that begins at the last point of its level, as a share of the cost of the first one: 0.4 to 0.8
_WARM = 0.6
# the part of the time that is left that the loss of the whole training set may take: lower levels are worth more
_WHOLE = 0.3


class Geometry:
    """Distances and stability; keeps the points where the next searches begin.

    Args:
        options: what to measure.
        schedule: the steps at which to measure.
        budget: the time that measurements may take.
        affords: whether a kind of measurement takes no more than a part of the time that is left.
        gradients: how many gradients fit into a part of it.
        generator: of all random directions and draws.
    """

    def __init__(
        self,
        options: Options,
        schedule: Schedule,
        budget: Budget,
        affords: Callable[[str, float], bool],
        gradients: Callable[[float], float],
        generator: torch.Generator,
    ) -> None:
        self.options, self.schedule, self.budget, self.generator = options, schedule, budget, generator
        self.levels, self._affords, self._gradients = Levels(), affords, gradients

    def _part(self, snapshot: Snapshot) -> float:
        """The part of the time that is left which a measurement at this snapshot may take."""
        return self.schedule.part_at(snapshot.step)

    def find_levels(
        self, problem: ZeroLossProblem, snapshot: Snapshot, found: dict[Level, LevelPoint], *levels: Level
    ) -> list[Reason]:
        """Add the nearest points of these levels of the loss to those that were found; why others were not."""
        reasons = []
        for level in levels:
            kind = level.name.lower()
            part = 1.0 if level is Level.HALF else max(self._part(snapshot), _LOWER)
            # at the beginning, low levels are expensive, and say little
            early = snapshot.step == 0 and level is not Level.HALF and self.budget.share is not None
            if early or not self._affords(kind, part):
                continue
            most, cold = min(level.gradients, self._gradients(part)), level not in self.levels.points
            with self.budget.timed(kind):
                point = self.levels.measure(problem, snapshot.weights, level, found, max_gradients=most)
            if point.certified:
                found[level] = point
                if cold:
                    self.budget.scale(kind, _WARM)
            elif most < level.gradients:
                self.budget.skip(kind)
            else:
                reasons.append(Code.LEVEL_NOT_MET(level=f"{level.value:g}", gradients=level.gradients))
        return reasons

    def of_whole(
        self,
        problem: ZeroLossProblem,
        whole: TrainingSet | None,
        snapshot: Snapshot,
        levels: Mapping[Level, LevelPoint],
    ) -> dict[Level, float] | None:
        """Excess loss of the whole training set at the points of levels, as a share of that at the weights."""
        if whole is None or not levels or not self._affords("whole", _WHOLE * self._part(snapshot)):
            return None
        with self.budget.timed("whole"):
            present = whole.loss(problem, snapshot.weights)
            return {level: whole.loss(problem, each.point) / present for level, each in levels.items()}

    def stability(self, problem: ZeroLossProblem, snapshot: Snapshot) -> float | None:
        """lambda_1 over the largest curvature at which the optimizer is stable, both in its metric."""
        sgd = snapshot.sgd
        if sgd is None or not self._affords("stability", 1.0):
            return None
        if snapshot.metric is not None:
            problem, snapshot = problem.in_metric(snapshot.metric.ratios), snapshot.in_metric()
        with self.budget.timed("stability"):
            found = largest_curvature(problem.at_precision(torch.float32), snapshot.weights, generator=self.generator)
        return None if found is None else found.item() / sgd.largest_stable_curvature

    def distance(
        self, problem: ZeroLossProblem, snapshot: Snapshot, noise: NoiseSystem | None
    ) -> DistanceMeasurement | None:
        """The distance from the zero-loss set, and the limit's prediction for this noise, if it is given.

        Under an adaptive optimizer the limit is predicted in its metric, by `in_metric`.
        """
        if snapshot.metric is not None:
            snapshot, noise = replace(snapshot, sgd=None), None
        part = self._part(snapshot)
        if not self._affords("distance", part):
            return None
        predicted = noise is not None and self._affords("limit", part)
        with self.budget.timed("limit" if predicted else "distance"):
            distance = measure_distance(
                problem,
                snapshot,
                noise=noise if predicted else None,
                num_draws=self.options.num_draws,
                relaxed_after=self.options.relaxed_after,
                start=self.levels.nearest,
                generator=self.generator,
            )
        self.levels.keep_nearest(distance.nearest)
        return distance

    def in_metric(
        self,
        problem: ZeroLossProblem,
        snapshot: Snapshot,
        noise: NoiseSystem | None,
        plain: DistanceMeasurement | None,
    ) -> DistanceMeasurement | None:
        """The distance in the metric of an adaptive optimizer, with the limit's prediction.

        Args:
            problem: loss and samples.
            snapshot: of the training.
            noise: all noise of the training, in this metric; None: the theory does not cover it.
            plain: the distance without a metric; the search begins at its nearest point.
        """
        if snapshot.metric is None or noise is None or plain is None:
            return None
        if not self._affords("limit", self._part(snapshot)):
            return None
        nearest, metric = plain.nearest, snapshot.metric
        with self.budget.timed("limit"):
            found = measure_distance(
                problem.in_metric(metric.ratios),
                snapshot.in_metric(),
                noise=noise,
                moments=metric.moments,
                num_draws=self.options.num_draws,
                relaxed_after=self.options.relaxed_after,
                start=nearest.point / metric.roots if nearest.converged else None,
                generator=self.generator,
            )
            return replace(found, moments=compare_moments(problem, snapshot, noise))

    def of_fewer(self, problem: ZeroLossProblem, snapshot: Snapshot, nearest: NearestPoint) -> dict[int, float] | None:
        """Number of samples -> distance of the nearest point for so many of them."""
        if not nearest.converged or not self._affords("subsets", self._part(snapshot)):
            return None
        with self.budget.timed("subsets"):
            return distances_of_subsets(problem, snapshot.weights, nearest)

    def flow(
        self,
        problem: ZeroLossProblem,
        opened: OpenWindow,
        noise: NoiseSystem,
        sgd: SGDSettings,
        *,
        steps: int,
    ) -> WindowPrediction | Reason | None:
        """The limit integrated over a window, in its metric; None: it cannot hold, diffuses, or there is no time."""
        forecast, start = opened.forecast, opened.start
        if forecast is None or not forecast.relaxed or forecast.diffusion > 0:
            return None
        if not self._affords("flow", self.schedule.part(start)):
            return None
        if opened.metric is not None:
            problem = problem.in_metric(opened.metric.ratios)
        with self.budget.timed("flow"):
            draws = self.options.num_draws
            flow = integrated(
                problem,
                forecast,
                noise,
                sgd,
                steps=steps,
                moments=None if opened.metric is None else opened.metric.moments,
                num_draws=draws,
                generator=self.generator,
            )
        if flow.status is Result.SUCCESSFUL:
            return flow
        return Code.LIMIT_STOPPED(start=start, stop=start + steps, status=flow.status.message)
