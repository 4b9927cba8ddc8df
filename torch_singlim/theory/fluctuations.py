"""Fluctuations about the zero-loss set at finite step size.

The recursion w+ = w - alpha grad L_b(w, eta), linearised at a point of Gamma, has the stationary covariance X with

    H X + X H - alpha E[H_b X H_b] = alpha Sigma,       E over the batches b

Batches smaller than the data make the Hessian of a step random: at the same order as a finite step size, that feeds X.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_singlim.linalg import DenseFactored
from torch_singlim.theory.sgd import SGDSettings, stationary_covariance

__all__ = ["FEW_RESIDUALS", "UnstableStepError", "batch_mean", "batch_weights", "fluctuation_covariance"]

# up to so many residuals the covariance takes seconds
FEW_RESIDUALS = 500
# relative accuracy, and number of iterations
_RTOL, _STEPS = 1e-10, 2_000
# fluctuations that have grown by this factor grow forever
_GROWS = 1e8


class UnstableStepError(ValueError):
    """The step size is too large for fluctuations about the zero-loss set to have a variance."""


def batch_weights(num_samples: int, batch_size: int) -> tuple[float, float]:
    """a and d with E[1_b Z 1_b] (N/B)^2 = a Z + d diag(Z) over batches b; diag keeps the blocks of single samples.

    >>> batch_weights(6, 3)
    (0.8, 1.2)
    """
    N, B = num_samples, batch_size
    a = N * (B - 1) / (B * (N - 1)) if B < N else 1.0
    return a, N / B - a


def batch_mean(matrix: Tensor, *, num_samples: int, batch_size: int) -> Tensor:
    """E[1_b Z 1_b] (N/B)^2 of Z ``[M, M]`` in the basis of residuals, where 1_b keeps those of the batch.

    >>> batch_mean(torch.ones(2, 2), num_samples=2, batch_size=1)
    tensor([[2., 0.],
            [0., 2.]])
    """
    a, d = batch_weights(num_samples, batch_size)
    rows = len(matrix) // num_samples
    samples = torch.eye(num_samples, dtype=matrix.dtype, device=matrix.device)
    return matrix * (a + d * torch.kron(samples, matrix.new_ones(rows, rows)))


def fluctuation_covariance(hessian: DenseFactored, source: Tensor, sgd: SGDSettings, *, num_samples: int) -> Tensor:
    """Y of X = B^T Y B, in the basis of the eigenvectors of K = B B^T  ``[r, r]``, for Sigma = B^T S B.

        K Y + Y K - alpha E_b[K Y K] = alpha S,         E_b: `batch_mean`
        full batch: Y_ij = s(l_i, l_j) S_ij,            s: `stationary_covariance`, with momentum, too

    Solved by a fixed-point iteration for batches smaller than the data.

    Args:
        hessian: H on Gamma, of N samples; r is its rank.
        source: S ``[M, M]``, symmetric, in the basis of residuals.
        sgd: step size alpha, momentum, batch size B.
        num_samples: N.

    Raises:
        ValueError: batches smaller than the data together with momentum, or fluctuations that grow forever.
    """
    N, B, alpha = num_samples, sgd.batch(num_samples), sgd.lr
    U, values = hessian.eigenvectors, hessian.eigenvalues
    unstable = f"the step size {alpha} is unstable: the largest eigenvalue is {hessian.largest:.3g}"
    S = U.T @ source @ U
    if B == N or not len(values):
        pairs = torch.broadcast_tensors(values[:, None], values)
        found = stationary_covariance(sgd, *(each.reshape(-1) for each in pairs)).reshape(S.shape) * S
        if not bool(found.isfinite().all()):
            raise UnstableStepError(
                f"the step size {alpha} is unstable: the largest eigenvalue is {hessian.largest:.3g}"
            )
        return found
    if sgd.momentum:
        raise ValueError(
            f"at finite step size, batches of {sgd.batch_size} of {N} samples are covered without momentum, got "
            f"momentum {sgd.momentum}: use the full batch, or finite_step=False"
        )
    if alpha * hessian.largest >= 2:
        raise UnstableStepError(unstable)
    denominator = values[:, None] + values - alpha * values[:, None] * values
    Y = constant = alpha * S / denominator
    largest = _GROWS * torch.linalg.matrix_norm(constant)
    for _ in range(_STEPS):
        KYK = values[:, None] * Y * values
        # over the batches, less that of the full batch, which is in the denominator
        more = batch_mean(U @ KYK @ U.T, num_samples=N, batch_size=B)
        new = constant + alpha * (U.T @ more @ U - KYK) / denominator
        change, size, Y = torch.linalg.matrix_norm(new - Y), torch.linalg.matrix_norm(new), new
        if not size <= largest:
            break
        if change <= _RTOL * size:
            return Y
    raise UnstableStepError(
        f"fluctuations under batches of {B} grow without bound at the step size {alpha}: use a smaller one"
    )
