"""Lanczos' method with reorthogonalisation in bounded memory; linear systems and matrix functions by Lanczos.

The functions take a symmetric positive semi-definite operator K given by its products. Here K = B B^T acts on the small
space (residuals), so storing and reorthogonalising the basis is cheap compared with a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.linalg.solution import Result, Solution

__all__ = ["KrylovBasis", "krylov_function", "krylov_solve", "lanczos", "preconditioned_solve"]


@dataclass(frozen=True)
class KrylovBasis:
    """K Q = Q T + beta q e_k^T with orthonormal columns Q ``[m, k]`` and tridiagonal T ``[k, k]``, after k steps.

    beta = 0 means that the space is invariant: the eigenvalues of T are eigenvalues of K. Only the first j columns are
    stored; the others are recomputed by the recurrence when they are needed.

    Args:
        held: the first columns of Q, as rows ``[j, m]``, 2 <= j <= k if k > 1.
        tridiagonal: T.
        beta: norm of the remainder.
        matvec: the product with K.
    """

    held: Tensor = field(repr=False)
    tridiagonal: Tensor
    beta: float
    matvec: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def steps(self) -> int:
        """k, the number of products with K so far."""
        return len(self.tridiagonal)

    def combine(self, y: Tensor) -> Tensor:
        """Q y  ``[m]`` for coefficients y ``[k]``; takes k - j products with K."""
        held, T = self.held, self.tridiagonal
        result = held.T @ y[: len(held)]
        if len(held) < self.steps:
            before, last = held[-2], held[-1]
            for k in range(len(held) - 1, self.steps - 1):
                rest = self.matvec(last) - T[k, k] * last - T[k - 1, k] * before
                before, last = last, rest / T[k, k + 1]
                result += y[k + 1] * last
        return result

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``[k]`` ascending, their vectors in the basis ``[k, k]``, error bounds |beta e_k^T s| ``[k]``.

        Every interval [theta - bound, theta + bound] contains an eigenvalue of K (Parlett 1998, section 13.2).
        """
        values, vectors = torch.linalg.eigh(self.tridiagonal)
        return values, vectors, (self.beta * vectors[-1]).abs()


def lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, *, max_steps: int, stride: int = 5, held: int | None = None
) -> Iterator[KrylovBasis]:
    """Yield the Krylov basis of (K, start) every `stride` steps and at the last step.

    The last step is number `max_steps`, or the one at which the space becomes invariant. As long as the whole basis is
    in memory, each new direction is orthogonalised against all of it, which prevents repeated copies of converged Ritz
    values. After that only the recurrence is used: copies appear, but matrix functions remain accurate.

    Args:
        matvec: the product with K.
        start: ``[m]``.
        max_steps: maximum number of products.
        stride: a basis is yielded every so many steps.
        held: maximum number of vectors in memory, at least 2; default: all.

    Source: C. Musco, C. Musco, A. Sidford, Stability of the Lanczos method for matrix function approximation, 2018.
    """
    size = start.numel()
    if held is None or held >= size:
        max_steps = min(max_steps, size)
    norm = torch.linalg.vector_norm(start)
    if max_steps < 1 or not norm > 0:
        return
    basis = start.new_empty(min(max_steps, held or max_steps), size)
    last = basis[0] = start / norm
    before = torch.zeros_like(start)
    tridiagonal = start.new_zeros(max_steps, max_steps)
    scale, beta = 0.0, 0.0
    for k in range(max_steps):
        direction = matvec(last)
        tridiagonal[k, k] = torch.dot(last, direction)
        direction = direction - tridiagonal[k, k] * last - beta * before
        if k + 1 < len(basis) or len(basis) == max_steps:
            for _ in range(2):  # "twice is enough" (Giraud et al. 2005)
                direction = direction - basis[: k + 1].T @ (basis[: k + 1] @ direction)
        before, beta = last, torch.linalg.vector_norm(direction).item()
        scale = max(scale, abs(tridiagonal[k, k].item()) + beta)
        invariant = beta <= size * torch.finfo(start.dtype).eps * scale or k + 1 == size == len(basis)
        final = invariant or k + 1 == max_steps
        if final or (k + 1) % stride == 0:
            yield KrylovBasis(basis[: k + 1], tridiagonal[: k + 1, : k + 1], 0.0 if invariant else beta, matvec)
        if final:
            return
        last = direction / beta
        if k + 1 < len(basis):
            basis[k + 1] = last
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta


def _least_squares(space: KrylovBasis) -> tuple[Tensor, float]:
    """The y that minimises |K Q y - q_1|, and that residual (MINRES: Paige & Saunders 1975)."""
    k = space.steps
    extended = torch.cat([space.tridiagonal, space.tridiagonal.new_zeros(1, k)])
    extended[k, k - 1] = space.beta
    start = extended.new_zeros(k + 1)
    start[0] = 1
    y = torch.linalg.lstsq(extended, start[:, None]).solution[:, 0]
    return y, torch.linalg.vector_norm(extended @ y - start).item()


def krylov_solve(
    matvec: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    rtol: float,
    max_steps: int,
    cutoff: float,
    held: int | None = None,
) -> Solution:
    """The minimum-norm solution x of K x = b: x = |b| Q T^+ e_1, on the Krylov space of b.

    If the residual of this x is larger than b itself, as it can be if b is far from the range of K, the x with the
    smallest residual is returned instead.

    Args:
        matvec: product with the symmetric positive semi-definite K.
        rhs: b ``[m]``.
        rtol: stop when |K x - b| <= rtol |b|.
        max_steps: maximum number of products.
        cutoff: Ritz values at most ``cutoff`` times the largest count as zero (K is rank-deficient, and b has a part
            outside its range).
        held: maximum number of Krylov vectors in memory, see `lanczos`.

    >>> K = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    >>> s = krylov_solve(lambda v: K @ v, torch.tensor([4.0, 1.0, 0.0]).double(), rtol=1e-10, max_steps=9, cutoff=1e-12)
    >>> s.x.round(decimals=9), s.status.name
    (tensor([1., 1., 0.], dtype=torch.float64), 'SUCCESSFUL')
    """
    norm = torch.linalg.vector_norm(rhs).item()
    if norm == 0.0:
        return Solution(torch.zeros_like(rhs), Result.SUCCESSFUL, 0, 0.0)
    x, residual, steps, status = torch.zeros_like(rhs), 1.0, 0, Result.MAX_STEPS
    for space in lanczos(matvec, rhs, max_steps=max_steps, held=held):
        steps = space.steps
        values, vectors, _ = space.ritz()
        kept = values > cutoff * values[-1].clamp_min(0)
        weights = torch.where(kept, 1 / values.where(kept, 1), 0)
        coefficients = vectors @ (weights * vectors[0])  # T^+ e_1
        # (K x - b)/|b| = Q (T T^+ e_1 - e_1) + beta q e_k^T T^+ e_1, two orthogonal parts
        outside = torch.linalg.vector_norm(vectors[0][~kept]).item()
        residual = ((space.beta * coefficients[-1].item()) ** 2 + outside**2) ** 0.5
        if residual <= rtol:
            status = Result.SUCCESSFUL
        elif space.beta == 0.0:
            status = Result.INCONSISTENT
        if status != Result.MAX_STEPS or steps == max_steps:
            if residual > 1:  # worse than x = 0: b is probably not in the range
                coefficients, residual = _least_squares(space)
            x = norm * space.combine(coefficients)
            break
    return Solution(x, status, steps, residual)


def krylov_function(
    matvec: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    vector: Tensor,
    *,
    rtol: float,
    max_steps: int,
    held: int | None = None,
) -> Solution:
    """f(K) b = |b| Q f(T) e_1, on the Krylov space of b (Higham 2008, section 13.2).

    The iteration stops when the result has changed by at most rtol times its norm over the last few steps. This change,
    which is returned as `residual`, is a reliable error estimate for the smooth f used here, but not for a step
    function. `held`: maximum number of Krylov vectors in memory, see `lanczos`.
    """
    norm = torch.linalg.vector_norm(vector).item()
    if norm == 0.0:
        return Solution(torch.zeros_like(vector), Result.SUCCESSFUL, 0, 0.0)
    x, y, residual, steps, status = torch.zeros_like(vector), vector.new_zeros(0), float("inf"), 0, Result.MAX_STEPS
    for space in lanczos(matvec, vector, max_steps=max_steps, held=held):
        previous, steps = y, space.steps
        values, vectors, _ = space.ritz()
        y = vectors @ (function(values.clamp_min(0)) * vectors[0])
        if space.beta == 0.0:
            residual, status = 0.0, Result.SUCCESSFUL
        elif len(previous) > 0:
            # Q has orthonormal columns: norms of results are norms of their coefficients
            change = y.clone()
            change[: len(previous)] -= previous
            size = torch.linalg.vector_norm(y).item()
            residual = torch.linalg.vector_norm(change).item() / size if size > 0 else 0.0
            status = Result.SUCCESSFUL if residual <= rtol else status
        if status == Result.SUCCESSFUL or steps == max_steps:
            x = norm * space.combine(y)
            break
    return Solution(x, status, steps, residual)


def preconditioned_solve(
    matvec: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    rtol: float,
    max_steps: int,
) -> Solution:
    """Solve K x = b for a positive definite K by conjugate gradients, preconditioned by an approximate inverse.

    With the Cholesky factor of a nearby K, few steps are needed (Golub & Van Loan 2013, section 11.5.2).

    Args:
        matvec: product with K.
        rhs: b ``[m]``.
        precondition: product with the approximate inverse, symmetric positive definite.
        rtol: stop when |K x - b| <= rtol |b|.
        max_steps: maximum number of products. The iteration stops after a quarter of them (at least 4) if the logarithm
            of the residual has not come a quarter of the way to that of the tolerance.

    >>> K = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    >>> preconditioned_solve(lambda v: K @ v, torch.ones(2).double(), lambda v: v, rtol=1e-12, max_steps=5).x
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    norm = torch.linalg.vector_norm(rhs).item()
    x, r = torch.zeros_like(rhs), rhs
    if norm == 0.0:
        return Solution(x, Result.SUCCESSFUL, 0, 0.0)
    z = precondition(r)
    direction, rz, residual = z, torch.dot(r, z), 1.0
    for step in range(1, max_steps + 1):
        Kd = matvec(direction)
        length = rz / torch.dot(direction, Kd)
        x, r = x + length * direction, r - length * Kd
        residual = torch.linalg.vector_norm(r).item() / norm
        if residual <= rtol:
            return Solution(x, Result.SUCCESSFUL, step, residual)
        if step == max(4, max_steps // 4) and residual**4 > rtol:
            return Solution(x, Result.MAX_STEPS, step, residual)
        z = precondition(r)
        rz, before = torch.dot(r, z), rz
        direction = z + (rz / before) * direction
    return Solution(x, Result.MAX_STEPS, max_steps, residual)
