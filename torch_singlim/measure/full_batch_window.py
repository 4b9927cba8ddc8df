"""Compare a window with models of the motion that need gradients of all samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.measure.agreement import compare, jackknife, noise_ceiling, noise_ratio, plane
from torch_singlim.measure.distance import Forecast
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.window import Comparison, Model, Spread, Window
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import Minibatch, NoiseSystem
from torch_singlim.theory import (
    SGDSettings,
    WindowPrediction,
    effective_flow,
    finite_window,
    has_effective_flow,
    simulate,
)

__all__ = ["compare_window", "unusable"]

# number of steps up to which unit-step integration costs less than long steps with their error estimate
_SHORT = 200
# largest acceptable error of a prediction, relative to the displacement; it changes the cosine by 2 %
_ACCURATE = 0.2
# relative error from which on a prediction by long steps is useless
_BLIND = 0.5


def compare_window(
    problem: ZeroLossProblem,
    origin: Tensor,
    end: Tensor,
    *,
    start: int,
    stop: int,
    noise: NoiseSystem,
    sgd: SGDSettings,
    forecast: Forecast | None = None,
    replicas: int = 0,
    reference: bool = False,
    accurate: bool = True,
    between: Mapping[int, Tensor] | None = None,
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Window:
    """Compare the motion of the weights over a window with the effective flow, with descent on L alone, with the limit.

    Args:
        problem: loss and samples: all samples that training uses.
        origin: the iterate at the beginning of the window ``[P]``.
        end: the iterate at the end ``[P]``.
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
        noise: the system.
        sgd: settings over the window (under a schedule, lr is the mean).
        forecast: the motion that the limit predicts from the beginning of the window; None: do not compare with it.
        replicas: number of independent runs of the window for the noise ceiling; 0: none.
        reference: integrate the effective flow by unit steps, too.
        accurate: integrate by unit steps if the estimated error of `finite_window` exceeds a fifth of the displacement;
            otherwise this error is only reported.
        between: the iterate at some steps within the window, step -> ``[P]``, for standard errors.
        velocity: the optimizer's momentum at the beginning ``[P]``.
        generator: of noise and batches.
    """
    steps, measured = stop - start, end - origin
    marks = [step - start for step in (*(between or {}), stop)]

    def unit_steps(system: NoiseSystem, marks: Sequence[int] = ()) -> WindowPrediction:
        return effective_flow(
            problem,
            origin,
            system,
            sgd,
            steps=steps,
            rtol=_ACCURATE,
            marks=marks,
            velocity=velocity,
            generator=generator,
        )

    def long_steps(system: NoiseSystem, marks: Sequence[int] = ()) -> WindowPrediction | None:
        if steps <= _SHORT:
            return None
        window = finite_window(
            problem, origin, system, sgd, steps=steps, marks=marks, velocity=velocity, generator=generator
        )
        size = torch.linalg.vector_norm(window.displacement).item()
        good = not accurate or math.hypot(window.stderr, window.error) <= _ACCURATE * size
        return window if window.status is Result.SUCCESSFUL and good else None

    predictions = {Model.BASELINE: long_steps(Minibatch()) or unit_steps(Minibatch())}
    if has_effective_flow(noise, problem):
        flow = unit_steps(noise, marks) if reference else None
        long = long_steps(noise, marks)
        if long is not None:
            predictions[Model.FULL_BATCH] = long
        if flow is not None or long is None:
            predictions[Model.AVERAGED] = flow or unit_steps(noise, marks)
    comparisons = {model: Comparison(p, compare(measured, p.displacement)) for model, p in predictions.items()}
    drift = predictions.get(Model.FULL_BATCH) or predictions.get(Model.AVERAGED)
    baseline = predictions[Model.BASELINE].displacement
    runs = [measured]
    if replicas:
        ensemble = simulate(
            problem, origin, noise, sgd, steps=steps, replicas=replicas, velocity=velocity, generator=generator
        )
        runs.extend(ensemble.displacements)
    path = [*(v - origin for v in (between or {}).values()), measured]
    spread = None
    if forecast is not None:
        comparisons[Model.LIMIT], spread = _against_limit(forecast, measured, steps)
    if drift is None:
        return Window(
            start,
            stop,
            measured,
            comparisons,
            scatter=jackknife(path, path),
            ceiling=noise_ceiling(runs),
            spread=spread,
            diffuses=forecast is not None and forecast.diffusion > 0,
            gradients=sum(p.gradients for p in predictions.values()),
        )
    return Window(
        start,
        stop,
        measured,
        comparisons,
        reason=unusable(drift, start, stop),
        scatter=jackknife(path, list(drift.path)),
        noise_ratio=noise_ratio(runs, drift.displacement, baseline),
        noise_share=compare(drift.displacement, baseline).residual,
        ceiling=noise_ceiling(runs),
        spread=spread,
        diffuses=forecast is not None and forecast.diffusion > 0,
        plane=plane(path, list(drift.path)),
        gradients=sum(p.gradients for p in predictions.values()),
    )


def _against_limit(forecast: Forecast, measured: Tensor, steps: int) -> tuple[Comparison, Spread]:
    """Compare the tangential part of the motion with K times the limit's drift; both lengths."""
    predicted = WindowPrediction((steps * forecast.drift)[None], 0.0, math.nan, 0, Result.SUCCESSFUL)
    agreement = compare(forecast.tangent.project(measured), predicted.displacement)
    along = math.hypot(agreement.predicted, math.sqrt(steps * forecast.diffusion * forecast.dimension))
    return Comparison(predicted, agreement), Spread(agreement.measured, along)


def unusable(prediction: WindowPrediction, start: int, stop: int) -> Reason | None:
    """Why a prediction is invalidated; None: it is not."""
    size, off = torch.linalg.vector_norm(prediction.displacement).item(), prediction.error
    if math.hypot(off, prediction.stderr) > _BLIND * size and off > 0:
        return Code.UNCERTAIN(start=start, stop=stop)
    if prediction.status is Result.DIVERGED:
        return Code.DIVERGED(start=start, stop=stop)
    return None
