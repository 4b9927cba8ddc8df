"""The displacement over a window of K steps by a few long exponential steps, at finite separation of time scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry import linearize
from torch_singlim.linalg import LinearDescent, Result, descent_norm, linear_descent
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.effective import EffectiveLoss, WindowPrediction, check_marks
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["finite_window"]

_FIRST = 5  # the first sub-step is the window divided by this number
_KRYLOV = 0.05  # relative accuracy of a sub-step: far below the sampling error of its slope
_GROW, _SHRINK = 2.0, 0.3  # largest and smallest factor between the lengths of successive sub-steps


def _block_mean(effective: EffectiveLoss, w: Tensor, strata: int) -> tuple[Tensor, int]:
    """Mean gradient of one stratified block at w ``[P]``, and the number of gradients that were computed."""
    total, count = torch.zeros_like(w), 0
    for gradient in effective.block(w, strata):
        total += gradient
        count += 1
    mean = total.div_(count)
    return (mean + effective.order_two_gradient(w), count + 2) if effective.second else (mean, count)


@dataclass(frozen=True)
class _SubStep:
    """One exponential sub-step: the linear descent u(t) from its starting point.

    Args:
        origin: the starting point  ``[P]``.
        descent: u.
        length: h.
        size: norm of u(h).
        sampled: norm of the sampling error of u(h).
        local: estimated norm of the integration error of u(h).
        gradients: number of gradients over all samples that were computed.
        finite: whether the network's outputs in the middle, and the errors, are finite.
    """

    origin: Tensor = field(repr=False)
    descent: LinearDescent = field(repr=False)
    length: float
    size: float = 0.0
    sampled: float = 0.0
    local: float = 0.0
    gradients: float = 0.0
    finite: bool = True

    def middle_of_next(self, h: float) -> Tensor:
        """The middle of the next sub-step, of length h, as extrapolated by the descent of this one  ``[P]``."""
        return self.origin + self.descent.at(self.length + h / 2)


def _sub_step(effective: EffectiveLoss, at: Tensor, last: _SubStep, h: float, strata: int) -> _SubStep:
    """The sub-step of length h from `at` ``[P]``, linearised about its middle, with its errors."""
    problem, middle = effective.problem, last.middle_of_next(h)
    mean, cost = _block_mean(effective, middle, strata)
    half = None
    if effective.is_random:
        other, more = _block_mean(effective, middle, strata)
        mean, half, cost = (mean + other) / 2, mean.sub_(other).div_(2), cost + more
        del other
    if not torch.isfinite(problem.outputs(middle)).all():
        return _SubStep(at, last.descent, h, finite=False)
    B = linearize(problem, middle).operator
    sampled = 0.0 if half is None else descent_norm(B, half, time=h)  # the error of the two blocks' mean
    slope = mean + B.normal_product(at - middle)
    del mean, half
    descent = linear_descent(B, slope, time=h, rtol=_KRYLOV)
    u = descent.at(h)
    draw = effective.draw()
    bend = draw(at).add_(draw(at + u)).sub_(draw(middle), alpha=2)
    local = descent_norm(B, bend.sub_(B.normal_product(2 * (at - middle) + u)), time=h) / 6
    # two products for the offset and the bend, three gradients for the bend, two short Lanczos runs
    cost = cost + descent.products + 2 + 3 + 2 * 3.5
    size = torch.linalg.vector_norm(u).item()
    return _SubStep(at, descent, h, size, sampled, local, cost, math.isfinite(size + local))


def finite_window(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    rtol: float = 0.1,
    num_draws: int = 22,
    marks: Sequence[int] = (),
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WindowPrediction:
    """Displacement over K steps of descent on the effective loss, by exponential sub-steps.

        dw/dt = -g(w),   g = grad L_eff,   t = alpha k;   about the middle m of a sub-step of length h
        w + u(h),   u(h) = -h phi1(-h H(m)) (g(m) + H(m) (w - m)),      phi1(z) = (e^z - 1)/z

    Normal modes relax (phi1 -> 0), tangent modes drift (phi1 = 1), slow modes are in between. H = B^T B is the
    Gauss-Newton matrix; only products with it are used (Lanczos). The middle m is extrapolated by the linear descent of
    the previous sub-step; linearising about the middle makes the method of second order for any H. g(m) is the mean of
    two stratified blocks of draws, whose difference gives the sampling error. The length of a sub-step is chosen by an
    estimate of its integration error: with N(w) = g(w) - H (w - m), the part of g that is not linear, and the same draw
    in all three terms,

        |h phi1(-h H) (N(w) - 2 N(m) + N(w + u))| / 6        (Simpson's rule minus the midpoint rule)

    If nothing is random, one exact gradient replaces the blocks. With momentum mu, z = w - c v, c = alpha mu/(1 - mu),
    moves by plain gradient descent with step size alpha/(1 - mu).

    Args:
        problem: loss and samples: all samples that training uses.
        w: weights at the start of the window ``[P]``.
        noise: the system.
        sgd: step size and momentum; the batch size matters for noises of order 2 only.
        steps: K.
        rtol: a sub-step is shortened if its integration error exceeds rtol times its displacement and half its sampling
            error. The integration ends if it takes more gradients than unit-step integration.
        num_draws: number of gradients of single draws in a sub-step (fewer if it spans fewer steps). In blocks of about
            1/p draws or more, terms linear in the noise cancel: one stratified draw is then worth several independent
            ones.
        marks: steps at which the path is recorded, the last of them K; default: K alone.
        velocity: the optimizer's momentum at the start ``[P]``, if it has any.
        generator: of the draws.

    Raises:
        ValueError: fewer than one step; a noise without an effective loss (see `has_effective_flow`).

    Source: M. Hochbruck, A. Ostermann, Exponential integrators, Acta Numerica 2010; arXiv 2404.12293 for the limit.

    >>> from torch import nn
    >>> from torch_singlim.noise import Minibatch
    >>> problem = ZeroLossProblem(nn.Linear(1, 1, bias=False), "mse", torch.ones(1, 1), torch.zeros(1, 1))
    >>> window = finite_window(problem, torch.ones(1).double(), Minibatch(), SGDSettings(lr=0.01), steps=50)
    >>> window.displacement, window.status.name  # e^{-1} - 1: H = 2, t = 0.5
    (tensor([-0.6321], dtype=torch.float64), 'SUCCESSFUL')
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    marks = check_marks(marks, steps)
    path = w.new_empty(len(marks), w.numel())
    effective = EffectiveLoss(problem, noise, sgd, generator=generator)
    lag = sgd.lr * sgd.momentum / (1 - sgd.momentum) * (sgd.momentum if sgd.nesterov else 1)
    alpha, total = sgd.effective_lr, sgd.effective_lr * steps
    at = w if velocity is None or lag == 0 else w - lag * velocity
    time, h, gradients, variance, error = 0.0, total / _FIRST, 0.0, 0.0, 0.0

    def failed(status: Result) -> WindowPrediction:
        path[-1] = at - w
        return WindowPrediction(path, math.nan, math.inf, round(gradients), status)

    def strata() -> int:
        return math.ceil(min(num_draws, h / alpha) / 2)

    # to begin with, a sub-step of length 0, linearised about w itself
    mean, cost = _block_mean(effective, at, strata())
    last = _SubStep(at, linear_descent(linearize(problem, at).operator, mean, time=h / 2, rtol=_KRYLOV), 0.0)
    gradients += cost + last.descent.products
    del mean
    while time < total * (1 - 1e-9):
        h = (total - time) / math.ceil((total - time) / h * (1 - 1e-9))  # avoids a short last sub-step
        step = _sub_step(effective, at, last, h, strata())
        gradients += step.gradients
        if not step.finite:
            return failed(Result.DIVERGED)
        # there is no use in an integration error far below the sampling error
        allowed = max(rtol * step.size, step.sampled / 2)
        # the error is zero on Gamma without noise
        change = 0.9 * math.sqrt(allowed / step.local) if step.local > 0 else math.inf
        wanted = max(alpha, h * min(_GROW, max(_SHRINK, change)))
        if step.local > allowed and h > alpha:
            h = wanted
            if gradients > steps:  # unit-step integration would have been cheaper
                return failed(Result.INACCURATE)
            continue
        variance += step.sampled**2
        error = math.hypot(error, step.local)
        for i, mark in enumerate(marks):
            since = alpha * mark - time
            if since > 0 and (since <= h or mark == steps):  # the entry for K is overwritten by later sub-steps
                since = min(since, h)
                path[i] = at + step.descent.at(since) - w
                if lag:  # w = z + c v, and v = -(z_k - z_{k-1})/lr
                    path[i] -= lag / sgd.lr * (step.descent.at(since) - step.descent.at(since - min(alpha, since)))
        last, at, time, h = step, at + step.descent.at(h), time + h, wanted
    return WindowPrediction(path, math.sqrt(variance), error, round(gradients), Result.SUCCESSFUL)
