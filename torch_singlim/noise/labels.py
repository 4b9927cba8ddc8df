"""Noise on the labels: Gaussian noise on the targets of mse, random flips of class labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torch_singlim.network import MeanSquaredError, SampleLoss, SoftCrossEntropy, ZeroLossProblem
from torch_singlim.noise.base import BatchLoss, Covariance, NoiseSpace
from torch_singlim.noise.gaussian import GaussianNoise, WithStd

__all__ = ["LabelFlips", "LabelNoise"]


@dataclass(frozen=True)
class LabelNoise(WithStd):
    """Gaussian noise on the targets of a mean squared error: y + eta, independent for each sample and output.

        Sigma = 2 std^2/(C B) H on Gamma,     V = std^2/(2 C B) tr H

    Order 2: E Lhat differs from L by a constant, and the gradient noise is normal to Gamma.

    Raises:
        ValueError: a std that is not positive; a loss other than mse.

    >>> LabelNoise(std=0.1).order
    2
    """

    checked_on_samples: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 2

    def _check_loss(self, loss: SampleLoss) -> None:
        if not isinstance(loss, MeanSquaredError):
            hint = ""
            if isinstance(loss, SoftCrossEntropy):
                hint = (
                    ": class labels cannot be shifted by a real number; use LabelFlips(rate=...), which redraws them, "
                    "or train with mse on one-hot targets"
                )
            raise ValueError(f"LabelNoise is for mse, got {type(loss).__name__}{hint}")

    def check(self, problem: ZeroLossProblem) -> None:
        self._check_loss(problem.sample_loss)

    def check_targets(self, loss: SampleLoss | None, targets: Tensor) -> None:
        if loss is not None:
            self._check_loss(loss)
        if not targets.is_floating_point():
            raise ValueError(
                f"LabelNoise needs floating point targets in the batches, got {targets.dtype}: let the dataset return "
                "F.one_hot(labels, num_classes).float()"
            )

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_outputs

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y, shift=eta)

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(hessian=2 * self.std**2 / (problem.num_outputs * batch_size))


@dataclass(frozen=True)
class LabelFlips(GaussianNoise):
    """Each class label is redrawn uniformly over the C classes with probability `rate` at every step.

        mean target q = (1 - rate) onehot + rate/C:  the zero-loss problem of label_smoothing = rate
        Sigma = H/B on Gamma,     V = tr H/(4 B)

    Order 2, for cross-entropy. The clock's sigma^2 is 1, since H depends on the rate. Let delta = e_c if the label was
    redrawn as c, and 0 else. Then eta = W^{-1} (delta - rate/C), where W^2 = Cov delta, has unit variance, and

        y - q = W eta - (1 . W eta) onehot

    Raises:
        ValueError: a rate outside (0, 1); a loss other than cross-entropy; targets that are not smoothed by the rate.

    >>> LabelFlips(rate=0.1).order
    2
    """

    rate: float
    relabels: ClassVar[bool] = True
    checked_on_samples: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"the rate must be in (0, 1), got {self.rate}; for no noise do not use the system")

    @property
    def order(self) -> int:
        return 2

    def _check_loss(self, loss: SampleLoss) -> None:
        if not isinstance(loss, SoftCrossEntropy):
            raise ValueError(
                f"LabelFlips is for cross-entropy on class labels, got {type(loss).__name__}: flipped "
                "one-hot targets do not preserve the mean for it; use LabelNoise(std=...) with mse"
            )

    def check(self, problem: ZeroLossProblem) -> None:
        self._check_loss(problem.sample_loss)
        onehot = self._onehot(problem.targets)
        if not torch.allclose(onehot, onehot.round(), atol=1e-6):
            raise ValueError(
                f"LabelFlips(rate={self.rate}) averages the targets to label smoothing {self.rate}, but the problem "
                f"has other targets: use class labels with nn.CrossEntropyLoss(label_smoothing={self.rate}) for the "
                "problem (and no smoothing in the training, where the flips have this effect)"
            )

    def check_targets(self, loss: SampleLoss | None, targets: Tensor) -> None:
        if loss is not None:
            self._check_loss(loss)
        if targets.is_floating_point() or targets.ndim != 1:
            raise ValueError(
                f"LabelFlips needs class labels [n] in the batches, got {targets.dtype} targets of shape "
                f"{tuple(targets.shape)}: let the dataset return the labels themselves"
            )
        if isinstance(loss, SoftCrossEntropy) and loss.label_smoothing:
            raise ValueError(
                f"LabelFlips smooths the labels itself, and training_step already has "
                f"label_smoothing={loss.label_smoothing:g}: use hard labels, or remove the flips"
            )

    def variance(self, space: NoiseSpace) -> float:
        return 1.0

    def scale(self, space: NoiseSpace) -> Tensor:
        return torch.ones(space.num_outputs, dtype=space.dtype, device=space.device)

    def _onehot(self, q: Tensor) -> Tensor:
        return (q - self.rate / q.shape[-1]) / (1 - self.rate)

    def _color(self, v: Tensor, power: float) -> Tensor:
        """W^power v, W^2 = (rate/C) I - (rate/C)^2 1 1^T: eigenvalue (rate/C)(1 - rate) along 1  ``[..., C]``."""
        spread = self.rate / v.shape[-1]
        along = v.mean(-1, keepdim=True)
        return spread ** (power / 2) * (v - along) + (spread * (1 - self.rate)) ** (power / 2) * along

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        classes = space.num_outputs
        source = "cpu" if generator is None else generator.device
        flipped = torch.rand(count, 1, generator=generator, device=source, dtype=space.dtype) < self.rate
        label = torch.randint(classes, (count,), generator=generator, device=source)
        delta = flipped * torch.nn.functional.one_hot(label, classes).to(space.dtype)
        return self._color(delta - self.rate / classes, -1).to(space.device)

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        moved = self._color(eta, 1)
        return loss(w, x, y, shift=moved - moved.sum(-1, keepdim=True) * self._onehot(y))

    def redraw(self, labels: Tensor, eta: Tensor) -> Tensor:
        delta = self._color(eta, 1) + self.rate / eta.shape[-1]  # e_c where redrawn, else 0
        return torch.where(delta.sum(-1) > 0.5, delta.argmax(-1).to(labels.dtype), labels)

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(hessian=1 / batch_size)
