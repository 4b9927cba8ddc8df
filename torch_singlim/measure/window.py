"""The motion of the weights over one window of steps, and its comparison with models of this motion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from torch_singlim.linalg import Estimate, Result
from torch_singlim.measure.agreement import Agreement, Plane, Scatter
from torch_singlim.measure.reasons import Reason
from torch_singlim.theory import WindowPrediction

__all__ = ["Comparison", "Model", "Spread", "Window"]


class Model(Enum):
    """A model of the motion of the weights over a window; the value is its label in figures."""

    BASELINE = "baseline (loss alone)"
    FULL_BATCH = "effective flow"
    AVERAGED = "effective flow, unit steps"
    LIMIT = "singular limit"


@dataclass(frozen=True)
class Comparison:
    """The comparison of one model with the measured motion over a window.

    Args:
        prediction: the model's displacement of the weights, with its errors.
        agreement: of the measured displacement with the prediction.
    """

    prediction: WindowPrediction = field(repr=False)
    agreement: Agreement

    @property
    def status(self) -> Result:
        """How the prediction's integration ended."""
        return self.prediction.status


@dataclass(frozen=True)
class Spread:
    """Length of the motion along Gamma, measured and predicted by the singular limit, in weight norm.

    predicted^2 = |K drift|^2 + K diffusion dim Gamma
    """

    measured: float
    predicted: float


@dataclass(frozen=True)
class Window:
    """The motion of the weights over one window, measured and predicted.

    Args:
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
        displacement: the measured displacement of the iterate w - xi  ``[P]``.
        comparisons: with each model; empty if the drift is not predicted. `Model.LIMIT` is compared with the tangential
            part of the motion.
        reason: why the prediction for this window is invalidated (None if it is not).
        scatter: standard errors of the agreement, from parts of the window (nan without weights in between).
        noise_ratio: the noise-induced drift, measured over predicted (nan without a prediction).
        noise_share: |prediction - baseline| / |prediction|  (nan without a prediction).
        ceiling: the noise ceiling, the best cosine that any deterministic prediction can have (nan without replicas).
        spread: length of the motion along Gamma (None if the limit predicts no motion).
        diffuses: whether the limit diffuses: the direction of the motion cannot be predicted then.
        plane: the measured and the predicted path in the plane of prediction and deviation (None without a prediction).
        gradients: number of gradients over all samples that the predictions took.
    """

    start: int
    stop: int
    displacement: Tensor = field(repr=False)
    comparisons: Mapping[Model, Comparison] = field(default_factory=dict)
    reason: Reason | None = None
    scatter: Scatter = Scatter(math.nan, math.nan)  # noqa: RUF009  # frozen
    noise_ratio: Estimate = Estimate(math.nan, math.nan)  # noqa: RUF009  # frozen
    noise_share: float = math.nan
    ceiling: float = math.nan
    spread: Spread | None = None
    diffuses: bool = False
    plane: Plane | None = field(default=None, repr=False)
    gradients: int = 0

    @property
    def steps(self) -> int:
        """K."""
        return self.stop - self.start

    @property
    def drift(self) -> Comparison | None:
        """The comparison with descent on the effective loss, unless it is invalidated."""
        if self.reason is not None:
            return None
        return self.comparisons.get(Model.FULL_BATCH) or self.comparisons.get(Model.AVERAGED)
