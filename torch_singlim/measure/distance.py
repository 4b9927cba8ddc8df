"""The distance of one snapshot from the zero-loss set, and the prediction of the singular limit from there."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_singlim.geometry import (
    MAX_DENSE,
    NearestPoint,
    TangentSpace,
    gauss_newton,
    linearize,
    nearest_point,
    num_modes,
    relaxation_level,
    relaxed_part,
    tangent_space,
)
from torch_singlim.linalg import CholeskyFactor, FactoredOperator, VectorEstimate
from torch_singlim.measure.agreement import Agreement, compare
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem, parts
from torch_singlim.theory import (
    EffectiveLoss,
    LimitPrediction,
    SecondMoments,
    SGDSettings,
    UnstableStepError,
    averaged_gradient,
    diagonal,
    expected_distance,
    gradient_noise,
    has_effective_flow,
    has_finite_step,
    of_hessian,
    potential,
    sampled_potential,
    singular_limit,
)

__all__ = [
    "NEAREST",
    "NEAREST_STEPS",
    "DistanceMeasurement",
    "Expansion",
    "Forecast",
    "RelaxedPart",
    "compare_expansion",
    "compare_moments",
    "measure_distance",
    "tangent_at",
]

# tolerance of the nearest point: an estimated error of the distance of 1 %, the square of this over 2
NEAREST = 0.14
# maximum number of linearisations; of 40 states along six trainings, 39 took 5 to 18
NEAREST_STEPS = 20
# random vectors for the expected variance where H is not decomposed: each averages over thousands of residuals
_FORMS = 2
# number of independent averages from which the standard error of a sampled gradient is computed
_GROUPS = 4


@dataclass(frozen=True)
class Expansion:
    """The paper's second-order expansion of the noise, compared with the average over noise of finite size.

    Args:
        cosine: between grad V and E_eta grad Lhat - grad L.
        ratio: |grad V| over the norm of the other; far from 1: the expansion does not hold at this noise level.
        stderr: sampling error of the two, relative to their norms.
    """

    cosine: float
    ratio: float
    stderr: float

    @property
    def fails(self) -> bool:
        """Whether the expansion clearly does not hold: cosine or norm off by more than 0.15 and the sampling error."""
        return abs(self.ratio - 1) > 0.15 + self.stderr or self.cosine < 0.85 - self.stderr


def compare_expansion(averaged: VectorEstimate, expanded: VectorEstimate) -> Expansion:
    """Compare the averaged gradient with grad V at the same weights, from other draws; corrects sampling errors."""
    a, b = averaged.norm, expanded.norm
    if a * b == 0:
        return Expansion(math.nan, math.nan, math.nan)
    cosine = torch.dot(averaged.mean, expanded.mean).item() / (a * b)
    return Expansion(cosine, b / a, math.hypot(averaged.stderr / a, expanded.stderr / b))


@dataclass(frozen=True)
class Forecast:
    """The motion that the singular limit predicts from one point of Gamma, with the drift of that point.

    Args:
        point: ``[P]``.
        tangent: the tangent space of Gamma there.
        drift: mean displacement per optimizer step ``[P]``.
        diffusion: variance per step and tangent direction, in squared weight norm.
        dimension: of Gamma.
        finite_step: whether the drift is that at this step size, exactly in alpha.
        relaxed: whether a mode has relaxed: before that, the limit cannot hold.
    """

    point: Tensor = field(repr=False)
    tangent: TangentSpace = field(repr=False)
    drift: Tensor = field(repr=False)
    diffusion: float
    dimension: int
    finite_step: bool = False
    relaxed: bool = True


@dataclass(frozen=True)
class RelaxedPart:
    """Distance along the relaxed modes at w: the part of B^+ b, the linearised displacement, with alpha lambda k >= c.

    Args:
        measured: norm of this part.
        expected: root mean square of this norm by theory (None without a prediction).
        cosine: with the mean offset that theory expects (nan at order 2, and without a prediction).
        count: number of relaxed modes; an estimate, or nan, if H is too large to be decomposed.
        num_modes: number of normal modes; an upper bound, the number of residuals, if H is too large to be decomposed.
    """

    measured: float
    expected: float | None
    cosine: float
    count: float
    num_modes: int


@dataclass(frozen=True)
class DistanceMeasurement:
    """The distance of the weights from Gamma at one step, and the prediction of the limit.

    Args:
        step: optimizer steps so far.
        weight_norm: |w|.
        nearest: the nearest point of Gamma.
        tangent: the tangent space there.
        relaxed: the part of the distance along the relaxed modes (None without a step size that theory covers).
        limit: the singular limit's prediction at the nearest point (None if the theory does not cover the training, or
            if the expansion of the noise does not hold).
        tangent_steps: 1 / (alpha d^T H d / d^T d) for the limit's drift d. Over fewer steps d is practically tangent,
            although Lanczos does not remove all normal directions from it (nan if H was decomposed, or without drift).
        expansion: how well the expansion of the noise holds at these weights (at order 1 only).
        moments: the second moments of an adaptive optimizer, compared with c diag H for noise of order 2, Sigma = c H.
    """

    step: int
    weight_norm: float
    nearest: NearestPoint = field(repr=False)
    tangent: TangentSpace = field(repr=False)
    relaxed: RelaxedPart | None
    limit: LimitPrediction | None = field(repr=False)
    tangent_steps: float
    expansion: Expansion | None
    moments: Agreement | None = None

    @property
    def forecast(self) -> Forecast | None:
        """The motion along Gamma that the limit predicts from here (None if it predicts no motion)."""
        if self.limit is None or self.limit.order is None:
            return None
        limit = self.limit
        return Forecast(
            self.nearest.point,
            self.tangent,
            limit.drift,
            limit.diffusion,
            limit.dimension,
            limit.finite_step,
            relaxed=self.relaxed is None or self.relaxed.count != 0,
        )

    @property
    def of_nearest(self) -> Reason | None:
        """Why the nearest point was not found to tolerance (None if it was)."""
        if self.nearest.converged:
            return None
        return Code.NEAREST(status=self.nearest.status.message)

    @property
    def of_slower(self) -> Reason | None:
        """That the limit's drift lacks noise of a higher order (None if it does not)."""
        if self.limit is None or self.limit.finite_step:
            return None
        names = {1: [], 2: [], None: []}
        for part in parts(self.limit.noise):
            names[part.order].append(type(part).__name__)
        if not (names[1] and names[2]):
            return None
        return Code.SLOWER(leading=" and ".join(names[1]), others=" and ".join(names[2]))

    @property
    def reason(self) -> Reason | None:
        """Why the limit's prediction is invalidated: the expansion that it rests on fails (None if it holds)."""
        if self.expansion is None or not self.expansion.fails:
            return None
        cosine = min(max(self.expansion.cosine, -1.0), 1.0)  # corrected for sampling errors, it may lie outside
        return Code.EXPANSION_FAILS(step=self.step, cosine=cosine, ratio=self.expansion.ratio)


def compare_moments(problem: ZeroLossProblem, snapshot: Snapshot, noise: NoiseSystem) -> Agreement | None:
    """The second moments of an adaptive optimizer against c diag H, as which noise with Sigma = c H builds them up.

    Args:
        problem: loss and samples, in the weights themselves.
        snapshot: of the training.
        noise: the system; None is returned for other noise.
    """
    metric, sgd = snapshot.metric, snapshot.sgd
    if metric is None or metric.moments is None or sgd is None:
        return None
    c = of_hessian(noise, problem, sgd.batch(problem.num_samples))
    if not c:
        return None
    return compare(metric.moments.values.to(metric.ratios) / metric.ratios, c * diagonal(problem, snapshot.iterate))


def tangent_at(
    problem: ZeroLossProblem, point: Tensor, *, max_dense: int = MAX_DENSE, factor: CholeskyFactor | None = None
) -> TangentSpace:
    """The tangent space of Gamma at one of its points, with the accuracy that a measurement needs."""
    return tangent_space(problem, point, max_dense=max_dense, rtol=1e-3, max_steps=100, factor=factor)


def _noise_gradient(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    sampled: bool,
    num_draws: int,
    generator: torch.Generator | None,
) -> tuple[VectorEstimate, Expansion | None]:
    """The noise's average gradient at w ``[P]``, and at order 1 how well its second-order expansion holds."""
    gradient, expansion = VectorEstimate(torch.zeros_like(w)[None]), None
    if noise.order == 1:
        evaluate = sampled_potential if sampled else potential
        expanded = evaluate(noise, problem, w, num_draws=num_draws, generator=generator).gradient
        gradient = averaged_gradient(noise, problem, w, num_draws=num_draws, generator=generator)
        expansion = compare_expansion(gradient, expanded)
    if has_effective_flow(noise, problem):
        effective = EffectiveLoss(problem, noise, sgd, generator=generator)
        if effective.second:
            groups = len(gradient.groups) if len(gradient.groups) > 1 else _GROUPS
            second = torch.stack([effective.order_two_gradient(w) for _ in range(groups)])
            gradient = gradient + VectorEstimate(second)
    return gradient, expansion


def _relaxed(
    problem: ZeroLossProblem,
    snapshot: Snapshot,
    hessian: FactoredOperator,
    residual: Tensor,
    *,
    noise: NoiseSystem | None,
    num_draws: int,
    relaxed_after: float,
    generator: torch.Generator | None,
) -> tuple[RelaxedPart | None, Expansion | None]:
    """The part of B^+ b ``[P]`` along the relaxed modes, b the residual, with the value that theory expects."""
    sgd = snapshot.sgd
    if sgd is None:
        return None, None
    level = relaxation_level(sgd.effective_lr, snapshot.step, relaxed_after)
    expected = offset = expansion = None
    if noise is not None:
        w, batch = snapshot.weights, sgd.batch(problem.num_samples)
        gradient, expansion = _noise_gradient(
            problem,
            snapshot.iterate,
            noise,
            sgd,
            sampled=not hessian.decomposed,
            num_draws=num_draws,
            generator=generator,
        )
        Sigma = gradient_noise(noise, problem, w, batch_size=batch, num_draws=num_draws, generator=generator)
        expectation = expected_distance(
            hessian,
            gradient,
            Sigma,
            sgd=sgd,
            level=level,
            random_batches=True,
            num_draws=_FORMS,
            generator=generator,
        )
        expected, offset = expectation.rms, expectation.offset.mean
        del gradient, Sigma, expectation  # each takes the memory of several weight vectors
    part = relaxed_part(hessian, residual, level)
    cosine = math.nan if offset is None else compare(part, offset).cosine
    count = hessian.count(level)
    return RelaxedPart(torch.linalg.vector_norm(part).item(), expected, cosine, count, num_modes(hessian)), expansion


def _limit(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    *,
    moments: SecondMoments | None,
    num_draws: int,
    generator: torch.Generator | None,
) -> LimitPrediction:
    """The singular limit's prediction, with the drift at this step size where it is known and the step is stable."""
    options: dict[str, Any] = {"moments": moments, "num_draws": num_draws, "hessian": hessian, "generator": generator}
    predicted = functools.partial(singular_limit, problem, point, noise, sgd, **options)
    # small problems take all eigenvectors
    known = has_finite_step(noise, problem, sgd) and (hessian.decomposed or problem.num_residuals > MAX_DENSE)
    try:
        return predicted(finite_step=known)
    except UnstableStepError:  # `stability` tells
        return predicted(finite_step=False)


def measure_distance(
    problem: ZeroLossProblem,
    snapshot: Snapshot,
    *,
    noise: NoiseSystem | None = None,
    moments: SecondMoments | None = None,
    num_draws: int = 32,
    relaxed_after: float = 3.0,
    max_dense: int = MAX_DENSE,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> DistanceMeasurement:
    """Distance, tangent space and the limit's prediction at one snapshot.

    Args:
        problem: loss and samples.
        snapshot: of the training.
        noise: the system; None if the theory does not cover the training: no prediction then.
        moments: of an adaptive optimizer, in whose metric problem and snapshot are.
        num_draws: for the trace in V, see `singular_limit`.
        relaxed_after: a mode counts as relaxed once alpha lambda step reaches this.
        max_dense: up to this many residuals the geometry is exact. Above, Lanczos is used, and unless B B^T is cheap to
            factor, the distance is that of one linearisation.
        start: the nearest point of the last measurement  ``[P]``, where the search begins if H is not decomposed: one
            factor of B B^T is then enough, instead of about seven.
        generator: of random directions.
    """
    w = snapshot.weights
    at = linearize(problem, w)
    residual, cold = at.residual, start is None or problem.num_residuals <= max_dense
    # the relaxed modes are those of H at w, where loss and noise are in balance
    hessian = gauss_newton(problem, w, at=at, max_dense=max_dense, rtol=1e-2, max_steps=200, projections=cold)
    factored = hessian.decomposed or hessian.inverse is not None or not cold
    nearest = nearest_point(
        problem,
        w,
        rtol=NEAREST,
        max_steps=NEAREST_STEPS if factored else 1,
        max_dense=max_dense,
        krylov_steps=100,
        start=None if cold or start is None else start.to(w),
        at=at,
        hessian=hessian,
    )
    del at
    tangent = tangent_at(problem, nearest.point, max_dense=max_dense, factor=nearest.factor)
    relaxed, expansion = _relaxed(
        problem,
        snapshot,
        hessian,
        residual,
        noise=noise,
        num_draws=num_draws,
        relaxed_after=relaxed_after,
        generator=generator,
    )
    limit, tangent_steps, sgd = None, math.nan, snapshot.sgd
    if noise is not None and sgd is not None and not (expansion is not None and expansion.fails):
        limit = _limit(
            problem,
            nearest.point,
            noise,
            sgd,
            tangent.hessian,
            moments=moments,
            num_draws=num_draws,
            generator=generator,
        )
        if not tangent.hessian.decomposed and limit.drift.any():
            tangent_steps = 1 / (sgd.effective_lr * tangent.curvature(limit.drift))
    weight_norm = torch.linalg.vector_norm(w).item()
    return DistanceMeasurement(snapshot.step, weight_norm, nearest, tangent, relaxed, limit, tangent_steps, expansion)
