"""Noise sites: where a forward pass multiplies activations by noise, and where the samples are in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ActivationSite", "Call", "Layout", "Tape", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """Where the samples are in an activation.

        [n, ...] axis 0        [T, n, ...] axis 1        [n T, ...] or [T n, ...] axis 0, folded

    Args:
        axis: whose entries belong to samples.
        fold: T, the number of entries of each sample along this axis.
        inner: of folded axes: whether the entries of a sample are T apart rather than neighbours, [T n].
    """

    axis: int = 0
    fold: int = 1
    inner: bool = False

    def of_samples(self, x: Tensor) -> Tensor:
        """The activation with the samples first  ``[n, (T,) ...]``."""
        if self.fold == 1:
            return x.movedim(self.axis, 0)
        if self.inner:
            return x.unflatten(0, (self.fold, -1)).transpose(0, 1)
        return x.unflatten(0, (-1, self.fold))

    def of_activation(self, x: Tensor) -> Tensor:
        """The inverse of `of_samples`.

        >>> x = torch.arange(12.0).view(6, 2)
        >>> all(torch.equal(x, each.of_activation(each.of_samples(x))) for each in (Layout(1), Layout(0, 3, True)))
        True
        """
        if self.fold == 1:
            return x.movedim(0, self.axis)
        return (x.transpose(0, 1) if self.inner else x).flatten(0, 1)


@dataclass(frozen=True)
class ActivationSite:
    """One call of dropout in the forward pass, or of a layer of multiplicative Gaussian noise.

    Args:
        name: of the layer or function.
        rate: p of dropout; 0 for Gaussian noise.
        shape: of one sample's mask.
        layout: where the samples are.
        std: standard deviation of Gaussian noise; 0 for dropout.
    """

    name: str
    rate: float
    shape: tuple[int, ...]
    layout: Layout = Layout()
    std: float = 0.0

    @property
    def dimension(self) -> int:
        """Number of mask values per sample."""
        return int(torch.Size(self.shape).numel())

    @property
    def variance(self) -> float:
        """sigma^2, p / (1 - p) for dropout: the variance of eta, where the activation is multiplied by 1 + eta."""
        return self.std**2 if self.std else self.rate / (1 - self.rate)


@dataclass(frozen=True)
class Call:
    """A call at a noise site while sites are recorded.

    Args:
        name: of the layer or function.
        rate: p of dropout.
        activation: to which it is applied.
        shared: number of trailing dimensions that share a mask value, or all but the first if negative.
        std: of Gaussian noise.
    """

    name: str
    rate: float
    activation: Tensor
    shared: int
    std: float = 0.0

    def mask_like(self, x: Tensor) -> Tensor:
        """A view of x with the shape of the mask."""
        trailing = x.ndim - 1 if self.shared < 0 else self.shared
        for axis in range(x.ndim - trailing, x.ndim):
            x = x.narrow(axis, 0, 1)
        return x


class Tape:
    """State that the noise sites of one copy share: the noise to apply, in call order, and the recorded calls."""

    def __init__(self) -> None:
        self.noise: list[tuple[ActivationSite, Tensor]] | None = None
        self.calls: list[Call] | None = None

    def visit(self, name: str, rate: float, x: Tensor, *, shared: int = 0, std: float = 0.0) -> Tensor:
        """The activation times 1 + eta."""
        if self.calls is not None:
            self.calls.append(Call(name, rate, x.detach(), shared, std))
        if self.noise is None:
            return x
        site, eta = self.noise.pop(0)
        return x * (1 + site.layout.of_activation(eta.reshape(-1, *site.shape)))


def _candidates(x: Tensor, n: int) -> list[Layout]:
    plain = [Layout(axis) for axis, size in enumerate(x.shape) if size == n]
    size = x.shape[0] if x.ndim else 1
    folded = [Layout(0, size // n, inner) for inner in (False, True)] if size > n and size % n == 0 else []
    return plain + folded


def find_layout(call: Call, changed: Tensor, n: int) -> Layout:
    """Where the n samples are in an activation, from where it changes with the last sample's input.

    Args:
        call: on all samples.
        changed: the same activation for another input of the last sample.
        n: number of samples.

    Raises:
        ValueError: it depends on samples in no way that is known.

    >>> x = torch.zeros(2, 6)
    >>> changed = x.clone()
    >>> changed[:, 3:] = 1
    >>> find_layout(Call("", 0.1, x.T, 0), changed.T, 2)
    Layout(axis=0, fold=3, inner=False)
    """
    x = call.activation
    candidates = _candidates(x, n)
    if changed.shape == x.shape:
        differs = (changed != x) & ~(changed.isnan() & x.isnan())
        candidates = [each for each in candidates if not bool(each.of_samples(differs)[:-1].any())]
    if not candidates:
        raise ValueError(
            f"the samples of a batch could not be told apart in the activation {tuple(x.shape)} of {call.name} for "
            f"{n} inputs: apply dropout to activations [n, ...], [T, n, ...], [n T, ...] or [T n, ...] of n samples"
        )
    return candidates[0]
