"""Linear operators given by their products with vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LinearOperator"]


@dataclass(frozen=True)
class LinearOperator:
    """A linear map B: R^n -> R^m, given by the products v -> B v and u -> B^T u.

    Args:
        shape: ``(m, n)``.
        matvec: maps a vector ``[n]`` to ``[m]``.
        rmatvec: maps a vector ``[m]`` to ``[n]``; the transpose of ``matvec``.

    >>> B = LinearOperator.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]]))
    >>> B.shape, B.matvec(torch.tensor([1.0, 1.0])), B.rmatvec(torch.tensor([1.0, 0.0, 1.0]))
    ((3, 2), tensor([3., 1., 3.]), tensor([4., 2.]))
    """

    shape: tuple[int, int]
    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor]

    @classmethod
    def from_matrix(cls, matrix: Tensor) -> LinearOperator:
        """The operator of a dense matrix ``[m, n]``."""
        rows, columns = matrix.shape
        return cls((rows, columns), lambda v: matrix @ v, lambda u: matrix.T @ u)

    @property
    def held(self) -> int:
        """How many Krylov vectors ``[m]`` take the memory of four vectors ``[n]``, or of 32 MB; at least 2."""
        m, n = self.shape
        return max(2, max(4 * n, 4 * 10**6) // max(m, 1))

    def gram_product(self, u: Tensor) -> Tensor:
        """K u with K = B B^T.  u ``[m]`` -> ``[m]``."""
        return self.matvec(self.rmatvec(u))  # u -> B^T u -> B B^T u

    def normal_product(self, v: Tensor) -> Tensor:
        """H v with H = B^T B.  v ``[n]`` -> ``[n]``."""
        return self.rmatvec(self.matvec(v))  # v -> B v -> B^T B v

    def rows(self, like: Tensor) -> Tensor:
        """The dense matrix B ``[m, n]`` by one product per row, for small problems.  `like` sets dtype and device."""
        identity = torch.eye(self.shape[0], dtype=like.dtype, device=like.device)
        return torch.stack([self.rmatvec(e) for e in identity])
