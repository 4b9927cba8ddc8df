"""The Cholesky factor of a Gram matrix, for solves that are refined with products in a higher precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.linalg.krylov import preconditioned_solve

__all__ = ["CholeskyFactor", "cholesky", "gram_cutoff"]

# steps of inverse iteration: each reduces the part of the other eigenvectors by the ratio of eigenvalues
_INVERSE_ITERATIONS = 4
# maximum number of products that refine a solve
_REFINEMENTS = 30


@dataclass(frozen=True)
class CholeskyFactor:
    """K = L L^T up to rounding errors of the precision of L.

    Args:
        lower: L ``[m, m]``.

    >>> factor = CholeskyFactor(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    >>> factor.solve(torch.tensor([8.0, 3.0], dtype=torch.float64))
    tensor([2., 3.], dtype=torch.float64)
    """

    lower: Tensor = field(repr=False)

    def solve(self, u: Tensor) -> Tensor:
        """K^-1 u  ``[m]``, in the precision of u."""
        # torch.cholesky_solve copies the factor, which takes ten times as long
        x = torch.linalg.solve_triangular(self.lower, u.to(self.lower)[:, None], upper=False)
        return torch.linalg.solve_triangular(self.lower.mT, x, upper=True)[:, 0].to(u)

    def refined(self, product: Callable[[Tensor], Tensor], u: Tensor, *, rtol: float) -> Tensor:
        """K^-1 u  ``[m]``, refined by conjugate gradients with the products of K in the precision of u.

        Args:
            product: u -> K u, also for a K that differs a little from the one that was factored.
            u: right-hand side.
            rtol: relative residual.
        """
        return preconditioned_solve(product, u, self.solve, rtol=rtol, max_steps=_REFINEMENTS).x


def gram_cutoff(rows: int, dtype: torch.dtype) -> float:
    """Relative cutoff m eps: smaller eigenvalues of K are rounding error (as in numpy.linalg.matrix_rank).

    It applies to K ``[m, m]``, and so to the eigenvalues of H, which are the squared singular values of B.
    """
    return max(rows, 10) * torch.finfo(dtype).eps


def cholesky(
    gram: Tensor, *, product: Callable[[Tensor], Tensor] | None = None, dtype: torch.dtype | None = None
) -> CholeskyFactor | None:
    """The factor of a K ``[m, m]`` of full numerical rank, or None.

    Rounding errors of the pivots hide a small eigenvalue, or a zero. Inverse iteration finds out which it is: its
    Rayleigh quotient is evaluated with products in a higher precision, if these are given.

    Args:
        gram: K, perhaps in single precision.
        product: u -> K u  ``[m]``; default: that with the matrix.
        dtype: precision of the product; default: that of the matrix.

    >>> K = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    >>> cholesky(K) is None
    True
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    if info.item() != 0:
        return None
    factor, dtype = CholeskyFactor(lower), dtype or gram.dtype
    u = torch.randn(len(gram), generator=torch.Generator().manual_seed(0)).to(gram.device, dtype)
    for _ in range(_INVERSE_ITERATIONS):
        u = factor.solve(u)
        u = u / torch.linalg.vector_norm(u)
    smallest = torch.dot(u, gram @ u if product is None else product(u))
    full = bool(smallest > gram_cutoff(len(gram), dtype) * gram.diagonal().max())
    return factor if full else None
