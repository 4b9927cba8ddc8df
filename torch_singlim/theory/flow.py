"""What K steps do: along the limit, beyond it by descent on the effective loss, and in runs of the training itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm import tqdm

from torch_singlim.linalg import Estimate, VectorEstimate, rademacher
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory.descent import SGDSettings
from torch_singlim.theory.noise import Covariance, NoiseSystem, Sum, draw_noise, noisy_loss, parts
from torch_singlim.theory.potential import noisy_gradient, random_direction, second_order_gradient
from torch_singlim.theory.second_order import row_gradient
from torch_singlim.theory.singular_limit import singular_limit

__all__ = ["Ensemble", "WindowPrediction", "effective_flow", "has_effective_flow", "limit_flow", "simulate"]

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
    """Independent noisy runs over the same window.

    Args:
        displacements: of the foot points on Gamma where a map to them was given, of the weights otherwise
            ``[replicas, P]``; without what the weights only carry along (the xi of `AntiCorrelated`).
        weights: the training's weights at the end ``[replicas, P]``.
    """

    displacements: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)

    @property
    def mean(self) -> VectorEstimate:
        """Mean displacement with its standard error."""
        return VectorEstimate(self.displacements)

    def covariance(self, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Covariance of the displacements and the standard error of each entry ``[k, k]``, in the rows of a basis
        ``[k, P]`` (default: every weight).
        """
        centred = self.displacements - self.displacements.mean(0)
        if basis is not None:
            centred = centred @ basis.T
        R = len(centred)
        covariance = centred.T @ centred / (R - 1)
        fourth = centred.square().T @ centred.square() / R
        return covariance, ((fourth - covariance.square()).clamp_min(0) / R).sqrt()

    @property
    def spread(self) -> Estimate:
        """Trace of the covariance, in squared weight norm, with its standard error."""
        squares = (self.displacements - self.displacements.mean(0)).square().sum(1)
        return Estimate.from_draws(squares * (len(squares) / (len(squares) - 1)))


# grad tr H changes as slowly as the weights drift: it is held fixed between so many evaluations in a window
_REFRESHES = 200
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
        second_order:  w <- w - alpha (grad L + grad V)                 the paper's Laplacian; one fresh direction
        in both, for noises of order 2:   - alpha^2 (c_H/4) grad tr H   Sigma = c_H H; a fresh direction 200 times

    The draws of successive steps average along the path, as they do in training, but over all N samples at once; what
    sampling error is left is told by independent paths. With `Minibatch()` this is plain gradient descent on L: the
    null control.

    Args:
        problem: loss and probe set, all the samples that training uses.
        w: weights at the start of the window ``[P]``.
        noise: the system.
        sgd: step size and momentum; the batch size enters for noises of order 2 alone, which it averages.
        steps: K.
        expansion: how the noise average is taken.
        replicas: independent paths, averaged (one where nothing is random).
        velocity: the optimizer's momentum at the start ``[P]``, where it has some.
        generator: of the draws.

    Raises:
        ValueError: the noise does not fit the problem, or is of order 2 without a potential that can be followed
            step by step (see `has_effective_flow`); an unknown expansion; fewer than one step or path.

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
    if not has_effective_flow(noise, problem):
        raise ValueError(
            f"{noise} has no effective loss that could be followed step by step (its drift needs H decomposed): use "
            "singular_limit or limit_flow, or simulate"
        )
    first = Sum(tuple(part for part in parts(noise) if part.order == 1))
    known = (part.covariance(problem, sgd.batch(problem.num_samples)) for part in parts(noise) if part.order == 2)
    covariance = sum((c for c in known if c is not None), start=Covariance())
    is_random = any(part.scale(problem).numel() for part in parts(first))

    def of_first_order(v: Tensor) -> Tensor:
        if expansion == "averaged" or not is_random:
            return noisy_gradient(
                first, problem, v, draw_noise(first, problem, problem.num_samples, generator=generator)
            )
        s = random_direction(first, problem, generator=generator)
        quiet = noisy_gradient(first, problem, v, [torch.zeros_like(each) for each in s])
        return quiet + 0.5 * second_order_gradient(first, problem, v, s)[0]

    rows = problem.num_residuals // problem.num_samples
    stride = max(1, steps // _REFRESHES)

    def gradients() -> Iterator[Callable[[Tensor], Tensor]]:
        second = torch.zeros_like(w)

        def quick(v: Tensor) -> Tensor:
            return of_first_order(v) + second

        def refreshed(v: Tensor) -> Tensor:
            nonlocal second
            z = rademacher((problem.num_samples, rows), generator=generator, like=w)
            second = sgd.effective_lr * covariance.hessian / 4 * row_gradient(problem, v, z)[0]
            return quick(v)

        for k in range(steps):
            yield refreshed if covariance.hessian and k % stride == 0 else quick

    cost = 2 if expansion == "second_order" and is_random else 1
    extra = 2 / stride if covariance.hessian else 0.0
    is_random = is_random or covariance.hessian > 0
    paths, products, bounded = [], 0, True
    for _ in range(replicas if is_random else 1):
        path, taken, ok = _descend(w, velocity, sgd, gradients())
        paths.append(path)
        products += round((cost + extra) * taken)
        bounded = bounded and ok
    mean = VectorEstimate(torch.stack(paths))
    stderr = math.nan if is_random and replicas == 1 else mean.stderr
    return WindowPrediction(mean.mean, stderr, products, "ok" if bounded else "diverged")


def has_effective_flow(noise: NoiseSystem, problem: ZeroLossProblem) -> bool:
    """Whether L_eff can be followed step by step: every part is of order 1, or has Sigma = c_H H."""

    def followed(part: NoiseSystem) -> bool:
        if part.order != 2:
            return True
        covariance = part.covariance(problem, 1)
        return covariance is not None and covariance.identity == 0.0

    return all(followed(part) for part in parts(noise))


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

        W <- Pi(W + h drift(Pi(W + (h/2) drift(W)))),      h = K / substeps,  Pi the way back to Gamma

    Deterministic: where the limit diffuses too, this is its mean for short times only.

    Args:
        problem: loss and probe set.
        point: weights on Gamma ``[P]``.
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        retract: weights near Gamma -> weights on Gamma ``[P]``, ``lambda v: nearest_point(problem, v).point``.
        substeps: of the integration.
        num_draws: for each drift, see `singular_limit`.
        generator: of random directions.

    >>> from torch import nn
    >>> from torch_singlim.theory import Dropout
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
        squared += (h * limit.drift_stderr) ** 2 / 2  # two drifts a substep, the second one counts
        passes += limit.passes
        return limit.drift

    for _ in range(substeps):
        middle = retract(at + 0.5 * h * drift(at))
        at = retract(at + h * drift(middle))
    return WindowPrediction(at - point, math.sqrt(squared), passes, "ok")


def _bytes_per_replica(
    problem: ZeroLossProblem, w: Tensor, noise: NoiseSystem, batch: int, generator: torch.Generator | None
) -> int:
    """Memory of one run: what a gradient saves of a batch, the noise, and weights, velocity, gradient, temporaries."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    etas = draw_noise(noise, problem, batch, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy_loss(
            noise, problem.batch_loss, w.clone().requires_grad_(), problem.inputs[:batch], problem.targets[:batch], etas
        )
    # a backward pass holds about as much again as the forward pass saved
    return 2 * sum(saved.values()) + sum(eta.nbytes for eta in etas) + 8 * w.nbytes


def simulate(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    replicas: int,
    foot: Callable[[Tensor], Tensor] | None = None,
    velocity: Tensor | None = None,
    memory: int = 2**30,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> Ensemble:
    """Independent runs of the noisy training itself from the same weights: fresh noise, freshly shuffled batches.

        w <- w - alpha grad_w Lhat_batch(w, eta)        on every replica, with torch.optim.SGD's momentum

    Batches are drawn as a shuffling DataLoader draws them: every sample once per epoch, the last batch what is left.
    Runs go side by side, as many at once as `memory` holds, and what they return is ``[replicas, P]`` twice.

    Args:
        problem: loss and the samples that training uses.
        w: weights at the start ``[P]``, or one row for each replica ``[replicas, P]`` (to go on with an ensemble).
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        replicas: number of runs.
        foot: weights -> their foot point on Gamma ``[P]``, ``lambda v: nearest_point(problem, v).point``; default: the
            weights themselves are compared.
        velocity: the optimizer's momentum at the start ``[P]``, where it has some.
        memory: bytes that the runs in progress may take, beside the result; one run at a time at least.
        progress: show a progress bar on the terminal.
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
    starts = w.expand(replicas, -1)
    size = _bytes_per_replica(problem, starts[0], noise, sgd.batch(problem.num_samples), generator)
    at_once = max(1, min(replicas, memory // size))
    groups = starts.split(at_once)
    ends = w.new_empty(replicas, problem.num_weights)
    with tqdm(total=steps * len(groups), desc=f"{replicas} runs", unit="step", disable=not progress) as bar:
        for own, W in zip(ends.split(at_once), groups, strict=True):
            own.copy_(_run(problem, W, noise, sgd, steps, velocity, generator, bar.update))
    weights = ends
    for part in parts(noise):
        if part.carried(part.scale(problem)) is not None:  # what the last step has left on the weights
            weights = weights + draw_noise(part, problem, 1, replicas=replicas, generator=generator)[0]
    if foot is None:
        return Ensemble(ends - starts, weights)
    origins = foot(w) if w.ndim == 1 else torch.stack([foot(v) for v in w])
    return Ensemble(torch.stack([foot(v) for v in ends]) - origins, weights)


def _run(
    problem: ZeroLossProblem,
    W: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    steps: int,
    velocity: Tensor | None,
    generator: torch.Generator | None,
    done: Callable[[int], object],
) -> Tensor:
    """Runs side by side from W ``[R, P]``: where they end."""
    R, N, B = len(W), problem.num_samples, sgd.batch(problem.num_samples)
    V = None if velocity is None else velocity.expand(R, -1)

    def of_batch(v: Tensor, x: Tensor, y: Tensor, *etas: Tensor) -> Tensor:
        return grad(lambda u: noisy_loss(noise, problem.batch_loss, u, x, y, etas))(v)

    whole = vmap(of_batch, in_dims=(0, None, None, *(0 for _ in parts(noise))))
    batched = vmap(of_batch)
    batches: list[Tensor] = []
    for _ in range(steps):
        if B == N:  # the order of a full batch does not matter
            etas = draw_noise(noise, problem, N, replicas=R, generator=generator)
            gradient = whole(W, problem.inputs, problem.targets, *etas)
        else:
            if not batches:  # a new epoch on every replica
                device = "cpu" if generator is None else generator.device
                orders = torch.rand(R, N, generator=generator, device=device).argsort(1)
                batches = list(orders.to(W.device).split(B, dim=1))
            index = batches.pop(0)  # [R, n]
            etas = draw_noise(noise, problem, index.shape[1], replicas=R, generator=generator)
            gradient = batched(W, problem.inputs[index], problem.targets[index], *etas)
        W, V = sgd.step(W, V, gradient)
        done(1)
    return W
