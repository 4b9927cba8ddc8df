"""Paths that start at the weights of a training and use the same batches.

    run        w <- w - alpha M grad Lhat(w; batch, eta)              the training itself, which is not changed
    baseline   n <- n - alpha M grad L(n; batch)                      the noise is switched off
    averaged   a <- a - alpha M E_eta grad Lhat(a; batch, eta)        the mean over m new draws in each step
    replica    r <- r - alpha M grad Lhat(r; batch, eta')             with independent noise

M stands for the optimizer's rule; each path has momentum and other state of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torch_singlim.measure.coupling import CoupledWindow
from torch_singlim.measure.optimizer_copy import copy_optimizer, parameters_of
from torch_singlim.measure.steps import Before, Step, flat
from torch_singlim.network import RandomState, noise_off

__all__ = ["CoupledPaths", "Gradient", "LossGradient", "Path", "is_affine"]

# loss of one micro-batch on a copy of the module
Loss = Callable[[nn.Module, Any], Tensor]

# by which the loss is scaled at least, and by which a scale is reduced if a gradient overflows
_SMALLEST_SCALE = 16.0
# relative tolerance for an update to count as affine in the gradient
_AFFINE = 1e-5


def _no_closure() -> float:
    """A closure for optimizers that call it once, when the gradient has been computed already."""
    return 0.0


def _on_a_graph(kept: Any) -> Iterator[Tensor]:
    """Tensors with a graph in nested lists, tuples, sets and dictionaries."""
    if isinstance(kept, Tensor):
        if kept.grad_fn is not None:
            yield kept
    elif isinstance(kept, Mapping):
        yield from _on_a_graph(list(kept.values()))
    elif isinstance(kept, list | tuple | set):
        for each in kept:
            yield from _on_a_graph(each)


class Path:
    """A copy of a module and its optimizer, whose weights move independently of the run.

    Args:
        module: the module of the run.
        optimizer: its optimizer. The copies share nothing with the run except for the objects in `shared`.
        shared: objects that are not copied, such as data sets.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, shared: Sequence[object] = ()) -> None:
        # tensors kept on the module may be part of a graph, and deepcopy cannot copy those
        results = _on_a_graph([vars(part) for part in module.modules()])
        memo: dict[int, Any] = {id(each): each for each in shared}
        memo |= {id(result): result.detach().clone() for result in results}
        # with one memo, so that the optimizer's parameters are those of the module
        self.module = copy.deepcopy(module, memo)
        self.optimizer = copy_optimizer(optimizer, memo)
        self.parameters = parameters_of(self.optimizer)

    def weights(self) -> Tensor:
        """The parameters that the optimizer holds  ``[P]``."""
        return flat(self.parameters)

    def take_settings(self, step: Step) -> None:
        """Set the modes and the optimizer's settings to those of a step of the run."""
        for part, mode in zip(self.module.modules(), step.modes, strict=True):
            part.training = mode
        for group, settings in zip(self.optimizer.param_groups, step.groups, strict=True):
            group.update(settings)

    def update(self, step: Step) -> None:
        """Clip the gradients as in the run, and make an optimizer step."""
        if step.clip is not None:
            step.clip(self.parameters)
        self.optimizer.step(_no_closure)

    def _evaluate(self, step: Step, evaluate: Callable[[Step], object]) -> Step:
        """Compute the gradient of a step, without its scale, which is reduced if the gradient overflows."""
        while True:
            self.optimizer.zero_grad()
            evaluate(step)
            if step.scale == 1:
                return step
            found = [p.grad for p in self.parameters if p.grad is not None]
            if step.scale < _SMALLEST_SCALE or all(bool(g.isfinite().all()) for g in found):
                for g in found:
                    g.div_(step.scale)
                return step
            step = replace(step, scale=step.scale / _SMALLEST_SCALE)

    def descend(
        self, gradient: Gradient, step: Step, seeds: Sequence[int], add: Callable[[Path], object] | None = None
    ) -> None:
        """Make the step with the mean gradient over independent draws, one for each seed; no seeds: without noise.

        Args:
            gradient: computes the gradient.
            step: of the run.
            seeds: of the draws.
            add: adds a further term to the gradient.
        """
        self.take_settings(step)
        if not seeds:
            step = self._evaluate(step, lambda scaled: gradient.quiet(self, scaled))
        elif len(seeds) == 1:
            step = self._evaluate(step, lambda scaled: gradient.noisy(self, scaled, seeds[0]))
        else:
            totals: list[Tensor | None] = [None] * len(self.parameters)
            for seed in seeds:
                step = self._evaluate(step, lambda scaled, seed=seed: gradient.noisy(self, scaled, seed))
                for i, p in enumerate(self.parameters):
                    if p.grad is not None:
                        share = p.grad / len(seeds)
                        known = totals[i]
                        totals[i] = share if known is None else known + share
            for p, total in zip(self.parameters, totals, strict=True):
                p.grad = total
        if add is not None:
            add(self)
        self.update(step)

    def descend_by_updates(
        self, gradient: Gradient, step: Step, seeds: Sequence[int], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Make the step with the mean update of several optimizers with the same weights, with one draw for each.

        For rules that are not affine in the gradient: the mean update then differs from that of the mean gradient.
        """
        start = [p.detach().clone() for p in self.parameters]
        totals = [torch.zeros_like(p) for p in self.parameters]
        for seed, optimizer in zip(seeds, optimizers, strict=True):
            self.optimizer = optimizer
            self.take_settings(step)
            self._evaluate(step, lambda scaled, seed=seed: gradient.noisy(self, scaled, seed))
            self.update(step)
            with torch.no_grad():
                for p, origin, total in zip(self.parameters, start, totals, strict=True):
                    total += p - origin
                    p.copy_(origin)
        with torch.no_grad():
            for p, total in zip(self.parameters, totals, strict=True):
                p.add_(total, alpha=1 / len(seeds))

    def twin_optimizers(self, count: int) -> list[torch.optim.Optimizer]:
        """Copies of the optimizer for the same parameters, each with its own state."""
        shared = {id(p): p for p in self.parameters}
        return [copy_optimizer(self.optimizer, dict(shared)) for _ in range(count)]


class Gradient(Protocol):
    """Computes the gradient of a step's loss on a path; each method adds the gradient to ``p.grad``."""

    def noisy(self, path: Path, step: Step, seed: int) -> None:
        """With noise drawn from this seed."""
        ...

    def quiet(self, path: Path, step: Step) -> None:
        """Without noise."""
        ...

    def again(self, path: Path, step: Step, before: Before) -> None:
        """With the random numbers of the run."""
        ...


class Potential(Protocol):
    """Adds the gradient of the potential of known noise to the gradients of a path."""

    @property
    def second(self) -> bool:
        """Whether there is noise of order 2."""
        ...

    def add(self, path: Path, step: Step, seed: int, *, first: bool) -> None:
        """Add alpha grad V of the noises of order 2, and, with `first`, grad V of those of order 1."""
        ...


@dataclass(frozen=True)
class LossGradient:
    """The gradient of a loss that takes a module and a micro-batch, and is random in training mode only.

    Args:
        loss: of one micro-batch.
    """

    loss: Loss

    def _add(self, path: Path, step: Step) -> None:
        with torch.enable_grad():
            for batch in step.batches:
                (self.loss(path.module, batch) * step.share).backward()

    def noisy(self, path: Path, step: Step, seed: int) -> None:
        RandomState.seed(seed)
        self._add(path, step)

    def quiet(self, path: Path, step: Step) -> None:
        with noise_off(path.module):
            self._add(path, step)

    def again(self, path: Path, step: Step, before: Before) -> None:
        before.random.restore()
        self._add(path, step)


def _two_steps(path: Path, gradients: Sequence[Tensor]) -> Tensor:
    """Displacement by two steps of the optimizer with the same gradients."""
    start = path.weights()
    for _ in range(2):
        for p, g in zip(path.parameters, gradients, strict=True):
            p.grad = g.clone()
        path.optimizer.step(_no_closure)
    return path.weights() - start


def is_affine(module: nn.Module, optimizer: torch.optim.Optimizer, *, generator: torch.Generator) -> bool:
    """Whether two steps of the optimizer are an affine function of the gradients, by a test on copies.

    >>> net = nn.Linear(3, 1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> is_affine(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), generator=generator)
    True
    >>> is_affine(net, torch.optim.Adam(net.parameters()), generator=generator)
    False
    """
    draws = [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in parameters_of(optimizer)]
        for _ in range(2)
    ]
    middle = [(a + b) / 2 for a, b in zip(*draws, strict=True)]
    try:
        moved = [_two_steps(Path(module, optimizer), gradients) for gradients in (*draws, middle)]
    except Exception:  # a rule that needs more than gradients
        return False
    a, b, mean = moved
    size = torch.linalg.vector_norm(a - b).item() + torch.linalg.vector_norm(mean).item()
    return torch.linalg.vector_norm(mean - (a + b) / 2).item() <= _AFFINE * size


class CoupledPaths:
    """Baseline, averaged paths and replicas of one training, from its present state on.

    Args:
        make_path: returns a copy of the run in its present state.
        gradient: computes the gradient of a step on a copy.
        draws: m, number of noise draws per step in both averaged paths together; even.
        replicas: R.
        expanded: whether there is a path with the second-order expansion of the noise; it needs a potential.
        potential: of the noise, as far as it is known.
        baseline: whether there is a path without noise.
        affine: whether gradients are averaged; otherwise updates are. None: by a test of the optimizer.
        watched: positions, among the optimizer's parameters, of those whose motion is compared; None: all.
        generator: of all seeds.

    Raises:
        ValueError: an odd number of draws, or none.
    """

    def __init__(
        self,
        make_path: Callable[[], Path],
        gradient: Gradient,
        *,
        draws: int = 4,
        replicas: int = 1,
        expanded: bool = False,
        potential: Potential | None = None,
        baseline: bool = True,
        affine: bool | None = None,
        watched: Sequence[int] | None = None,
        generator: torch.Generator,
    ) -> None:
        if draws < 2 or draws % 2:
            raise ValueError(f"draws must be even, at least 2: half of them for each averaged path, got {draws}")
        self.gradient, self.draws, self.generator = gradient, draws, generator
        self.averaged = (make_path(), make_path())
        self.baseline = make_path() if baseline else None
        self.potential, self.expanded = potential, make_path() if expanded and potential is not None else None
        self.replicas = tuple(make_path() for _ in range(replicas))
        first = self.averaged[0]
        if affine is None:
            affine = is_affine(first.module, first.optimizer, generator=torch.Generator().manual_seed(0))
        self.affine = affine
        """Whether gradients are averaged; otherwise updates are."""
        ends = itertools.accumulate((p.numel() for p in first.parameters), initial=0)
        everything = [slice(*pair) for pair in itertools.pairwise(ends)]
        self._watched = everything if watched is None else [everything[i] for i in watched]
        self.start = self._select(first.weights())
        self._optimizers: list[list[torch.optim.Optimizer]] = [[], []]

    @property
    def gradients_per_step(self) -> int:
        """Number of gradients of one batch that a step takes."""
        return self.draws + len(self.replicas) + (self.baseline is not None)

    def _select(self, weights: Tensor) -> Tensor:
        return torch.cat([weights[part] for part in self._watched])

    def _seeds(self, count: int) -> list[int]:
        return torch.randint(2**62, (count,), generator=self.generator).tolist()

    def advance(self, step: Step) -> None:
        """Make one step of the run on all paths."""
        with RandomState.isolated():
            if self.baseline is not None:
                self.baseline.descend(self.gradient, step, ())
            for i, path in enumerate(self.averaged):
                seeds = self._seeds(self.draws // 2)
                # with clipping, no rule is affine
                if self.affine and step.clip is None:
                    path.descend(self.gradient, step, seeds, self._second_order(step))
                    continue
                if not self._optimizers[i]:
                    self._optimizers[i] = path.twin_optimizers(len(seeds))
                path.descend_by_updates(self.gradient, step, seeds, self._optimizers[i])
            for path in self.replicas:
                path.descend(self.gradient, step, self._seeds(1))
            if self.expanded is not None and self.potential is not None:
                (seed,), potential = self._seeds(1), self.potential
                self.expanded.descend(self.gradient, step, (), lambda path: potential.add(path, step, seed, first=True))

    def _second_order(self, step: Step) -> Callable[[Path], object] | None:
        """Adds to the gradient of an averaged path what noise of order 2 does through its fluctuations."""
        potential = self.potential
        if potential is None or not potential.second:
            return None
        (seed,) = self._seeds(1)
        return lambda path: potential.add(path, step, seed, first=False)

    def moved(self, weights: Tensor) -> Tensor:
        """Displacement since the beginning of weights of a path or the run  ``[P]`` -> watched ones."""
        return self._select(weights) - self.start

    def displacement(self) -> Tensor:
        """Displacement of the averaged paths, (a_1 + a_2)/2."""
        first, second = (self.moved(path.weights()) for path in self.averaged)
        return (first + second) / 2

    def displacement_of_baseline(self) -> Tensor:
        """Displacement of the baseline; zero without one."""
        return torch.zeros_like(self.start) if self.baseline is None else self.moved(self.baseline.weights())

    def window(self, weights: Tensor) -> CoupledWindow:
        """The motion of run and paths so far; `weights` are the present ones of the run  ``[P]``."""
        return CoupledWindow.of(
            self.moved(weights),
            *(self.moved(path.weights()) for path in self.averaged),
            expanded=None if self.expanded is None else self.moved(self.expanded.weights()),
            baseline=None if self.baseline is None else self.moved(self.baseline.weights()),
            replicas=[self.moved(path.weights()) for path in self.replicas],
        )
