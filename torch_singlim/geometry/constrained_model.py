"""The quadratic model of min |v - w|^2 / 2 subject to b(v) = 0 at one point v, and the solves with K that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from torch_singlim.geometry.curvature import Linearization
from torch_singlim.geometry.gram import gram_flops
from torch_singlim.linalg import (
    CholeskyFactor,
    DenseFactored,
    FactoredOperator,
    LinearOperator,
    Result,
    cholesky,
    gram_cutoff,
    krylov_solve,
    lanczos,
    preconditioned_solve,
    rademacher,
)
from torch_singlim.network.problem import ZeroLossProblem

__all__ = ["ConstrainedModel", "DualSolver"]

# cost of two triangular solves, which are limited by memory bandwidth, in units of M^2 operations
_TRIANGULAR = 100.0
# Lanczos steps for the smallest curvature. They see it where many directions share it, or where there are few at all.
# Along trainings of a network with 19,210 weights, whose distances were right to .7 %, five steps find .3 to .6; ten
# find negative curvature, in a few directions, at 4 of 26 states.
_LANCZOS = 5


class DualSolver:
    """x = K^+ r for a sequence of linearisations; the factor of an earlier K serves as a preconditioner.

    Args:
        problem: the loss and its samples.
        at: the first linearisation.
        hessian: H there, if it was computed already.
        rtol: relative residual of the preconditioned solves.
        direct_rtol: relative residual of the other solves.
        max_dense: K is formed and factored up to this many residuals, and above if that is cheap.
        krylov_steps: maximum number of products in the solves without preconditioner.
    """

    def __init__(
        self,
        problem: ZeroLossProblem,
        at: Linearization,
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
        self.decomposed = problem.num_residuals <= max_dense
        self.rtol, self.direct_rtol, self.krylov_steps = rtol, direct_rtol, krylov_steps
        self.products, self.rank, self.factored = 0, problem.num_residuals, True
        self.factor: CholeskyFactor | None = None  # of the last K that was factored; None if it was decomposed
        self._inverse: Callable[[Tensor], Tensor] | None = None  # of an earlier K
        self._own: Callable[[Tensor], Tensor] | None = None  # K^+ at the linearisation `_at`
        self._at: LinearOperator | None = None
        if hessian is not None:
            self._inverse = hessian.inverse
            if hessian.decomposed or self._inverse is not None:
                self._own, self._at, self.rank = hessian.solve, at.operator, hessian.rank

    def counted(self, at: Linearization) -> Linearization:
        """The same linearisation; its products are counted from now on."""
        B = at.operator

        def matvec(v: Tensor) -> Tensor:
            self.products += 1
            return B.matvec(v)

        def rmatvec(u: Tensor) -> Tensor:
            self.products += 1
            return B.rmatvec(u)

        counted = replace(at, operator=LinearOperator(B.shape, matvec, rmatvec))
        self._at = counted.operator if self._at is B else self._at
        return counted

    def __call__(self, at: Linearization, rhs: Tensor, *, uses: int = 1) -> Tensor:
        """K^+ r ``[M]``; `uses`: about how many such systems are going to be solved at this linearisation."""
        B = at.operator
        if self._at is B and self._own is not None:
            return self._own(rhs)
        if self._inverse is not None and self.patience >= uses:
            # sharing the steps among all systems: else a new factor is cheaper
            most = max(4, self.patience // uses)
            inner = preconditioned_solve(B.gram_product, rhs, self._inverse, rtol=self.rtol, max_steps=most)
            if inner.status is Result.SUCCESSFUL:
                return inner.x
        self._own, self._at = self._factor(at), B
        return self._own(rhs)

    def _factor(self, at: Linearization) -> Callable[[Tensor], Tensor]:
        """K^+ by the Cholesky factor or the eigenvectors of K, or by Lanczos."""
        B, K = at.operator, at.operator.gram_product
        self._inverse, self.factor, self.rank, self.factored = None, None, B.shape[0], True
        if self.decomposed:
            gram = at.gram()
            factor = cholesky(gram)
            if factor is None:
                dense = DenseFactored.from_gram(B, gram)
                self.rank = dense.rank
                return dense.solve
            self._inverse = factor.solve
            return factor.solve
        self.factor = factor = at.factor() if at.cheap_gram else None
        if factor is not None:
            self._inverse = factor.solve
            return lambda r: factor.refined(K, r, rtol=self.rtol)
        self.factored = False
        cutoff = gram_cutoff(B.shape[0], at.residual.dtype)
        return lambda r: (
            krylov_solve(K, r, rtol=self.direct_rtol, max_steps=self.krylov_steps, cutoff=cutoff, held=B.held).x
        )


class ConstrainedModel:
    """First and second derivatives of |v - w|^2 / 2 and of the constraints b(v) = 0 at one point v.

        multiplier  y = K^+ B (v - w)              B^T y is the normal part of v - w
        normal      n = -B^+ b                     the shortest step to the linearised zero-loss set
        tangential  g = P_T (v - w)                zero where the distance is stationary
        curvature   W = I - sum_i y_i D^2 b_i      on the tangent space, the Hessian of |v - w|^2 / 2 along that set

    w is a focal point of the set where W has the eigenvalue 0 on the tangent space (Milnor, Morse Theory, 1963,
    section 6).

    Args:
        at: the linearisation at v.
        away: v - w  ``[P]``.
        solve: solves with K.
        uses: about how many systems with K are solved here.
        dual: K^+ b, if it was computed already  ``[M]``.
    """

    def __init__(
        self, at: Linearization, away: Tensor, solve: DualSolver, *, uses: int, dual: Tensor | None = None
    ) -> None:
        self.at, self._solver, self._uses = at, solve, uses
        B = at.operator
        self.multiplier = self.solve(B.matvec(away)) if away.any() else torch.zeros_like(at.residual)
        self.tangential = away - B.rmatvec(self.multiplier)
        self.dual = self.solve(at.residual) if dual is None else dual
        self.normal = -B.rmatvec(self.dual)
        self.distance = torch.linalg.vector_norm(away).item()  # |v - w|
        self.corrected = torch.linalg.vector_norm(away + self.normal).item()  # from w to the linearised set
        self._second = at.second(self.multiplier)

    def solve(self, r: Tensor) -> Tensor:
        """K^+ r  ``[M]``."""
        return self._solver(self.at, r, uses=self._uses)

    def shortest(self, r: Tensor) -> Tensor:
        """B^+ r  ``[P]``."""
        return self.at.operator.rmatvec(self.solve(r))

    def project(self, v: Tensor) -> Tensor:
        """P_T v  ``[P]``."""
        return self.shortest(self.at.operator.matvec(v)).neg_().add_(v)  # in place: vectors ``[P]`` are large

    def second(self, v: Tensor) -> Tensor:
        """sum_i y_i D^2 b_i v  ``[P]``."""
        if self.distance == 0:  # y = 0
            return torch.zeros_like(v)
        self._solver.products += 1
        return self._second(v)

    def product(self, v: Tensor) -> Tensor:
        """P_T W v  ``[P]`` for a tangent v."""
        return self.project(v - self.second(v))

    @property
    def unreachable(self) -> float:
        """Share of b that no step changes to first order: |b + B n| / |b|."""
        b = self.at.residual
        rest = torch.linalg.vector_norm(b + self.at.operator.matvec(self.normal)).item()
        return rest / max(torch.linalg.vector_norm(b).item(), 1e-300)

    def rayleigh(self, dual: Tensor) -> float:
        """z^T K z / z^T z: the curvature of the modes that dominate K^-1 (inf for z = 0)."""
        size = torch.linalg.vector_norm(dual).item()
        return math.inf if size == 0 else (torch.linalg.vector_norm(self.at.operator.rmatvec(dual)).item() / size) ** 2

    def smallest_curvature(self) -> float:
        """The smallest Ritz value of W on the tangent space from one random vector (inf without tangent space)."""
        start = rademacher(self.normal.shape, generator=torch.Generator().manual_seed(0), like=self.normal)
        tangent = self.project(start)
        if torch.linalg.vector_norm(tangent) <= 1e-3 * torch.linalg.vector_norm(start):
            return math.inf
        del start

        def product(v: Tensor) -> Tensor:  # normal directions, which rounding errors bring in, get the eigenvalue 1
            inside = self.project(v)
            return self.product(inside).sub_(inside).add_(v)

        # few enough steps for the recurrence alone, which keeps two vectors
        *_, space = lanczos(product, tangent, max_steps=_LANCZOS, stride=_LANCZOS, held=2)
        return space.ritz()[0][0].item()
