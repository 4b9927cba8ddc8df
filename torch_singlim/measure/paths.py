"""Paths that start at the weights of a training and use the same batches; and replays of single steps of the training.

    run        w <- w - alpha M grad Lhat(w; batch, eta)              the training itself, which is not changed
    baseline   n <- n - alpha M grad L(n; batch)                      the noise is switched off
    averaged   a <- a - alpha M E_eta grad Lhat(a; batch, eta)        the mean over m new draws in each step
    replica    r <- r - alpha M grad Lhat(r; batch, eta')             with independent noise

M stands for the optimizer's rule; each path has momentum and other state of its own. A replay repeats one step of the
run, from the same weights, state and random numbers: if the result differs, paths cannot reproduce this training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torch_singlim.measure.coupling import CoupledWindow
from torch_singlim.network import RandomState, noise_off

__all__ = [
    "Before",
    "CoupledPaths",
    "Gradient",
    "LossGradient",
    "Path",
    "Replay",
    "Step",
    "held_by",
    "is_affine",
    "replay",
]

# loss of one micro-batch on a copy of the module
Loss = Callable[[nn.Module, Any], Tensor]
# changes the gradients of parameters between backward and step, in place
Clip = Callable[[list[nn.Parameter]], object]

# tolerance of a replay: a share of the step, and a multiple of the rounding error of the weights
_REPLAY_RTOL, _ROUNDINGS = 1e-3, 4.0
# relative tolerance for an update to count as affine in the gradient
_AFFINE = 1e-5


@dataclass(frozen=True)
class Step:
    """One optimizer step of the run, with everything that paths need to make it, too.

    Args:
        batches: its micro-batches, in order.
        groups: settings of the optimizer's parameter groups at the step, without their parameters.
        modes: ``training`` of every submodule, in the order of ``module.modules()``.
        divisor: of the loss of each micro-batch; None: their number.
        clip: what is done to the gradients before the step.
    """

    batches: tuple[Any, ...] = field(repr=False)
    groups: tuple[Mapping[str, Any], ...]
    modes: tuple[bool, ...] = field(repr=False)
    divisor: int | None = None
    clip: Clip | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Any],
        *,
        divisor: int | None = None,
        clip: Clip | None = None,
    ) -> Step:
        """The step that a module and an optimizer are about to make."""
        groups = tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
        return cls(tuple(batches), groups, tuple(part.training for part in module.modules()), divisor, clip)

    @property
    def share(self) -> float:
        """The factor of each micro-batch's loss in the loss of the step."""
        return 1 / (self.divisor or len(self.batches))


def held_by(tensor: Tensor, truth: Mapping[int, Tensor]) -> Tensor:
    """The data of a tensor without perturbation: those in `truth` under its id, if there are any, else its own."""
    found = truth.get(id(tensor))
    return tensor.detach() if found is None else found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector, in float64  ``[P]``."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


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
        # copied together, so that the optimizer's parameters are those of the module
        self.module, self.optimizer = copy.deepcopy((module, optimizer), memo)
        vars(self.optimizer).pop("step", None)  # a scheduler replaces it by a method that counts the steps of the run
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]

    def weights(self) -> Tensor:
        """The parameters that the optimizer holds  ``[P]``."""
        return _flat(self.parameters)

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

    def descend(self, gradient: Gradient, step: Step, seeds: Sequence[int]) -> None:
        """Make the step with the mean gradient over independent draws, one for each seed; no seeds: without noise."""
        self.take_settings(step)
        self.optimizer.zero_grad()
        if not seeds:
            gradient.quiet(self, step)
        elif len(seeds) == 1:
            gradient.noisy(self, step, seeds[0])
        else:
            totals: list[Tensor | None] = [None] * len(self.parameters)
            for seed in seeds:
                self.optimizer.zero_grad()
                gradient.noisy(self, step, seed)
                for i, p in enumerate(self.parameters):
                    if p.grad is not None:
                        share = p.grad / len(seeds)
                        known = totals[i]
                        totals[i] = share if known is None else known + share
            for p, total in zip(self.parameters, totals, strict=True):
                p.grad = total
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
            optimizer.zero_grad()
            gradient.noisy(self, step, seed)
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
        return [copy.deepcopy(self.optimizer, dict(shared)) for _ in range(count)]


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
        torch.manual_seed(seed)
        self._add(path, step)

    def quiet(self, path: Path, step: Step) -> None:
        with noise_off(path.module):
            self._add(path, step)

    def again(self, path: Path, step: Step, before: Before) -> None:
        before.random.restore()
        self._add(path, step)


@dataclass(frozen=True)
class Before:
    """The state of the run before a step, on which the step depends.

    Args:
        weights: the optimizer's parameters.
        state: of the module, including buffers.
        optimizer: the optimizer's state.
        random: the global random state.
    """

    weights: Tensor = field(repr=False)
    state: Mapping[str, Tensor] = field(repr=False)
    optimizer: Mapping[str, Any] = field(repr=False)
    random: RandomState = field(repr=False)

    @classmethod
    def of(
        cls, module: nn.Module, optimizer: torch.optim.Optimizer, truth: Mapping[int, Tensor] | None = None
    ) -> Before:
        """A copy of the present state.

        Args:
            module: the module that is trained.
            optimizer: its optimizer.
            truth: id of each parameter that is perturbed at present -> its data without perturbation.
        """
        known = truth or {}
        parameters = [held_by(p, known) for group in optimizer.param_groups for p in group["params"]]
        tensors: dict[str, Tensor] = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
        held = {name: held_by(tensors[name], known) for name in module.state_dict()}
        state = {name: tensor.clone() for name, tensor in held.items()}
        return cls(_flat(parameters), state, copy.deepcopy(optimizer.state_dict()), RandomState.now())


@dataclass(frozen=True)
class Replay:
    """The result of repeating a step of the run.

    Args:
        error: rho = |w_replayed - w_{k+1}| / |w_{k+1} - w_k|; 0 if the run did not move.
        passed: |w_replayed - w_{k+1}| <= 1e-3 |w_{k+1} - w_k| + 4 eps |w|, or the run did not move.
    """

    error: float
    passed: bool


def replay(path: Path, gradient: Gradient, step: Step, before: Before, after: Tensor) -> Replay:
    """Repeat a step of the run on a path, whose state is overwritten.

    Args:
        path: a copy of the run.
        gradient: computes the gradient of the step.
        step: the step of the run.
        before: the state of the run before the step.
        after: the run's weights after the step  ``[P]``.
    """
    path.module.load_state_dict(dict(before.state))
    path.optimizer.load_state_dict(copy.deepcopy(dict(before.optimizer)))
    with RandomState.isolated():
        path.take_settings(step)
        path.optimizer.zero_grad()
        gradient.again(path, step, before)
        path.update(step)
    off = torch.linalg.vector_norm(path.weights() - after).item()
    moved = torch.linalg.vector_norm(after - before.weights).item()
    eps = max(torch.finfo(p.dtype).eps for p in path.parameters)
    allowed = _REPLAY_RTOL * moved + _ROUNDINGS * eps * torch.linalg.vector_norm(after).item()
    return Replay(off / moved, off <= allowed) if moved else Replay(0.0, True)


def is_affine(module: nn.Module, optimizer: torch.optim.Optimizer, *, generator: torch.Generator) -> bool:
    """Whether two steps of the optimizer are an affine function of the gradients, by a test on copies.

    >>> net = nn.Linear(3, 1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> is_affine(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), generator=generator)
    True
    >>> is_affine(net, torch.optim.Adam(net.parameters()), generator=generator)
    False
    """
    first = Path(module, optimizer)
    draws = [
        [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in first.parameters]
        for _ in range(2)
    ]
    middle = [(a + b) / 2 for a, b in zip(*draws, strict=True)]
    moved = []
    for gradients in (*draws, middle):
        path = Path(module, optimizer)
        start = path.weights()
        for _ in range(2):
            for p, g in zip(path.parameters, gradients, strict=True):
                p.grad = g.clone()
            path.optimizer.step(_no_closure)
        moved.append(path.weights() - start)
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
        generator: torch.Generator,
    ) -> None:
        if draws < 2 or draws % 2:
            raise ValueError(f"draws must be even, at least 2: half of them for each averaged path, got {draws}")
        self.gradient, self.draws, self.generator = gradient, draws, generator
        self.baseline = make_path()
        self.averaged = (make_path(), make_path())
        self.replicas = tuple(make_path() for _ in range(replicas))
        self.start = self.baseline.weights()
        self.affine = is_affine(self.baseline.module, self.baseline.optimizer, generator=generator)
        """Whether gradients are averaged; otherwise updates are."""
        self._optimizers: list[list[torch.optim.Optimizer]] = [[], []]

    def _seeds(self, count: int) -> list[int]:
        return torch.randint(2**62, (count,), generator=self.generator).tolist()

    def advance(self, step: Step) -> None:
        """Make one step of the run on all paths."""
        with RandomState.isolated():
            self.baseline.descend(self.gradient, step, ())
            for i, path in enumerate(self.averaged):
                seeds = self._seeds(self.draws // 2)
                # with clipping, no rule is affine
                if self.affine and step.clip is None:
                    path.descend(self.gradient, step, seeds)
                    continue
                if not self._optimizers[i]:
                    self._optimizers[i] = path.twin_optimizers(len(seeds))
                path.descend_by_updates(self.gradient, step, seeds, self._optimizers[i])
            for path in self.replicas:
                path.descend(self.gradient, step, self._seeds(1))

    def window(self, weights: Tensor) -> CoupledWindow:
        """The motion of run and paths so far; `weights` are the present ones of the run  ``[P]``."""
        return CoupledWindow.of(
            weights - self.start,
            *(path.weights() - self.start for path in self.averaged),
            baseline=self.baseline.weights() - self.start,
            replicas=[path.weights() - self.start for path in self.replicas],
        )
