"""Compare the motion over a window with the singular limit from the nearest point at its beginning."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.measure.agreement import compare
from torch_singlim.measure.distance import Forecast
from torch_singlim.measure.open_window import OpenWindow
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.measure.window import Comparison, Model, Spread, Window
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory import SecondMoments, SGDSettings, WindowPrediction, limit_flow

__all__ = ["against_limit", "displacement_in_metric", "integrated"]

# error of a sub-step, as a share of its length; number of sub-steps at most
_RTOL, _SUBSTEPS = 5e-2, 30
# change of an adaptive optimizer's step sizes within a window up to which the limit is compared in the first metric
_CHANGE = 0.5


def integrated(
    problem: ZeroLossProblem,
    forecast: Forecast,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    moments: SecondMoments | None = None,
    num_draws: int,
    generator: torch.Generator | None,
) -> WindowPrediction:
    """The limit integrated along Gamma from the nearest point of the forecast, over K steps."""
    return limit_flow(
        problem,
        forecast.point,
        noise,
        sgd,
        steps=steps,
        rtol=_RTOL,
        num_draws=num_draws,
        finite_step=forecast.finite_step,
        moments=moments,
        max_substeps=_SUBSTEPS,
        generator=generator,
    )


def displacement_in_metric(opened: OpenWindow, snapshot: Snapshot) -> Tensor | Reason:
    """The motion over a window in the metric of its beginning  ``[P]``; or why that is not the metric of the window.

    Args:
        opened: the window.
        snapshot: its end.
    """
    displacement = snapshot.iterate - opened.iterate
    if opened.metric is None:
        return displacement
    change = math.inf if snapshot.metric is None else opened.metric.change(snapshot.metric, displacement)
    if change > _CHANGE:
        return Code.METRIC_CHANGED(start=opened.start, stop=snapshot.step, share=change)
    return displacement / opened.metric.roots


def against_limit(
    window: Window, forecast: Forecast, displacement: Tensor, steps: int, *, flow: WindowPrediction | None = None
) -> Window:
    """The window with comparisons of the tangential part of the motion with the limit; the lengths of both.

    Args:
        window: without these comparisons.
        forecast: the limit's prediction.
        displacement: of the iterate since the forecast, in the forecast's coordinates  ``[P]``.
        steps: K, since the forecast.
        flow: the limit integrated over these steps, besides K times the drift of the forecast, the frozen limit.
    """
    frozen = WindowPrediction((steps * forecast.drift)[None], 0.0, math.nan, 0, Result.SUCCESSFUL)
    motion = forecast.tangent.project(displacement)
    comparisons = {
        model: Comparison(compare(motion, prediction.displacement), prediction)
        for model, prediction in ((Model.LIMIT, flow), (Model.FROZEN_LIMIT, frozen))
        if prediction is not None
    }
    agreement = comparisons[Model.FROZEN_LIMIT].agreement
    along = math.hypot(agreement.predicted, math.sqrt(steps * forecast.diffusion * forecast.dimension))
    return replace(
        window,
        comparisons={**window.comparisons, **comparisons},
        spread=Spread(agreement.measured, along),
        diffuses=forecast.diffusion > 0,
    )
