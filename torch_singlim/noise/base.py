"""A noise is defined by its noisy loss Lhat(w, eta), from which everything else follows.

A system states how its noise eta enters the loss of a batch, in one line, in the notation of arXiv 2404.12293:

    DropConnect:  loss(w * (1 + eta), x, y)         input noise:  loss(w, x + eta, y)       Langevin:  L + eta . w

The components of eta are uncorrelated, with mean zero. eta has either one row for each sample of the batch ``[n, D]``
(`per_sample`), or it is one vector ``[D]`` for the whole step. The eta of a sum is a tuple with one eta for each part.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from torch_singlim.network import ActivationSite, SampleLoss, ZeroLossProblem

__all__ = [
    "BatchLoss",
    "Covariance",
    "NoiseSpace",
    "NoiseSystem",
    "Sum",
    "draw_noise",
    "leading",
    "map_parts",
    "noisy_loss",
    "noisy_outputs",
    "parts",
    "uniform",
]

# eta: a tensor, or a tuple of tensors for a sum
Eta = TypeVar("Eta")


class BatchLoss(Protocol):
    """Mean loss of a batch: weights ``[P]``, inputs ``[n, ...]``, targets ``[n, ...]`` -> scalar."""

    def __call__(
        self, w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """`activations`: noise on the dropout sites ``[n, D]``; `shift` is added to the targets ``[n, C]``."""
        ...


class NoiseSpace(Protocol):
    """What a system needs to draw its noise: the quantities that can be perturbed. A `ZeroLossProblem` is one."""

    num_weights: int
    num_outputs: int
    sites: list[ActivationSite]
    dtype: torch.dtype
    device: torch.device

    @property
    def input_shape(self) -> torch.Size:
        """Shape of one sample's input."""
        ...


@dataclass(frozen=True)
class Covariance:
    """Sigma = hessian * H + identity * I, the covariance on Gamma of one step's gradient noise, if it has this form."""

    hessian: float = 0.0
    identity: float = 0.0

    def __add__(self, other: Covariance) -> Covariance:
        return Covariance(self.hessian + other.hessian, self.identity + other.identity)


class NoiseSystem(ABC, Generic[Eta]):
    """A noise, or a penalty: how its eta enters the loss. Subclasses are frozen; ``a + b`` is their sum.

    Attributes:
        per_sample: eta is ``[n, D]``, a row for each sample; otherwise ``[D]``, one vector for the whole step.
        additive: adds a term in the weights to the loss; in a sum, the other parts do not perturb the weights in it.
        moves_outputs: acts through the outputs f(w, x) of each sample, and on nothing else in the loss.
        scale_free: does not change when each weight is expressed in a unit of its own, as parameter groups with
            different learning rates require.
        transient: eta is added to the weights after a step and subtracted a step later; the recursion is written in the
            weights without eta.
        ascends: the gradient is that at a distance sqrt(variance) up the gradient, instead of at the weights.
        relabels: acts on class labels, see `redraw`, rather than through the arguments of the loss.
        done_by: what applies this noise in a training already, so that it cannot be injected; None: it can be injected.
        checked_on_samples: samples of the training are needed to decide whether the noise fits, see `check_targets`.
    """

    per_sample: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    moves_outputs: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    transient: ClassVar[bool] = False
    ascends: ClassVar[bool] = False
    relabels: ClassVar[bool] = False
    done_by: ClassVar[str | None] = None
    checked_on_samples: ClassVar[bool] = False

    @property
    @abstractmethod
    def order(self) -> int | None:
        """Power of the step size in the drift along Gamma: 1, 2, or None if there is no drift on either clock."""

    @abstractmethod
    def variance(self, space: NoiseSpace) -> float:
        """sigma^2 of the slow clock; the largest one of several layers or systems."""

    @abstractmethod
    def scale(self, space: NoiseSpace) -> Eta:
        """sigma_j, the standard deviation of each of the D components of eta ``[D]``."""

    @abstractmethod
    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Eta:
        """Independent draws of eta ``[count, D]``.

        They are drawn on the generator's device (default: the CPU) and moved afterwards, so that a seed gives the same
        noise on every device.
        """

    @abstractmethod
    def quantile(self, space: NoiseSpace, u: Eta) -> Eta:
        """Inverse distribution function of each component at u ``[..., D]`` in (0, 1)."""

    @abstractmethod
    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Eta) -> Tensor:
        """Lhat(w, eta) of a batch, a scalar, in terms of the loss without this noise; differentiable in w and eta."""

    def check(self, problem: ZeroLossProblem) -> None:  # most systems fit every problem
        """Raise ValueError, with advice on what to do, if the system does not fit the problem."""

    def check_targets(self, loss: SampleLoss | None, targets: Tensor) -> None:  # most systems fit all targets
        """Raise ValueError if the noise does not fit this loss (None: unknown) or these targets."""

    def redraw(self, labels: Tensor, eta: Eta) -> Tensor:
        """The class labels ``[n]`` under the noise eta."""
        return labels

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance | None:
        """Sigma on Gamma in closed form; None if there is no closed form."""
        return None

    def __add__(self, other: NoiseSystem) -> NoiseSystem:
        """Both noises, independently of each other: their potentials add up."""
        return Sum((*parts(self), *parts(other)))


@dataclass(frozen=True)
class Sum(NoiseSystem[tuple[Tensor, ...]]):
    """Several independent systems at once, written ``a + b``. Its eta is a tuple, with one eta for each part.

    Raises:
        ValueError: two systems of one kind.
    """

    systems: tuple[NoiseSystem[Tensor], ...]

    def __post_init__(self) -> None:
        kinds = [type(system).__name__ for system in self.systems]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"a sum takes systems of different kinds, one each, got {' + '.join(kinds)}")

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.systems))

    @property
    def per_sample(self) -> bool:  # type: ignore[override]  # for a sum these depend on its parts
        """Whether every part is."""
        return all(system.per_sample for system in self.systems)

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(system.additive for system in self.systems)

    @property
    def moves_outputs(self) -> bool:  # type: ignore[override]
        """Whether every part does."""
        return all(system.moves_outputs for system in self.systems)

    @property
    def scale_free(self) -> bool:  # type: ignore[override]
        """Whether every part is."""
        return all(system.scale_free for system in self.systems)

    @property
    def transient(self) -> bool:  # type: ignore[override]
        """Whether a part is."""
        return any(system.transient for system in self.systems)

    @property
    def relabels(self) -> bool:  # type: ignore[override]
        """Whether a part does."""
        return any(system.relabels for system in self.systems)

    @property
    def done_by(self) -> str | None:  # type: ignore[override]
        """That of the first part which is applied in a training already."""
        return next((system.done_by for system in self.systems if system.done_by), None)

    @property
    def checked_on_samples(self) -> bool:  # type: ignore[override]
        """Whether a part is."""
        return any(system.checked_on_samples for system in self.systems)

    @property
    def order(self) -> int | None:
        return min((s.order for s in self.systems if s.order is not None), default=None)

    def variance(self, space: NoiseSpace) -> float:
        return max((s.variance(space) for s in self.systems if s.order == self.order), default=0.0)

    def scale(self, space: NoiseSpace) -> tuple[Tensor, ...]:
        return tuple(system.scale(space) for system in self.systems)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> tuple[Tensor, ...]:
        return tuple(system.draw(space, count, generator=generator) for system in self.systems)

    def quantile(self, space: NoiseSpace, u: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(system.quantile(space, each) for system, each in zip(self.systems, u, strict=True))

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: tuple[Tensor, ...]) -> Tensor:
        return noisy_loss(self, loss, w, x, y, eta)

    def check(self, problem: ZeroLossProblem) -> None:
        for system in self.systems:
            system.check(problem)

    def check_targets(self, loss: SampleLoss | None, targets: Tensor) -> None:
        for system in self.systems:
            system.check_targets(loss, targets)

    def redraw(self, labels: Tensor, eta: tuple[Tensor, ...]) -> Tensor:
        for system, own in zip(self.systems, eta, strict=True):
            labels = system.redraw(labels, own)
        return labels

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance | None:
        """The sum over the parts that have noise; None if one of them has no closed form."""
        noisy = [system for system in self.systems if system.scale(problem).numel()]
        known = [system.covariance(problem, batch_size) for system in noisy]
        closed = [each for each in known if each is not None]
        return sum(closed, start=Covariance()) if len(closed) == len(noisy) else None


def parts(system: NoiseSystem) -> tuple[NoiseSystem[Tensor], ...]:
    """The systems that a sum consists of; a single system is its only part."""
    return system.systems if isinstance(system, Sum) else (system,)


def map_parts(system: NoiseSystem, change: Callable[[NoiseSystem], NoiseSystem]) -> NoiseSystem:
    """The system with each of its parts changed, in order."""
    return Sum(tuple(map(change, system.systems))) if isinstance(system, Sum) else change(system)


def leading(system: NoiseSystem) -> tuple[NoiseSystem[Tensor], ...]:
    """The parts that move the weights on the clock of the sum."""
    return tuple(part for part in parts(system) if part.order == system.order)


def uniform(space: NoiseSpace, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform on [0, 1), drawn on the generator's device."""
    source = "cpu" if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source, dtype=space.dtype).to(space.device)


def noisy_loss(system: NoiseSystem, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, etas: Sequence[Tensor]) -> Tensor:
    """Lhat(w, eta), a scalar: the mean loss of a batch under all parts of a system, with one eta for each part.

    Parts that add a term in the weights are applied outermost, so that the other parts do not perturb it.
    """

    def wrapped(inner: BatchLoss, part: NoiseSystem[Tensor], eta: Tensor) -> BatchLoss:
        def with_noise(w: Tensor, x: Tensor, y: Tensor, **perturbation: Tensor | None) -> Tensor:
            return part.noisy_loss(functools.partial(inner, **perturbation), w, x, y, eta)

        return with_noise

    layers = sorted(zip(parts(system), etas, strict=True), key=lambda pair: pair[0].additive)
    for part, eta in layers:
        loss = wrapped(loss, part, eta)
    return loss(w, x, y)


def noisy_outputs(
    part: NoiseSystem[Tensor],
    outputs: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    w: Tensor,
    x: Tensor,
    y: Tensor,
    eta: Tensor,
) -> Tensor:
    """The outputs f of a batch under a noise that moves them  ``[n, C]``, from the way it enters the loss.

    Args:
        part: a single system with `moves_outputs`.
        outputs: weights, inputs and noise on the dropout sites (None: no noise) -> f  ``[n, C]``.
        w: weights ``[P]``.
        x: inputs ``[n, ...]``.
        y: targets ``[n, ...]``.
        eta: ``[n, D]`` or ``[D]``.
    """
    seen: list[Tensor] = []

    def loss(
        w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        seen.append(outputs(w, x, activations))
        return seen[0].sum()

    part.noisy_loss(loss, w, x, y, eta)
    return seen[0]


def draw_noise(
    system: NoiseSystem,
    space: NoiseSpace,
    count: int,
    *,
    generator: torch.Generator | None,
    replicas: int | None = None,
    antithetic: bool = False,
) -> tuple[Tensor, ...]:
    """New noise for a batch of `count` samples: for each part ``[count, D]`` or ``[D]``, with [replicas] in front.

    Antithetic replicas 2 i and 2 i + 1 have opposite noise: the quantiles at u and at 1 - u; for a symmetric
    distribution eta and -eta.
    """
    lead = () if replicas is None else (replicas,)
    copies = replicas or 1
    etas = []
    for part in parts(system):
        rows = copies * count if part.per_sample else copies
        if antithetic:
            u = uniform(space, (copies // 2, rows // copies, part.scale(space).numel()), generator)
            tiny = torch.finfo(u.dtype).eps
            u = torch.stack([u, 1 - u], 1).clamp(tiny, 1 - tiny)
            eta = part.quantile(space, u.reshape(rows, -1))
        else:
            eta = part.draw(space, rows, generator=generator)
        shape = (*lead, count, eta.shape[1]) if part.per_sample else (*lead, eta.shape[1])
        etas.append(eta.reshape(shape))
    return tuple(etas)
