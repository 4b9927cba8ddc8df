"""What is recorded of one window of steps: the motion of the weights, beside that of every model of it."""

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
    """What the motion of the weights over a window is compared with; the value is its label in figures."""

    BASELINE = "baseline (loss alone)"
    FULL_BATCH = "effective flow"
    AVERAGED = "effective flow, unit steps"
    LIMIT = "singular limit"


@dataclass(frozen=True)
class Comparison:
    """One model of a window's motion against the motion itself.

    Args:
        prediction: displacement of the weights, with its errors.
        agreement: of the measured displacement with it.
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
        start: optimizer steps at its beginning.
        stop: at its end.
        displacement: measured, of the iterate w - xi  ``[P]``.
        comparisons: with each model; empty where the drift is not predicted. For `Model.LIMIT` the tangential part of
            the motion is compared.
        reason: why the drift is not predicted, where that is known of this window alone.
        scatter: standard errors of the drift's agreement, from parts of the window (nan without weights in between).
        noise_ratio: the noise-induced part of the motion, measured over predicted (nan without a prediction).
        noise_share: |prediction - baseline| / |prediction|  (nan without a prediction).
        ceiling: the noise ceiling, the best cosine that any deterministic prediction can have (nan without replicas).
        spread: length along Gamma (None where the limit predicts no motion).
        diffuses: whether the limit diffuses: no deterministic prediction has a direction then.
        plane: the measured and the predicted path in the plane of prediction and deviation (None without a prediction).
        gradients: gradients of all samples that the predictions took.
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
        """The comparison with the noise-averaged loss, if there is one that holds."""
        if self.reason is not None:
            return None
        return self.comparisons.get(Model.FULL_BATCH) or self.comparisons.get(Model.AVERAGED)
