"""How far from Gamma the iterates hover: the mean offset and the variance of the normal modes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.linalg import DenseFactored, FactoredOperator, VectorEstimate, rademacher

__all__ = ["ExpectedDistance", "expected_distance"]


@dataclass(frozen=True)
class ExpectedDistance:
    """Root mean square distance to Gamma, sqrt(|offset|^2 + variance), in units of the weights' norm.

    `offset` is the mean of w minus its nearest point ``[P]``, `variance` the trace of its covariance (infinite where
    a mode is unstable, alpha lambda >= 2).
    """

    offset: VectorEstimate
    variance: float

    @property
    def rms(self) -> float:
        """sqrt(|offset|^2 + variance)."""
        return math.sqrt(self.offset.norm**2 + self.variance)


def expected_distance(
    hessian: FactoredOperator,
    gradient: VectorEstimate,
    noise_gram: Tensor,
    *,
    alpha: float,
    order: int,
    batch_size: int,
    smallest: float = 0.0,
    num_draws: int = 16,
    generator: torch.Generator | None = None,
) -> ExpectedDistance:
    """Where the iterate settles around Gamma, over the modes with lambda >= smallest.

        offset    = -alpha^{order-1} H^+ grad V
        variance  = sum_i alpha S_ii / (2 l_i - alpha l_i^2),      S_ii = (l_i / batch) u_i^T blockdiag(G) u_i,
                    the trace of the X that solves H X + X H - alpha H X H = alpha S

    Args:
        hessian: H = B^T B at the point of Gamma.
        gradient: grad V there ``[P]``.
        noise_gram: G ``[N, rows, rows]``, from `noise_gram`.
        alpha: step size (its effective value under momentum).
        order: of the noise.
        batch_size: samples per step, which average the noise.
        smallest: modes below do not count; below 1 / (alpha steps) they have not had the time to settle.
        num_draws: random vectors for the variance where H is not decomposed.
        generator: of those.

    Source: stationary state of the linearised recursion; arXiv 2404.12293.
    """

    def kept(values: Tensor) -> Tensor:
        return (values >= smallest).to(values.dtype)

    offset = gradient.map(
        lambda g: -(alpha ** (order - 1)) * hessian.normal_function(lambda values: kept(values) / values, g)
    )
    N, rows, _ = noise_gram.shape
    if isinstance(hessian, DenseFactored):
        values = hessian.eigenvalues
        U = hessian.eigenvectors.reshape(N, rows, -1)
        noise = torch.einsum("nar,nar->r", U, noise_gram @ U)  # u_i^T blockdiag(G) u_i
        unstable = (alpha * values >= 2) & (kept(values) > 0) & (noise > 0)
        modes = kept(values) * alpha * noise / (2 - alpha * values) / batch_size
        return ExpectedDistance(offset, math.inf if bool(unstable.any()) else modes.sum().item())

    # trace by Hutchinson: (alpha / batch) E z^T chi(K) z, chi(l) = 1 / (2 - alpha l) on the kept modes, Cov z = G
    spectrum = hessian.spectrum()
    if spectrum.numel() and alpha * spectrum[0].item() >= 2:
        return ExpectedDistance(offset, math.inf)
    values, vectors = torch.linalg.eigh(noise_gram)
    root = vectors * values.clamp_min(0).sqrt()[:, None, :]
    total = 0.0
    for _ in range(num_draws):
        z = (root @ rademacher((N, rows, 1), generator=generator, like=noise_gram)).reshape(-1)
        total += torch.dot(z, hessian.gram_function(lambda values: kept(values) / (2 - alpha * values), z)).item()
    return ExpectedDistance(offset, alpha * total / (num_draws * batch_size))
