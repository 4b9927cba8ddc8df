"""H = B^T B by means of its small Gram matrix K = B B^T: kernel projection, pseudo-inverse, matrix functions.

With K u_i = l_i u_i, the eigenvectors of H with nonzero eigenvalue are v_i = B^T u_i / sqrt(l_i). So for any phi,

    phi(H) P_N = sum_i phi(l_i) v_i v_i^T = B^T psi(K) B,      psi(l) = phi(l) / l,

and no n x n matrix is ever formed.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from torch_singlim.linalg.cholesky import CholeskyFactor, gram_cutoff
from torch_singlim.linalg.estimate import Estimate, rademacher
from torch_singlim.linalg.krylov import KrylovBasis, krylov_function, lanczos
from torch_singlim.linalg.operator import LinearOperator

__all__ = [
    "CholeskyFactored",
    "DenseFactored",
    "FactoredOperator",
    "KrylovFactored",
]


# Lanczos steps of a quadrature, which then matches 2 * 40 moments of the spectrum
_QUADRATURE = 40
# number of random vectors for estimates of traces and counts of eigenvalues; each averages over m eigenvalues, so that
# their relative spread is about sqrt(2 / m)
_COUNTING = 2
# relative residual to which solves with a factor in a lower precision are refined
_REFINED = 1e-10


class FactoredOperator(ABC):
    """H = B^T B ``[n, n]`` for an operator B ``[m, n]``: the interface of the dense and the Krylov implementations."""

    operator: LinearOperator

    @property
    @abstractmethod
    def decomposed(self) -> bool:
        """Whether all eigenvectors were computed: a matrix function is then a dense product, else many with B."""

    @abstractmethod
    def gram_function(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        """psi(K) u on the range of K (zero on its kernel).  psi maps eigenvalues elementwise; u ``[m]`` -> ``[m]``."""

    @abstractmethod
    def gram_form(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> float:
        """u^T psi(K) u on the range of K.  psi as above, u ``[m]``."""

    @abstractmethod
    def spectrum(self) -> Tensor:
        """Nonzero eigenvalues of H, descending ``[r]``; only the resolved ones if `exact` is False."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest eigenvalue of H, the curvature of the stiffest mode; 0 for H = 0."""

    @abstractmethod
    def trace(self, phi: Callable[[Tensor], Tensor]) -> Estimate:
        """sum_i phi(l_i) over the nonzero eigenvalues of H.  phi maps eigenvalues elementwise."""

    @abstractmethod
    def count(self, smallest: float) -> float:
        """Number of eigenvalues of H that are at least `smallest`; nan if eigenvalues that small are not resolved."""

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the spectrum and the projections are complete up to rounding."""

    @property
    @abstractmethod
    def unresolved(self) -> float:
        """Share of K's m eigenvalues that a projection does not resolve to a relative accuracy of 1/10; 0: none."""

    @property
    @abstractmethod
    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        """The product u -> K^-1 u ``[m]``, to the precision of the factor: a preconditioner for this K and nearby ones;
        None unless K has full rank and was factored.
        """

    @property
    def rank(self) -> int:
        """Number of nonzero eigenvalues of H; a lower bound if `exact` is False."""
        return self.spectrum().numel()

    def normal_function(self, phi: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """phi(H) P_N v = B^T psi(K) B v with psi(l) = phi(l) / l.  v ``[n]`` -> ``[n]``."""
        B = self.operator
        return B.rmatvec(self.gram_function(lambda values: phi(values) / values, B.matvec(v)))

    def project_kernel(self, v: Tensor) -> Tensor:
        """P_T v = v - B^T K^+ B v: the orthogonal projection on ker H.  v ``[n]`` -> ``[n]``.

        If all eigenvectors are known, the projection is applied twice: the second pass removes the rounding errors of
        the first one.
        """
        for _ in range(2 if self.decomposed else 1):
            v = v - self.normal_function(torch.ones_like, v)
        return v

    def pseudo_inverse(self, u: Tensor) -> Tensor:
        """B^+ u = B^T K^+ u: the shortest x with B x = P_range u.  u ``[m]`` -> ``[n]``."""
        return self.operator.rmatvec(self.solve(u))

    def solve(self, u: Tensor) -> Tensor:
        """K^+ u  ``[m]``."""
        return self.gram_function(torch.reciprocal, u)


@dataclass(frozen=True)
class DenseFactored(FactoredOperator):
    """H = B^T B by the full eigendecomposition of K; exact, O(m^3) once, O(m^2) per product.

    >>> B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    >>> H = DenseFactored.from_gram(LinearOperator.from_matrix(B), B @ B.T)
    >>> H.spectrum(), H.rank, H.project_kernel(torch.ones(3, dtype=torch.float64))
    (tensor([4., 1.], dtype=torch.float64), 2, tensor([0., 0., 1.], dtype=torch.float64))
    """

    operator: LinearOperator
    eigenvalues: Tensor  # [r] descending, above the cutoff
    eigenvectors: Tensor = field(repr=False)  # [m, r], of K

    @classmethod
    def from_gram(cls, operator: LinearOperator, gram: Tensor, *, rtol: float | None = None) -> DenseFactored:
        """From K ``[m, m]``; eigenvalues at most rtol times the largest count as zero (default `gram_cutoff`)."""
        rtol = gram_cutoff(gram.shape[0], gram.dtype) if rtol is None else rtol
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0), vectors.flip(1)
        kept = (values > rtol * values[0]) & (values > 0) if values.numel() else values > 0
        return cls(operator, values[kept], vectors[:, kept])

    @property
    def decomposed(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return True

    @property
    def unresolved(self) -> float:
        return 0.0

    @property
    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        return functools.partial(self.gram_function, torch.reciprocal) if self.rank == self.operator.shape[0] else None

    def spectrum(self) -> Tensor:
        return self.eigenvalues

    @property
    def largest(self) -> float:
        return self.eigenvalues[:1].sum().item()

    def trace(self, phi: Callable[[Tensor], Tensor]) -> Estimate:
        return Estimate(phi(self.eigenvalues).sum().item(), 0.0)

    def gram_function(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        return self.eigenvectors @ (psi(self.eigenvalues) * (self.eigenvectors.T @ u))

    def count(self, smallest: float) -> float:
        return float((self.eigenvalues >= smallest).sum())

    def gram_form(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> float:
        return torch.dot(psi(self.eigenvalues), (self.eigenvectors.T @ u).square()).item()


@dataclass(frozen=True)
class KrylovFactored(FactoredOperator):
    """H = B^T B by Lanczos on K, with a new Krylov space for each vector; only products with B and B^T are used.

    Args:
        operator: B ``[m, n]``.
        like: a tensor with the dtype and the device of the vectors.
        rtol: relative accuracy of every matrix function times a vector.
        max_steps: maximum number of products with K per vector.
        cutoff: Ritz values at most this share of the largest count as zero.
        seed: of the random start vectors of `spectrum` and `trace`.
    """

    operator: LinearOperator
    like: Tensor = field(repr=False)
    rtol: float
    max_steps: int
    cutoff: float
    seed: int = 0

    @property
    def decomposed(self) -> bool:
        return False

    def _lanczos(self, start: Tensor, steps: int) -> Iterator[KrylovBasis]:
        """The Krylov space after this number of steps; an iterator of at most one element."""
        B = self.operator
        return lanczos(B.gram_product, start, max_steps=steps, stride=steps, held=B.held)

    @cached_property
    def _ritz(self) -> tuple[Tensor, bool, float]:
        """The resolved eigenvalues, whether these are all distinct ones, and the weight of the unresolved ones."""
        generator = torch.Generator().manual_seed(self.seed)
        start = rademacher((self.operator.shape[0],), generator=generator, like=self.like)
        spaces = list(self._lanczos(start, self.max_steps))
        if not spaces:
            return self.like.new_zeros(0), True, 0.0
        space = spaces[-1]
        values, vectors, bounds = space.ritz()
        largest = values[-1].clamp_min(0)
        resolved = (values > self.cutoff * largest) & (bounds <= self.rtol * largest)
        blurred = (values > self.cutoff * largest) & (bounds > 0.1 * values)
        if space.steps > len(space.held):
            # eigenvalues may appear repeatedly: overlapping intervals may contain the same one and are counted once
            lowest = math.inf
            for i in resolved.nonzero()[:, 0].flip(0).tolist():
                resolved[i] = bool(values[i] + bounds[i] < lowest)
                lowest = (values[i] - bounds[i]).item() if resolved[i] else lowest
        return values[resolved].flip(0), space.beta == 0.0, vectors[0][blurred].square().sum().item()

    def spectrum(self) -> Tensor:
        return self._ritz[0]

    @property
    def exact(self) -> bool:
        """True when the Krylov space of a random vector became invariant: every distinct eigenvalue was found.

        A multiple eigenvalue is found once (a random start vector has one direction in common with its eigenspace).
        """
        return self._ritz[1]

    @property
    def unresolved(self) -> float:
        """The quadrature weight of the Ritz values that are not resolved, from one random vector."""
        return self._ritz[2]

    @property
    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        return None

    def _on_range(self, psi: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        kept = values > self.cutoff * values.max()
        return torch.where(kept, psi(values.where(kept, 1)), 0)

    def gram_function(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
        on_range = functools.partial(self._on_range, psi)
        B, accuracy = self.operator, {"rtol": self.rtol, "max_steps": self.max_steps}
        return krylov_function(B.gram_product, on_range, u, **accuracy, held=B.held).x

    @cached_property
    def _quadrature(self) -> list[tuple[Tensor, Tensor, bool]]:
        """For each of a few random vectors z: nodes l and weights c with z^T psi(K) z = sum_j c_j psi(l_j), and whether
        this is exact. The same rules are used for every trace.
        """
        generator, m = torch.Generator().manual_seed(self.seed), self.operator.shape[0]
        rules = []
        for _ in range(_COUNTING):
            z = rademacher((m,), generator=generator, like=self.like)
            for space in self._lanczos(z, min(self.max_steps, 2 * _QUADRATURE)):
                values, vectors, _ = space.ritz()
                kept = values > self.cutoff * values.max()
                rules.append((values[kept], m * vectors[0][kept].square(), space.beta == 0))
        return rules

    @property
    def largest(self) -> float:
        return max((values.max().item() for values, _, _ in self._quadrature if len(values)), default=0.0)

    def trace(self, phi: Callable[[Tensor], Tensor]) -> Estimate:
        """By quadrature from random vectors (S. Ubaru, J. Chen, Y. Saad, SIAM J. Matrix Anal. Appl. 38, 2017)."""
        draws = [torch.dot(weights, phi(values)) for values, weights, _ in self._quadrature]
        return Estimate.from_draws(torch.stack(draws)) if draws else Estimate(0.0, 0.0)

    def count(self, smallest: float) -> float:
        """The trace of an indicator function, accurate to a few percent of m.

        It is nan if the Krylov space of one of the vectors has no Ritz value as small as `smallest`: the number of
        eigenvalues below is then unknown.
        """
        if any(not exact and len(v) and bool(v.min() > smallest) for v, _, exact in self._quadrature):
            return math.nan
        return self.trace(lambda values: (values >= smallest).to(values)).mean

    def gram_form(self, psi: Callable[[Tensor], Tensor], u: Tensor) -> float:
        """By Gauss quadrature, which converges in fewer steps than the vector psi(K) u does."""
        form, most = 0.0, min(self.max_steps, _QUADRATURE)
        for space in self._lanczos(u, most):
            values, vectors, _ = space.ritz()
            form = torch.dot(vectors[0].square(), self._on_range(psi, values)).item() * torch.dot(u, u).item()
        return form


@dataclass(frozen=True)
class CholeskyFactored(KrylovFactored):
    """H = B^T B with the Cholesky factor of a K of full rank: exact projections and K^-1, all else by Lanczos.

    Computing the factor takes a thirtieth of the time of computing all eigenvectors, in single precision a sixtieth.
    Solves are refined with products by K in the precision of the operator.

    >>> B = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    >>> K = CholeskyFactor(torch.linalg.cholesky((B @ B.T).float()))
    >>> H = CholeskyFactored(LinearOperator.from_matrix(B), B[0], rtol=1e-3, max_steps=9, cutoff=1e-12, factor=K)
    >>> H.rank, H.project_kernel(torch.ones(3, dtype=torch.float64))
    (2, tensor([0., 0., 1.], dtype=torch.float64))
    """

    factor: CholeskyFactor = field(repr=False, kw_only=True)

    @property
    def rank(self) -> int:
        return self.operator.shape[0]

    @property
    def unresolved(self) -> float:
        return 0.0

    @property
    def inverse(self) -> Callable[[Tensor], Tensor] | None:
        return self.factor.solve

    def solve(self, u: Tensor) -> Tensor:
        return self.factor.refined(self.operator.gram_product, u, rtol=_REFINED)

    def project_kernel(self, v: Tensor) -> Tensor:
        for _ in range(2):  # the second pass removes the rounding errors of the first one
            v = v - self.pseudo_inverse(self.operator.matvec(v))
        return v
