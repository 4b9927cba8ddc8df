"""Noise that acts through the outputs of each sample: dropout and noise on the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise.base import BatchLoss, NoiseSpace, uniform
from torch_singlim.noise.gaussian import GaussianNoise, WithStd, bernoulli

__all__ = ["Dropout", "InputNoise"]


@dataclass(frozen=True)
class Dropout(GaussianNoise):
    """Dropout with the rates of the module's own layers and calls of dropout: activations times 1 + eta.

        1 + eta = Bernoulli(1 - p) / (1 - p),      sigma_j^2 = p_j / (1 - p_j)

    Order 1. Every call of dropout has independent noise for each sample and unit (``Dropout2d``: each channel). Layers
    of the module that multiply by 1 + sigma_j xi in training, with normal xi, are part of it (Gaussian dropout).

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2), nn.Linear(3, 1))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> Dropout().scale(problem)
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    moves_outputs: ClassVar[bool] = True
    done_by: ClassVar[str | None] = "the module's own dropout layers and calls inject it, and the monitor finds them"

    @property
    def order(self) -> int:
        return 1

    def check(self, problem: ZeroLossProblem) -> None:
        if not problem.sites:
            raise ValueError(
                "Dropout() needs nn.Dropout layers, or calls of F.dropout, with a positive rate in the forward pass, "
                "or layers of multiplicative Gaussian noise, found none: add them to the module, or use another noise"
            )

    def variance(self, space: NoiseSpace) -> float:
        return max(site.variance for site in space.sites)

    def _each(self, space: NoiseSpace, value: Callable[[Any], float]) -> Tensor:
        columns = [torch.full((site.dimension,), value(site), dtype=space.dtype) for site in space.sites]
        return torch.cat(columns).to(space.device)

    def scale(self, space: NoiseSpace) -> Tensor:
        return self._each(space, lambda site: site.variance**0.5)

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        masks = bernoulli(self._each(space, lambda site: 1 - site.rate), u)
        if not any(site.std for site in space.sites):
            return masks
        tiny, std = torch.finfo(u.dtype).eps, self._each(space, lambda site: site.std)
        return torch.where(std > 0, std * torch.special.ndtri(u.clamp(tiny, 1 - tiny)), masks)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        dimension = sum(site.dimension for site in space.sites)
        return self.quantile(space, uniform(space, (count, dimension), generator))

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y, activations=eta)


@dataclass(frozen=True)
class InputNoise(WithStd):
    """Gaussian noise on the inputs: L(w; x + eta), per sample.  Order 1, V = (std^2/2) mean of the Laplacian in x.

    Raises:
        ValueError: a std that is not positive; inputs that are not floating point.

    >>> InputNoise(std=0.1).order
    1
    """

    moves_outputs: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 1

    def check(self, problem: ZeroLossProblem) -> None:
        if not problem.inputs.is_floating_point():
            raise ValueError(f"InputNoise needs floating point inputs, got {problem.inputs.dtype}; use another noise")

    def dimension(self, space: NoiseSpace) -> int:
        return space.input_shape.numel()

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x + eta.reshape(x.shape), y)
