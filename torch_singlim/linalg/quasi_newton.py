"""Quasi-Newton directions from known eigenpairs and the last few steps, with a quadratic penalty that may change."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["QuasiNewton"]


class QuasiNewton:
    """Descent directions -H g for f(u) + mu |u|^2 / 2, where H approximates the inverse of D^2 f + mu.

    H is that of L-BFGS: from the last pairs (s, y) of steps and changes of grad f, and from an initial matrix, here

        H_0 = V (Lambda + mu)^{-1} V^T + gamma (1 - V V^T)

    with eigenpairs (Lambda, V) of a Hessian nearby. gamma is the inverse curvature along the last step outside of V, at
    most 1 / mu, and before the first step that of the smallest of these eigenvalues. The pairs are those of f alone, so
    that mu may change from step to step. All recursions are made with coefficients in the basis of these vectors and g,
    whose inner products are known: a direction takes two passes through the basis.

    Args:
        values: Lambda  ``[k]``, positive.
        vectors: V  ``[k, n]``, orthonormal rows.
        pairs: number of pairs that are kept.

    Source: J. Nocedal, S. Wright, Numerical Optimization, 2006, sections 7.2 and 7.3; W. Chen, Z. Wang, J. Zhou,
    Large-scale L-BFGS using MapReduce, 2014, for the coefficients.

    >>> memory = QuasiNewton(torch.tensor([3.0]), torch.tensor([[1.0, 0.0]]), pairs=5)
    >>> memory.direction(torch.tensor([4.0, 0.0]), 1.0)  # f = 3 u_1^2 / 2
    tensor([-1., -0.])
    """

    def __init__(self, values: Tensor, vectors: Tensor, *, pairs: int) -> None:
        k, n = vectors.shape
        self._values = values.double().cpu()
        self._basis = vectors.new_zeros(k + 2 * pairs, n)  # V, then s and y of each pair
        self._basis[:k] = vectors
        self._products = torch.zeros(len(self._basis), len(self._basis), dtype=torch.float64)
        self._products[:k, :k] = torch.eye(k)
        self._capacity, self._slots, self._next = pairs, [], 0  # the slots in use, from the oldest pair to the newest

    def _slot(self, pair: int) -> tuple[int, int]:
        """Where s and y of a pair are in the basis."""
        first = len(self._values) + 2 * pair
        return first, first + 1

    def add(self, s: Tensor, y: Tensor) -> None:
        """Keep a step and the change of grad f along it, in place of the oldest pair."""
        pair = self._next
        self._next = (pair + 1) % self._capacity
        self._slots = [each for each in self._slots if each != pair] + [pair]
        for at, vector in zip(self._slot(pair), (s, y), strict=True):
            self._basis[at] = vector
            self._products[at] = self._products[:, at] = (self._basis @ vector).double().cpu()

    def clear(self) -> None:
        """Forget all pairs."""
        self._slots = []

    def direction(self, g: Tensor, mu: float) -> Tensor:
        """-H g  ``[n]``.

        The two loops over the pairs are two triangular systems: with R_ij = <s_i, y_j> for j >= i and D its diagonal,

            R alpha = S g,   q = g - Y^T alpha,   r = H_0 q,   R^T c = D alpha - Y r,   H g = r + S^T c

        Args:
            g: grad f + mu u  ``[n]``.
            mu: the penalty, positive.
        """
        size, k = len(self._basis), len(self._values)
        P = torch.zeros(size + 1, size + 1, dtype=torch.float64)  # inner products of the basis and g
        P[:size, :size] = self._products
        P[size, :size] = P[:size, size] = (self._basis @ g).double().cpu()
        P[size, size] = torch.dot(g, g).item()

        eye = torch.eye(size + 1, dtype=torch.float64)
        first = torch.tensor([self._slot(pair)[0] for pair in self._slots], dtype=torch.long)
        S = eye[first]
        Y = eye[first + 1] + mu * S  # coefficients of the pairs, from the oldest to the newest  [m, size + 1]
        PY = Y @ P
        kept = (S * PY).sum(1) > 0
        S, Y, PY = S[kept], Y[kept], PY[kept]
        gamma = 1 / (mu + (self._values.min().item() if k else 0.0))
        if len(S):
            s, y = (P @ S[-1])[:k], PY[-1, :k]  # their parts along the rows of V
            outside = (PY[-1] @ S[-1] - s @ y).item(), (PY[-1] @ Y[-1] - y @ y).item()
            if min(outside) > 0:
                gamma = min(outside[0] / outside[1], 1 / mu)
        R = torch.triu(S @ PY.T)  # the inner products of s_i with y_j, j >= i
        alpha = torch.linalg.solve_triangular(R, S @ P[:, size:], upper=True)  # [m, 1]
        q = eye[size] - (alpha.T @ Y)[0]
        r = gamma * q
        r[:k] += (1 / (self._values + mu) - gamma) * (P @ q)[:k]
        rest = R.diagonal()[:, None] * alpha - (PY @ r)[:, None]
        r = r + (torch.linalg.solve_triangular(R.T, rest, upper=False).T @ S)[0]
        return -(self._basis.T @ r[:size].to(g)) - r[size].item() * g
