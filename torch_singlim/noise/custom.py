"""Minibatches alone, and noise that is defined by the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise.base import BatchLoss, NoiseSpace
from torch_singlim.noise.gaussian import GaussianNoise, require_positive

__all__ = ["CustomNoise", "Minibatch"]


@dataclass(frozen=True)
class Minibatch(GaussianNoise):
    """Minibatch sampling and nothing else: the loss of the batch without further noise.

    On Gamma the gradient of every sample is zero, so this noise vanishes as the weights approach Gamma. It has no order
    and causes no drift along Gamma.

    >>> Minibatch().order is None
    True
    """

    done_by: ClassVar[str | None] = "the DataLoader injects it"

    @property
    def order(self) -> None:
        return None

    def variance(self, space: NoiseSpace) -> float:
        return 0.0


@dataclass(frozen=True)
class CustomNoise(GaussianNoise):
    """A noise that the user defines by a function Lhat(w, eta) and the shape of eta. Everything else follows.

    Args:
        function: (loss, w, x, y, eta) -> scalar, where ``loss(w, x, y)`` is the mean loss of a batch without this
            noise; at eta = 0 the result must equal that loss. It runs under `torch.func`: no ``.item()``, no in-place
            changes.
        std: standard deviation of the components of eta, which are Gaussian and independent.
        like: the shape of eta: "weights" ``[P]`` (one vector for the step), or, with a row for each sample, "inputs"
            ``[n, ...]`` flattened, or "outputs" ``[n, C]``.
        claimed_order: 1, 2, or None if the noise causes no drift; default: "measured" at the point where it is needed.

    Raises:
        ValueError: a std that is not positive; a function with Lhat(w, 0) != L(w), or that does not return a scalar.

    >>> def noisy(loss, w, x, y, eta):
    ...     return loss(w, x + eta.reshape(x.shape), y)
    >>> CustomNoise(noisy, std=0.1, like="inputs").per_sample
    True
    """

    scale_free: ClassVar[bool] = False
    checked_on_samples: ClassVar[bool] = True

    function: Callable[[BatchLoss, Tensor, Tensor, Tensor, Tensor], Tensor]
    std: float
    like: Literal["weights", "inputs", "outputs"] = "weights"
    claimed_order: int | Literal["measured"] | None = field(default="measured", kw_only=True)

    def __post_init__(self) -> None:
        require_positive("std", self.std)
        if self.like not in ("weights", "inputs", "outputs"):
            raise ValueError(f"like must be 'weights', 'inputs' or 'outputs', got {self.like!r}")

    @property
    def per_sample(self) -> bool:  # type: ignore[override]  # here it depends on the shape
        """Whether eta has a row for each sample."""
        return self.like != "weights"

    @property
    def order(self) -> int | None:
        if self.claimed_order == "measured":
            raise ValueError("the order of this noise has not been measured yet: call with_measured_order(...)")
        return self.claimed_order

    def check(self, problem: ZeroLossProblem) -> None:
        n = min(problem.num_samples, 4)
        x, y, w = problem.inputs[:n], problem.targets[:n], problem.weights()
        eta = self.scale(problem).new_zeros((n, self.scale(problem).numel()) if self.per_sample else w.shape)
        quiet = problem.batch_loss(w, x, y)
        noisy = self.noisy_loss(problem.batch_loss, w, x, y, eta)
        if noisy.shape != ():
            raise ValueError(f"a noisy loss must be one number for the batch, got shape {tuple(noisy.shape)}")
        if not torch.allclose(noisy, quiet, rtol=1e-6, atol=1e-12):
            raise ValueError(
                f"without noise the noisy loss must be the loss, got Lhat(w, 0) = {noisy.item():.6g} and L(w) = "
                f"{quiet.item():.6g}: eta must enter in such a way that eta = 0 changes nothing"
            )

    def variance(self, space: NoiseSpace) -> float:
        return self.std**2

    def scale(self, space: NoiseSpace) -> Tensor:
        size = {"weights": space.num_weights, "inputs": space.input_shape.numel(), "outputs": space.num_outputs}
        return torch.full((size[self.like],), self.std, dtype=space.dtype, device=space.device)

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return self.function(loss, w, x, y, eta)
