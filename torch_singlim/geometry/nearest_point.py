"""The nearest point of the zero-loss set, with an estimate of its error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry.constrained_model import ConstrainedModel, DualSolver
from torch_singlim.geometry.curvature import Linearization, linearize
from torch_singlim.geometry.gram import MAX_DENSE
from torch_singlim.linalg import CholeskyFactor, FactoredOperator, Result, TrustRegionStep, trust_region_step
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["NearestPoint", "nearest_point"]

# Gauss-Newton steps are taken as long as each reduces |b| to this share, and is no longer than this share of the last
_EASY_RESIDUAL, _EASY_STEP = 0.1, 0.5
# a step of length s along Gamma may increase |b| by O(s^2): residuals this small, relative to the first one, are enough
_FEASIBLE = 1e-3
# conjugate gradients on the tangent space: tolerance, and number of products; at 218 of 226 points of searches along
# trainings, they left the ball of radius d, or met the tolerance, in fewer
_CG_RTOL, _CG_STEPS = 0.1, 25
# the number if each of them solves a system with K by Lanczos
_CG_UNFACTORED = 5
# as a length, |b| counts like that at w, times this: the next one may lie in softer modes
_SOFT = 3.0
# systems with K that one such linearisation solves
_USES = 20
# the first radius of the trust region, as a share of the distance or of |n|; how it shrinks and grows
_FIRST, _SHRINK, _GROW = 0.3, 0.4, 2.0
# a step is accepted if the residual that a correction leaves, as a length, is below this share of the step. After 20
# linearisations, 1/2 gave longer distances for two of six states of a training and a shorter one for one; 1 for three
_NONLINEAR = 0.25
# share of the predicted decrease that must be found, and above which the radius may grow
_SUFFICIENT, _GOOD = 0.1, 0.7
# the normal step takes this share of the radius; it dominates above this share of the tangential one
_NORMAL_SHARE, _FAR = 0.8, 0.5
# relative accuracy of the projections on the tangent space
_PROJECTION = 1e-3
# how often a step is shortened
_TRIES = 30
# the point counts as close to Gamma if |n| is below this share of the distance
_CLOSE = 0.1
# w counts as near a focal point below this curvature of |v - w|^2 / 2 along Gamma (1 where Gamma is flat)
_FOCAL = 0.02
# the set counts as singular when the curvature of the modes that resist the step has fallen to this share
_SINGULAR = 1e-6
# ... or if the linearisation cannot reduce |b| below this share
_UNREACHABLE = 0.9


@dataclass(frozen=True)
class NearestPoint:
    """The nearest point of Gamma, and how accurately it was found.

    Args:
        point: ``[P]``.
        distance: |w - point|, in units of the weights' norm.
        error: estimated error of the distance, in the same units; inf if it is unknown, as after a single step. It is
            that of this local minimum: another part of Gamma may be closer.
        linearised: B^+ b, the displacement from Gamma by the linearisation at w alone ``[P]``; correct to first order.
            None if the search did not begin at w.
        status: how the search ended; successful: the error is below the given tolerance.
        residual: |b(point)|, about the square root of twice the remaining excess loss.
        steps: number of linearisations.
        products: number of products with B, its transpose or second derivatives of b; each costs one to two gradients.
        factor: that of K at a point one normal step away, where the search ended with such a step; else None.
    """

    point: Tensor = field(repr=False)
    distance: float
    error: float
    linearised: Tensor | None = field(repr=False)
    status: Result
    residual: float
    steps: int
    products: int
    factor: CholeskyFactor | None = field(default=None, repr=False)

    @property
    def converged(self) -> bool:
        """Whether the error is below the given tolerance."""
        return self.status is Result.SUCCESSFUL

    @property
    def linearised_distance(self) -> float | None:
        """|B^+ b|, in units of the weights' norm; None if the search did not begin at w."""
        return None if self.linearised is None else _norm(self.linearised)


def _norm(v: Tensor) -> float:
    return torch.linalg.vector_norm(v).item()


class _Search:
    """The iterates of `nearest_point`: v, |b(v)|, the estimated error of |v - w| and the trust region's radius.

    Args:
        problem: the loss and its samples.
        w: weights  ``[P]``.
        initial: |b(w)|.
        start: the first v, see `nearest_point`.
        solve: solves with K.
        rtol: see `nearest_point`.
    """

    def __init__(
        self, problem: ZeroLossProblem, w: Tensor, initial: float, start: Tensor | None, solve: DualSolver, rtol: float
    ) -> None:
        self.problem, self.w, self.initial, self.solve, self.rtol = problem, w, initial, solve, rtol
        self.v, self.residual, self.error, self.radius = w, initial, math.inf, math.inf
        self.moved, self.easy, self.successful = math.inf, start is None, False
        self.linearised: Tensor | None = None  # B^+ b at w
        self.dual: Tensor | None = None  # K^+ b at w
        self.length = 0.0  # |b(w)| as a length
        if start is not None:
            self.v, self.residual, self.length = start, _norm(problem.residual(start)), _norm(start - w)
        self.model: ConstrainedModel | None = None  # the last one
        self.first = math.inf  # curvature of the modes that resist the step at w
        self.first_rank = problem.num_residuals
        self.negative = False
        self.rounding = 100 * torch.finfo(w.dtype).eps

    def feasible(self, size: float) -> bool:
        """Whether |b| is small enough, or at the level of rounding errors."""
        return self.residual <= max(self.rtol * self.initial, self.rounding * size)

    def gauss_newton(self, at: Linearization) -> bool:
        """The step v <- w + B^+ (B (v - w) - b), if it contracts well. Gamma is then almost flat at this distance."""
        away = self.v - self.w
        dual = self.solve(at, at.operator.matvec(away) - at.residual)
        shift = at.operator.rmatvec(dual)
        if self.dual is None:
            self.dual, self.linearised, self.length = -dual, -shift, _norm(shift)
        target = self.w + shift
        residual, moved = _norm(self.problem.residual(target)), _norm(target - self.v)
        size, distance = _norm(target), _norm(shift)
        fallen = residual <= max(_EASY_RESIDUAL * self.residual, _FEASIBLE * self.initial, self.rounding * size)
        if not fallen or moved > max(_EASY_STEP * self.moved, self.rounding * size):
            return False
        # The next step's normal part enters the distance to first order. Its tangential part, which enters squared,
        # shrinks like the steps, or, before there is a second one, like the turn of the tangent space, which |b| tells
        share = min(1.0, residual / self.residual) if self.residual > 0 else 0.0
        rate = max(moved / self.moved, 2 * share)
        normal = min(moved * share, _SOFT * residual / self.initial * self.length)
        self.error = normal + (rate * moved) ** 2 / max(distance, moved)
        self.v, self.residual, self.moved = target, residual, moved
        stationary = moved <= max(self.rtol * distance, self.rounding * size)
        self.successful = stationary and self.feasible(size)
        return True

    def newton(self, at: Linearization) -> bool:
        """A step of sequential quadratic programming in a trust region; False if no step that is short enough helps.

        What must fall is |v - w|^2 / 2 - y^T b with the multipliers y at v: the Lagrangian, which the step models.
        """
        self.model = None  # each one takes several vectors of the weights' size
        away = self.v - self.w
        self.model = model = ConstrainedModel(at, away, self.solve, uses=_USES, dual=None if away.any() else self.dual)
        if self.first == math.inf:
            self.first, self.first_rank = model.rayleigh(model.dual), self.solve.rank
        d, n, second = model.distance, _norm(model.normal), model.second(model.normal)
        bent = model.project(second)
        bending = n**2 - torch.dot(model.normal, second).item()  # n^T W n
        del second
        # steps of Newton's kind converge superlinearly if their systems are solved accurately in the end
        rtol = min(_CG_RTOL, max(_norm(model.tangential) / d, 1e-8)) if d > 0 else _CG_RTOL
        for trial in range(_TRIES):
            theta = 1.0 if n == 0 else min(1.0, _NORMAL_SHARE * self.radius / n)
            gradient = model.tangential - theta * bent  # the normal step has turned it by then
            size = _norm(gradient)
            if size <= self.rounding * d:  # conjugate gradients would follow rounding errors
                gradient = torch.zeros_like(gradient)
            elif rtol * size <= self.rounding * d:
                # rounding errors of v - w have left a normal part, on which W vanishes
                gradient = model.project(gradient)
            step = trust_region_step(
                model.product,
                gradient,
                self.radius if self.radius < math.inf else _FIRST * max(d, n),
                reach=0.0 if trial else d,
                rtol=rtol,
                max_steps=_CG_STEPS if self.solve.factored else _CG_UNFACTORED,
            )
            if trial == 0 and d > 0:
                self._judge(model, step)
                if self.successful:  # another tangential step might not be as good as the error says
                    self.v = self.v + model.normal
                    self.residual = _norm(self.problem.residual(self.v))
                    return True
            length = math.hypot(theta * n, _norm(step.x))
            goal = (1 - theta) * at.residual
            v = self.v + theta * model.normal + step.x
            v, rest, left = self._correct(model, v, goal)
            before = d**2 / 2 - torch.dot(model.multiplier, at.residual).item() + theta**2 * bending / 2
            after = _norm(v - self.w) ** 2 / 2 - torch.dot(model.multiplier, rest).item() + left**2 / 2
            found, far = before - after, theta < 1 or n > _FAR * _norm(step.x)
            slack = self.rounding * d**2
            if left <= _NONLINEAR * length and (far or found >= _SUFFICIENT * step.decrease - slack):
                if self.radius == math.inf and step.decrease > 0:
                    self.radius = _GROW * _norm(step.x)
                elif trial == 0 and (theta < 1 or not step.inside):
                    good = far or found >= _GOOD * step.decrease
                    self.radius *= _GROW if good and left <= _NONLINEAR / 2 * length else 1.0
                self.v, self.residual = v, _norm(self.problem.residual(v))
                return True
            self.radius = _SHRINK * length
        return False

    def _correct(self, model: ConstrainedModel, v: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, float]:
        """v after a normal step towards b = goal with B as it was, b there, and what is left of it as a length.

        Without a factor of K, such a step costs too much; the length is then estimated as at w.
        """
        at = model.at
        if not self.solve.factored:
            rest = at.residual_at(v)
            return v, rest, _norm(rest - goal) / self.initial * self.length
        v = v - model.shortest(at.residual_at(v) - goal)
        rest = at.residual_at(v)
        return v, rest, _norm(model.shortest(rest - goal))

    def _judge(self, model: ConstrainedModel, step: TrustRegionStep) -> None:
        """The error of |v - w|, and whether it is below the tolerance."""
        d, n, size = model.distance, _norm(model.normal), _norm(self.v)
        self.negative = step.negative
        # in the ball of radius d the model falls by more than |v - w|^2 / 2 does, as a rule: at 122 of 139 points of
        # 22 searches along trainings whose distance was wrong by more than .1 %, this error covered that
        self.error = abs(model.corrected - d) + step.reach_decrease / d
        small = self.error <= max(self.rtol**2 / 2 * d, self.rounding * size)
        self.successful = small and n <= max(self.rtol * d, self.rounding * size) and self.feasible(size)

    def status(self, stalled: bool) -> Result:
        """How the search ended; looks for a singular set and for focal points."""
        if self.model is None:  # Gauss-Newton steps alone
            return Result.SUCCESSFUL if self.successful else Result.MAX_STEPS
        model = self.model
        soft = self.first < math.inf and model.rayleigh(model.multiplier) < _SINGULAR * self.first
        lost = self.solve.rank < self.first_rank or soft
        if lost or (self.residual > self.rounding and model.unreachable > _UNREACHABLE):
            self.error = math.inf
            return Result.SINGULAR
        close = model.distance > 0 and _norm(model.normal) <= _CLOSE * model.distance
        smallest = model.smallest_curvature() if self.successful and close else math.inf
        if smallest < _FOCAL or (close and self.negative and not self.successful):
            # the distance may fall along that direction, at most as the model does in the ball of radius d
            self.error += max(-smallest, 0.0) / 2 * model.distance if smallest < math.inf else 0.0
            return Result.NEAR_FOCAL_POINT
        if self.successful:
            return Result.SUCCESSFUL
        return Result.STALLED if stalled else Result.MAX_STEPS


def nearest_point(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    rtol: float = 1e-6,
    max_steps: int = 20,
    max_dense: int = MAX_DENSE,
    krylov_steps: int = 500,
    start: Tensor | None = None,
    at: Linearization | None = None,
    hessian: FactoredOperator | None = None,
) -> NearestPoint:
    """The nearest point of Gamma to w: minimise |v - w|^2 / 2 subject to b(v) = 0, with an estimate of the error.

    Next to Gamma by Gauss-Newton steps, as long as they contract well:

        v <- w + B(v)^+ (B(v) (v - w) - b(v))

    Else by sequential quadratic programming in a trust region. A step consists of a share of the normal step
    n = -B^+ b, of a tangential step t, and of a correction by one more normal step with the same B:

        min  g^T t + t^T W t / 2      over tangent t, |t| <= radius
        g = P_T (v - w + W n),  W = I - sum_i y_i D^2 b_i,  y = K^+ B (v - w)

    At a stationary point b(v) = 0 and P_T (v - w) = 0. The error of |v - w| is of second order in the second of these:

        error = | |v + n - w| - |v - w| | + max_t -(g^T t + t^T W t / 2) / |v - w|      over |t| <= |v - w|

    Where W is positive, that maximum is g^T W^+ g / 2. Close to a focal point of Gamma it is not, and the ball limits
    the estimate. All this is local: another part of Gamma may be closer.

    Args:
        problem: the loss and its samples.
        w: weights ``[P]``.
        rtol: the search is successful when the last step of Gauss and Newton is at most rtol times the distance, or
            the error at most rtol^2 / 2 times the distance, which is the same where W = I; or, next to Gamma, at the
            level of rounding errors.
        max_steps: maximum number of linearisations.
        max_dense: B B^T is formed and factored up to this many residuals, and above if that is cheap; as long as its
            factor is a good preconditioner of the later ones, only once. Else Lanczos is used.
        krylov_steps: maximum number of products for each solve if Lanczos is used.
        start: a point near Gamma to begin at  ``[P]``, such as the nearest point of weights nearby: one step may then
            be enough, but the search stays near it. Default: w.
        at: ``linearize(problem, w)``, if it was computed already.
        hessian: ``gauss_newton(problem, w)``, if it was computed already; K then need not be formed at w.

    Raises:
        ValueError: weights or outputs that are not finite; a loss that never reaches its infimum.

    Sources: R. H. Byrd, E. O. Omojokun (Omojokun's thesis, Boulder 1989) for the composite step; N. Gould, M. Hribar,
    J. Nocedal, SIAM J. Sci. Comput. 23, 2001, for conjugate gradients on the tangent space.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> nearest = nearest_point(problem, torch.tensor([1.0, 5.0], dtype=torch.float64))
    >>> nearest.point, nearest.distance, nearest.converged, nearest.error < 1e-12
    (tensor([3., 5.], dtype=torch.float64), 2.0, True, True)
    """
    if w.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError("the weights contain nan or infinity: training has probably diverged")
    at = linearize(problem, w) if at is None else at
    initial, eps = _norm(at.residual), torch.finfo(w.dtype).eps
    if initial <= 100 * eps:
        return NearestPoint(w, 0.0, 0.0, torch.zeros_like(w), Result.SUCCESSFUL, initial, 0, 0)
    solve = DualSolver(
        problem,
        at,
        hessian,
        # the error estimate takes the square of these; on a wide spectrum, they may not get below 1e4 eps
        rtol=max(min(0.1 * rtol, rtol**2 / 20, _PROJECTION), 1e4 * eps),
        direct_rtol=min(0.1 * rtol, _PROJECTION),
        max_dense=max_dense,
        krylov_steps=krylov_steps,
    )
    search, steps, stalled = _Search(problem, w, initial, start, solve, rtol), 0, False
    at = at if start is None else linearize(problem, start)
    while not (search.successful or stalled) and steps < max_steps:
        at = solve.counted(linearize(problem, search.v) if steps else at)
        steps += 1
        search.easy = search.easy and search.gauss_newton(at)
        stalled = not search.easy and not search.newton(at)
    status, distance = search.status(stalled), _norm(search.v - w)
    factor = solve.factor if search.successful else None
    return NearestPoint(
        search.v, distance, search.error, search.linearised, status, search.residual, steps, solve.products, factor
    )
