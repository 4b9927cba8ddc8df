"""Fluctuations about the zero-loss set under batches smaller than the data, at finite step size.

Batches make the Hessian of a step random. At the same order as a finite step size, that feeds the fluctuations X:

    H X + X H - alpha E[H_b X H_b] = alpha Sigma,       E over the batches b
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_singlim.linalg import DenseFactored, FactoredOperator
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["FEW_RESIDUALS", "UnstableStepError", "batch_covariance"]

# up to so many residuals the covariance takes seconds
FEW_RESIDUALS = 500
# relative accuracy, and number of iterations
_RTOL, _STEPS = 1e-10, 2_000
# fluctuations that have grown by this factor grow forever
_GROWS = 1e8


class UnstableStepError(ValueError):
    """The step size is too large for fluctuations about the zero-loss set to have a variance."""


def batch_covariance(hessian: FactoredOperator, source: Tensor, sgd: SGDSettings, *, num_samples: int) -> Tensor:
    """Y of X = B^T Y B, in the basis of the eigenvectors of K = B B^T  ``[M, M]``, for Sigma = B^T S B.

        K Y + Y K - alpha (d diag(K Y K) + a K Y K) = alpha S,      a = N (B - 1)/(B (N - 1)),   d = N/B - a

    Here diag keeps the blocks of single samples. Solved by a fixed-point iteration.

    Args:
        hessian: H on Gamma, of N samples.
        source: S ``[M, M]``, symmetric.
        sgd: step size alpha and batch size B.
        num_samples: N.

    Raises:
        ValueError: momentum, a K that is not decomposed or without full rank, or fluctuations that grow forever.
    """
    N, M, alpha = num_samples, len(source), sgd.lr
    if sgd.momentum:
        raise ValueError(
            f"at finite step size, batches of {sgd.batch_size} of {N} samples are covered without momentum, got "
            f"momentum {sgd.momentum}: use the full batch, or finite_step=False"
        )
    if not isinstance(hessian, DenseFactored) or hessian.rank < M:
        raise ValueError(
            "at finite step size, batches need all eigenvectors of a B B^T of full rank, got "
            f"{type(hessian).__name__} of rank {hessian.rank} for {M} residuals: use fewer samples, or "
            "finite_step=False"
        )
    B = sgd.batch(N)
    a = N * (B - 1) / (B * (N - 1))
    U, values = hessian.eigenvectors, hessian.eigenvalues
    denominator = values[:, None] + values - alpha * a * values[:, None] * values
    if bool((denominator <= 0).any()):
        raise UnstableStepError(f"the step size {alpha} is unstable: alpha lambda_1 = {alpha * values[0].item():.3g}")
    samples = torch.eye(N, dtype=values.dtype, device=values.device)
    blocks = torch.kron(samples, values.new_ones(M // N, M // N))  # 1 within each sample
    Y = constant = alpha * (U.T @ source @ U) / denominator
    largest = _GROWS * torch.linalg.matrix_norm(constant)
    for _ in range(_STEPS):
        KYK = U @ (values[:, None] * Y * values) @ U.T
        new = constant + alpha * (N / B - a) * (U.T @ (blocks * KYK) @ U) / denominator
        change, size, Y = torch.linalg.matrix_norm(new - Y), torch.linalg.matrix_norm(new), new
        if not size <= largest:
            break
        if change <= _RTOL * size:
            return Y
    raise UnstableStepError(
        f"fluctuations under batches of {B} grow without bound at the step size {alpha}: use a smaller one"
    )
