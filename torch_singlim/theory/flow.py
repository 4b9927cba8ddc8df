"""What K steps do beyond the limit: descent on the effective loss, and independent runs of the same noisy training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap

from torch_singlim.linalg import VectorEstimate
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory.descent import SGDSettings
from torch_singlim.theory.noise import NoiseSystem, noisy_loss
from torch_singlim.theory.potential import noisy_gradient, second_order_gradient, trace_directions

__all__ = ["Ensemble", "WindowPrediction", "effective_flow", "simulate"]

Expansion = Literal["averaged", "second_order"]


@dataclass(frozen=True)
class WindowPrediction:
    """Predicted displacement of the weights over a window of K optimizer steps.

    Args:
        displacement: w(K) - w(0) ``[P]``.
        stderr: norm of its sampling error; 0 for a deterministic flow, nan from a single noisy path.
        products: gradients of the whole probe set that it took.
        status: "ok", or "diverged": the flow left every bounded region; the displacement is where it was stopped.
    """

    displacement: Tensor = field(repr=False)
    stderr: float
    products: int
    status: Literal["ok", "diverged"]


@dataclass(frozen=True)
class Ensemble:
    """Displacements of independent noisy runs over the same window ``[replicas, P]``."""

    displacements: Tensor = field(repr=False)

    @property
    def mean(self) -> VectorEstimate:
        """Mean displacement with its standard error."""
        return VectorEstimate(self.displacements)


# weights this many times their starting norm away from the start have run away
_RUNAWAY = 100.0


def _descend(
    w: Tensor, velocity: Tensor | None, sgd: SGDSettings, gradients: Iterator[Callable[[Tensor], Tensor]]
) -> tuple[Tensor, int, bool]:
    """Displacement after one step for each gradient function, steps taken, and whether it stayed bounded."""
    at, start, steps = w, torch.linalg.vector_norm(w).item(), 0
    for gradient in gradients:
        at, velocity = sgd.step(at, velocity, gradient(at))
        steps += 1
        # nan compares false, so this catches it too
        if not torch.linalg.vector_norm(at - w).item() <= _RUNAWAY * max(start, 1.0):
            return at - w, steps, False
    return at - w, steps, True


def effective_flow(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    expansion: Expansion = "averaged",
    replicas: int = 2,
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> WindowPrediction:
    """K steps of full-batch gradient descent on the effective loss: the reference for what training does on average.

        averaged:      w <- w - alpha grad E_eta Lhat(w, eta)           finite sigma; one fresh draw of eta per step
        second_order:  w <- w - alpha (grad L + alpha^{order-1} grad V)    the paper's Laplacian; one fresh direction

    The draws of successive steps average along the path, as they do in training, but over all N samples at once; what
    sampling error is left is told by independent paths. With `Minibatch()` this is plain gradient descent on L: the
    null control.

    Args:
        problem: loss and probe set, all the samples that training uses.
        w: weights at the start of the window ``[P]``.
        noise: the system.
        sgd: step size and momentum; the batch size does not enter.
        steps: K.
        expansion: how the noise average is taken.
        replicas: independent paths, averaged (one where nothing is random).
        velocity: the optimizer's momentum at the start ``[P]``, where it has some.
        generator: of the draws.

    Raises:
        ValueError: the noise does not fit the problem; an unknown expansion; fewer than one step or path.

    >>> from torch import nn
    >>> from torch_singlim.theory import Minibatch
    >>> problem = ZeroLossProblem(nn.Linear(1, 1, bias=False), "mse", torch.ones(1, 1), torch.zeros(1, 1))
    >>> flow = effective_flow(problem, torch.ones(1).double(), Minibatch(), SGDSettings(lr=0.25), steps=2)
    >>> flow.displacement, flow.products  # w <- w - 2 lr w halves w
    (tensor([-0.7500], dtype=torch.float64), 2)
    """
    if expansion not in ("averaged", "second_order"):
        raise ValueError(f"expansion must be 'averaged' or 'second_order', got {expansion!r}")
    if steps < 1 or replicas < 1:
        raise ValueError(f"steps and replicas must be at least 1, got {steps} and {replicas}")
    noise.check(problem)
    dimension = noise.scale(problem).numel()

    def averaged(v: Tensor) -> Tensor:
        return noisy_gradient(noise, problem, v, noise.draw(problem, problem.num_samples, generator=generator))

    def second_order(v: Tensor) -> Tensor:
        quiet = noisy_gradient(noise, problem, v, w.new_zeros(problem.num_samples, dimension))
        if dimension == 0:
            return quiet
        directions, _ = trace_directions(noise, problem, num_draws=1, generator=generator)
        curvature = sum(second_order_gradient(noise, problem, v, s)[0] for s in directions)
        return quiet + 0.5 * curvature

    gradient, cost = (averaged, 1) if expansion == "averaged" else (second_order, 2 if dimension else 1)
    paths, products, bounded = [], 0, True
    for _ in range(replicas if dimension else 1):
        path, taken, ok = _descend(w, velocity, sgd, (gradient for _ in range(steps)))
        paths.append(path)
        products += cost * taken
        bounded = bounded and ok
    mean = VectorEstimate(torch.stack(paths))
    stderr = float("nan") if dimension and replicas == 1 else mean.stderr
    return WindowPrediction(mean.mean, stderr, products, "ok" if bounded else "diverged")


def simulate(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    replicas: int,
    velocity: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Ensemble:
    """Independent runs of the noisy training itself from the same weights: fresh noise, freshly shuffled batches.

        w <- w - alpha grad_w Lhat_batch(w, eta)        on every replica, with torch.optim.SGD's momentum

    Batches are drawn as a shuffling DataLoader draws them: every sample once per epoch, the last batch what is left.
    Memory: replicas times (P + the activations of one batch).

    Args:
        problem: loss and the samples that training uses.
        w: weights at the start ``[P]``.
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        replicas: number of runs.
        velocity: the optimizer's momentum at the start ``[P]``, where it has some.
        generator: of noise and batches.

    >>> from torch import nn
    >>> from torch_singlim.theory import Minibatch
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.eye(2), torch.zeros(2, 1))
    >>> sgd = SGDSettings(lr=0.25, batch_size=1)
    >>> simulate(problem, torch.ones(2).double(), Minibatch(), sgd, steps=2, replicas=3).displacements
    tensor([[-0.5000, -0.5000],
            [-0.5000, -0.5000],
            [-0.5000, -0.5000]], dtype=torch.float64)
    """
    if steps < 1 or replicas < 1:
        raise ValueError(f"steps and replicas must be at least 1, got {steps} and {replicas}")
    noise.check(problem)
    N, B = problem.num_samples, sgd.batch(problem.num_samples)

    gradient = vmap(grad(lambda v, x, y, eta: noisy_loss(noise, problem, v, x, y, eta)))
    W = w.expand(replicas, -1)
    V = None if velocity is None else velocity.expand(replicas, -1)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:  # a new epoch on every replica
            orders = torch.stack([torch.randperm(N, generator=generator) for _ in range(replicas)])
            batches = list(orders.to(w.device).split(B, dim=1))
        index = batches.pop(0)  # [replicas, n]
        eta = noise.draw(problem, index.numel(), generator=generator).reshape(*index.shape, -1)
        W, V = sgd.step(W, V, gradient(W, problem.inputs[index], problem.targets[index], eta))
    return Ensemble(W - w)
