"""Layers that replace dropout and multiplicative Gaussian noise in a copy of a module."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.network.randomness import RandomState
from torch_singlim.network.sites import Tape

__all__ = ["ActivationNoise", "gaussian_std", "noise_of", "stochastic_depth_rate"]

# activations on which a layer is tried whose class is not known
_TRIALS = ((3, 8), (3, 4, 5), (3, 4, 5, 5))

# number of trailing dimensions that share one mask value
_DROPOUTS: dict[type[nn.Module], int] = {nn.Dropout: 0, nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}


def stochastic_depth_rate(layer: nn.Module) -> float | None:
    """The rate at which a layer drops whole samples (stochastic depth); None for any other layer.

    Known are torchvision's StochasticDepth in its mode "row", and the layers named DropPath with a `drop_prob`, if they
    divide by the probability to be kept.
    """
    name = type(layer).__name__
    if name == "StochasticDepth" and getattr(layer, "mode", None) == "row":
        return float(layer.p)  # type: ignore[arg-type]  # a number
    if name == "DropPath" and getattr(layer, "scale_by_keep", True) and hasattr(layer, "drop_prob"):
        return float(layer.drop_prob or 0.0)  # type: ignore[arg-type]  # a number, or None
    return None


def _std_on(layer: nn.Module, x: Tensor, seed: int) -> float | None:
    """sigma if a pass on x with this seed is x (1 + sigma xi), xi the first normal numbers of the seed; else None."""
    RandomState.seed(seed)
    relative = layer(x) / x - 1
    RandomState.seed(seed)
    xi = torch.randn(x.shape)
    if relative.shape != x.shape:
        return None
    std = ((relative * xi).sum() / xi.square().sum()).item()
    return std if std > 0 and (relative - std * xi).abs().max().item() <= 1e-4 * std + 1e-6 else None


def gaussian_std(layer: nn.Module) -> float | None:
    """The sigma of a layer that multiplies each activation by an independent 1 + sigma xi; None for any other layer.

    There is no common class of such layers: a copy of the layer is tried, with the numbers that torch would draw.

    >>> class Noise(nn.Module):
    ...     def forward(self, x):
    ...         return x * (1 + 0.25 * torch.randn_like(x)) if self.training else x
    >>> round(gaussian_std(Noise()), 4), gaussian_std(nn.Tanh())
    (0.25, None)
    """
    if type(layer).__module__.startswith("torch.") or next(layer.parameters(), None) is not None:
        return None
    if next(layer.children(), None) is not None:
        return None
    for shape in _TRIALS:
        x = torch.linspace(1, 2, torch.Size(shape).numel()).view(shape)
        try:
            with torch.no_grad(), RandomState.isolated():
                tried = copy.deepcopy(layer).train()
                first, second = _std_on(tried, x, 0), _std_on(tried, 0.5 - x, 1)
                quiet = torch.equal(tried.eval()(x), x)
        except Exception:  # whatever a layer raises that takes other activations
            continue
        same = first is not None and second is not None and abs(first - second) <= 1e-4 * first
        return first if same and quiet else None
    return None


def noise_of(layer: nn.Module) -> dict[str, Any] | None:
    """What the `ActivationNoise` that replaces a layer does; None for a layer without noise that is known."""
    if type(layer) in _DROPOUTS:
        return {"rate": float(layer.p), "shared": _DROPOUTS[type(layer)]}  # type: ignore[arg-type]  # a number
    depth = stochastic_depth_rate(layer)
    if depth is not None:
        return {"rate": depth, "shared": -1}
    std = gaussian_std(layer)
    return None if std is None else {"std": std}


class ActivationNoise(nn.Module):
    """Replaces a layer of noise: multiplies the activation by 1 + eta, with eta from the tape.

    Args:
        name: of the noise site.
        tape: of the noise sites.
        rate: p of dropout.
        shared: number of trailing dimensions that share one mask value, or all but the samples if negative.
        std: of Gaussian noise.
    """

    def __init__(self, name: str, tape: Tape, *, rate: float = 0.0, shared: int = 0, std: float = 0.0) -> None:
        super().__init__()
        self.site, self.tape, self.rate, self.shared, self.std = name, tape, rate, shared, std

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 and self.std == 0.0:
            return x
        if self.shared > 0 and x.ndim != self.shared + 2:
            raise ValueError(
                f"channel dropout {self.site!r} expects batched input with {self.shared + 2} dimensions, "
                f"got shape {tuple(x.shape)}"
            )
        return self.tape.visit(self.site, self.rate, x, shared=self.shared, std=self.std)
