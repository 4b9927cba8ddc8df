"""K steps of descent on the effective loss, by unit-step integration: the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem
from torch_singlim.theory.effective import EffectiveLoss, Gradient, WindowPrediction, check_marks
from torch_singlim.theory.potential import noisy_gradient, random_direction, second_order_gradient
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["effective_flow"]

Expansion = Literal["averaged", "second_order"]

# number of evaluations of grad tr H in a window; in between it is held fixed, since it changes as slowly as the weights
# drift
_REFRESHES = 200
# a displacement of so many times the initial norm of the weights counts as divergence
_RUNAWAY = 100.0


def _descend(
    w: Tensor, velocity: Tensor | None, sgd: SGDSettings, gradients: Iterator[Gradient], marks: tuple[int, ...]
) -> tuple[Tensor, int, bool]:
    """One step for each gradient function: displacements at the marks, number of steps, whether they stayed bounded."""
    at, start, steps = w, torch.linalg.vector_norm(w).item(), 0
    path = w.new_empty(len(marks), w.numel())
    for gradient in gradients:
        at, velocity = sgd.step(at, velocity, gradient(at))
        steps += 1
        # comparisons with nan are false, so that this detects nan, too
        if not torch.linalg.vector_norm(at - w).item() <= _RUNAWAY * max(start, 1.0):
            path[sum(mark < steps for mark in marks) :] = at - w
            return path, steps, False
        if steps in marks:
            path[marks.index(steps)] = at - w
    return path, steps, True


def effective_flow(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    expansion: Expansion = "averaged",
    replicas: int = 2,
    rtol: float = math.inf,
    max_replicas: int = 6,
    marks: Sequence[int] = (),
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WindowPrediction:
    """K steps of full-batch gradient descent on the effective loss: the reference for the average motion in training.

        averaged:      w <- w - alpha grad E_eta Lhat(w, eta)           finite sigma; a new draw of eta at each step
        second_order:  w <- w - alpha (grad L + grad V)                 the paper's Laplacian; a new random direction
        in both, for noises of order 2:   - alpha^2 (c_H/4) grad tr H   Sigma = c_H H; 200 random directions in all

    The draws of successive steps average out along the path, as they do in training, but each of them is taken over all
    N samples. The remaining sampling error is estimated from independent paths. With `Minibatch()` this is plain
    gradient descent on L: the baseline.

    Args:
        problem: loss and samples: all samples that training uses.
        w: weights at the start of the window ``[P]``.
        noise: the system.
        sgd: step size and momentum; the batch size matters for noises of order 2 only.
        steps: K.
        expansion: how the average over the noise is taken.
        replicas: number of independent paths, which are averaged (one if nothing is random).
        rtol: further paths are taken while the sampling error exceeds rtol times the displacement.
        max_replicas: maximum number of paths.
        marks: steps at which the path is recorded, the last of them K; default: K alone.
        velocity: the optimizer's momentum at the start ``[P]``, if it has any.
        generator: of the draws.

    Raises:
        ValueError: the noise does not fit the problem, or is of order 2 without a known gradient (see
            `has_effective_flow`); an unknown expansion; fewer than one step or path.

    >>> from torch import nn
    >>> from torch_singlim.noise import Minibatch
    >>> problem = ZeroLossProblem(nn.Linear(1, 1, bias=False), "mse", torch.ones(1, 1), torch.zeros(1, 1))
    >>> flow = effective_flow(problem, torch.ones(1).double(), Minibatch(), SGDSettings(lr=0.25), steps=2)
    >>> flow.displacement, flow.gradients  # w <- w - 2 lr w halves w
    (tensor([-0.7500], dtype=torch.float64), 2)
    """
    if expansion not in ("averaged", "second_order"):
        raise ValueError(f"expansion must be 'averaged' or 'second_order', got {expansion!r}")
    if steps < 1 or replicas < 1:
        raise ValueError(f"steps and replicas must be at least 1, got {steps} and {replicas}")
    marks = check_marks(marks, steps)
    effective = EffectiveLoss(problem, noise, sgd, generator=generator)
    first, stride = effective.first, max(1, steps // _REFRESHES)

    def second_order(v: Tensor) -> Tensor:
        s = random_direction(first, problem, generator=generator)
        quiet = noisy_gradient(first, problem, v, [torch.zeros_like(each) for each in s])
        return quiet + 0.5 * second_order_gradient(first, problem, v, s)[0]

    expanded = expansion == "second_order" and effective.is_noisy

    def gradients() -> Iterator[Gradient]:
        drift = torch.zeros_like(w)
        for k in range(steps):

            def whole(v: Tensor, refresh: bool = k % stride == 0) -> Tensor:
                nonlocal drift
                if effective.second and refresh:
                    drift = effective.order_two_gradient(v)
                return (second_order(v) if expanded else effective.draw()(v)) + drift

            yield whole

    cost = (2 if expanded else 1) + (2 / stride if effective.second else 0)
    mean, scatter, count, products, bounded = w.new_zeros(len(marks), w.numel()), 0.0, 0, 0, True

    def stderr() -> float:
        return math.sqrt(scatter / (count * (count - 1))) if count > 1 else math.nan

    def unclear() -> bool:
        return count < max_replicas and bounded and stderr() > rtol * torch.linalg.vector_norm(mean[-1]).item()

    while count == 0 or (effective.is_random and (count < replicas or unclear())):
        path, taken, ok = _descend(w, velocity, sgd, gradients(), marks)
        products += round(cost * taken)
        bounded, count = bounded and ok, count + 1
        path -= mean  # sums of squares as in Welford 1962
        scatter += (count - 1) / count * path[-1].square().sum().item()
        mean.add_(path, alpha=1 / count)
    error = stderr() if effective.is_random else 0.0
    return WindowPrediction(mean, error, 0.0, products, Result.SUCCESSFUL if bounded else Result.DIVERGED)
