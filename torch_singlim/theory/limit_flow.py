"""The drift of the singular limit, integrated along Gamma over K steps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.effective import WindowPrediction
from torch_singlim.theory.sgd import SGDSettings
from torch_singlim.theory.singular_limit import singular_limit

__all__ = ["limit_flow"]


def limit_flow(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    retract: Callable[[Tensor], Tensor],
    substeps: int = 10,
    num_draws: int = 64,
    generator: torch.Generator | None = None,
) -> WindowPrediction:
    """The singular limit's drift integrated along Gamma over K optimizer steps, by the midpoint rule.

        W <- Pi(W + h drift(Pi(W + (h/2) drift(W)))),      h = K / substeps,  Pi: `retract`

    This flow is deterministic: if the limit also diffuses, the flow is the mean of the limit for short times only.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        retract: a map of weights near Gamma to weights on Gamma ``[P]``, ``lambda v: nearest_point(problem, v).point``.
        substeps: number of steps of the integration.
        num_draws: for each drift, see `singular_limit`.
        generator: of random directions.

    Raises:
        ValueError: fewer than one step or sub-step.

    >>> from torch import nn
    >>> from torch_singlim.noise import Dropout
    >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1, bias=False))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> w, sgd = torch.tensor([0.75, 0.25]).double(), SGDSettings(lr=0.1)
    >>> flow = limit_flow(problem, w, Dropout(), sgd, steps=20, retract=lambda v: v)
    >>> flow.displacement  # towards the middle of the line w_1 + w_2 = 1
    tensor([-0.2447,  0.2447], dtype=torch.float64)
    """
    if steps < 1 or substeps < 1:
        raise ValueError(f"steps and substeps must be at least 1, got {steps} and {substeps}")
    at, h, squared, passes = point, steps / substeps, 0.0, 0

    def drift(v: Tensor) -> Tensor:
        nonlocal squared, passes
        limit = singular_limit(problem, v, noise, sgd, num_draws=num_draws, generator=generator)
        squared += (h * limit.drift_stderr) ** 2 / 2  # there are two drifts per substep, and the second one counts
        passes += limit.passes
        return limit.drift

    for _ in range(substeps):
        middle = retract(at + 0.5 * h * drift(at))
        at = retract(at + h * drift(middle))
    return WindowPrediction((at - point)[None], math.sqrt(squared), math.nan, passes, Result.SUCCESSFUL)
