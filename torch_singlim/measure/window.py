"""The motion of the weights over one window of steps, and its comparison with models of this motion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from torch import Tensor

from torch_singlim.linalg import Estimate, Result
from torch_singlim.measure.agreement import Agreement
from torch_singlim.measure.coupling import CoupledWindow, Projection, noise_ceiling_of
from torch_singlim.measure.reasons import Reason
from torch_singlim.theory import WindowPrediction

__all__ = ["Comparison", "Model", "NoiseInduced", "Spread", "Window"]


class Model(Enum):
    """A model of the motion of the weights over a window; the value is its label in figures."""

    BASELINE = "baseline (noise off)"
    AVERAGED = "averaged path"
    EXPANDED = "expanded path"
    FULL_BATCH = "effective flow"
    LIMIT = "singular limit"
    FROZEN_LIMIT = "singular limit, frozen"


@dataclass(frozen=True)
class Comparison:
    """The comparison of one model with the measured motion over a window.

    Args:
        agreement: of the measured displacement with the prediction.
        prediction: the model's displacement of the weights, with its errors; None within a window, before its end.
    """

    agreement: Agreement
    prediction: WindowPrediction | None = field(default=None, repr=False)

    @property
    def status(self) -> Result:
        """How the prediction's integration ended."""
        return Result.SUCCESSFUL if self.prediction is None else self.prediction.status


_UNKNOWN = Estimate(math.nan, math.nan)


@dataclass(frozen=True)
class NoiseInduced:
    """The noise-induced drift, run minus baseline, measured and predicted.

    Args:
        measured: its norm.
        predicted: norm of prediction minus baseline.
        cosine: between the two.
        ratio: <measured, predicted> / <predicted, predicted>, with its standard error.
        ceiling: the noise ceiling of the cosine (nan without replicas).
        share: norm of the predicted noise-induced drift over that of the predicted motion.
        replicas: the ratio of the replicas' mean noise-induced drift to the predicted one (nan without replicas).
    """

    measured: float
    predicted: float
    cosine: float
    ratio: Estimate
    ceiling: float
    share: float
    replicas: Estimate = _UNKNOWN


@dataclass(frozen=True)
class Spread:
    """Length of the motion along Gamma, measured and predicted by the singular limit, in weight norm.

    predicted^2 = |K drift|^2 + K diffusion dim Gamma
    """

    measured: float
    predicted: float


@dataclass(frozen=True)
class Window:
    """The motion of the weights over one window, or the first part of one, measured and predicted.

    Args:
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end, or so far.
        measured: norm of the displacement of the iterate w - xi.
        displacement: this displacement itself  ``[P]``; None before the end of the window.
        comparisons: with each model; empty if the drift is not predicted. `Model.LIMIT` and `Model.FROZEN_LIMIT` are
            compared with the tangential part of the motion.
        reason: why the prediction for this window is invalidated (None if it is not).
        noise: the noise-induced drift (None without a prediction for it).
        ceiling: the noise ceiling, the best cosine that any deterministic prediction can have (nan without replicas).
        expansion: cosine and ratio of norms of the expanded path's noise-induced drift with the averaged path's (None
            without an expanded path).
        baseline_moved: |n - w_0|, displacement of the baseline (None without a baseline beside the training).
        replay_error: of the replay at the end (None without paths beside the training).
        coupled: inner products of the run's and the paths' displacements (None without paths beside the training).
        spread: length of the motion along Gamma (None if the limit predicts no motion).
        diffuses: whether the limit diffuses: the direction of the motion cannot be predicted then.
        gradients: number of gradients that the predictions took: of all samples, or of the run's batches.
    """

    start: int
    stop: int
    measured: float
    displacement: Tensor | None = field(default=None, repr=False)
    comparisons: Mapping[Model, Comparison] = field(default_factory=dict)
    reason: Reason | None = None
    noise: NoiseInduced | None = None
    ceiling: float = math.nan
    expansion: tuple[float, float] | None = None
    baseline_moved: float | None = None
    replay_error: float | None = None
    coupled: CoupledWindow | None = field(default=None, repr=False)
    spread: Spread | None = None
    diffuses: bool = False
    gradients: int = 0

    @classmethod
    def of_coupled(
        cls, coupled: CoupledWindow, start: int, stop: int, *, replay_error: float, gradients: int
    ) -> Window:
        """The comparison of a run with the paths coupled to it.

        Args:
            coupled: inner products of their displacements.
            start: optimizer steps at the beginning.
            stop: optimizer steps so far.
            replay_error: of the step that ends here.
            gradients: number of gradients of the run's batches that the paths took.
        """
        measured, comparisons, noise = coupled.norm(0), {}, None
        if coupled.speed.resolved:
            comparisons[Model.AVERAGED] = Comparison(_agreement(coupled.speed, measured, coupled.residual))
        if coupled.has_baseline and coupled.norm(1) > 0:
            comparisons[Model.BASELINE] = Comparison(coupled.baseline)
        if coupled.noise is not None and coupled.noise.resolved and coupled.speed.resolved:
            p, others = coupled.noise, coupled.noise_of_replicas
            noise = NoiseInduced(
                measured=coupled.norm_of_noise,
                predicted=math.sqrt(p.square),
                cosine=p.cosine,
                ratio=p.ratio,
                ceiling=noise_ceiling_of(coupled.cosines(relative=True)),
                share=math.sqrt(p.square / coupled.speed.square),
                replicas=_UNKNOWN if others is None else others.ratio,
            )
        return cls(
            start,
            stop,
            measured,
            comparisons=comparisons,
            noise=noise,
            ceiling=noise_ceiling_of(coupled.cosines(relative=False)),
            expansion=None if noise is None else coupled.expansion,
            baseline_moved=coupled.norm(1) if coupled.has_baseline else None,
            replay_error=replay_error,
            coupled=coupled,
            gradients=gradients,
        )

    @property
    def steps(self) -> int:
        """K."""
        return self.stop - self.start

    @property
    def drift(self) -> Comparison | None:
        """The comparison with the averaged path, or with the effective flow, unless it is invalidated."""
        if self.reason is not None:
            return None
        return self.comparisons.get(Model.AVERAGED) or self.comparisons.get(Model.FULL_BATCH)


def _agreement(p: Projection, measured: float, residual: float) -> Agreement:
    ratio = p.ratio
    return Agreement(p.cosine, ratio.mean, residual, measured, math.sqrt(p.square), p.cosine_stderr, ratio.stderr)
