"""Regularised least squares on a Krylov space, with the regularisation that gives a wanted residual."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_singlim.linalg.krylov import KrylovBasis, lanczos

__all__ = ["Tikhonov", "tikhonov"]

# the regularisation is searched among so many decades on either side of the largest eigenvalue, in so many rounds with
# so many points at once: to 2e-9 of it
_DECADES, _ROUNDS, _POINTS = 14, 5, 129


class Tikhonov:
    """The minimiser of |r + B u|^2 + mu |u|^2, u = -B^T (K + mu)^{-1} r with K = B B^T, for every mu > 0.

    On a Krylov space of (K, r) all mu cost nothing, so that mu can be chosen by the residual that it leaves (Morozov's
    discrepancy principle; Hansen, Rank-Deficient and Discrete Ill-Posed Problems, 1998, section 7.2).

    Args:
        space: the Krylov space.
        norm: |r|.
    """

    def __init__(self, space: KrylovBasis, norm: float) -> None:
        self.space, self.norm = space, norm
        values, self._vectors, _ = space.ritz()
        self._values = values.clamp_min(0)

    def _coefficients(self, mu: float) -> Tensor:
        return self._vectors @ (self._vectors[0] / (self._values + mu))

    def residual(self, mu: float) -> float:
        """|r + B u| = mu |(K + mu)^{-1} r|, which grows with mu."""
        return mu * self.norm * torch.linalg.vector_norm(self._vectors[0] / (self._values + mu)).item()

    def length(self, mu: float) -> float:
        """|u|, which falls with mu."""
        return self.norm * torch.linalg.vector_norm(self._values.sqrt() * self._vectors[0] / (self._values + mu)).item()

    def error(self, mu: float) -> float:
        """The residual of (K + mu) y = r for the y of this space, relative to mu |y|."""
        y = self._coefficients(mu)
        return self.space.beta * abs(y[-1].item()) / max(mu * torch.linalg.vector_norm(y).item(), 1e-300)

    def regularisation(self, residual: float) -> float:
        """The mu that leaves this residual; the smallest one if every mu leaves more."""
        top, width = math.log(max(self._values[-1].item(), 1e-300)), _DECADES * math.log(10)
        low, high = top - width, top + width
        for _ in range(_ROUNDS):
            between = torch.linspace(low, high, _POINTS, dtype=torch.float64)
            mu = between.exp().to(self._values)[:, None]
            left = self.norm * torch.linalg.vector_norm(mu * self._vectors[0] / (self._values + mu), dim=1)
            last = int((left[1:-1] < residual).sum())  # the residual grows with mu
            low, high = between[last].item(), between[last + 1].item()
        return math.exp(high)

    def leading(self, count: int) -> tuple[Tensor, Tensor]:
        """The largest Ritz values of K ``[k]`` and their vectors ``[k, m]``; none if the space is not all in memory."""
        if len(self.space.held) < self.space.steps:
            return self._values[:0], self.space.held[:0]
        return self._values[-count:], self._vectors[:, -count:].T @ self.space.held

    def dual(self, mu: float) -> Tensor:
        """y = (K + mu)^{-1} r  ``[m]``; u = -B^T y."""
        return self.norm * self.space.combine(self._coefficients(mu))


def tikhonov(
    matvec: Callable[[Tensor], Tensor], rhs: Tensor, *, max_steps: int, held: int | None = None
) -> Iterator[Tikhonov]:
    """Yield the regularised solutions on growing Krylov spaces, see `lanczos`.

    Args:
        matvec: the product with K.
        rhs: r  ``[m]``.
        max_steps: maximum number of products.
        held: maximum number of Krylov vectors in memory.

    >>> K = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    >>> *_, last = tikhonov(lambda v: K @ v, torch.tensor([3.0, 4.0]).double(), max_steps=2)
    >>> mu = last.regularisation(2.5)
    >>> round(last.residual(mu), 6), round(last.length(mu), 3) < 2.0
    (2.5, True)
    """
    norm = torch.linalg.vector_norm(rhs).item()
    for space in lanczos(matvec, rhs, max_steps=max_steps, held=held):
        yield Tikhonov(space, norm)
