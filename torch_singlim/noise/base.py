"""What a noise is: a noisy loss Lhat(w, eta), from which everything else follows.

A system says how its noise eta enters the loss of a batch, one line in the letters of arXiv 2404.12293:

    DropConnect:  loss(w * (1 + eta), x, y)         input noise:  loss(w, x + eta, y)       Langevin:  L + eta . w

The components of eta are uncorrelated, with mean zero. eta has either one row for each sample of the batch ``[n, D]``
(`per_sample`), or is one vector ``[D]`` for the whole step. The eta of a sum is a tuple, one eta for each part.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    "noisy_loss",
    "parts",
]

# eta: a tensor, of a sum a tuple of them
Eta = TypeVar("Eta")


class BatchLoss(Protocol):
    """Mean loss of a batch: weights ``[P]``, inputs ``[n, ...]``, targets ``[n, ...]`` -> scalar."""

    def __call__(
        self, w: Tensor, x: Tensor, y: Tensor, *, activations: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """`activations`: noise on the dropout sites ``[n, D]``; `shift`: what is added to the targets ``[n, C]``."""
        ...


class NoiseSpace(Protocol):
    """What there is to perturb: all that a system needs to know to draw its noise. A `ZeroLossProblem` is one."""

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
    """Sigma = hessian * H + identity * I: covariance on Gamma of one step's gradient noise, where it has this form."""

    hessian: float = 0.0
    identity: float = 0.0

    def __add__(self, other: Covariance) -> Covariance:
        return Covariance(self.hessian + other.hessian, self.identity + other.identity)


class NoiseSystem(ABC, Generic[Eta]):
    """A noise (or a penalty): how its eta enters the loss. Subclasses are frozen; ``a + b`` is their sum.

    Attributes:
        per_sample: eta is ``[n, D]``, a row for each sample; otherwise ``[D]``, one for the whole step.
        additive: adds a term of the weights themselves to the loss; in a sum it sees them unperturbed.
        moves_outputs: acts through the outputs f of each sample (and on nothing else).
        scale_free: the same in coordinates in which each weight has another unit, as steps of different sizes need.
        transient: eta is added to the weights after a step and taken back a step later; the recursion's weights are
            those of the training without it.
        relabels: acts on class labels, see `redraw`, rather than through the arguments of the loss.
        done_by: who does it in a training already, so that it cannot be injected; None: it can.
        checked_on_samples: whether it fits is decided on samples of the training, see `check_targets`.
    """

    per_sample: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    moves_outputs: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True
    transient: ClassVar[bool] = False
    relabels: ClassVar[bool] = False
    done_by: ClassVar[str | None] = None
    checked_on_samples: ClassVar[bool] = False

    @property
    @abstractmethod
    def order(self) -> int | None:
        """Power of the step size in the drift along Gamma: 1, 2, or None where nothing moves on either clock."""

    @abstractmethod
    def variance(self, space: NoiseSpace) -> float:
        """sigma^2 of the slow clock; with several layers or systems the largest, which sets the pace."""

    @abstractmethod
    def scale(self, space: NoiseSpace) -> Eta:
        """sigma_j, the standard deviation of each of the D components of eta ``[D]``."""

    @abstractmethod
    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Eta:
        """Independent draws of eta ``[count, D]``.

        Drawn on the generator's device (default: the CPU) and moved, so that a seed means the same everywhere.
        """

    @abstractmethod
    def quantile(self, space: NoiseSpace, u: Eta) -> Eta:
        """Inverse distribution function of each component at u ``[..., D]`` in (0, 1)."""

    @abstractmethod
    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Eta) -> Tensor:
        """Lhat(w, eta) of a batch, a scalar, in terms of the loss without this noise; differentiable in w and eta."""

    def check(self, problem: ZeroLossProblem) -> None:  # most systems fit every problem
        """Raise ValueError, with what to do, if the system does not fit the problem."""

    def check_targets(self, loss: SampleLoss | None, targets: Tensor) -> None:  # likewise
        """Raise ValueError unless loss (None: not known) and targets are those that the noise is made for."""

    def redraw(self, labels: Tensor, eta: Eta) -> Tensor:
        """The class labels ``[n]`` that training sees under eta."""
        return labels

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance | None:
        """Sigma on Gamma in closed form; None where it has none."""
        return None

    def __add__(self, other: NoiseSystem) -> NoiseSystem:
        """Both, independently: their potentials add."""
        return Sum((*parts(self), *parts(other)))


@dataclass(frozen=True)
class Sum(NoiseSystem[tuple[Tensor, ...]]):
    """Several independent systems at once; written ``a + b``. Its eta is a tuple, one for each part.

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
    def per_sample(self) -> bool:  # type: ignore[override]  # of a sum these depend on its parts
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
        """Of the first part that is done in a training already."""
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
        """The sum of the parts' that have noise; None where one of them has no closed form."""
        noisy = [system for system in self.systems if system.scale(problem).numel()]
        known = [system.covariance(problem, batch_size) for system in noisy]
        closed = [each for each in known if each is not None]
        return sum(closed, start=Covariance()) if len(closed) == len(noisy) else None


def parts(system: NoiseSystem) -> tuple[NoiseSystem[Tensor], ...]:
    """The systems that a sum consists of; a single one is its own only part."""
    return system.systems if isinstance(system, Sum) else (system,)


def noisy_loss(system: NoiseSystem, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, etas: Sequence[Tensor]) -> Tensor:
    """Lhat(w, eta): mean loss of a batch under all parts of a system, one eta for each; a scalar.

    Parts that add a term of the weights come outermost, so that none of the others perturbs it.
    """

    def wrapped(inner: BatchLoss, part: NoiseSystem[Tensor], eta: Tensor) -> BatchLoss:
        def with_noise(w: Tensor, x: Tensor, y: Tensor, **perturbation: Tensor | None) -> Tensor:
            return part.noisy_loss(functools.partial(inner, **perturbation), w, x, y, eta)

        return with_noise

    layers = sorted(zip(parts(system), etas, strict=True), key=lambda pair: pair[0].additive)
    for part, eta in layers:
        loss = wrapped(loss, part, eta)
    return loss(w, x, y)


def draw_noise(
    system: NoiseSystem,
    space: NoiseSpace,
    count: int,
    *,
    generator: torch.Generator | None,
    replicas: int | None = None,
) -> tuple[Tensor, ...]:
    """Fresh noise for a batch of `count` samples: per part ``[count, D]`` or ``[D]``; with a leading [replicas]."""
    lead = () if replicas is None else (replicas,)
    copies = replicas or 1
    etas = []
    for part in parts(system):
        eta = part.draw(space, copies * count if part.per_sample else copies, generator=generator)
        shape = (*lead, count, eta.shape[1]) if part.per_sample else (*lead, eta.shape[1])
        etas.append(eta.reshape(shape))
    return tuple(etas)
