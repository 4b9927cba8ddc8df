"""The loss of a training step, recognised by its value."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn import functional as F

from torch_singlim.callbacks.stand_in import StandIn, ignore
from torch_singlim.network import (
    FunctionalModule,
    MeanSquaredError,
    SampleLoss,
    SequenceCrossEntropy,
    SoftCrossEntropy,
    check_samples,
    in_precision,
    structural_copy,
)

__all__ = ["Trials", "as_targets", "close", "try_training_step"]

# losses agree up to this share
_LOSS_RTOL = 1e-3


def _training_losses(module: LightningModule, batches: list[Any], dtype: torch.dtype) -> list[float] | None:
    """The loss that training_step of a copy in evaluation mode returns for each batch; None if the call fails.

    With manual optimization it is not called, since it would make steps.
    """
    if not module.automatic_optimization:
        return None
    twin: Any = in_precision(structural_copy(module), dtype).eval()
    twin.log = twin.log_dict = ignore
    if module._trainer is not None:
        twin._trainer = StandIn.of(module._trainer)
    if getattr(vars(twin).get("training_step"), "recording", None):  # of the run's calls, not the copy's
        del twin.training_step
    # batch_idx is optional, and may have any name
    further = [0] if is_param_in_hook_signature(twin.training_step, "batch_idx", min_args=2) else []
    losses = []
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches:
                out = twin.training_step(batch, *further)
                value = out["loss"] if isinstance(out, dict) else out
                losses.append(float(value))
    except Exception:  # a training step may need more of the trainer; the caller tells the user what to pass instead
        return None
    return losses


def as_targets(loss: SampleLoss, targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the form that the loss takes: class labels become one-hot for mse."""
    if isinstance(loss, MeanSquaredError) and not targets.is_floating_point() and targets.ndim == 1:
        classes = outputs.shape[1]
        if int(targets.min()) < 0 or int(targets.max()) >= classes:
            raise ValueError(
                f"class labels must be 0 to {classes - 1} for a network with {classes} outputs, got "
                f"{int(targets.min())} to {int(targets.max())}"
            )
        return F.one_hot(targets.long(), classes).to(outputs.dtype)
    return targets


def _candidates(f: Tensor, targets: Tensor, value: float) -> list[SampleLoss]:
    """Losses that may have the value `value` at outputs f ``[n, C]``."""
    if targets.is_floating_point():
        if targets.reshape(len(targets), -1).shape != f.shape:
            return []
        soft = (
            targets.shape == f.shape
            and bool((targets >= 0).all())
            and torch.allclose(targets.sum(1), f.new_ones(()).to(targets))
        )
        return [MeanSquaredError(), *([SoftCrossEntropy()] if soft else [])]
    if targets.ndim > 1:
        return [each for make in _sequence_losses(f, targets) for each in _smoothed(make, f, targets, value)]
    if targets.ndim != 1 or int(targets.max()) >= f.shape[1] or int(targets.min()) < 0:
        return []
    return [MeanSquaredError(), *_smoothed(SoftCrossEntropy, f, targets, value)]


def _sequence_losses(f: Tensor, targets: Tensor) -> list[Callable[[float], SampleLoss]]:
    """Label smoothing -> cross-entropy at all positions, classes last and classes first, if labels ``[n, ...]`` fit."""
    size = targets[0].numel()
    classes = f.shape[1] // size
    if classes < 2 or classes * size != f.shape[1] or int(targets.max()) >= classes:
        return []

    def make(smoothing: float, first: bool) -> SampleLoss:
        return SequenceCrossEntropy.of(targets, classes, smoothing, classes_first=first)

    return [functools.partial(make, first=first) for first in (False, True)]


def _smoothed(make: Callable[[float], SampleLoss], f: Tensor, targets: Tensor, value: float) -> list[SampleLoss]:
    """Cross-entropies with the label smoothing, if any, at which they have this value, and with none."""
    # they are linear in the smoothing, which one value therefore determines
    hard, uniform = (_mean_loss(make(smoothing), f, targets) for smoothing in (0.0, 1.0))
    smoothing = round((value - hard) / (uniform - hard), 4) if uniform != hard else 0.0
    return [*([make(smoothing)] if 0 < smoothing < 1 else []), make(0.0)]


def _mean_loss(loss: SampleLoss, f: Tensor, targets: Tensor) -> float:
    """The training loss: with the infimum that `value` subtracts."""
    y = loss.prepare(as_targets(loss, targets, f), f)
    return (loss.value(f, y) + loss.infimum(y)).mean().item()


@dataclass(frozen=True)
class Trials:
    """The loss of training_step on two small batches (None if it could not be run), and the outputs there."""

    batches: list[tuple[Tensor, Tensor]]
    outputs: list[Tensor]
    losses: list[float] | None

    def fit(self, candidate: SampleLoss, which: int) -> tuple[float, float]:
        """The values of a candidate and of training_step on one of the batches."""
        assert self.losses is not None
        return _mean_loss(candidate, self.outputs[which], self.batches[which][1]), self.losses[which]

    def at_positions(self, loss: SoftCrossEntropy) -> SampleLoss:
        """The same loss at every position, if the labels are those of positions."""
        f, targets = self.outputs[0], self.batches[0][1]
        if targets.ndim == 1 or self.losses is None:
            return loss
        made = [make(loss.label_smoothing) for make in _sequence_losses(f, targets)]
        return next((each for each in made if close(*self.fit(each, 0))), loss)

    def recognised(self) -> SampleLoss | None:
        """The loss that agrees with training_step on both batches; None if there is none."""
        if self.losses is None:
            return None

        def agrees(candidate: SampleLoss) -> bool:
            return all(close(*self.fit(candidate, which)) for which in range(len(self.batches)))

        fitting = filter(agrees, _candidates(self.outputs[0], self.batches[0][1], self.losses[0]))
        return next(fitting, None)


def close(value: float, target: float) -> bool:
    """Whether two values of a loss agree up to rounding."""
    return abs(value - target) <= _LOSS_RTOL * abs(target) + 1e-12


def _cast(data: Any, function: FunctionalModule) -> Any:
    """Data on the function's device and in its precision, as Lightning passes it to a module of that precision."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(function.device, function.dtype if tensor.is_floating_point() else None)

    return apply_to_collection(data, Tensor, cast)


def try_training_step(
    module: LightningModule, inputs: Tensor, targets: Tensor, trials: Sequence[tuple[Any, Tensor, Tensor]]
) -> Trials:
    """The loss that training_step of a copy in evaluation mode returns for small batches, and the outputs there.

    Args:
        module: the module that is trained.
        inputs: all samples that are measured.
        targets: their targets.
        trials: batches in the form in which a training step gets them, with their inputs and targets.

    Raises:
        ValueError: samples that are not finite, a module that is random in evaluation mode.
    """
    check_samples(inputs, targets)
    dtype = next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)
    dtype = torch.promote_types(dtype, torch.float32)  # losses in half precision are too inaccurate
    function = FunctionalModule(module, dtype=dtype)
    function.check_deterministic(_cast(inputs[:2], function))
    batches = [_cast((x, y), function) for _, x, y in trials]
    with torch.no_grad():
        outputs = [function(function.weights(), x).double() for x, _ in batches]
    raw = [_cast(batch, function) for batch, _, _ in trials]
    return Trials(batches, outputs, _training_losses(module, raw, dtype))
