"""The protocol of a noise system: a noisy loss Lhat(w, eta), from which all the rest follows.

A system says how its noise eta enters the loss of a batch, one line in the letters of arXiv 2404.12293:

    DropConnect:  loss(w * (1 + eta), x, y)         input noise:  loss(w, x + eta, y)       Langevin:  L + eta . w

The components of eta are uncorrelated, with mean zero. eta has either one row for each sample of the batch ``[n, D]``
(`per_sample`), or is one vector ``[D]`` for the whole step.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from torch_singlim.functional import ActivationSite
from torch_singlim.problem import ZeroLossProblem

__all__ = [
    "BatchLoss",
    "Covariance",
    "NoiseSpace",
    "NoiseSystem",
    "Sum",
    "draw_noise",
    "noisy_loss",
    "parts",
    "stratified_noise",
]


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


class NoiseSystem(ABC):
    """A noise (or a penalty): how its eta enters the loss. Subclasses are frozen; ``a + b`` is their sum.

    Attributes:
        per_sample: eta is ``[n, D]``, a row for each sample; otherwise ``[D]``, one for the whole step.
        additive: adds a term of the weights themselves to the loss; in a sum it sees them unperturbed.
        moves_outputs: acts through the outputs f of each sample (and on nothing else).
        scale_free: the same in coordinates in which each weight has another unit, as steps of different sizes need.
    """

    per_sample: ClassVar[bool] = True
    additive: ClassVar[bool] = False
    moves_outputs: ClassVar[bool] = False
    scale_free: ClassVar[bool] = True

    @property
    @abstractmethod
    def order(self) -> int | None:
        """Power of the step size in the drift along Gamma: 1, 2, or None where nothing moves on either clock."""

    @abstractmethod
    def variance(self, space: NoiseSpace) -> float:
        """sigma^2 of the slow clock; with several layers or systems the largest, which sets the pace."""

    def check(self, problem: ZeroLossProblem) -> None:  # noqa: B027  # most systems fit every problem
        """Raise ValueError, with what to do, if the system does not fit the problem."""

    def scale(self, space: NoiseSpace) -> Tensor:
        """sigma_j, the standard deviation of each of the D components of eta ``[D]``."""
        return torch.zeros(0, dtype=space.dtype, device=space.device)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        """Independent draws of eta ``[count, D]``; Gaussian unless the system says otherwise.

        Drawn on the generator's device (default: the CPU) and moved, so that a seed means the same everywhere.
        """
        scale = self.scale(space)
        device = "cpu" if generator is None else generator.device
        return scale * torch.randn(count, scale.numel(), generator=generator, dtype=space.dtype, device=device).to(
            scale
        )

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        """Inverse distribution function of each component at u ``[..., D]`` in (0, 1)."""
        return self.scale(space) * torch.special.ndtri(u)

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        """Lhat(w, eta) of a batch, a scalar, in terms of the loss without this noise; differentiable in w and eta."""
        return loss(w, x, y)

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance | None:
        """Sigma on Gamma in closed form, for systems of order 2; None where it has none."""
        return None

    def carried(self, eta: Tensor) -> Tensor | None:
        """What the weights of the training carry on top of the weights of the recursion, for eta ``[..., D]``."""
        return None

    def __add__(self, other: NoiseSystem) -> NoiseSystem:
        """Both, independently: their potentials add."""
        return Sum((*parts(self), *parts(other)))


@dataclass(frozen=True)
class Sum(NoiseSystem):
    """Several independent systems at once; written ``a + b``. The generic functions work on its `parts`."""

    systems: tuple[NoiseSystem, ...]

    def __post_init__(self) -> None:
        kinds = [type(system).__name__ for system in self.systems]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"a sum takes systems of different kinds, one each, got {' + '.join(kinds)}")

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.systems))

    @property
    def order(self) -> int | None:
        return min((s.order for s in self.systems if s.order is not None), default=None)

    def check(self, problem: ZeroLossProblem) -> None:
        for system in self.systems:
            system.check(problem)

    def variance(self, space: NoiseSpace) -> float:
        return max((s.variance(space) for s in self.systems if s.order == self.order), default=0.0)


def parts(system: NoiseSystem) -> tuple[NoiseSystem, ...]:
    """The systems that a sum consists of; a single one is its own only part."""
    return system.systems if isinstance(system, Sum) else (system,)


def noisy_loss(system: NoiseSystem, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, etas: Sequence[Tensor]) -> Tensor:
    """Lhat(w, eta): mean loss of a batch under all parts of a system, one eta for each; a scalar.

    Parts that add a term of the weights come outermost, so that none of the others perturbs it.
    """

    def wrapped(inner: BatchLoss, part: NoiseSystem, eta: Tensor) -> BatchLoss:
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


def _prime(least: int) -> int:
    """The smallest prime that is at least this."""
    n = max(least, 2)
    while any(n % d == 0 for d in range(2, int(n**0.5) + 1)):
        n += 1
    return n


def stratified_noise(
    system: NoiseSystem, space: NoiseSpace, count: int, *, strata: int, generator: torch.Generator | None
) -> Iterator[tuple[Tensor, ...]]:
    """A block of draws like those of `draw_noise`, spread evenly over each component's distribution (Latin hypercube).

        u_j(i) = ((a_j i + s_j) mod n + U_ij) / n,      eta_j(i) = F_j^{-1}(u_j(i)),      i = 0..n-1

    Every draw by itself is exactly distributed and has independent components; over the block each component visits
    each of its n strata once, so that what is linear in eta averages to almost nothing. a_j is uniform on 1..n-1,
    s_j on 0..n-1, n the next prime: any two draws are then as those of a random permutation (Owen 1992, Tang 1993).

    Args:
        system: the noise; its components must be independent (a `quantile` of their own).
        space: what there is to perturb.
        count: samples of a batch.
        strata: draws in the block, rounded up to a prime.
        generator: of the draws.
    """
    n = _prime(strata)
    device = "cpu" if generator is None else generator.device
    shapes = [
        (count, part.scale(space).numel()) if part.per_sample else (part.scale(space).numel(),)
        for part in parts(system)
    ]
    slopes = [torch.randint(1, n, shape, generator=generator, device=device, dtype=torch.int32) for shape in shapes]
    shifts = [torch.randint(0, n, shape, generator=generator, device=device, dtype=torch.int32) for shape in shapes]
    for i in range(n):
        etas = []
        for part, slope, shift in zip(parts(system), slopes, shifts, strict=True):
            jitter = torch.rand(slope.shape, generator=generator, device=device, dtype=space.dtype)
            u = ((slope * i + shift) % n + jitter) / n
            etas.append(part.quantile(space, u.clamp_min(torch.finfo(space.dtype).tiny).to(space.device)))
        yield tuple(etas)
