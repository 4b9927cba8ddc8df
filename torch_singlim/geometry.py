"""The zero-loss set: nearest point, distance, tangent space, spectrum."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.gram import MAX_DENSE, gram_flops
from torch_singlim.linalg import FactoredOperator, Solution, cholesky, minimum_norm, preconditioned_solve
from torch_singlim.problem import Linearization, ZeroLossProblem

__all__ = [
    "FootPoint",
    "TangentSpace",
    "linearised_displacement",
    "nearest_point",
    "separation_filter",
    "separation_level",
    "tangent_space",
]


# operations of two triangular solves, which wait for memory, in units of M^2
_TRIANGULAR = 100.0


@dataclass(frozen=True)
class TangentSpace:
    """T = ker H at one weight vector, H = B^T B the Gauss-Newton matrix there (the Hessian of L, on Gamma).

    `hessian` holds H; where `exact` is False it was too large to decompose, `rank` is a lower bound, `spectrum` the
    part that Lanczos resolved, `unresolved` the share of it that is not, and `project` as accurate as the steps allow:
    what it leaves of normal directions is flat, see `curvature`.
    """

    hessian: FactoredOperator

    def project(self, v: Tensor) -> Tensor:
        """P_T v = v - B^T (B B^T)^+ B v  ``[P]``, orthogonal projection on the tangent space."""
        return self.hessian.project_kernel(v)

    @property
    def rank(self) -> int:
        """r, the codimension of Gamma: number of nonzero eigenvalues of H."""
        return self.hessian.rank

    @property
    def exact(self) -> bool:
        """Whether the whole spectrum was resolved."""
        return self.hessian.exact

    @property
    def unresolved(self) -> float:
        """Share of the normal modes whose eigenvalue is not known to a tenth; 0: all are."""
        return self.hessian.unresolved

    def curvature(self, v: Tensor) -> float:
        """v^T H v / v^T v: 0 for a tangent vector; 1 / (lr curvature) steps show that v is not quite one."""
        return (self.hessian.operator.matvec(v).square().sum() / v.square().sum()).item()

    def spectrum(self) -> Tensor:
        """Nonzero eigenvalues of H, descending ``[r]``, in units of loss per squared weight norm."""
        return self.hessian.spectrum()

    def separated(self, v: Tensor, *, lr: float, steps: float, threshold: float = 1.0) -> Tensor:
        """The part of v along separated normal modes, those with lr lambda steps >= threshold  ``[P]``.

        After that many steps of size `lr` their initial deviation has decayed to exp(-threshold) or less. The border is
        that of `separation_filter`.
        """
        level = separation_level(lr, steps, threshold)
        return self.hessian.normal_function(lambda values: separation_filter(values, level), v)

    def num_separated(self, *, lr: float, steps: float, threshold: float = 1.0) -> float:
        """Number of normal modes with lr lambda steps >= threshold; estimated where H was not decomposed."""
        return self.hessian.count(separation_level(lr, steps, threshold))

    @property
    def num_modes(self) -> int:
        """Number of normal modes: the rank; where H was not decomposed, the number of residuals, which bounds it."""
        return self.rank if self.hessian.decomposed else self.hessian.operator.shape[0]


def separation_level(lr: float, steps: float, threshold: float) -> float:
    """Smallest separated eigenvalue: threshold / (lr steps); infinite before the first step."""
    return threshold / (lr * steps) if lr * steps > 0 else float("inf")


def separation_filter(eigenvalues: Tensor, level: float) -> Tensor:
    """How far modes count as separated: 1 / (1 + (level / lambda)^4), from 0 over 1/2 at the level to 1.

    Rational, because a step has no accurate matrix function by Lanczos: with 100 products on 10,000 residuals the
    directions through a step were 5 % to 10 % off, through this 0.1 %, and the distances beyond are the same.

    >>> separation_filter(torch.tensor([0.1, 1.0, 10.0]), 1.0)
    tensor([9.9990e-05, 5.0000e-01, 9.9990e-01])
    """
    return 1 / (1 + (level / eigenvalues) ** 4)


@dataclass(frozen=True)
class FootPoint:
    """Where the nearest point of Gamma is, and how well it was found.

    Args:
        point: ``[P]``.
        distance: |w - point|, in units of the weights' norm. An upper bound of the distance where `converged` is False.
        linearised: B^+ b, the displacement from Gamma by the linearisation at w alone ``[P]``: right to first order.
        converged: the point is on Gamma and stationary to the tolerance asked for.
        residual: |b(point)|, the root of about twice the loss gap that is left.
        steps: linearisations used.
    """

    point: Tensor = field(repr=False)
    distance: float
    linearised: Tensor = field(repr=False)
    converged: bool
    residual: float
    steps: int

    @property
    def linearised_distance(self) -> float:
        """|B^+ b|, in units of the weights' norm."""
        return torch.linalg.vector_norm(self.linearised).item()


def nearest_point(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    rtol: float = 1e-6,
    max_steps: int = 20,
    max_dense: int = MAX_DENSE,
    krylov_steps: int = 500,
    hessian: FactoredOperator | None = None,
) -> FootPoint:
    """The nearest point of Gamma to w, by Gauss-Newton steps on the constraint b(v) = 0 with v - w kept shortest.

        v <- w + B(v)^+ (B(v) (v - w) - b(v))

    A fixed point has b(v) = 0 and v - w in the range of B(v)^T, the normal space: stationarity of |v - w| on Gamma.
    A step is halved while it would increase |b|, which far from Gamma the full step can.

    Args:
        problem: the loss and probe set.
        w: weights ``[P]``.
        rtol: converged when the last step is at most rtol times the distance (or rounding, next to Gamma).
        max_steps: most linearisations.
        max_dense: up to this many residuals, and where that is cheap, B B^T is formed and factored, once as a rule: its
            factor preconditions the later solves; else Lanczos with `krylov_steps` products.
        krylov_steps: most products per linearisation on that path.
        hessian: ``problem.gauss_newton(w)``, if it is there already: K need then not be formed at all.

    Raises:
        ValueError: weights or outputs that are not finite.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> foot = nearest_point(problem, torch.tensor([1.0, 5.0], dtype=torch.float64))
    >>> foot.point, foot.distance, foot.converged
    (tensor([3., 5.], dtype=torch.float64), 2.0, True)
    """
    if w.shape != (problem.num_weights,):
        raise ValueError(f"expected {problem.num_weights} weights in one vector, got shape {tuple(w.shape)}")
    if not torch.isfinite(w).all():
        raise ValueError("the weights contain nan or infinity: training has probably diverged")

    rounding = 100 * torch.finfo(w.dtype).eps
    # relative residual of the inner solves; less than 1e4 eps conjugate gradients may not reach on a wide spectrum
    inner_rtol = max(0.1 * rtol, 1e4 * torch.finfo(w.dtype).eps)
    at = problem.linearize(w)
    initial = torch.linalg.vector_norm(at.residual).item()

    # preconditioned steps that cost less than forming and factoring K anew: a product is about two gradients
    M = float(problem.num_residuals)
    step_flops = 6 * problem.flops * problem.num_samples + _TRIANGULAR * M**2
    patience = min(100, max(4, round((gram_flops(problem) + M**3 / 3) / step_flops)))
    # the inverse of the last K that was decomposed: it preconditions those nearby
    inverse = None if hessian is None else hessian.inverse

    def shortest(linearization: Linearization, rhs: Tensor) -> Solution:
        nonlocal inverse
        B = linearization.operator
        if inverse is not None:
            inner = preconditioned_solve(B.gram_product, rhs, inverse, rtol=inner_rtol, max_steps=patience)
            if inner.status == "converged":
                return Solution(B.rmatvec(inner.x), "converged", inner.steps, inner.residual)
        decomposed = problem.num_residuals <= max_dense
        gram = linearization.gram() if decomposed or linearization.cheap_gram else None
        factor = None if gram is None else cholesky(gram)
        if factor is None and not decomposed:
            gram = None  # its eigenvectors would take too long
        inverse = None if factor is None else lambda r: torch.cholesky_solve(r[:, None], factor)[:, 0]
        return minimum_norm(B, gram, rhs, rtol=0.1 * rtol, max_steps=krylov_steps)

    v, residual, linearised, converged, steps = w, initial, torch.zeros_like(w), initial <= rounding, 0
    while not converged and steps < max_steps:
        steps += 1
        target = w + shortest(at, at.operator.matvec(v - w) - at.residual).x
        if steps == 1:
            linearised = w - target
        # near Gamma a step along it may raise |b| by its square: residuals this small count as feasible
        feasible = 1e-3 * initial
        share = 1.0
        while share > 1e-3:
            trial = v + share * (target - v)
            trial_residual = torch.linalg.vector_norm(problem.residual(trial)).item()
            if trial_residual < max((1 - 0.1 * share) * residual, feasible):
                break
            share /= 2
        else:
            break  # no step reduces the residual: the best point so far is returned, not converged
        moved = torch.linalg.vector_norm(trial - v).item()
        v, residual = trial, trial_residual
        distance = torch.linalg.vector_norm(v - w).item()
        scale = torch.linalg.vector_norm(v).item()
        converged = (
            share == 1.0
            and moved <= max(rtol * distance, rounding * scale)
            and residual <= max(rtol * initial, rounding * scale)
        )
        if not converged and steps < max_steps:
            at = problem.linearize(v)
    return FootPoint(v, torch.linalg.vector_norm(v - w).item(), linearised, converged, residual, steps)


def linearised_displacement(
    problem: ZeroLossProblem, w: Tensor, *, rtol: float = 1e-2, max_steps: int = 100
) -> Solution:
    """B^+ b, the displacement of w from Gamma by the linearisation at w, from products alone: the distance for little.

    On MNIST with 10,000 residuals 100 products found 99 % of its norm, with a relative residual |B x - b|/|b| of 0.3.

    Args:
        problem: the loss and probe set.
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
    at = problem.linearize(w)
    return minimum_norm(at.operator, None, at.residual, rtol=rtol, max_steps=max_steps)


def tangent_space(
    problem: ZeroLossProblem, w: Tensor, *, max_dense: int = MAX_DENSE, rtol: float = 1e-6, max_steps: int = 300
) -> TangentSpace:
    """The kernel of the Gauss-Newton matrix at w: where w lies on Gamma, the tangent space of Gamma there.

    Args:
        problem: the loss and probe set.
        w: weights ``[P]``.
        max_dense: up to this many residuals everything is exact (one eigendecomposition of an M x M matrix).
        rtol: above that, relative accuracy of each projection.
        max_steps: above that, most products per projection.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> T = tangent_space(problem, torch.tensor([3.0, 5.0], dtype=torch.float64))
    >>> T.rank, round(T.spectrum().item(), 9), T.project(torch.ones(2, dtype=torch.float64))
    (1, 2.0, tensor([0., 1.], dtype=torch.float64))
    """
    return TangentSpace(problem.gauss_newton(w, max_dense=max_dense, rtol=rtol, max_steps=max_steps))
