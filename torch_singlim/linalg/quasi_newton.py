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

    Source: J. Nocedal, S. Wright, Numerical Optimization, 2006, algorithm 7.4; W. Chen, Z. Wang, J. Zhou, Large-scale
    L-BFGS using MapReduce, 2014, for the coefficients.

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

        Args:
            g: grad f + mu u  ``[n]``.
            mu: the penalty, positive.
        """
        size, k = len(self._basis), len(self._values)
        P = torch.zeros(size + 1, size + 1, dtype=torch.float64)  # inner products of the basis and g
        P[:size, :size] = self._products
        P[size, :size] = P[:size, size] = (self._basis @ g).double().cpu()
        P[size, size] = torch.dot(g, g).item()

        def unit(at: int) -> Tensor:
            return torch.zeros(size + 1, dtype=torch.float64).index_fill_(0, torch.tensor([at]), 1.0)

        pairs = []
        for each in self._slots:
            s, y = (unit(at) for at in self._slot(each))
            y = y + mu * s
            if (s @ P @ y).item() > 0:
                pairs.append((s, y))
        gamma = 1 / (mu + (self._values.min().item() if k else 0.0))
        if pairs:
            s, y = pairs[-1]
            inside = (P @ s)[:k], (P @ y)[:k]
            outside = (s @ P @ y - inside[0] @ inside[1]).item(), (y @ P @ y - inside[1] @ inside[1]).item()
            if min(outside) > 0:
                gamma = min(outside[0] / outside[1], 1 / mu)
        q, found = unit(size), []
        for s, y in reversed(pairs):
            found.append((s @ P @ q) / (s @ P @ y))
            q = q - found[-1] * y
        r = gamma * q
        r[:k] += (1 / (self._values + mu) - gamma) * (P @ q)[:k]
        for (s, y), alpha in zip(pairs, reversed(found), strict=True):
            r = r + (alpha - (y @ P @ r) / (s @ P @ y)) * s
        return -(self._basis.T @ r[:size].to(g)) - r[size].item() * g
