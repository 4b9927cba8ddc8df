"""From weights at two probes to what was measured and what was predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.agreement import Agreement, Plane, Scatter, compare, jackknife, noise_ceiling, noise_pull, plane
from torch_singlim.geometry import FootPoint, TangentSpace, nearest_point, separation_level, tangent_space
from torch_singlim.gram import MAX_DENSE
from torch_singlim.linalg import Estimate, VectorEstimate
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory import (
    EffectiveLoss,
    LimitPrediction,
    Minibatch,
    NoiseSystem,
    SGDSettings,
    WindowPrediction,
    averaged_gradient,
    effective_flow,
    expected_distance,
    finite_window,
    gradient_noise,
    has_effective_flow,
    potential,
    simulate,
    singular_limit,
)

__all__ = [
    "FiniteNoise",
    "Forecast",
    "Observation",
    "Spread",
    "WindowObservation",
    "finite_noise",
    "observe",
    "observe_window",
    "tangent_at",
]


@dataclass(frozen=True)
class FiniteNoise:
    """The paper's second-order expansion of the noise against its average at finite size, at one weight vector.

    Args:
        cosine: between grad V and E_eta grad Lhat - grad L.
        norm_ratio: |grad V| over the other's norm; far from 1: the expansion does not hold at this noise.
        stderr: sampling error of the two, relative to their norms.
    """

    cosine: float
    norm_ratio: float
    stderr: float

    @property
    def fails(self) -> bool:
        """Whether the expansion clearly does not hold: cosine or norm off by more than 0.15 and the sampling error."""
        return abs(self.norm_ratio - 1) > 0.15 + self.stderr or self.cosine < 0.85 - self.stderr


def finite_noise(averaged: VectorEstimate, expanded: VectorEstimate) -> FiniteNoise:
    """Compare the averaged gradient with grad V at the same weights, from other draws, sampling error taken out."""
    a, b = averaged.norm, expanded.norm
    if a * b == 0:
        return FiniteNoise(math.nan, math.nan, math.nan)
    cosine = torch.dot(averaged.mean, expanded.mean).item() / (a * b)
    return FiniteNoise(cosine, b / a, math.hypot(averaged.stderr / a, expanded.stderr / b))


@dataclass(frozen=True)
class Forecast:
    """The singular limit's motion from one point of Gamma, step by step.

    Args:
        point: ``[P]``.
        tangent: Gamma's tangent space there.
        drift: mean displacement per optimizer step ``[P]``.
        diffusion: variance per step and tangent direction, in squared weight norm.
        dimension: of Gamma.
    """

    point: Tensor = field(repr=False)
    tangent: TangentSpace = field(repr=False)
    drift: Tensor = field(repr=False)
    diffusion: float
    dimension: int


@dataclass(frozen=True)
class Observation:
    """The weights at one probe, seen from Gamma.

    Args:
        step: optimizer steps so far.
        weights: ``[P]``.
        drifting: the weights without what a noise has them carry for a step (`AntiCorrelated`) ``[P]``: what drifts.
        loss_gap: L(w).
        foot: the nearest point of Gamma.
        tangent: the tangent space there.
        separated: distance along the separated modes at w: the part of B^+ b, the linearised displacement, along modes
            of H with alpha lambda step >= c (None without a covered step size).
        expected: the same by the theory, root mean square (None without a prediction).
        direction: cosine between that part and the mean offset which the theory expects (nan at order 2).
        num_separated: how many modes that is; where H is too large to be decomposed, an estimate, or nan.
        num_modes: how many modes there are; then the number of residuals, which bounds it.
        limit: the singular limit's prediction at the foot point (None where the theory does not cover the training, or
            its expansion of the noise does not hold).
        tangent_steps: 1 / (alpha d^T H d / d^T d) for the limit's drift d: over fewer steps it is as good as tangent,
            whatever Lanczos has left of normal directions in it (nan where H was decomposed, and without a drift).
        finite_noise: how far that expansion holds at these weights (order 1 alone).
        moves: whether the noise drives a motion along Gamma on one of the two clocks.
        subset: whether training uses more samples than were probed. The Gamma of some samples contains that of all:
            distances are then lower bounds.
    """

    step: int
    weights: Tensor = field(repr=False)
    drifting: Tensor = field(repr=False)
    loss_gap: float
    foot: FootPoint = field(repr=False)
    tangent: TangentSpace = field(repr=False)
    separated: float | None
    expected: float | None
    direction: float
    num_separated: float | None
    num_modes: int
    limit: LimitPrediction | None = field(repr=False)
    tangent_steps: float
    finite_noise: FiniteNoise | None
    moves: bool
    subset: bool

    @property
    def forecast(self) -> Forecast | None:
        """The motion along Gamma that the limit predicts from here (None where it predicts none)."""
        if self.limit is None or self.limit.order is None:
            return None
        return Forecast(self.foot.point, self.tangent, self.limit.drift, self.limit.diffusion, self.limit.dimension)

    @property
    def withdrawn(self) -> str | None:
        """Why the limit's prediction is not given, where the expansion that it rests on fails."""
        if self.finite_noise is None or not self.finite_noise.fails:
            return None
        return (
            f"the noise is too large for the second-order expansion that the singular limit rests on: at step "
            f"{self.step} its gradient has cosine {self.finite_noise.cosine:.2f} and "
            f"{self.finite_noise.norm_ratio:.2f} times the norm of the averaged one"
        )


def _pull(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> tuple[VectorEstimate, FiniteNoise | None]:
    """The noise's average pull at w ``[P]``, and at order 1 how far its second-order expansion holds."""
    pull, expansion = VectorEstimate(torch.zeros_like(w)[None]), None
    if noise.order == 1:
        expanded = potential(noise, problem, w, num_draws=num_draws, generator=generator).gradient
        pull = averaged_gradient(noise, problem, w, num_draws=num_draws, generator=generator)
        expansion = finite_noise(pull, expanded)
    if has_effective_flow(noise, problem):
        effective = EffectiveLoss(problem, noise, sgd, generator=generator)
        if effective.second:
            pull = pull + VectorEstimate(torch.stack([effective.pull_of_order_two(w) for _ in range(4)]))
    return pull, expansion


def tangent_at(problem: ZeroLossProblem, point: Tensor, *, max_dense: int = MAX_DENSE) -> TangentSpace:
    """Gamma's tangent space at a point of it, as accurate as a probe needs it."""
    return tangent_space(problem, point, max_dense=max_dense, rtol=1e-3, max_steps=100)


def observe(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    step: int,
    noise: NoiseSystem | None = None,
    sgd: SGDSettings | None = None,
    carried: Tensor | None = None,
    num_draws: int = 32,
    separation: float = 3.0,
    rtol: float = 2e-2,
    max_steps: int = 12,
    max_dense: int = MAX_DENSE,
    subset: bool = False,
    generator: torch.Generator | None = None,
) -> Observation:
    """Distance, tangent space and the limit's prediction at weights w ``[P]``.

    Args:
        problem: loss and probe set.
        w: weights.
        step: optimizer steps so far: what had the time to settle.
        noise: the system; None where the theory does not cover the training (geometry only).
        sgd: the descent's settings; None likewise.
        carried: what the weights carry for this step on top of what drifts ``[P]``.
        num_draws: for the trace in V, see `singular_limit`.
        separation: a mode counts as separated at alpha lambda step >= this.
        rtol: of the nearest point; the distance, stationary there, is then right to about rtol^2.
        max_steps: most linearisations for the nearest point; early in training it is far and may not be found.
        max_dense: up to this many residuals the geometry is exact; above, Lanczos, and unless B B^T is cheap to factor
            the linearised distance.
        subset: whether training uses samples that the problem does not have; noted in the record.
        generator: of random directions.
    """
    # the separated modes are those of H at w: there the loss and the noise pull against one another
    settled = TangentSpace(problem.gauss_newton(w, max_dense=max_dense, rtol=1e-2, max_steps=200))
    factored = settled.hessian.decomposed or settled.hessian.inverse is not None
    foot = nearest_point(
        problem,
        w,
        rtol=rtol if settled.hessian.decomposed else max(rtol, _COARSE),
        max_steps=max_steps if factored else 1,
        max_dense=max_dense,
        krylov_steps=100,
        hessian=settled.hessian,
    )
    tangent = tangent_at(problem, foot.point, max_dense=max_dense)
    drifting = w if carried is None else w - carried
    separated = expected = count = limit = expansion = offset = None
    direction, tangent_steps = math.nan, math.nan
    if noise is not None and sgd is not None:
        pull, expansion = _pull(problem, drifting, noise, sgd, num_draws=num_draws, generator=generator)
        batch, level = sgd.batch(problem.num_samples), separation_level(sgd.effective_lr, step, separation)
        Sigma = gradient_noise(noise, problem, w, batch_size=batch, num_draws=num_draws, generator=generator)
        expectation = expected_distance(
            settled.hessian, pull, Sigma, sgd=sgd, level=level, num_draws=4, generator=generator
        )
        expected, offset = expectation.rms, expectation.offset.mean
        del pull, Sigma, expectation  # as large as several weight vectors each
    if sgd is not None:
        count = settled.num_separated(lr=sgd.effective_lr, steps=step, threshold=separation)
        part = settled.separated(foot.linearised, lr=sgd.effective_lr, steps=step, threshold=separation)
        separated = torch.linalg.vector_norm(part).item()
        if offset is not None:
            direction = compare(part, offset).cosine
        del part, offset
    if noise is not None and sgd is not None and not (expansion is not None and expansion.fails):
        limit = singular_limit(
            problem, foot.point, noise, sgd, num_draws=num_draws, hessian=tangent.hessian, generator=generator
        )
        if not tangent.hessian.decomposed and limit.drift.any():
            tangent_steps = 1 / (sgd.effective_lr * tangent.curvature(limit.drift))
    return Observation(
        step=step,
        weights=w,
        drifting=drifting,
        loss_gap=problem.loss(w).item(),
        foot=foot,
        tangent=tangent,
        separated=separated,
        expected=expected,
        direction=direction,
        num_separated=count,
        num_modes=settled.num_modes,
        limit=limit,
        tangent_steps=tangent_steps,
        finite_noise=expansion,
        moves=noise is not None and noise.order is not None,
        subset=subset,
    )


# of the nearest point where a linearisation takes seconds: the distance is right to a hundredth
_COARSE = 0.1
# optimizer steps up to which following each of them costs less than long steps with their error estimate
_SHORT = 200
# estimated error of a prediction, relative to the displacement, that is put up with: 2 % of the cosine
_ACCURATE = 0.2
# the same from which long steps tell nothing
_BLIND = 0.5


@dataclass(frozen=True)
class Spread:
    """Length of the motion along Gamma, measured and predicted, where the limit diffuses; in weight norm.

    predicted^2 = |K drift|^2 + K diffusion dim Gamma
    """

    measured: float
    predicted: float


@dataclass(frozen=True)
class WindowObservation:
    """The motion of the weights over one window, measured and predicted.

    Args:
        start: optimizer steps at its beginning.
        stop: at its end.
        displacement: measured, w(stop) - w(start) ``[P]``.
        prediction: descent on the effective loss by `finite_window` (None where the noise has none); followed step by
            step where the window is short or the long steps are not accurate.
        drift: measured against it.
        scatter: standard errors of that agreement, from parts of the window (nan without weights in between).
        flow: the same followed step by step, `effective_flow`, where it was asked for.
        reference: measured against that.
        null: measured against descent on L alone, the control that must be lower.
        pull: the noise's own part of the motion, measured over predicted (None without a prediction); see `noise_pull`.
        pull_share: how large that part is in it, |prediction - null| / |prediction| (nan without one).
        limit: the tangential part of the measured motion against the singular limit's (None where nothing moves).
        spread: how far along Gamma, where the limit diffuses (else None): no deterministic prediction has a direction.
        ceiling: the best cosine that any deterministic prediction can have (nan without replicas).
        plane: the two paths in the plane of prediction and deviation (None without a prediction).
        products: gradients of the whole probe set that the predictions took.
    """

    start: int
    stop: int
    displacement: Tensor = field(repr=False)
    prediction: WindowPrediction | None = field(repr=False)
    drift: Agreement | None
    scatter: Scatter
    flow: WindowPrediction | None = field(repr=False)
    reference: Agreement | None
    null: Agreement
    pull: Estimate | None
    pull_share: float
    limit: Agreement | None
    spread: Spread | None
    ceiling: float
    plane: Plane | None = field(repr=False)
    products: int

    @property
    def withdrawn(self) -> str | None:
        """Why the prediction is not given, where it was tried in vain."""
        if self.prediction is None:
            return None
        size, off = torch.linalg.vector_norm(self.prediction.displacement).item(), self.prediction.error
        if math.hypot(off, self.prediction.stderr) > _BLIND * size and off > 0:
            return (
                f"long steps over the window {self.start}-{self.stop} are uncertain by more than half of what they "
                "predict, and there was no time to follow every step: pass max_overhead=None"
            )
        if self.prediction.status != "diverged":
            return None
        return (
            f"descent on the effective loss runs away in the window {self.start}-{self.stop}: training itself is "
            "probably unstable at this step size and noise"
        )


def observe_window(
    problem: ZeroLossProblem,
    origin: Tensor,
    w: Tensor,
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
) -> WindowObservation:
    """Compare where the weights went with where the effective flow, descent on L alone and the limit would go.

    Args:
        problem: loss and probe set, all the samples that training uses.
        origin: what drifts, at the window's beginning ``[P]``: the weights without what they carry for a step.
        w: the same at its end ``[P]``.
        start: optimizer steps at the beginning.
        stop: at the end.
        noise: the system.
        sgd: settings over the window (lr: its mean, under a schedule).
        forecast: the limit's, from the weights at the beginning; None: without it.
        replicas: independent runs of the window for the ceiling; 0: none.
        reference: follow the effective flow step by step, too.
        accurate: follow every step where the long steps of `finite_window` are estimated to be off by more than a
            fifth; else their error is only told.
        between: what drifted at some steps in between, step -> ``[P]``, for standard errors.
        velocity: the optimizer's momentum at the start ``[P]``.
        generator: of noise and batches.
    """
    steps = stop - start
    measured = w - origin
    marks = [step - start for step in (*(between or {}), stop)]

    def stepwise(system: NoiseSystem, marks: Sequence[int] = ()) -> WindowPrediction:
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
        return window if window.status == "ok" and good else None

    null = long_steps(Minibatch()) or stepwise(Minibatch())
    prediction = flow = None
    if has_effective_flow(noise, problem):
        flow = stepwise(noise, marks) if reference else None
        prediction = long_steps(noise, marks) or flow or stepwise(noise, marks)
    runs = [measured]
    if replicas:
        ensemble = simulate(
            problem, origin, noise, sgd, steps=steps, replicas=replicas, velocity=velocity, generator=generator
        )
        runs.extend(ensemble.displacements)
    path = [*(v - origin for v in (between or {}).values()), measured]
    limit = spread = None
    if forecast is not None:
        limit = compare(forecast.tangent.project(measured), steps * forecast.drift)
        if forecast.diffusion:
            spread = Spread(
                limit.measured, math.hypot(limit.predicted, math.sqrt(steps * forecast.diffusion * forecast.dimension))
            )
    return WindowObservation(
        start=start,
        stop=stop,
        displacement=measured,
        prediction=prediction,
        drift=None if prediction is None else compare(measured, prediction.displacement),
        scatter=jackknife(path, path if prediction is None else list(prediction.path)),
        flow=flow,
        reference=None if flow is None else compare(measured, flow.displacement),
        null=compare(measured, null.displacement),
        pull=None if prediction is None else noise_pull(runs, prediction.displacement, null.displacement),
        pull_share=math.nan
        if prediction is None
        else compare(prediction.displacement, null.displacement).residual_ratio,
        limit=limit,
        spread=spread,
        ceiling=noise_ceiling(runs),
        plane=None if prediction is None else plane(path, list(prediction.path)),
        products=sum({id(each): each.products for each in (null, prediction, flow) if each is not None}.values()),
    )
