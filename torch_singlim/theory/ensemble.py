"""Independent runs of the noisy training itself, evaluated in parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm import tqdm

from torch_singlim.linalg import Estimate, VectorEstimate
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem, Sum, draw_noise, noisy_loss, parts
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["Ensemble", "simulate"]


@dataclass(frozen=True)
class Ensemble:
    """Independent noisy runs over the same window.

    Args:
        displacements: of the points on Gamma if a map to Gamma was given, else of the weights ``[replicas, P]``;
            without transient perturbations (the xi of `AntiCorrelated`).
        weights: the training's weights at the end ``[replicas, P]``.
        antithetic: whether runs 2 i and 2 i + 1 had opposite noise.
    """

    displacements: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    antithetic: bool = False

    @property
    def independent(self) -> Tensor:
        """Independent displacements with the same mean: of the runs, or means of antithetic pairs  ``[k, P]``."""
        D = self.displacements
        return D.view(-1, 2, D.shape[1]).mean(1) if self.antithetic else D

    @property
    def mean(self) -> VectorEstimate:
        """Mean displacement with its standard error."""
        return VectorEstimate(self.independent)

    def covariance(self, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Covariance of the displacements, and the standard error of each entry ``[k, k]``, in the basis whose vectors
        are the rows of `basis` ``[k, P]`` (default: the weights themselves).
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


def _bytes_per_replica(
    problem: ZeroLossProblem, w: Tensor, noise: NoiseSystem, batch: int, generator: torch.Generator | None
) -> int:
    """Memory of one run in bytes: the activations that a gradient needs, the noise, vectors of the weights' size."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    # SAM's own gradient takes no more memory than the one that follows
    noise = Sum(tuple(part for part in parts(noise) if not part.ascends))
    etas = draw_noise(noise, problem, batch, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        noisy_loss(
            noise, problem.batch_loss, w.clone().requires_grad_(), problem.inputs[:batch], problem.targets[:batch], etas
        )
    # a backward pass needs about as much memory again as the forward pass saved
    return 2 * sum(saved.values()) + sum(eta.nbytes for eta in etas) + 8 * w.nbytes


def simulate(
    problem: ZeroLossProblem,
    w: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    *,
    steps: int,
    replicas: int,
    retract: Callable[[Tensor], Tensor] | None = None,
    velocity: Tensor | None = None,
    antithetic: bool = False,
    memory: int = 2**30,
    progress: bool = False,
    generator: torch.Generator | None = None,
) -> Ensemble:
    """Independent runs of the noisy training itself from the same weights, each with its own noise and batches.

        w <- w - alpha grad_w Lhat_batch(w, eta)        for each replica, with torch.optim.SGD's momentum

    Batches are drawn as by a shuffling DataLoader: every sample once per epoch, the last batch of an epoch may be
    smaller. As many runs are evaluated in parallel as fit into `memory`; the result has two tensors ``[replicas, P]``.

    Args:
        problem: loss and the samples that training uses.
        w: weights at the start ``[P]``, or one row for each replica ``[replicas, P]``. To continue an ensemble, add its
            displacements to its initial weights; its `weights` include the transient perturbation.
        noise: the system.
        sgd: step size, momentum, batch size.
        steps: K.
        replicas: number of runs.
        retract: a map of weights near Gamma to weights on Gamma ``[P]``, ``lambda v: nearest_point(problem, v).point``;
            default: none, the displacements are those of the weights.
        velocity: the optimizer's momentum at the start ``[P]``, if it has any.
        antithetic: runs 2 i and 2 i + 1 have opposite noise, and the same batches. What is linear in the noise, such as
            diffusion to first order, cancels in the mean of a pair; drifts are quadratic.
        memory: bytes that the runs in progress may take, in addition to the result; at least one run is in progress.
        progress: show a progress bar on the terminal.
        generator: of noise and batches.

    Raises:
        ValueError: fewer than one step or run; an odd number of antithetic runs; a noise that does not fit the problem.

    >>> from torch import nn
    >>> from torch_singlim.noise import Minibatch
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.eye(2), torch.zeros(2, 1))
    >>> sgd = SGDSettings(lr=0.25, batch_size=1)
    >>> simulate(problem, torch.ones(2).double(), Minibatch(), sgd, steps=2, replicas=3).displacements
    tensor([[-0.5000, -0.5000],
            [-0.5000, -0.5000],
            [-0.5000, -0.5000]], dtype=torch.float64)
    """
    if steps < 1 or replicas < 1:
        raise ValueError(f"steps and replicas must be at least 1, got {steps} and {replicas}")
    if antithetic and replicas % 2:
        raise ValueError(f"antithetic runs come in pairs: pass an even number of replicas, got {replicas}")
    noise.check(problem)
    starts = w.expand(replicas, -1)
    size = _bytes_per_replica(problem, starts[0], noise, sgd.batch(problem.num_samples), generator)
    at_once = max(1, min(replicas, memory // size))
    if antithetic:
        at_once = max(2, at_once - at_once % 2)
    groups = starts.split(at_once)
    ends = w.new_empty(replicas, problem.num_weights)
    with tqdm(total=steps * len(groups), desc=f"{replicas} runs", unit="step", disable=not progress) as bar:
        for own, W in zip(ends.split(at_once), groups, strict=True):
            own.copy_(_run(problem, W, noise, sgd, steps, velocity, antithetic, generator, bar.update))
    weights = ends
    for part in parts(noise):
        if part.transient:  # the perturbation that the last step adds to the weights
            last = draw_noise(part, problem, 1, replicas=replicas, antithetic=antithetic, generator=generator)
            weights = weights + last[0]
    if retract is None:
        return Ensemble(ends - starts, weights, antithetic)
    origins = retract(w) if w.ndim == 1 else torch.stack([retract(v) for v in w])
    return Ensemble(torch.stack([retract(v) for v in ends]) - origins, weights, antithetic)


def _run(
    problem: ZeroLossProblem,
    W: Tensor,
    noise: NoiseSystem,
    sgd: SGDSettings,
    steps: int,
    velocity: Tensor | None,
    antithetic: bool,
    generator: torch.Generator | None,
    done: Callable[[int], object],
) -> Tensor:
    """Final weights of parallel runs from W ``[R, P]``. Processes share the runs; each draws the noise of all runs."""
    R, N, B = len(W), problem.num_samples, sgd.batch(problem.num_samples)
    own = problem.process_group.shard(R)
    W = W[own]
    V = None if velocity is None else velocity.expand(len(W), -1)

    def of_batch(v: Tensor, x: Tensor, y: Tensor, *etas: Tensor) -> Tensor:
        return grad(lambda u: noisy_loss(noise, problem.batch_loss, u, x, y, etas))(v)

    whole = vmap(of_batch, in_dims=(0, None, None, *(0 for _ in parts(noise))))
    batched = vmap(of_batch)
    batches: list[Tensor] = []
    draw = functools.partial(draw_noise, noise, problem, replicas=R, antithetic=antithetic, generator=generator)
    for _ in range(steps):
        if B == N:  # the order of a full batch does not matter
            etas = draw(N)
            gradient = whole(W, problem.inputs, problem.targets, *(eta[own] for eta in etas)) if len(W) else W
        else:
            if not batches:  # a new epoch begins, with an order for each replica
                device = "cpu" if generator is None else generator.device
                orders = torch.rand(R // 2 if antithetic else R, N, generator=generator, device=device).argsort(1)
                orders = orders.repeat_interleave(R // len(orders), 0)
                batches = list(orders.to(W.device).split(B, dim=1))
            index = batches.pop(0)  # [R, n]
            etas = draw(index.shape[1])
            x, y = problem.inputs[index[own]], problem.targets[index[own]]
            gradient = batched(W, x, y, *(eta[own] for eta in etas)) if len(W) else W
        W, V = sgd.step(W, V, gradient)
        done(1)
    return problem.process_group.all_gather(W, R)
