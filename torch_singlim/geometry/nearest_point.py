"""The nearest point of the zero-loss set, and the displacement from it by one linearisation."""

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

# operations of two triangular solves, which wait for memory, in units of M^2
_TRIANGULAR = 100.0
# near Gamma a step along it may raise |b| by its square: residuals this small, relative to the first, count as feasible
_FEASIBLE = 1e-3
# a step is not made shorter than this share of the full one
_SHORTEST = 1e-3


@dataclass(frozen=True)
class NearestPoint:
    """Where the nearest point of Gamma is, and how well it was found.

    Args:
        point: ``[P]``.
        distance: |w - point|, in units of the weights' norm. An upper bound of the distance unless `converged`.
        linearised: B^+ b, the displacement from Gamma by the linearisation at w alone ``[P]``: right to first order.
        status: how the search ended; successful: the point is on Gamma and stationary to the tolerance asked for.
        residual: |b(point)|, the root of about twice the excess loss that is left.
        steps: linearisations used.
    """

    point: Tensor = field(repr=False)
    distance: float
    linearised: Tensor = field(repr=False)
    status: Result
    residual: float
    steps: int

    @property
    def converged(self) -> bool:
        """Whether the point is on Gamma and stationary to the tolerance asked for."""
        return self.status is Result.SUCCESSFUL

    @property
    def linearised_distance(self) -> float:
        """|B^+ b|, in units of the weights' norm."""
        return torch.linalg.vector_norm(self.linearised).item()


class _MinimumNorm:
    """x = B^+ r at one linearisation after another, the factor of an earlier K kept as a preconditioner.

    Args:
        problem: the loss and its samples.
        hessian: H at the first of these points, if it is there already.
        rtol: relative residual of the preconditioned solves.
        direct_rtol: of the others.
        max_dense: up to this many residuals, and where that is cheap, K is formed and factored.
        krylov_steps: most products of the others.
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
        # preconditioned steps that cost less than forming and factoring K anew: a product is about two gradients
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
            gram = None  # its eigenvectors would take too long
        self.inverse = None if factor is None else lambda r: torch.cholesky_solve(r[:, None], factor)[:, 0]
        return minimum_norm(B, gram, rhs, rtol=self.direct_rtol, max_steps=self.krylov_steps)


def _line_search(
    problem: ZeroLossProblem, v: Tensor, target: Tensor, residual: float, feasible: float
) -> tuple[Tensor, float, float] | None:
    """v + s (target - v), |b| there and s, for the first s of 1, 1/2, 1/4, ... that reduces |b|; None: none does."""
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
    """The nearest point of Gamma to w, by Gauss-Newton steps on the constraint b(v) = 0 with v - w kept shortest.

        v <- w + B(v)^+ (B(v) (v - w) - b(v))

    A fixed point has b(v) = 0 and v - w in the range of B(v)^T, the normal space: stationarity of |v - w| on Gamma.
    A step is halved while it would increase |b|, which far from Gamma the full step can.

    Args:
        problem: the loss and its samples.
        w: weights ``[P]``.
        rtol: successful when the last step is at most rtol times the distance (or rounding, next to Gamma).
        max_steps: most linearisations.
        max_dense: up to this many residuals, and where that is cheap, B B^T is formed and factored, once as a rule: its
            factor preconditions the later solves; else Lanczos with `krylov_steps` products.
        krylov_steps: most products per linearisation on that path.
        at: ``linearize(problem, w)``, if it is there already.
        hessian: ``gauss_newton(problem, w)``, if it is there already: K need then not be formed at all.

    Raises:
        ValueError: weights or outputs that are not finite.

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
        rtol=max(0.1 * rtol, 1e4 * eps),  # less than 1e4 eps conjugate gradients may not reach on a wide spectrum
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

    What the products leave, |B x - b|/|b|, is its `residual`. The small eigenvalues of H, which the products resolve
    last, dominate the displacement: it says little where that residual is not small.

    Args:
        problem: the loss and its samples.
        w: weights ``[P]``.
        rtol: of that residual.
        max_steps: most products.

    Raises:
        ValueError: outputs that are not finite.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> linearised_displacement(problem, torch.tensor([1.0, 5.0], dtype=torch.float64)).x
    tensor([-2.,  0.], dtype=torch.float64)
    """
    at = linearize(problem, w)
    return minimum_norm(at.operator, None, at.residual, rtol=rtol, max_steps=max_steps)
