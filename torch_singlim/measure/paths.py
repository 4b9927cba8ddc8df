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
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.measure.coupling import CoupledWindow

__all__ = ["Before", "CoupledPaths", "Path", "RandomState", "Step", "is_affine", "noise_off", "replay_error"]

# loss of one micro-batch on a copy of the module
Loss = Callable[[nn.Module, Any], Tensor]

# a replay passes within this share of the step, and so many roundings of the weights
_REPLAY_RTOL, _ROUNDINGS = 1e-3, 4.0
# an update counts as affine in the gradient up to this
_AFFINE = 1e-5


@dataclass(frozen=True)
class RandomState:
    """The global random state: torch's (CPU and CUDA devices in use), Python's, and numpy's if it is loaded."""

    cpu: Tensor = field(repr=False)
    cuda: tuple[Tensor, ...] = field(repr=False)
    python: Any = field(repr=False)
    numpy: Any = field(repr=False)

    @classmethod
    def now(cls) -> RandomState:
        """At present."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), cuda, random.getstate(), None if numpy is None else numpy.random.get_state())

    def restore(self) -> None:
        """Put it back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    @staticmethod
    @contextmanager
    def isolated() -> Iterator[None]:
        """What is drawn within the block does not show outside."""
        before = RandomState.now()
        try:
            yield
        finally:
            before.restore()


@dataclass(frozen=True)
class Step:
    """One optimizer step of the run, as far as paths make it, too.

    Args:
        batches: its micro-batches, in order.
        groups: settings of the optimizer's parameter groups at the step, without their parameters.
        modes: ``training`` of every submodule, in the order of ``module.modules()``.
    """

    batches: tuple[Any, ...] = field(repr=False)
    groups: tuple[Mapping[str, Any], ...]
    modes: tuple[bool, ...] = field(repr=False)

    @classmethod
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any]) -> Step:
        """From a module and an optimizer that are about to make it."""
        groups = tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
        return cls(tuple(batches), groups, tuple(part.training for part in module.modules()))


@contextmanager
def noise_off(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for batch and instance normalisation, whose modes stay: what they do is no noise.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    >>> with noise_off(net):
    ...     [part.training for part in net]
    [False, True]
    """
    kept = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            if not isinstance(part, kept):
                part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector, in float64  ``[P]``."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


class Path:
    """A copy of a module with its optimizer, whose weights go their own way.

    Args:
        module: as the run has it.
        optimizer: of its parameters. The copy shares nothing with the run but what the module does not own.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        # results kept as attributes may hang on a graph, which deepcopy refuses
        memo: dict[int, Any] = {}
        for part in module.modules():
            kept = [v for v in vars(part).values() if isinstance(v, Tensor) and v.grad_fn is not None]
            memo |= {id(v): v.detach().clone() for v in kept}
        # in one copy, so that the optimizer's parameters are the module's
        self.module, self.optimizer = copy.deepcopy((module, optimizer), memo)
        vars(self.optimizer).pop("step", None)  # a scheduler's, which counts the run's steps
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def weights(self) -> Tensor:
        """The parameters that the optimizer holds  ``[P]``."""
        return _flat(self.parameters)

    def _prepare(self, step: Step) -> None:
        for part, mode in zip(self.module.modules(), step.modes, strict=True):
            part.training = mode
        for group, settings in zip(self.optimizer.param_groups, step.groups, strict=True):
            group.update(settings)

    def _add_gradient(self, loss: Loss, step: Step, share: float) -> None:
        """The gradient of the step's mean loss, times a share, on top of what is there."""
        with torch.enable_grad():
            for batch in step.batches:
                (loss(self.module, batch) * (share / len(step.batches))).backward()

    def descend(self, loss: Loss, step: Step, seeds: Sequence[int], *, noise: bool = True) -> None:
        """Make the step with the mean gradient of independent draws, one for each seed; or with the noise off."""
        self._prepare(step)
        self.optimizer.zero_grad()
        if not noise:
            with noise_off(self.module):
                self._add_gradient(loss, step, 1.0)
        else:
            for seed in seeds:
                torch.manual_seed(seed)
                self._add_gradient(loss, step, 1 / len(seeds))
        self.optimizer.step()

    def descend_by_updates(
        self, loss: Loss, step: Step, seeds: Sequence[int], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Make the step with the mean update of several optimizers on shared weights, one draw for each.

        For a rule that is not affine in the gradient, where the update of the mean gradient is another one.
        """
        start = [p.detach().clone() for p in self.parameters]
        total = [torch.zeros_like(p) for p in self.parameters]
        for seed, optimizer in zip(seeds, optimizers, strict=True):
            self.optimizer = optimizer
            self._prepare(step)
            optimizer.zero_grad()
            torch.manual_seed(seed)
            self._add_gradient(loss, step, 1.0)
            optimizer.step()
            with torch.no_grad():
                for p, origin, sum_ in zip(self.parameters, start, total, strict=True):
                    sum_ += p - origin
                    p.copy_(origin)
        with torch.no_grad():
            for p, sum_ in zip(self.parameters, total, strict=True):
                p.add_(sum_, alpha=1 / len(seeds))

    def twin_optimizers(self, count: int) -> list[torch.optim.Optimizer]:
        """Copies of the optimizer, with state of their own, of the same parameters."""
        shared = {id(p): p for p in self.parameters}
        return [copy.deepcopy(self.optimizer, dict(shared)) for _ in range(count)]


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
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer) -> Before:
        """At present, copied."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return cls(_flat(parameters), state, copy.deepcopy(optimizer.state_dict()), RandomState.now())


def replay_error(path: Path, loss: Loss, step: Step, before: Before, after: Tensor) -> tuple[float, bool]:
    """Make a step of the run again; rho, and whether it passes.

        rho = |w_replayed - w_{k+1}| / |w_{k+1} - w_k|;   |w_replayed - w_{k+1}| <= 1e-3 |w_{k+1} - w_k| + 4 eps |w|

    Args:
        path: a copy of the run that may be overwritten.
        loss: of one micro-batch.
        step: what the run did.
        before: from before it.
        after: the run's weights after it  ``[P]``.
    """
    path.module.load_state_dict(dict(before.state))
    path.optimizer.load_state_dict(copy.deepcopy(dict(before.optimizer)))
    with RandomState.isolated():
        path._prepare(step)
        path.optimizer.zero_grad()
        before.random.restore()
        path._add_gradient(loss, step, 1.0)
        path.optimizer.step()
    off = torch.linalg.vector_norm(path.weights() - after).item()
    moved = torch.linalg.vector_norm(after - before.weights).item()
    eps = max(torch.finfo(p.dtype).eps for p in path.parameters)
    allowed = _REPLAY_RTOL * moved + _ROUNDINGS * eps * torch.linalg.vector_norm(after).item()
    return (off / moved if moved else 0.0), not moved or off <= allowed


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
            path.optimizer.step()
        moved.append(path.weights() - start)
    a, b, mean = moved
    size = torch.linalg.vector_norm(a - b).item() + torch.linalg.vector_norm(mean).item()
    return torch.linalg.vector_norm(mean - (a + b) / 2).item() <= _AFFINE * size


class CoupledPaths:
    """Baseline, averaged paths and replicas of one training, from where it is now.

    Args:
        module: as it is trained; copied.
        optimizer: its optimizer, which has just made a step; copied.
        loss: of one micro-batch on a copy of the module.
        draws: m, noise draws a step of both averaged paths together, even.
        replicas: R.
        generator: of all seeds.

    Raises:
        ValueError: an odd number of draws, or none.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        draws: int = 4,
        replicas: int = 1,
        generator: torch.Generator,
    ) -> None:
        if draws < 2 or draws % 2:
            raise ValueError(f"draws must be even, at least 2: half of them for each averaged path, got {draws}")
        self.loss, self.draws, self.generator = loss, draws, generator
        self.affine = is_affine(module, optimizer, generator=generator)
        """Whether gradients are averaged; else updates are."""
        self.baseline = Path(module, optimizer)
        self.averaged = (Path(module, optimizer), Path(module, optimizer))
        self.replicas = tuple(Path(module, optimizer) for _ in range(replicas))
        self.start = self.baseline.weights()
        twins = 0 if self.affine else draws // 2
        self._optimizers = [path.twin_optimizers(twins) for path in self.averaged]

    def _seeds(self, count: int) -> list[int]:
        return torch.randint(2**62, (count,), generator=self.generator).tolist()

    def advance(self, step: Step) -> None:
        """Follow one step of the run."""
        with RandomState.isolated():
            self.baseline.descend(self.loss, step, (), noise=False)
            for path, optimizers in zip(self.averaged, self._optimizers, strict=True):
                seeds = self._seeds(self.draws // 2)
                if self.affine:
                    path.descend(self.loss, step, seeds)
                else:
                    path.descend_by_updates(self.loss, step, seeds, optimizers)
            for path in self.replicas:
                path.descend(self.loss, step, self._seeds(1))

    def window(self, weights: Tensor) -> CoupledWindow:
        """The motion so far, of a run that is now at these weights  ``[P]``."""
        return CoupledWindow.of(
            weights - self.start,
            *(path.weights() - self.start for path in self.averaged),
            baseline=self.baseline.weights() - self.start,
            replicas=[path.weights() - self.start for path in self.replicas],
        )
