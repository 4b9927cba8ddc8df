"""Compare the motion over a window with the singular limit that was predicted at its beginning."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.measure.agreement import compare
from torch_singlim.measure.distance import Forecast
from torch_singlim.measure.window import Comparison, Model, Spread, Window
from torch_singlim.theory import WindowPrediction

__all__ = ["against_limit"]


def against_limit(window: Window, forecast: Forecast, displacement: Tensor, steps: int) -> Window:
    """The window with a comparison of the tangential part of the motion with K times the limit's drift; both lengths.

    Args:
        window: without this comparison.
        forecast: the limit's prediction.
        displacement: of the iterate since the forecast, in the forecast's coordinates  ``[P]``.
        steps: K, since the forecast.
    """
    predicted = WindowPrediction((steps * forecast.drift)[None], 0.0, math.nan, 0, Result.SUCCESSFUL)
    agreement = compare(forecast.tangent.project(displacement), predicted.displacement)
    along = math.hypot(agreement.predicted, math.sqrt(steps * forecast.diffusion * forecast.dimension))
    return replace(
        window,
        comparisons={**window.comparisons, Model.LIMIT: Comparison(agreement, predicted)},
        spread=Spread(agreement.measured, along),
        diffuses=forecast.diffusion > 0,
    )
