"""Sharpness-aware minimisation: no noise, but a perturbation of the weights that depends on the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import grad

from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise.base import BatchLoss, NoiseSpace
from torch_singlim.noise.gaussian import GaussianNoise, require_positive

__all__ = ["SAM"]


@dataclass(frozen=True)
class SAM(GaussianNoise):
    """Sharpness-aware minimisation on full batches: the gradient is that at w + rho grad L / |grad L|.

        V = (rho^2/2) lambda_1(H),      a distance of rho alpha lambda_1 / (2 - alpha lambda_1)

    Order 1, with sigma^2 = rho^2. Near the zero-loss set the gradient points along the stiffest mode u, and its sign
    changes at every step: w bounces between two points at that distance, and the perturbed weights are rho further out.
    As in training, the perturbation is not differentiated. In smaller batches SAM has another potential.

    Raises:
        ValueError: a rho that is not positive.

    Source: K. Wen, T. Ma, Z. Li, How does sharpness-aware minimization minimize sharpness?, arXiv 2211.05729.

    >>> SAM(rho=0.05).order
    1
    """

    rho: float
    per_sample: ClassVar[bool] = False
    scale_free: ClassVar[bool] = False
    ascends: ClassVar[bool] = True
    done_by: ClassVar[str | None] = "an optimizer that takes a second gradient does it"

    def __post_init__(self) -> None:
        require_positive("rho", self.rho)

    @property
    def order(self) -> int:
        return 1

    def variance(self, space: NoiseSpace) -> float:
        return self.rho**2

    def check(self, problem: ZeroLossProblem) -> None:
        if problem.batch_size < problem.num_samples:
            raise ValueError(
                f"SAM takes the gradient of all {problem.num_samples} samples at once, got batch_size="
                f"{problem.batch_size}: pass fewer samples, or more memory"
            )

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        g = grad(lambda v: loss(v, x, y))(w.detach())
        # at the bottom there is no direction, and no perturbation
        step = self.rho * g / torch.linalg.vector_norm(g).clamp_min(torch.finfo(w.dtype).tiny)
        return loss(w + step.detach(), x, y)
