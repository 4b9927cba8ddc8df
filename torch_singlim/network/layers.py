"""Layers that replace others in a copy: activation noise for dropout, elementary operations for LayerNorm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DROPOUT_KINDS", "ActivationNoise", "ActivationSite", "DecomposedLayerNorm", "Tape"]

# number of dimensions after the channel that share one mask value
DROPOUT_KINDS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


@dataclass(frozen=True)
class ActivationSite:
    """One call of a dropout layer in the forward pass: its rate p and the shape of one sample's mask."""

    name: str
    rate: float
    shape: tuple[int, ...]

    @property
    def dimension(self) -> int:
        """Number of mask values per sample."""
        return int(torch.Size(self.shape).numel())

    @property
    def variance(self) -> float:
        """sigma^2 = p / (1 - p), the variance of eta; dropout multiplies the activation by 1 + eta."""
        return self.rate / (1 - self.rate)


class Tape:
    """State that the noise layers of one copy share: the noise to apply, in call order, and the recorded sites."""

    def __init__(self) -> None:
        self.noise: list[Tensor] | None = None
        self.sites: list[ActivationSite] | None = None

    def visit(self, name: str, rate: float, shape: tuple[int, ...], x: Tensor) -> Tensor:
        if self.sites is not None:
            self.sites.append(ActivationSite(name, rate, shape))
        if self.noise is None:
            return x
        eta = self.noise.pop(0)
        return x * (1 + eta.reshape(x.shape[:1] + shape))


class ActivationNoise(nn.Module):
    """Replaces a dropout layer: multiplies the activation by 1 + eta, with eta from the tape."""

    def __init__(self, name: str, dropout: nn.modules.dropout._DropoutNd, tape: Tape) -> None:
        super().__init__()
        self.site = name
        self.p = float(dropout.p)
        self.trailing = DROPOUT_KINDS[type(dropout)]
        self.tape = tape

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0:
            return x
        if self.trailing and x.ndim != self.trailing + 2:
            raise ValueError(
                f"channel dropout {self.site!r} expects batched input with {self.trailing + 2} dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        shape = tuple(x.shape[1:]) if not self.trailing else (x.shape[1],) + (1,) * self.trailing
        return self.tape.visit(self.site, self.p, shape, x)


class DecomposedLayerNorm(nn.Module):
    """Layer normalisation in elementary operations: torch's fused one has wrong derivatives of second and third order.

    It shares the layer's parameters, under the same names.
    """

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.dims = tuple(range(-len(layer.normalized_shape), 0))
        self.eps = layer.eps
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(self.dims, keepdim=True)
        x = centred / (centred.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias
