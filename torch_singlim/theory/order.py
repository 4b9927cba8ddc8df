"""Measure the order of a noise: whether its regulariser varies along Gamma, and whether the noise vanishes there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_singlim.geometry import gauss_newton
from torch_singlim.linalg import Estimate, FactoredOperator
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import CustomNoise, NoiseSystem, draw_noise, map_parts, parts
from torch_singlim.theory.gradient_noise import noise_products
from torch_singlim.theory.potential import potential

__all__ = ["Degeneracy", "degeneracy", "with_measured_order"]

_SIGMAS = 4.0  # a tangential gradient longer than so many standard errors is not zero
_NEGLIGIBLE = 0.05  # a tangential part that is certainly smaller than this share of |grad V| counts as zero
_DRAWS = 4  # of the gradient noise, to find out whether it vanishes on Gamma


@dataclass(frozen=True)
class Degeneracy:
    """The order of a noise at a point of Gamma, and the measurements that decide it.

    Args:
        order: 1 if |P_T grad V| exceeds 4 standard errors and rounding errors; otherwise 2 if the gradient noise does
            not vanish on Gamma, else None.
        resolved: False if |P_T grad V| is neither significant nor, with 4 standard errors added, below 5 % of |grad V|:
            the order is then uncertain, and more draws are needed.
        tangential: |P_T grad V|, in loss per weight norm, and its standard error (0: exact).
        noise: root mean square norm of the gradient noise on Gamma.
    """

    order: int | None
    resolved: bool
    tangential: Estimate
    noise: float


def degeneracy(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    *,
    num_draws: int = 64,
    hessian: FactoredOperator | None = None,
    generator: torch.Generator | None = None,
) -> Degeneracy:
    """Measure the order of a noise: degenerate means P_T grad V = 0 on Gamma.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        noise: the system.
        num_draws: number of directions for the trace in V.
        hessian: ``gauss_newton(problem, point)``, if it was computed already.
        generator: of the directions.

    Source: arXiv 2404.12293.

    >>> from torch import nn
    >>> from torch_singlim.noise import LabelNoise
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> degeneracy(problem, torch.tensor([0.75, 0.25]).double(), LabelNoise(std=0.1)).order
    2
    """
    hessian = gauss_newton(problem, point) if hessian is None else hessian
    V = potential(noise, problem, point, num_draws=num_draws, generator=generator)
    tangential = V.gradient.map(hessian.project_kernel)
    size = torch.linalg.vector_norm(point).item()
    rounding = 1e-8 if hessian.exact else 1e-2
    floor = rounding * (torch.linalg.vector_norm(V.gradient.mean).item() + abs(V.value.mean) / max(size, 1e-300))
    # draws from the noise's own distribution: random signs could cancel in every draw if few components act together
    etas = [draw_noise(noise, problem, problem.num_samples, generator=generator) for _ in range(_DRAWS)]
    draws = noise_products(noise, problem, point, etas)
    rms = draws.square().sum(1).mean().sqrt().item()
    stiffest = hessian.largest
    length, error = torch.linalg.vector_norm(tangential.mean).item(), _SIGMAS * tangential.stderr
    if length > max(error, floor):
        order, resolved = 1, True
    else:
        order = 2 if rms > 1e-8 * stiffest * size * _noise_size(noise, problem) else None
        resolved = length + error <= max(_NEGLIGIBLE * V.gradient.norm, floor)
    return Degeneracy(order, resolved, Estimate(tangential.norm, tangential.stderr), rms)


def _noise_size(noise: NoiseSystem, problem: ZeroLossProblem) -> float:
    """The largest standard deviation among all components of eta; 0 if there are none."""
    scales = [part.scale(problem) for part in parts(noise)]
    return max((scale.max().item() for scale in scales if scale.numel()), default=0.0)


def with_measured_order(
    noise: NoiseSystem,
    problem: ZeroLossProblem,
    point: Tensor,
    *,
    num_draws: int = 64,
    most_draws: int = 1000,
    hessian: FactoredOperator | None = None,
    generator: torch.Generator | None = None,
) -> NoiseSystem:
    """The same system, with the order of each `CustomNoise` measured at `point`, unless it was claimed.

    Args:
        noise: the system.
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        num_draws: number of directions for the trace in V; if these do not decide, it is multiplied by four until they
            do.
        most_draws: the number of directions is not increased beyond about this number.
        hessian: ``gauss_newton(problem, point)``, if it was computed already.
        generator: of the directions.

    Raises:
        ValueError: the draws do not decide the order.
    """

    def unknown(part: NoiseSystem) -> bool:
        return isinstance(part, CustomNoise) and part.claimed_order == "measured"

    if hessian is None and any(map(unknown, parts(noise))):
        hessian = gauss_newton(problem, point)

    def measured(part: NoiseSystem) -> NoiseSystem:
        if not (isinstance(part, CustomNoise) and unknown(part)):
            return part
        draws = num_draws
        found = degeneracy(problem, point, part, num_draws=draws, hessian=hessian, generator=generator)
        while not found.resolved and draws < most_draws:
            draws *= 4
            found = degeneracy(problem, point, part, num_draws=draws, hessian=hessian, generator=generator)
        if not found.resolved:
            raise ValueError(
                f"{draws} draws do not tell the order of {part}: |P_T grad V| = {found.tangential.mean:.3g} +- "
                f"{found.tangential.stderr:.3g}; raise num_draws, or give the order: CustomNoise(..., claimed_order=1)"
            )
        return replace(part, claimed_order=found.order)

    return map_parts(noise, measured)
