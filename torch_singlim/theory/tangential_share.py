"""How much of the weights' motion is tangential to Gamma, in the linear model: what the singular limit can explain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_singlim.geometry import gauss_newton
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.potential import potential
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["tangential_share"]


def tangential_share(
    problem: ZeroLossProblem,
    point: torch.Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: Sequence[int],
    num_draws: int = 64,
    generator: torch.Generator | None = None,
) -> list[float]:
    """The cosine of the mean displacement of the weights, K steps after a point of Gamma, with its tangential part.

        |P_T g| / |P_T g + phi(alpha K H) P_N g|,      g = grad V,   phi(z) = (1 - exp(-z)) / z

    In the linear model the weights move by -alpha K (P_T g + phi P_N g). Modes with alpha lambda K >> 1 have relaxed,
    phi = 0; those with alpha lambda K << 1 move as if they were tangential, phi = 1, and are not in the singular limit.
    So this is the cosine that the weights can have with the limit. Their nearest points can have more.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        noise: a system of order 1.
        sgd: step size and momentum.
        steps: one or several K.
        num_draws: number of directions for the trace in V; exact with as many as eta has components.
        generator: of random directions.

    Raises:
        ValueError: another order than 1.

    >>> from torch import nn
    >>> from torch_singlim.noise import WeightDecay
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.ones(1, 1))
    >>> w, sgd = torch.ones(2).double(), SGDSettings(lr=0.01)
    >>> [round(c, 3) for c in tangential_share(problem, w, WeightDecay(0.1), sgd, steps=(1, 100, 10_000))]
    [0.711, 0.918, 1.0]
    """
    if noise.order != 1:
        raise ValueError(f"the share of the tangential motion is known for noise of order 1, got order {noise.order}")
    hessian = gauss_newton(problem, point)
    g = potential(noise, problem, point, num_draws=num_draws, generator=generator).gradient.mean
    along = torch.linalg.vector_norm(hessian.project_kernel(g)).item()
    shares = []
    for K in steps:
        rate = sgd.effective_lr * K
        across = hessian.normal_function(lambda values, rate=rate: -torch.expm1(-rate * values) / (rate * values), g)
        total = math.hypot(along, torch.linalg.vector_norm(across).item())
        shares.append(along / total if total > 0 else math.nan)
    return shares
