"""The effective loss, which training descends on average, and its gradients for single draws of the noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.linalg import Result, rademacher
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import Covariance, NoiseSystem, Sum, draw_noise, parts, stratified_noise
from torch_singlim.theory.on_gamma import row_gradient
from torch_singlim.theory.potential import noisy_gradient, noisy_gradients
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["EffectiveLoss", "WindowPrediction", "check_marks", "has_effective_flow"]

Gradient = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WindowPrediction:
    """Predicted displacement of the weights over a window of K optimizer steps.

    Args:
        path: w(k) - w(0) at the steps that were asked for, the last of them K  ``[marks, P]``.
        stderr: norm of the sampling error; 0 for a deterministic flow, nan for a single noisy path.
        error: estimated norm of the integration error; 0 by unit-step integration, nan if unknown.
        gradients: number of gradients over all samples that were computed; a product with H counts as one.
        status: how the integration ended; unless it was successful, the displacement is that up to where it ended.
    """

    path: Tensor = field(repr=False)
    stderr: float
    error: float
    gradients: int
    status: Result

    @property
    def displacement(self) -> Tensor:
        """w(K) - w(0)  ``[P]``."""
        return self.path[-1]


def check_marks(marks: Sequence[int], steps: int) -> tuple[int, ...]:
    """Check the steps at which a path is recorded: ascending within 1..K, the last of them K; default: K alone."""
    marks = tuple(marks) or (steps,)
    if steps < 1 or marks[0] < 1 or marks[-1] != steps or any(a >= b for a, b in itertools.pairwise(marks)):
        raise ValueError(f"marks must ascend from at least 1 to steps={steps}, got {marks}")
    return marks


def has_effective_flow(noise: NoiseSystem, problem: ZeroLossProblem) -> bool:
    """Whether grad L_eff is known: every part with a drift is of order 1, or has Sigma = c_H H."""

    def followed(part: NoiseSystem) -> bool:
        if part.order != 2:
            return True
        covariance = part.covariance(problem, 1)
        return covariance is not None and covariance.identity == 0.0

    return all(followed(part) for part in parts(noise))


class EffectiveLoss:
    """L_eff = E_eta Lhat(w, eta) + alpha (c_H/4) tr H(w), and gradients of it for single draws of eta.

    The parts of order 1 enter with their finite size: each draw of eta gives one gradient. The parts of order 2, with
    Sigma = c_H H, enter by their potential.

    Args:
        problem: loss and samples.
        noise: the system.
        sgd: step size, batch size.
        generator: of all draws.

    Raises:
        ValueError: the noise does not fit the problem, or has no effective loss (`has_effective_flow`).
    """

    def __init__(
        self,
        problem: ZeroLossProblem,
        noise: NoiseSystem,
        sgd: SGDSettings,
        *,
        generator: torch.Generator | None,
    ) -> None:
        noise.check(problem)
        if not has_effective_flow(noise, problem):
            raise ValueError(
                f"{noise} has no effective loss with a known gradient (the drift requires the decomposed H): "
                "use singular_limit or limit_flow, or simulate"
            )
        self.problem, self.generator = problem, generator
        self.first = Sum(tuple(part for part in parts(noise) if part.order == 1))
        known = (part.covariance(problem, sgd.batch(problem.num_samples)) for part in parts(noise) if part.order == 2)
        self.second = sgd.effective_lr * sum((c for c in known if c is not None), start=Covariance()).hessian / 4
        self.is_noisy = any(part.scale(problem).numel() for part in parts(self.first))

    @property
    def is_random(self) -> bool:
        """Whether the gradient is estimated from random draws."""
        return self.is_noisy or self.second > 0

    def draw(self) -> Gradient:
        """w -> grad Lhat(w, eta) for one new eta, that of the parts of order 1."""
        etas = draw_noise(self.first, self.problem, self.problem.num_samples, generator=self.generator)
        return lambda w: noisy_gradient(self.first, self.problem, w, etas)

    def block(self, w: Tensor, strata: int) -> Iterator[Tensor]:
        """Gradients at w ``[P]`` for a block of at least `strata` draws, spread evenly over the distribution of eta.

        If there is no noise of order 1, the block consists of the one exact gradient.
        """
        if not self.is_noisy:
            yield self.draw()(w)
            return
        problem, first = self.problem, self.first
        draws = stratified_noise(first, problem, problem.num_samples, strata=strata, generator=self.generator)
        yield from noisy_gradients(first, problem, w, draws)

    def order_two_gradient(self, w: Tensor) -> Tensor:
        """alpha (c_H/4) grad tr H at w ``[P]`` from one random direction for each sample; costs two gradients."""
        problem = self.problem
        shape = (problem.num_samples, problem.num_residuals // problem.num_samples)
        return self.second * row_gradient(problem, w, rademacher(shape, generator=self.generator, like=w))[0]
