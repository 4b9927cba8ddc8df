"""Other paths beside a training, from the same weights, on the very batches that it uses; and replays of its steps.

    run        w <- w - alpha M grad Lhat(w; batch, eta)              what is trained, never touched
    baseline   n <- n - alpha M grad L(n; batch)                      the noise switched off
    averaged   a <- a - alpha M E_eta grad Lhat(a; batch, eta)        m fresh draws a step
    replica    r <- r - alpha M grad Lhat(r; batch, eta')             noise of its own

M is the optimizer's own rule, with momentum and other state of each path's own. A replay makes one step of the run
again, from its weights, its state and its random numbers: where the result differs, paths do not follow this training.
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
# what is done to the gradients of parameters between backward and step, in place
Clip = Callable[[list[nn.Parameter]], object]

# a replay passes within this share of the step, and so many roundings of the weights
_REPLAY_RTOL, _ROUNDINGS = 1e-3, 4.0
# an update counts as affine in the gradient up to this
_AFFINE = 1e-5


@dataclass(frozen=True)
class Step:
    """One optimizer step of the run, as far as paths make it, too.

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
        """From a module and an optimizer that are about to make it."""
        groups = tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
        return cls(tuple(batches), groups, tuple(part.training for part in module.modules()), divisor, clip)

    @property
    def share(self) -> float:
        """Of each micro-batch's loss in the step's."""
        return 1 / (self.divisor or len(self.batches))


def held_by(tensor: Tensor, truth: Mapping[int, Tensor]) -> Tensor:
    """What a tensor holds outside a training step: what `truth` has under its id, or what it holds."""
    found = truth.get(id(tensor))
    return tensor.detach() if found is None else found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector, in float64  ``[P]``."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


def _no_closure() -> float:
    """For optimizers that call their closure once: the gradient is there already."""
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
    """A copy of a module with its optimizer, whose weights go their own way.

    Args:
        module: as the run has it.
        optimizer: of its parameters. The copy shares nothing with the run but what `shared` lists.
        shared: objects that are not copied, such as data sets.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, *, shared: Sequence[object] = ()) -> None:
        # results kept on the module may hang on a graph, which deepcopy refuses
        results = _on_a_graph([vars(part) for part in module.modules()])
        memo: dict[int, Any] = {id(each): each for each in shared}
        memo |= {id(result): result.detach().clone() for result in results}
        # in one copy, so that the optimizer's parameters are the module's
        self.module, self.optimizer = copy.deepcopy((module, optimizer), memo)
        vars(self.optimizer).pop("step", None)  # a scheduler's, which counts the run's steps
        self.parameters: list[nn.Parameter] = [p for group in self.optimizer.param_groups for p in group["params"]]

    def weights(self) -> Tensor:
        """The parameters that the optimizer holds  ``[P]``."""
        return _flat(self.parameters)

    def take_settings(self, step: Step) -> None:
        """The modes and the optimizer's settings of a step of the run."""
        for part, mode in zip(self.module.modules(), step.modes, strict=True):
            part.training = mode
        for group, settings in zip(self.optimizer.param_groups, step.groups, strict=True):
            group.update(settings)

    def update(self, step: Step) -> None:
        """Clip the gradients as the run does, and step."""
        if step.clip is not None:
            step.clip(self.parameters)
        self.optimizer.step(_no_closure)

    def descend(self, gradient: Gradient, step: Step, seeds: Sequence[int]) -> None:
        """Make the step with the mean gradient of independent draws, one for each seed; none: with the noise off."""
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
        """Make the step with the mean update of several optimizers on shared weights, one draw for each.

        For a rule that is not affine in the gradient, where the update of the mean gradient is another one.
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
        """Copies of the optimizer, with state of their own, of the same parameters."""
        shared = {id(p): p for p in self.parameters}
        return [copy.deepcopy(self.optimizer, dict(shared)) for _ in range(count)]


class Gradient(Protocol):
    """How the gradient of a step's loss comes about on a path: each method adds it to ``p.grad``."""

    def noisy(self, path: Path, step: Step, seed: int) -> None:
        """With noise drawn from this seed."""
        ...

    def quiet(self, path: Path, step: Step) -> None:
        """With the noise off."""
        ...

    def again(self, path: Path, step: Step, before: Before) -> None:
        """With the random numbers that the run had."""
        ...


@dataclass(frozen=True)
class LossGradient:
    """The gradient of a loss that takes a module and a micro-batch, random in training mode alone.

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
    """All that a step of the run depends on, from before it.

    Args:
        weights: the optimizer's parameters.
        state: of the module, buffers included.
        optimizer: its state.
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
        """At present, copied.

        Args:
            module: that is trained.
            optimizer: its optimizer.
            truth: id of a parameter -> what it holds outside a training step, where that is something else at present.
        """
        known = truth or {}
        parameters = [held_by(p, known) for group in optimizer.param_groups for p in group["params"]]
        tensors: dict[str, Tensor] = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
        held = {name: held_by(tensors[name], known) for name in module.state_dict()}
        state = {name: tensor.clone() for name, tensor in held.items()}
        return cls(_flat(parameters), state, copy.deepcopy(optimizer.state_dict()), RandomState.now())


@dataclass(frozen=True)
class Replay:
    """A step of the run made again.

    Args:
        error: rho = |w_replayed - w_{k+1}| / |w_{k+1} - w_k|; 0 where the run did not move.
        passed: |w_replayed - w_{k+1}| <= 1e-3 |w_{k+1} - w_k| + 4 eps |w|; a step that did not move is not judged.
    """

    error: float
    passed: bool


def replay(path: Path, gradient: Gradient, step: Step, before: Before, after: Tensor) -> Replay:
    """Make a step of the run again on a path, which is overwritten.

    Args:
        path: a copy of the run.
        gradient: of the step.
        step: what the run did.
        before: from before it.
        after: the run's weights after it  ``[P]``.
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
    """Whether two steps of the optimizer are an affine function of their gradients, tried on copies.

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
    """Baseline, averaged paths and replicas of one training, from where it is now.

    Args:
        make_path: a copy of the run as it is now.
        gradient: of a step on a copy.
        draws: m, noise draws a step of both averaged paths together, even.
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
        """Whether gradients are averaged; else updates are."""
        self._optimizers: list[list[torch.optim.Optimizer]] = [[], []]

    def _seeds(self, count: int) -> list[int]:
        return torch.randint(2**62, (count,), generator=self.generator).tolist()

    def advance(self, step: Step) -> None:
        """Follow one step of the run."""
        with RandomState.isolated():
            self.baseline.descend(self.gradient, step, ())
            for i, path in enumerate(self.averaged):
                seeds = self._seeds(self.draws // 2)
                # clipping makes any rule one that is not affine
                if self.affine and step.clip is None:
                    path.descend(self.gradient, step, seeds)
                    continue
                if not self._optimizers[i]:
                    self._optimizers[i] = path.twin_optimizers(len(seeds))
                path.descend_by_updates(self.gradient, step, seeds, self._optimizers[i])
            for path in self.replicas:
                path.descend(self.gradient, step, self._seeds(1))

    def window(self, weights: Tensor) -> CoupledWindow:
        """The motion so far, of a run that is now at these weights  ``[P]``."""
        return CoupledWindow.of(
            weights - self.start,
            *(path.weights() - self.start for path in self.averaged),
            baseline=self.baseline.weights() - self.start,
            replicas=[path.weights() - self.start for path in self.replicas],
        )
