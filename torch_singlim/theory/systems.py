"""The noise systems of the paper, their neighbours, and a user's own.

Each is a frozen object whose `noisy_loss` is the one line that defines it. `order` is a claim; it is confirmed by
`degeneracy`, and measured by it for a `CustomNoise`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from torch_singlim.loss import MeanSquaredError, SampleLoss, SoftCrossEntropy
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory.noise import BatchLoss, Covariance, NoiseSpace, NoiseSystem

__all__ = [
    "AntiCorrelated",
    "CustomNoise",
    "DropConnect",
    "Dropout",
    "InputNoise",
    "LabelFlips",
    "LabelNoise",
    "Langevin",
    "Minibatch",
    "WeightDecay",
]


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value}; for no noise leave the system out")


def _bernoulli(keep: Tensor | float, u: Tensor) -> Tensor:
    """eta = mask / keep - 1 with P(mask = 1) = keep, as a function of uniform u: -1 below 1 - keep."""
    return (u >= 1 - keep).to(u.dtype) / keep - 1


def _uniform(space: NoiseSpace, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform on [0, 1), drawn on the generator's device."""
    source = "cpu" if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source, dtype=space.dtype).to(space.device)


@dataclass(frozen=True)
class Dropout(NoiseSystem):
    """Dropout with the rates of the module's own ``nn.Dropout`` layers: activations times 1 + eta.

        1 + eta = Bernoulli(1 - p) / (1 - p),      sigma_j^2 = p_j / (1 - p_j)

    Order 1. Every call of a dropout layer has its own noise, per sample and unit (per channel for ``Dropout2d``).

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2), nn.Linear(3, 1))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> Dropout().scale(problem)
    tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
    """

    moves_outputs: ClassVar[bool] = True

    @property
    def order(self) -> int:
        return 1

    def check(self, problem: ZeroLossProblem) -> None:
        if not problem.sites:
            raise ValueError(
                "Dropout() needs nn.Dropout layers with a positive rate that the forward pass calls, found none: add "
                "them to the module (functional dropout cannot be seen), or use another noise"
            )

    def variance(self, space: NoiseSpace) -> float:
        return max(site.variance for site in space.sites)

    def _each(self, space: NoiseSpace, value: Callable[[Any], float]) -> Tensor:
        columns = [torch.full((site.dimension,), value(site), dtype=space.dtype) for site in space.sites]
        return torch.cat(columns).to(space.device)

    def scale(self, space: NoiseSpace) -> Tensor:
        return self._each(space, lambda site: site.variance**0.5)

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        return _bernoulli(self._each(space, lambda site: 1 - site.rate), u)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        dimension = sum(site.dimension for site in space.sites)
        return self.quantile(space, _uniform(space, (count, dimension), generator))

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y, activations=eta)


@dataclass(frozen=True)
class _WithStd(NoiseSystem):
    """A system whose eta has one standard deviation, which also sets the pace."""

    std: float

    def __post_init__(self) -> None:
        _require_positive("std", self.std)

    @abstractmethod
    def dimension(self, space: NoiseSpace) -> int:
        """D, the number of components of eta."""

    def variance(self, space: NoiseSpace) -> float:
        return self.std**2

    def scale(self, space: NoiseSpace) -> Tensor:
        return torch.full((self.dimension(space),), self.std, dtype=space.dtype, device=space.device)


@dataclass(frozen=True)
class DropConnect(_WithStd):
    """Multiplicative noise on every weight: L(w * (1 + eta)), one eta for the whole step.

        V = (std^2/2) sum_j w_j^2 d^2 L / d w_j^2

    Order 1. The gradient is that of w -> L(w * (1 + eta)): (1 + eta) * grad L at the perturbed weights.

    Args:
        std: standard deviation of eta.
        form: "gaussian", or "bernoulli": 1 + eta = mask / keep, with keep = 1 / (1 + std^2); see `from_rate`.

    Raises:
        ValueError: a std that is not positive, a rate outside (0, 1).

    >>> DropConnect.from_rate(0.2)
    DropConnect(std=0.5, form='bernoulli')
    """

    form: Literal["gaussian", "bernoulli"] = "gaussian"
    per_sample: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("gaussian", "bernoulli"):
            raise ValueError(f"form must be 'gaussian' or 'bernoulli', got {self.form!r}")

    @classmethod
    def from_rate(cls, rate: float) -> DropConnect:
        """Each weight is dropped with probability `rate`, the others divided by 1 - rate: std^2 = rate/(1 - rate)."""
        if not 0 < rate < 1:
            raise ValueError(f"the rate must be in (0, 1), got {rate}")
        return cls(math.sqrt(rate / (1 - rate)), "bernoulli")

    @property
    def order(self) -> int:
        return 1

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def quantile(self, space: NoiseSpace, u: Tensor) -> Tensor:
        return super().quantile(space, u) if self.form == "gaussian" else _bernoulli(1 / (1 + self.std**2), u)

    def draw(self, space: NoiseSpace, count: int, *, generator: torch.Generator | None) -> Tensor:
        if self.form == "gaussian":
            return super().draw(space, count, generator=generator)
        return self.quantile(space, _uniform(space, (count, space.num_weights), generator))

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w * (1 + eta), x, y)


@dataclass(frozen=True)
class AntiCorrelated(_WithStd):
    """Anti-correlated perturbed gradient descent: each perturbation of the weights is taken back a step later.

        w+ = w - alpha grad L(w) + (xi_{k+1} - xi_k)
        z+ = z - alpha grad L(z + xi_k),  z = w - xi:    Lhat = L(w + eta)

    Order 1 with V = (std^2/2) tr H. The recursion here runs in z; the weights of the training are z + xi.

    Raises:
        ValueError: a std that is not positive.

    >>> AntiCorrelated(std=0.01).order
    1
    """

    per_sample: ClassVar[bool] = False
    scale_free: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 1

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w + eta, x, y)

    def carried(self, eta: Tensor) -> Tensor:
        return eta


@dataclass(frozen=True)
class InputNoise(_WithStd):
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


@dataclass(frozen=True)
class WeightDecay(NoiseSystem):
    """L + (lambda/2) |w|^2, the optimizer's weight decay: no noise, but the clock of order 1 with lambda for sigma^2.

    Raises:
        ValueError: a coefficient that is not positive.

    >>> (Dropout() + WeightDecay(5e-4)).order
    1
    """

    coefficient: float
    additive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_positive("coefficient", self.coefficient)

    @property
    def order(self) -> int:
        return 1

    def variance(self, space: NoiseSpace) -> float:
        return self.coefficient

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y) + 0.5 * self.coefficient * w.square().sum()


@dataclass(frozen=True)
class LabelNoise(_WithStd):
    """Gaussian noise on the targets of a mean squared error: y + eta, per sample and output.

        Sigma = 2 std^2/(C B) H on Gamma,     V = std^2/(2 C B) tr H

    Order 2: E Lhat differs from L by a constant, and the noise is normal to Gamma.

    Raises:
        ValueError: a std that is not positive; a loss other than mse.

    >>> LabelNoise(std=0.1).order
    2
    """

    @property
    def order(self) -> int:
        return 2

    def check_loss(self, loss: SampleLoss) -> None:
        """Raise ValueError unless the loss is mse."""
        if not isinstance(loss, MeanSquaredError):
            hint = ""
            if isinstance(loss, SoftCrossEntropy):
                hint = (
                    ": class labels cannot be shifted by a real number; use LabelFlips(rate=...), which redraws them, "
                    "or train with mse on one-hot targets"
                )
            raise ValueError(f"LabelNoise is for mse, got {type(loss).__name__}{hint}")

    def check(self, problem: ZeroLossProblem) -> None:
        self.check_loss(problem.sample_loss)

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_outputs

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y, shift=eta)

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(hessian=2 * self.std**2 / (problem.num_outputs * batch_size))


@dataclass(frozen=True)
class LabelFlips(NoiseSystem):
    """Each class label is redrawn uniformly over the C classes with probability `rate` at every step.

        targets average to q = (1 - rate) onehot + rate/C:  the zero-loss problem of label_smoothing = rate
        Sigma = H/B on Gamma,     V = tr H/(4 B)

    Order 2, for cross-entropy. The clock's sigma^2 is 1: the rate is in H. With delta = e_c where the label was
    redrawn as c, and 0 elsewhere, eta = W^{-1} (delta - rate/C), where W^2 = Cov delta, has unit variance, and

        y - q = W eta - (1 . W eta) onehot

    Raises:
        ValueError: a rate outside (0, 1); a loss other than cross-entropy; targets that are not smoothed by the rate.

    >>> LabelFlips(rate=0.1).order
    2
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"the rate must be in (0, 1), got {self.rate}; for no noise leave the system out")

    @property
    def order(self) -> int:
        return 2

    def check_loss(self, loss: SampleLoss) -> None:
        """Raise ValueError unless the loss is a cross-entropy."""
        if not isinstance(loss, SoftCrossEntropy):
            raise ValueError(
                f"LabelFlips is for cross-entropy on class labels, got {type(loss).__name__}: flipped "
                "one-hot targets are not mean-preserving for it; use LabelNoise(std=...) with mse"
            )

    def check(self, problem: ZeroLossProblem) -> None:
        self.check_loss(problem.sample_loss)
        onehot = self._onehot(problem.targets)
        if not torch.allclose(onehot, onehot.round(), atol=1e-6):
            raise ValueError(
                f"LabelFlips(rate={self.rate}) averages the targets to label smoothing {self.rate}, the problem has "
                f"others: use class labels with nn.CrossEntropyLoss(label_smoothing={self.rate}) for the problem (and "
                "no smoothing in the training, where the flips do it)"
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
        """The labels ``[n]`` that training sees under eta ``[n, C]``."""
        delta = self._color(eta, 1) + self.rate / eta.shape[-1]  # e_c where redrawn, else 0
        return torch.where(delta.sum(-1) > 0.5, delta.argmax(-1).to(labels.dtype), labels)

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(hessian=1 / batch_size)


@dataclass(frozen=True)
class Langevin(_WithStd):
    """Stochastic gradient Langevin: w+ = w - alpha grad L - alpha std xi, that is Lhat = L + eta . w.

        Sigma = std^2 I,     V = (std^2/4) log pdet H (its tangential gradient),     diffusion alpha^2 std^2 along Gamma

    Order 2, one eta for the whole step.

    Raises:
        ValueError: a std that is not positive.

    >>> Langevin(std=0.1).order
    2
    """

    per_sample: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    scale_free: ClassVar[bool] = False

    @property
    def order(self) -> int:
        return 2

    def dimension(self, space: NoiseSpace) -> int:
        return space.num_weights

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return loss(w, x, y) + eta @ w

    def covariance(self, problem: ZeroLossProblem, batch_size: int) -> Covariance:
        return Covariance(identity=self.std**2)


@dataclass(frozen=True)
class Minibatch(NoiseSystem):
    """Minibatch sampling and nothing else: the loss of the batch as it is.

    Trivial: on Gamma every sample's gradient is zero, so the noise dies as the weights arrive. No order, no drift.

    >>> Minibatch().order is None
    True
    """

    @property
    def order(self) -> None:
        return None

    def variance(self, space: NoiseSpace) -> float:
        return 0.0


@dataclass(frozen=True)
class CustomNoise(NoiseSystem):
    """A user's own noise: Lhat(w, eta) as a function, and what shape its eta has. Everything else follows.

    Args:
        function: (loss, w, x, y, eta) -> scalar, with ``loss(w, x, y)`` the mean loss of a batch without this noise;
            at eta = 0 it must be that loss. It runs under `torch.func`: no ``.item()``, no in-place changes.
        std: standard deviation of the components of eta, Gaussian and independent.
        like: what eta has the shape of: "weights" ``[P]`` (one for the step), or, with a row for each sample,
            "inputs" ``[n, ...]`` flattened, or "outputs" ``[n, C]``.
        order: 1, 2, or None where nothing moves; left alone it is "measured", at the point where it is asked for.

    Raises:
        ValueError: a std that is not positive; a function with Lhat(w, 0) != L(w), or that does not return a scalar.

    >>> def noisy(loss, w, x, y, eta):
    ...     return loss(w, x + eta.reshape(x.shape), y)
    >>> CustomNoise(noisy, std=0.1, like="inputs").per_sample
    True
    """

    scale_free: ClassVar[bool] = False

    function: Callable[[BatchLoss, Tensor, Tensor, Tensor, Tensor], Tensor]
    std: float
    like: Literal["weights", "inputs", "outputs"] = "weights"
    claimed_order: int | Literal["measured"] | None = field(default="measured", kw_only=True)

    def __post_init__(self) -> None:
        _require_positive("std", self.std)
        if self.like not in ("weights", "inputs", "outputs"):
            raise ValueError(f"like must be 'weights', 'inputs' or 'outputs', got {self.like!r}")

    @property
    def per_sample(self) -> bool:  # type: ignore[override]  # here it depends on the shape
        """Whether eta has a row for each sample."""
        return self.like != "weights"

    @property
    def order(self) -> int | None:
        if self.claimed_order == "measured":
            raise ValueError("the order of this noise has not been measured yet: with_measured_order(...) does")
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
                f"{quiet.item():.6g}: let eta enter so that zero changes nothing"
            )

    def variance(self, space: NoiseSpace) -> float:
        return self.std**2

    def scale(self, space: NoiseSpace) -> Tensor:
        size = {"weights": space.num_weights, "inputs": space.input_shape.numel(), "outputs": space.num_outputs}
        return torch.full((size[self.like],), self.std, dtype=space.dtype, device=space.device)

    def noisy_loss(self, loss: BatchLoss, w: Tensor, x: Tensor, y: Tensor, eta: Tensor) -> Tensor:
        return self.function(loss, w, x, y, eta)
