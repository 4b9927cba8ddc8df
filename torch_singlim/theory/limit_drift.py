"""The drift of the singular limit at a point of Gamma."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate, FactoredOperator, VectorEstimate
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import Covariance, NoiseSystem, Sum, leading, parts
from torch_singlim.theory.finite_step import finite_step_potential
from torch_singlim.theory.gradient_noise import noise_factor, of_hessian
from torch_singlim.theory.on_gamma import tangential_potential
from torch_singlim.theory.potential import Potential, total
from torch_singlim.theory.second_moments import SecondMoments, excursion_potential
from torch_singlim.theory.second_order import covariance_potential, ito_drift
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["LimitDrift", "limit_drift"]


@dataclass(frozen=True)
class LimitDrift:
    """The potential V on Gamma, in units of the loss, and the drift -alpha^order P_T grad V per step  ``[P]``."""

    potential: Estimate
    drift: VectorEstimate = field(repr=False)
    passes: int


def _order_two(
    problem: ZeroLossProblem,
    point: Tensor,
    noises: tuple[NoiseSystem, ...],
    batch_size: int,
    hessian: FactoredOperator,
    num_draws: int,
    generator: torch.Generator | None,
) -> Potential:
    """V and grad V with -P_T grad V = (1/2) D^2 Phi[Sigma]; V is nan if there is no closed form."""
    closed, dense = Covariance(), []
    for part in noises:
        known = part.covariance(problem, batch_size)
        if known is not None:
            closed = closed + known
        else:
            dense.append(noise_factor(part, problem, point, batch_size=batch_size))
    V = covariance_potential(closed, problem, point, hessian, num_draws=num_draws, generator=generator)
    if dense:
        drift = ito_drift(problem, point, torch.cat(dense), hessian)
        V = V + Potential(Estimate(math.nan, 0.0), VectorEstimate(-drift[None]), 0)
    return V


def _at_finite_step(
    noise: NoiseSystem,
    problem: ZeroLossProblem,
    point: Tensor,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    **options: Any,
) -> Potential:
    """V and grad V at this step size, of all parts: those of order 2 count alpha times in a sum of order 1."""
    lowest, terms = noise.order, []
    for part in parts(noise):
        if part.order is not None and lowest is not None:
            V = finite_step_potential(part, problem, point, sgd, hessian, **options)
            terms.append(V.scaled(sgd.effective_lr ** (part.order - lowest)))
    return total(terms)


def _of_excursions(
    noises: tuple[NoiseSystem, ...],
    problem: ZeroLossProblem,
    point: Tensor,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    moments: SecondMoments,
    **options: Any,
) -> Potential:
    """What correlation of the step sizes with the gradient adds to grad V of noises of order 2, in their units."""
    c = of_hessian(Sum(noises), problem, sgd.batch(problem.num_samples))
    if not c:
        raise ValueError(
            "under an adaptive optimizer a drift of order 2 is known for noise with Sigma = c H, got "
            f"{' + '.join(map(str, noises))}: use LabelNoise or LabelFlips, or torch.optim.SGD"
        )
    return excursion_potential(problem, point, hessian, c, sgd, moments, **options)


def limit_drift(
    problem: ZeroLossProblem,
    point: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    hessian: FactoredOperator,
    *,
    num_draws: int,
    finite_step: bool = False,
    moments: SecondMoments | None = None,
    generator: torch.Generator | None = None,
) -> LimitDrift:
    """V and the drift of `singular_limit`, without the rest of its prediction.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        noise: the system; the order of each of its parts is known.
        sgd: step size, momentum, batch size.
        hessian: H at the point.
        num_draws: see `singular_limit`.
        finite_step: see `singular_limit`.
        moments: see `singular_limit`.
        generator: of random directions.
    """
    order, batch_size = noise.order, sgd.batch(problem.num_samples)
    options: dict[str, Any] = {"num_draws": num_draws, "generator": generator}
    if order is None:
        return LimitDrift(Estimate(0.0, 0.0), VectorEstimate(torch.zeros_like(point)[None]), 0)
    if finite_step:
        V = _at_finite_step(noise, problem, point, sgd, hessian, **options)
    elif order == 1:
        V = tangential_potential(Sum(leading(noise)), problem, point, **options)
    else:
        V = _order_two(problem, point, leading(noise), batch_size, hessian, num_draws, generator)
    second = tuple(part for part in parts(noise) if part.order == 2)
    if moments is not None and second and (finite_step or order == 2):
        found = _of_excursions(second, problem, point, sgd, hessian, moments, **options)
        V = V + found.scaled(sgd.effective_lr ** (2 - order))
    sampled = V.gradient if hessian.decomposed else V.gradient.halves()  # projections are expensive in the second case
    factor = -(sgd.effective_lr**order)
    return LimitDrift(V.value, sampled.map(lambda g: factor * hessian.project_kernel(g)), V.passes)
