"""A window in progress: what is needed when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_singlim.measure.distance import Forecast, tangent_at
from torch_singlim.measure.followed import FollowedWindow
from torch_singlim.measure.snapshot import Metric, Snapshot, StepSums
from torch_singlim.measure.window import Window
from torch_singlim.network import ZeroLossProblem
from torch_singlim.theory import SecondMoments

__all__ = ["OpenWindow"]


def _state_of(metric: Metric) -> dict[str, Any]:
    moments = None if metric.moments is None else vars(metric.moments)
    return {"ratios": metric.ratios, "scale": metric.scale, "moments": moments}


def _metric_of(state: Mapping[str, Any]) -> Metric:
    moments = state["moments"]
    return Metric(state["ratios"], state["scale"], None if moments is None else SecondMoments(**moments))


@dataclass
class OpenWindow:
    """A window in progress.

    Args:
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
        iterate: w - xi at the beginning  ``[P]``.
        velocity: the optimizer's momentum at the beginning  ``[P]``.
        sums: over the steps before the window.
        forecast: the motion that the limit predicts from the beginning.
        metric: of an adaptive optimizer at the beginning, in whose coordinates the forecast is.
        followed: the part of the window with paths beside the training; None: there are none, or not yet.
        closed: whether there will be no paths any more.
        last: the last values that the paths gave.
    """

    start: int
    stop: int
    iterate: Tensor = field(repr=False)
    velocity: Tensor | None = field(repr=False)
    sums: StepSums | None
    forecast: Forecast | None = field(repr=False)
    followed: FollowedWindow | None = field(default=None, repr=False)
    metric: Metric | None = None
    closed: bool = False
    last: Window | None = field(default=None, repr=False)

    def at(self, snapshot: Snapshot) -> Window:
        """The window until this snapshot: its motion, with the comparison by paths if they got as far."""
        if self.last is not None and self.last.stop == snapshot.step:
            return self.last
        displacement = snapshot.iterate - self.iterate
        return Window(self.start, snapshot.step, torch.linalg.vector_norm(displacement).item(), displacement)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, without paths; the tangent space is recomputed from its point."""
        f = self.forecast
        forecast = (
            None
            if f is None
            else {k: getattr(f, k) for k in ("point", "drift", "diffusion", "dimension", "finite_step", "relaxed")}
        )
        return {
            "start": self.start,
            "stop": self.stop,
            "iterate": self.iterate,
            "velocity": self.velocity,
            "sums": None if self.sums is None else vars(self.sums),
            "forecast": forecast,
            "metric": None if self.metric is None else _state_of(self.metric),
            "closed": self.closed or (self.followed is not None and self.followed.advanced),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], problem: ZeroLossProblem | None) -> OpenWindow:
        """The window with this state; if it had paths, they are gone, but can be opened again at its first step."""
        f, sums, metric = state["forecast"], state["sums"], state["metric"]
        metric = None if metric is None else _metric_of(metric)
        if f is not None and problem is not None:
            problem = problem if metric is None else problem.in_metric(metric.ratios)
            f = Forecast(tangent=tangent_at(problem, f["point"]), **f)
        return cls(
            start=state["start"],
            stop=state["stop"],
            iterate=state["iterate"],
            velocity=state["velocity"],
            sums=None if sums is None else StepSums(**sums),
            forecast=f,
            metric=metric,
            closed=state["closed"],
        )
