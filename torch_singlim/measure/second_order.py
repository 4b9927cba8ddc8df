"""Gradients of the potential of known noise on the batches of a step, for paths that need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_singlim.measure.paths import Path
from torch_singlim.measure.steps import Step
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import Covariance, NoiseSystem, Sum, WeightDecay, parts
from torch_singlim.theory import EffectiveLoss, SGDSettings, potential

__all__ = ["BatchPotential", "without_potential"]

# random directions for the potential of noises of order 1; it is unbiased for any number
_DIRECTIONS = 4


def without_potential(noise: NoiseSystem, problem: ZeroLossProblem) -> list[str]:
    """Names of the parts of order 2 whose drift has no potential c_H/4 tr H, so that averaged paths do not have it."""
    missing = []
    for part in parts(noise):
        covariance = part.covariance(problem, 1) if part.order == 2 else Covariance()
        if covariance is None or covariance.identity:
            missing.append(str(part))
    return missing


class BatchPotential:
    """Adds alpha grad V of the noises of order 2 to the gradient of a step, and grad V of those of order 1 if asked.

        V = c_H/4 tr H  at order 2,    V = 1/2 sum_j sigma_j^2 d^2 Lhat/d eta_j^2  at order 1,    on the step's batch

    Noise of order 2 averages to nothing in the gradient; it acts through its fluctuations, which averaged paths do not
    have. The step size alpha is that of torch.optim.SGD.

    Args:
        problem: the loss, in plain coordinates.
        noise: all noise of the training that is known.
        samples: a micro-batch of a step -> (inputs, targets).
        processes: number of processes among which the gradient is averaged.
        total: the sum of a vector over these processes.
    """

    def __init__(
        self,
        problem: ZeroLossProblem,
        noise: NoiseSystem,
        samples: Callable[[Any], tuple[Tensor, Tensor]],
        processes: int = 1,
        total: Callable[[Tensor], Tensor] = lambda own: own,
    ) -> None:
        self._problem, self._samples, self._processes, self._total = problem, samples, processes, total
        missing = without_potential(noise, problem)
        # weight decay is done by the optimizer of every path
        first = (part for part in parts(noise) if part.order == 1 and not isinstance(part, WeightDecay))
        self._first = Sum(tuple(first))
        self._second = Sum(tuple(p for p in parts(noise) if p.order == 2 and str(p) not in missing))

    @property
    def second(self) -> bool:
        """Whether there is noise of order 2."""
        return bool(parts(self._second))

    def add(self, path: Path, step: Step, seed: int, *, first: bool) -> None:
        """Add to the gradients of a path.

        Args:
            path: with the gradients of the step.
            step: of the run.
            seed: of the random directions.
            first: also grad V of the noises of order 1.
        """
        pairs = [self._samples(batch) for batch in step.batches]
        on = self._problem.on(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        names, named = on.function.names, dict(path.module.named_parameters())
        w = on.function.flatten([named[name] for name in names])
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(w)
        if self.second:
            group = step.groups[0]
            sgd = SGDSettings(
                lr=float(group["lr"]),
                momentum=float(group["momentum"]),
                dampening=float(group["dampening"]),
                nesterov=bool(group["nesterov"]),
                batch_size=on.num_samples,
            )
            # c_H of the mean over processes is that of one of them over their number
            effective = EffectiveLoss(on, self._second, sgd, generator=generator)
            total += effective.order_two_gradient(w) / self._processes
        if first and parts(self._first):
            total += potential(self._first, on, w, num_draws=_DIRECTIONS, generator=generator).gradient.mean
        total = self._total(total) / self._processes
        for name, part in on.function.unflatten(total).items():
            p = named[name]
            p.grad = part.to(p) if p.grad is None else p.grad + part.to(p)
