"""Lanczos' method with full reorthogonalisation, and what follows from it: solves and matrix functions.

All of it works on a symmetric positive semi-definite operator K given by its products. Here K = B B^T lives in the
small space (residuals), so keeping and reorthogonalising the basis costs little beside a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["KrylovBasis", "Solution", "krylov_function", "krylov_solve", "lanczos", "preconditioned_solve"]

Status = Literal["converged", "max_steps", "inconsistent"]


@dataclass(frozen=True)
class KrylovBasis:
    """K Q = Q T + beta q e_k^T with orthonormal columns Q ``[m, k]`` and tridiagonal T ``[k, k]``, after k steps.

    beta = 0 means that the space is invariant: T holds exact eigenvalues of K.
    """

    basis: Tensor
    tridiagonal: Tensor
    beta: float

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ``[k]`` ascending, their vectors in the basis ``[k, k]``, error bounds |beta e_k^T s| ``[k]``.

        Every interval [theta - bound, theta + bound] holds an eigenvalue of K (Parlett 1998, section 13.2).
        """
        values, vectors = torch.linalg.eigh(self.tridiagonal)
        return values, vectors, (self.beta * vectors[-1]).abs()


@dataclass(frozen=True)
class Solution:
    """What an iteration found and how it went.

    `residual` is relative to the right-hand side; for a matrix function it is the change over the last steps.
    `status` is "converged", "max_steps" (raise max_steps or loosen rtol), or "inconsistent" (the right-hand side has
    a part outside the range; the least-squares solution is returned).
    """

    x: Tensor
    status: Status
    steps: int
    residual: float


def lanczos(
    matvec: Callable[[Tensor], Tensor], start: Tensor, *, max_steps: int, stride: int = 5
) -> Iterator[KrylovBasis]:
    """Yield the Krylov basis of (K, start) every `stride` steps and at the last: `max_steps`, or an invariant space.

    A new direction is orthogonalised against the whole basis twice ("twice is enough", Giraud et al. 2005), which
    keeps copies of converged Ritz values out. Memory: max_steps vectors of `start`'s size.
    """
    size = start.numel()
    max_steps = min(max_steps, size)
    norm = torch.linalg.vector_norm(start)
    if max_steps < 1 or not norm > 0:
        return
    basis = start.new_empty(max_steps, size)
    basis[0] = start / norm
    tridiagonal = start.new_zeros(max_steps, max_steps)
    scale = 0.0
    for k in range(max_steps):
        direction = matvec(basis[k])
        tridiagonal[k, k] = torch.dot(basis[k], direction)
        for _ in range(2):
            direction = direction - basis[: k + 1].T @ (basis[: k + 1] @ direction)
        beta = torch.linalg.vector_norm(direction).item()
        scale = max(scale, abs(tridiagonal[k, k].item()) + beta)
        invariant = beta <= size * torch.finfo(start.dtype).eps * scale or k + 1 == size
        last = invariant or k + 1 == max_steps
        if last or (k + 1) % stride == 0:
            yield KrylovBasis(basis[: k + 1].T, tridiagonal[: k + 1, : k + 1], 0.0 if invariant else beta)
        if last:
            return
        basis[k + 1] = direction / beta
        tridiagonal[k, k + 1] = tridiagonal[k + 1, k] = beta


def krylov_solve(
    matvec: Callable[[Tensor], Tensor], rhs: Tensor, *, rtol: float, max_steps: int, cutoff: float
) -> Solution:
    """The minimum-norm solution x of K x = b: x = |b| Q T^+ e_1, on the Krylov space of b.

    Args:
        matvec: product with the symmetric positive semi-definite K.
        rhs: b ``[m]``.
        rtol: stop when |K x - b| <= rtol |b|.
        max_steps: at most this many products.
        cutoff: Ritz values at most ``cutoff`` times the largest count as zero (a rank-deficient K, and a part of b
            outside its range).

    >>> K = torch.diag(torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64))
    >>> s = krylov_solve(lambda v: K @ v, torch.tensor([4.0, 1.0, 0.0]).double(), rtol=1e-10, max_steps=9, cutoff=1e-12)
    >>> s.x, s.status
    (tensor([1., 1., 0.], dtype=torch.float64), 'converged')
    """
    norm = torch.linalg.vector_norm(rhs).item()
    if norm == 0.0:
        return Solution(torch.zeros_like(rhs), "converged", 0, 0.0)
    coefficients, residual, basis = rhs.new_zeros(1), 1.0, rhs.new_zeros(rhs.numel(), 1)
    steps, status = 0, "max_steps"
    for space in lanczos(matvec, rhs, max_steps=max_steps):
        steps, basis = space.basis.shape[1], space.basis
        values, vectors, _ = space.ritz()
        kept = values > cutoff * values[-1].clamp_min(0)
        weights = torch.where(kept, 1 / values.where(kept, 1), 0)
        coefficients = vectors @ (weights * vectors[0])  # T^+ e_1
        # (K x - b)/|b| = Q (T T^+ e_1 - e_1) + beta q e_k^T T^+ e_1, two orthogonal parts
        outside = torch.linalg.vector_norm(vectors[0][~kept]).item()
        residual = ((space.beta * coefficients[-1].item()) ** 2 + outside**2) ** 0.5
        if residual <= rtol:
            status = "converged"
            break
        if space.beta == 0.0:
            status = "inconsistent"
            break
    return Solution(norm * (basis @ coefficients), status, steps, residual)  # type: ignore[arg-type]  # narrowed above


def krylov_function(
    matvec: Callable[[Tensor], Tensor],
    function: Callable[[Tensor], Tensor],
    vector: Tensor,
    *,
    rtol: float,
    max_steps: int,
) -> Solution:
    """f(K) b = |b| Q f(T) e_1, on the Krylov space of b (Higham 2008, section 13.2).

    Stops when the result moved by at most rtol times its norm over the last few steps; for the smooth f used
    here that change is an honest error estimate, for a step function it is not, and `residual` says what was reached.
    """
    norm = torch.linalg.vector_norm(vector).item()
    if norm == 0.0:
        return Solution(torch.zeros_like(vector), "converged", 0, 0.0)
    previous: Tensor | None = None
    result, residual, steps, status = torch.zeros_like(vector), float("inf"), 0, "max_steps"
    for space in lanczos(matvec, vector, max_steps=max_steps):
        steps = space.basis.shape[1]
        values, vectors, _ = space.ritz()
        result = norm * (space.basis @ (vectors @ (function(values.clamp_min(0)) * vectors[0])))
        if space.beta == 0.0:
            residual, status = 0.0, "converged"
            break
        if previous is not None:
            size = torch.linalg.vector_norm(result).item()
            residual = torch.linalg.vector_norm(result - previous).item() / size if size > 0 else 0.0
            if residual <= rtol:
                status = "converged"
                break
        previous = result
    return Solution(result, status, steps, residual)  # type: ignore[arg-type]  # narrowed above


def preconditioned_solve(
    matvec: Callable[[Tensor], Tensor],
    rhs: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    rtol: float,
    max_steps: int,
) -> Solution:
    """K x = b for a positive definite K by conjugate gradients, preconditioned by an approximate inverse.

    With the Cholesky factor of a K nearby the steps are few (Golub & Van Loan 2013, section 11.5.2).

    Args:
        matvec: product with K.
        rhs: b ``[m]``.
        precondition: product with the approximate inverse, symmetric positive definite.
        rtol: stop when |K x - b| <= rtol |b|.
        max_steps: at most this many products; given up after a quarter of them, at least 4, where the residual has
            not come a quarter of the way, in logarithm.

    >>> K = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    >>> preconditioned_solve(lambda v: K @ v, torch.ones(2).double(), lambda v: v, rtol=1e-12, max_steps=5).x
    tensor([0.2500, 1.0000], dtype=torch.float64)
    """
    norm = torch.linalg.vector_norm(rhs).item()
    x, r = torch.zeros_like(rhs), rhs
    if norm == 0.0:
        return Solution(x, "converged", 0, 0.0)
    z = precondition(r)
    direction, rz, residual = z, torch.dot(r, z), 1.0
    for step in range(1, max_steps + 1):
        Kd = matvec(direction)
        length = rz / torch.dot(direction, Kd)
        x, r = x + length * direction, r - length * Kd
        residual = torch.linalg.vector_norm(r).item() / norm
        if residual <= rtol:
            return Solution(x, "converged", step, residual)
        if step == max(4, max_steps // 4) and residual**4 > rtol:
            return Solution(x, "max_steps", step, residual)
        z = precondition(r)
        rz, before = torch.dot(r, z), rz
        direction = z + (rz / before) * direction
    return Solution(x, "max_steps", max_steps, residual)
