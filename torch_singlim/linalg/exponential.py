"""The linear descent u' = -r - H u, u(0) = 0 with H = B^T B, solved by Lanczos: the phi functions of a matrix.

    u(t) = -t phi1(-t H) r = -t r + t^2 B^T phi2(-t K) B r,      K = B B^T
    phi1(-z) = (1 - e^{-z})/z,      phi2(-z) = (1 - phi1(-z))/z

The Krylov space is that of (K, B r), in the space of residuals; the same space is used for every t (Hochbruck &
Ostermann 2010).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.linalg.krylov import KrylovBasis, lanczos
from torch_singlim.linalg.operator import LinearOperator

__all__ = ["LinearDescent", "descent_norm", "linear_descent", "phi1", "phi2"]


def phi1(z: Tensor) -> Tensor:
    """phi1(-z) = (1 - e^{-z})/z for z >= 0, 1 at 0.

    >>> phi1(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.6321])
    """
    small = z < 1e-12
    return torch.where(small, 1.0, -torch.expm1(-z) / z.where(~small, 1.0))


def phi2(z: Tensor) -> Tensor:
    """phi2(-z) = (1 - phi1(-z))/z for z >= 0, 1/2 at 0.

    >>> phi2(torch.tensor([0.0, 1.0]))
    tensor([0.5000, 0.3679])
    """
    small = z < 1e-2  # the difference cancels for small z: use its series there, accurate to 1e-11
    series = 1 / 2 - z / 6 + z**2 / 24 - z**3 / 120 + z**4 / 720
    return torch.where(small, series, (1 - phi1(z)) / z.where(~small, 1.0))


@dataclass(frozen=True)
class LinearDescent:
    """u(t) for every t, from one Krylov space.

    Args:
        operator: B ``[m, n]``.
        slope: r ``[n]``.
        space: Krylov space of (K, B r); None if B r = 0.
        start: |B r|.
        residual: relative change of u(t) over the last Krylov steps, at the t that was asked for.
        products: number of products with H that were taken.
    """

    operator: LinearOperator = field(repr=False)
    slope: Tensor = field(repr=False)
    space: KrylovBasis | None = field(repr=False)
    start: float
    residual: float
    products: float

    def at(self, t: float) -> Tensor:
        """u(t)  ``[n]``; costs half a product, and one more for every Krylov vector that is not in memory."""
        if self.space is None or t == 0.0:
            return -t * self.slope
        y = _coefficients(self.space, self.start, t)
        return -t * self.slope + self.operator.rmatvec(self.space.combine(y))


def _coefficients(space: KrylovBasis, start: float, t: float) -> Tensor:
    """t^2 phi2(-t T) e_1 |B r|: u(t) + t r = B^T Q y."""
    values, vectors, _ = space.ritz()
    return start * (vectors @ (t * t * phi2(t * values.clamp_min(0)) * vectors[0]))


def linear_descent(
    operator: LinearOperator, slope: Tensor, *, time: float, rtol: float, max_steps: int = 100
) -> LinearDescent:
    """Solve u' = -r - B^T B u, u(0) = 0 up to `time`.

    Lanczos stops when u(time) has changed by at most rtol times its norm over the last three steps. The norm is that
    of u, not that of its Krylov coefficients: |B^T Q y|^2 = y^T T y.

    Args:
        operator: B ``[m, n]``.
        slope: r ``[n]``.
        time: t > 0; u is slightly less accurate at later times.
        rtol: relative accuracy.
        max_steps: maximum number of products with K.

    Source: M. Hochbruck, A. Ostermann, Exponential integrators, Acta Numerica 2010.

    >>> B = LinearOperator.from_matrix(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    >>> linear_descent(B, torch.ones(2, dtype=torch.float64), time=50.0, rtol=1e-8).at(50.0)
    tensor([ -1., -50.], dtype=torch.float64)
    """
    b = operator.matvec(slope)
    start = torch.linalg.vector_norm(b).item()
    squared, previous, space = torch.dot(slope, slope).item(), b.new_zeros(0), None
    residual = 0.0
    for space in lanczos(operator.gram_product, b, max_steps=max_steps, stride=3, held=operator.held):
        y = _coefficients(space, start, time)
        Ty = space.tridiagonal @ y
        # u = -t r + B^T Q y  =>  |u|^2 = t^2 |r|^2 - 2 t (B r).Q y + y.T y, and B r = |B r| q_1
        size = time**2 * squared - 2 * time * start * y[0].item() + torch.dot(y, Ty).item()
        change = y.clone()
        change[: len(previous)] -= previous
        moved = torch.dot(change, space.tridiagonal @ change).item()
        residual = 0.0 if space.beta == 0.0 else math.sqrt(max(moved, 0.0) / max(size, 1e-300))
        if residual <= rtol:
            break
        previous = y
    steps = 0 if space is None else space.steps
    return LinearDescent(operator, slope, space, start, residual, steps + 0.5)


def descent_norm(operator: LinearOperator, slope: Tensor, *, time: float, steps: int = 3) -> float:
    """|t phi1(-t H) r| by Gauss quadrature with a few Lanczos steps; the vector itself is not formed.

        |t phi1(-t H) r|^2 = t^2 |r|^2 - t^3 (B r)^T psi(t K) B r,      psi(z) = phi2(-z) (1 + phi1(-z))

    Source: G. Golub, G. Meurant, Matrices, Moments and Quadrature, 2010.
    """
    b = operator.matvec(slope)
    start = torch.linalg.vector_norm(b).item()
    squared = time**2 * torch.dot(slope, slope).item()
    for space in lanczos(operator.gram_product, b, max_steps=steps, stride=steps, held=operator.held):
        values, vectors, _ = space.ritz()
        z = time * values.clamp_min(0)
        squared -= time**3 * start**2 * torch.dot(vectors[0].square(), phi2(z) * (1 + phi1(z))).item()
    return math.sqrt(max(squared, 0.0))
