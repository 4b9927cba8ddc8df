"""Compare a window with models of the motion that need gradients of all samples: between checkpoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate, Result
from torch_singlim.measure.agreement import compare, noise_ceiling, noise_ratio
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.window import Comparison, Model, NoiseInduced, Window
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
# error of the effective flow, relative to the motion, due to the noise of minibatches, which it neglects
_FLOW_ERROR = 0.02


def _predict(
    problem: ZeroLossProblem,
    origin: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    steps: int,
    velocity: Tensor | None,
    generator: torch.Generator | None,
) -> WindowPrediction:
    """Descent on the effective loss, by long steps where these are accurate, otherwise by unit steps."""
    options = {"steps": steps, "velocity": velocity, "generator": generator}
    if steps > _SHORT:
        window = finite_window(problem, origin, noise, sgd, **options)
        size = torch.linalg.vector_norm(window.displacement).item()
        if window.status is Result.SUCCESSFUL and math.hypot(window.stderr, window.error) <= _ACCURATE * size:
            return window
    return effective_flow(problem, origin, noise, sgd, rtol=_ACCURATE, **options)


def compare_window(
    problem: ZeroLossProblem,
    origin: Tensor,
    end: Tensor,
    *,
    start: int,
    stop: int,
    noise: NoiseSystem,
    sgd: SGDSettings,
    replicas: int = 0,
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Window:
    """Compare the motion of the weights over a window with the effective flow, and with descent on L alone.

    Args:
        problem: loss and samples: all samples that training uses.
        origin: the iterate at the beginning of the window ``[P]``.
        end: the iterate at the end ``[P]``.
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
        noise: the system.
        sgd: settings over the window (under a schedule, lr is the mean).
        replicas: number of independent runs of the window for the noise ceiling; 0: none.
        velocity: the optimizer's momentum at the beginning ``[P]``.
        generator: of noise and batches.
    """
    steps, measured = stop - start, end - origin

    def predict(system: NoiseSystem) -> WindowPrediction:
        return _predict(problem, origin, system, sgd, steps, velocity, generator)

    predictions = {Model.BASELINE: predict(Minibatch())}
    if has_effective_flow(noise, problem):
        predictions[Model.FULL_BATCH] = predict(noise)
    comparisons = {model: Comparison(compare(measured, p.displacement), p) for model, p in predictions.items()}
    flow = predictions.get(Model.FULL_BATCH)
    runs = [measured]
    if replicas:
        ensemble = simulate(
            problem, origin, noise, sgd, steps=steps, replicas=replicas, velocity=velocity, generator=generator
        )
        runs.extend(ensemble.displacements)
    induced = None
    if flow is not None:
        induced = _noise_induced(runs, flow.displacement, predictions[Model.BASELINE].displacement)
    return Window(
        start,
        stop,
        torch.linalg.vector_norm(measured).item(),
        measured,
        comparisons,
        reason=None if flow is None else unusable(flow, start, stop),
        noise=induced,
        ceiling=noise_ceiling(runs),
        gradients=sum(p.gradients for p in predictions.values()),
    )


def _noise_induced(runs: list[Tensor], flow: Tensor, baseline: Tensor) -> NoiseInduced | None:
    """The noise-induced drift of the first run; None if the prediction has none."""
    found, share = compare(runs[0] - baseline, flow - baseline), compare(flow, baseline).residual
    if not found.predicted:
        return None
    ratio = noise_ratio(runs, flow, baseline)
    ratio = Estimate(ratio.mean, math.hypot(ratio.stderr, _FLOW_ERROR / share))
    ceiling = noise_ceiling([run - baseline for run in runs])
    return NoiseInduced(found.measured, found.predicted, found.cosine, ratio, ceiling, share)


def unusable(prediction: WindowPrediction, start: int, stop: int) -> Reason | None:
    """Why a prediction is invalidated; None: it is not."""
    size, off = torch.linalg.vector_norm(prediction.displacement).item(), prediction.error
    if math.hypot(off, prediction.stderr) > _BLIND * size and off > 0:
        return Code.UNCERTAIN(start=start, stop=stop)
    if prediction.status is Result.DIVERGED:
        return Code.DIVERGED(start=start, stop=stop)
    return None
