"""The nearest point of the zero-loss set, and the displacement from that set by one linearisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry.curvature import Linearization, linearize
from torch_singlim.geometry.gram import MAX_DENSE, gram_flops
from torch_singlim.linalg import FactoredOperator, Result, Solution, cholesky, minimum_norm, preconditioned_solve
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["NearestPoint", "linearised_displacement", "nearest_point"]

# cost of two triangular solves, which are limited by memory bandwidth, in units of M^2 operations
_TRIANGULAR = 100.0
# a step of length s along Gamma may increase |b| by O(s^2): residuals this small, relative to the first one, count as
# feasible
_FEASIBLE = 1e-3
# the line search does not go below this share of the full step
_SHORTEST = 1e-3


@dataclass(frozen=True)
class NearestPoint:
    """The nearest point of Gamma, and how accurately it was found.

    Args:
        point: ``[P]``.
        distance: |w - point|, in units of the weights' norm; an upper bound of the distance unless `converged`.
        linearised: B^+ b, the displacement from Gamma by the linearisation at w alone ``[P]``; correct to first order.
        status: how the search ended; successful: the point is on Gamma and stationary to the given tolerance.
        residual: |b(point)|, about the square root of twice the remaining excess loss.
        steps: number of linearisations.
    """

    point: Tensor = field(repr=False)
    distance: float
    linearised: Tensor = field(repr=False)
    status: Result
    residual: float
    steps: int

    @property
    def converged(self) -> bool:
        """Whether the point is on Gamma and stationary to the given tolerance."""
        return self.status is Result.SUCCESSFUL

    @property
    def linearised_distance(self) -> float:
        """|B^+ b|, in units of the weights' norm."""
        return torch.linalg.vector_norm(self.linearised).item()


class _MinimumNorm:
    """x = B^+ r for a sequence of linearisations; the factor of an earlier K serves as a preconditioner.

    Args:
        problem: the loss and its samples.
        hessian: H at the first of these points, if it was computed already.
        rtol: relative residual of the preconditioned solves.
        direct_rtol: relative residual of the other solves.
        max_dense: K is formed and factored up to this many residuals, and above if that is cheap.
        krylov_steps: maximum number of products in the solves without preconditioner.
    """

    def __init__(
        self,
        problem: ZeroLossProblem,
        hessian: FactoredOperator | None,
        *,
        rtol: float,
        direct_rtol: float,
        max_dense: int,
        krylov_steps: int,
    ) -> None:
        M = float(problem.num_residuals)
        # number of preconditioned steps that cost as much as forming and factoring K; a product is about two gradients
        step_flops = 6 * problem.flops * problem.num_samples + _TRIANGULAR * M**2
        self.patience = min(100, max(4, round((gram_flops(problem) + M**3 / 3) / step_flops)))
        self.inverse: Callable[[Tensor], Tensor] | None = None if hessian is None else hessian.inverse
        self.decomposed = problem.num_residuals <= max_dense
        self.rtol, self.direct_rtol, self.krylov_steps = rtol, direct_rtol, krylov_steps

    def __call__(self, at: Linearization, rhs: Tensor) -> Solution:
        """The shortest x with B x = r  ``[P]``."""
        B = at.operator
        if self.inverse is not None:
            inner = preconditioned_solve(B.gram_product, rhs, self.inverse, rtol=self.rtol, max_steps=self.patience)
            if inner.status is Result.SUCCESSFUL:
                return Solution(B.rmatvec(inner.x), inner.status, inner.steps, inner.residual)
        gram = at.gram() if self.decomposed or at.cheap_gram else None
        factor = None if gram is None else cholesky(gram)
        if factor is None and not self.decomposed:
            gram = None  # computing its eigenvectors would take too long
        self.inverse = None if factor is None else lambda r: torch.cholesky_solve(r[:, None], factor)[:, 0]
        return minimum_norm(B, gram, rhs, rtol=self.direct_rtol, max_steps=self.krylov_steps)


def _line_search(
    problem: ZeroLossProblem, v: Tensor, target: Tensor, residual: float, feasible: float
) -> tuple[Tensor, float, float] | None:
    """v + s (target - v), |b| there and s, for the first s of 1, 1/2, 1/4, ... that reduces |b|; None if none does."""
    share = 1.0
    while share > _SHORTEST:
        trial = v + share * (target - v)
        trial_residual = torch.linalg.vector_norm(problem.residual(trial)).item()
        if trial_residual < max((1 - 0.1 * share) * residual, feasible):
            return trial, trial_residual, share
        share /= 2
    return None


def nearest_point(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    rtol: float = 1e-6,
    max_steps: int = 20,
    max_dense: int = MAX_DENSE,
    krylov_steps: int = 500,
    at: Linearization | None = None,
    hessian: FactoredOperator | None = None,
) -> NearestPoint:
    """The nearest point of Gamma to w: minimise |v - w| subject to b(v) = 0, by Gauss-Newton steps.

        v <- w + B(v)^+ (B(v) (v - w) - b(v))

    At a fixed point, b(v) = 0 and v - w is in the range of B(v)^T, the normal space: |v - w| is stationary on Gamma.
    A step is halved as long as it would increase |b|, which the full step can do far from Gamma.

    Args:
        problem: the loss and its samples.
        w: weights ``[P]``.
        rtol: the search is successful when the last step is at most rtol times the distance, or, next to Gamma, at the
            level of rounding errors.
        max_steps: maximum number of linearisations.
        max_dense: B B^T is formed and factored up to this many residuals, and above if that is cheap. As a rule this
            is done once, since the factor preconditions the later solves. Else Lanczos is used.
        krylov_steps: maximum number of products for each linearisation if Lanczos is used.
        at: ``linearize(problem, w)``, if it was computed already.
        hessian: ``gauss_newton(problem, w)``, if it was computed already; K then need not be formed at all.

    Raises:
        ValueError: weights or outputs that are not finite; a loss that never reaches its infimum.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> nearest = nearest_point(problem, torch.tensor([1.0, 5.0], dtype=torch.float64))
    >>> nearest.point, nearest.distance, nearest.converged
    (tensor([3., 5.], dtype=torch.float64), 2.0, True)
    """
    if w.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError("the weights contain nan or infinity: training has probably diverged")
    at = linearize(problem, w) if at is None else at
    initial = residual = torch.linalg.vector_norm(at.residual).item()
    eps = torch.finfo(w.dtype).eps
    rounding = 100 * eps
    solve = _MinimumNorm(
        problem,
        hessian,
        rtol=max(0.1 * rtol, 1e4 * eps),  # on a wide spectrum, conjugate gradients may not get below 1e4 eps
        direct_rtol=0.1 * rtol,
        max_dense=max_dense,
        krylov_steps=krylov_steps,
    )
    v, linearised, steps = w, torch.zeros_like(w), 0
    status = Result.SUCCESSFUL if initial <= rounding else Result.MAX_STEPS
    while status is Result.MAX_STEPS and steps < max_steps:
        at = linearize(problem, v) if steps else at
        steps += 1
        target = w + solve(at, at.operator.matvec(v - w) - at.residual).x
        if steps == 1:
            linearised = w - target
        found = _line_search(problem, v, target, residual, _FEASIBLE * initial)
        if found is None:
            status = Result.STALLED
            break
        trial, residual, share = found
        moved = torch.linalg.vector_norm(trial - v).item()
        v = trial
        distance, size = (torch.linalg.vector_norm(each).item() for each in (v - w, v))
        stationary = share == 1.0 and moved <= max(rtol * distance, rounding * size)
        if stationary and residual <= max(rtol * initial, rounding * size):
            status = Result.SUCCESSFUL
    return NearestPoint(v, torch.linalg.vector_norm(v - w).item(), linearised, status, residual, steps)


def linearised_displacement(
    problem: ZeroLossProblem, w: Tensor, *, rtol: float = 1e-2, max_steps: int = 100
) -> Solution:
    """B^+ b, the displacement of w from Gamma by the linearisation at w, from products alone.

    The `residual` of the solution is |B x - b|/|b|. The displacement is dominated by the smallest eigenvalues of H,
    which the products resolve last. Unless the residual is small, the norm of x is too small by an unknown amount.

    Args:
        problem: the loss and its samples.
        w: weights ``[P]``.
        rtol: tolerance of that residual.
        max_steps: maximum number of products.

    Raises:
        ValueError: outputs that are not finite.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> linearised_displacement(problem, torch.tensor([1.0, 5.0], dtype=torch.float64)).x
    tensor([-2.,  0.], dtype=torch.float64)
    """
    at = linearize(problem, w)
    return minimum_norm(at.operator, None, at.residual, rtol=rtol, max_steps=max_steps)
