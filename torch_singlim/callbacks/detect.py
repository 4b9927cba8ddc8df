"""Detect the samples and the loss of a Trainer's training."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from torch_singlim.callbacks.stand_in import StandIn, ignore
from torch_singlim.measure import Code, Reason, TrainingSet
from torch_singlim.network import (
    FunctionalModule,
    MeanSquaredError,
    ProcessGroup,
    SampleLoss,
    SoftCrossEntropy,
    ZeroLossProblem,
    check_samples,
    in_precision,
    resolve_loss,
    structural_copy,
)
from torch_singlim.noise import LabelFlips, NoiseSystem, parts

__all__ = [
    "BatchToProblem",
    "Samples",
    "as_pair",
    "as_targets",
    "detect_problem",
    "find_problem",
    "given_samples",
    "read_samples",
    "recognise_loss",
    "training_set",
]

_log = logging.getLogger(__name__)

_LOSS_RTOL = 1e-3
_ADVICE = (
    "write the training loss as a mean over samples of mse or cross-entropy, or pass the loss: "
    "SingularLimitMonitor(loss=nn.MSELoss()), loss=nn.CrossEntropyLoss(label_smoothing=0.1), or a function of one "
    "sample's (outputs, target)"
)


BatchToProblem = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Samples:
    """The samples that are measured.

    Args:
        inputs: ``[N, ...]``.
        targets: ``[N, ...]``.
        train_size: size of the training set; None: a stream of unknown length.
        trials: small batches in the form in which a training step gets them, with their inputs and targets.
        whole: inputs and targets of the whole training set, if these samples are a part of it and it is in memory.
    """

    inputs: Tensor
    targets: Tensor
    train_size: int | None
    trials: tuple[tuple[Any, Tensor, Tensor], ...] = field(repr=False)
    whole: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, inputs: Tensor, targets: Tensor, train_size: int | None, batch: Callable[[slice], Any] | None = None
    ) -> Samples:
        """Samples and two trials from them; `batch` makes a batch of a slice; default: (inputs, targets)."""
        half = min(max(len(inputs) // 2, 1), 64)
        rest = slice(half, 2 * half) if len(inputs) >= 2 * half else slice(0, half)
        made = batch or (lambda part: (inputs[part], targets[part]))
        trials = tuple((made(part), inputs[part], targets[part]) for part in (slice(0, half), rest))
        return cls(inputs, targets, train_size, trials)

    @property
    def is_subset(self) -> bool:
        """Whether training uses samples that are not measured."""
        return self.train_size is None or len(self.inputs) < self.train_size


def _train_loader(trainer: Trainer) -> DataLoader:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"the samples are read from one DataLoader, got {type(loader).__name__}; pass the samples themselves: "
            "SingularLimitMonitor(data=(inputs, targets))"
        )
    return loader


def read_samples(trainer: Trainer, num_samples: int, *, batch_to_problem: BatchToProblem | None = None) -> Samples:
    """The first `num_samples` training samples, collated in the way of the loader.

    Args:
        trainer: with its train loader.
        num_samples: maximum number of samples.
        batch_to_problem: a batch -> (inputs ``[n, ...]``, targets ``[n, ...]``), for batches of another form.

    Raises:
        ValueError: not one DataLoader, batches that are not (inputs, targets), an empty dataset, or items that change
            when they are read again (random augmentation).
    """
    loader = _train_loader(trainer)
    dataset, collate = loader.dataset, loader.collate_fn
    if isinstance(dataset, IterableDataset):
        items = list(itertools.islice(dataset, num_samples + 1))
        size = len(items) if len(items) <= num_samples else None
        items, again = items[:num_samples], list(itertools.islice(dataset, 8))
    else:
        size = len(dataset)  # type: ignore[arg-type]  # a map-style dataset
        items, again = ([dataset[i] for i in range(min(n, size))] for n in (num_samples, 8))
    if not items:
        raise ValueError("the training dataset is empty: there is nothing to measure")
    inputs, targets = as_pair(collate(items), batch_to_problem)
    repeated, _ = as_pair(collate(again), batch_to_problem)
    few = min(len(inputs), len(repeated))
    if not torch.equal(inputs[:few], repeated[:few]):
        raise ValueError(
            "reading the same training items twice gave different inputs: with random augmentation the training set "
            "is not finite and has no zero-loss set; remove the augmentation, or pass fixed samples: "
            "SingularLimitMonitor(data=(inputs, targets))"
        )
    return Samples.of(inputs, targets, size, lambda part: collate(items[part]))


def as_pair(batch: Any, batch_to_problem: BatchToProblem | None) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a batch; ValueError if the batch has another form."""
    pair = batch if batch_to_problem is None else batch_to_problem(batch)
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair):
        return pair[0], pair[1]
    got = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, list | tuple) else type(pair).__name__
    if batch_to_problem is not None:
        raise ValueError(f"batch_to_problem must return (inputs, targets), two tensors, got {got}")
    raise ValueError(
        f"batches must be (inputs, targets), two tensors, got {got}; pass a function that reads them, "
        "batch_to_problem=function, to SingularLimitMonitor and to InjectNoise, or pass the samples to the monitor: "
        "data=(inputs, targets)"
    )


def given_samples(trainer: Trainer, inputs: Tensor, targets: Tensor) -> Samples:
    """The samples that were passed; they are a subset if the training set is known to be larger."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    size = len(dataset) if isinstance(dataset, Sized) else 0
    return Samples.of(inputs, targets, max(size, len(inputs)))


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
    losses = []
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches:
                out = twin.training_step(batch, 0)
                value = out["loss"] if isinstance(out, dict) else out
                losses.append(float(value))
    except Exception:  # a training step may need more of the trainer; the caller tells the user what to pass instead
        return None
    return losses


def training_set(problem: ZeroLossProblem, samples: Samples) -> TrainingSet | None:
    """All training samples of a problem that has a part of them, if they are in memory."""
    if samples.whole is None:
        return None
    inputs, targets = samples.whole
    with torch.no_grad():
        outputs = problem.function(problem.weights(), problem.inputs[:1])
    return TrainingSet(inputs, as_targets(problem.sample_loss, targets, outputs))


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
    if targets.ndim != 1 or int(targets.max()) >= f.shape[1] or int(targets.min()) < 0:
        return []
    hard, uniform = F.cross_entropy(f, targets.long()).item(), -F.log_softmax(f, 1).mean().item()
    # the cross-entropy is linear in its label smoothing, which one value therefore determines
    smoothing = round((value - hard) / (uniform - hard), 4) if uniform != hard else 0.0
    smoothed = [SoftCrossEntropy(smoothing)] if 0 < smoothing < 1 else []
    return [MeanSquaredError(), *smoothed, SoftCrossEntropy()]


def _mean_loss(loss: SampleLoss, f: Tensor, targets: Tensor) -> float:
    """The training loss: with the infimum that `value` subtracts."""
    y = loss.prepare(as_targets(loss, targets, f), f)
    return (loss.value(f, y) + loss.infimum(y)).mean().item()


@dataclass(frozen=True)
class _Trials:
    """The loss of training_step on two small batches (None if it could not be run), and the outputs there."""

    batches: list[tuple[Tensor, Tensor]]
    outputs: list[Tensor]
    losses: list[float] | None

    def fit(self, candidate: SampleLoss, which: int) -> tuple[float, float]:
        """The values of a candidate and of training_step on one of the batches."""
        assert self.losses is not None
        return _mean_loss(candidate, self.outputs[which], self.batches[which][1]), self.losses[which]

    def recognised(self) -> SampleLoss | None:
        """The loss that agrees with training_step on both batches; None if there is none."""
        if self.losses is None:
            return None

        def agrees(candidate: SampleLoss) -> bool:
            return all(_close(*self.fit(candidate, which)) for which in range(len(self.batches)))

        fitting = filter(agrees, _candidates(self.outputs[0], self.batches[0][1], self.losses[0]))
        return next(fitting, None)


def _close(value: float, target: float) -> bool:
    return abs(value - target) <= _LOSS_RTOL * abs(target) + 1e-12


def _cast(data: Any, function: FunctionalModule) -> Any:
    """Data on the function's device and in its precision, as Lightning passes it to a module of that precision."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(function.device, function.dtype if tensor.is_floating_point() else None)

    return apply_to_collection(data, Tensor, cast)


def _try_training_step(module: LightningModule, samples: Samples) -> _Trials:
    check_samples(samples.inputs, samples.targets)
    dtype = next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)
    dtype = torch.promote_types(dtype, torch.float32)  # losses in half precision are too inaccurate
    function = FunctionalModule(module, dtype=dtype)
    function.check_deterministic(_cast(samples.inputs[:2], function))
    batches = [_cast((x, y), function) for _, x, y in samples.trials]
    with torch.no_grad():
        outputs = [function(function.weights(), x).double() for x, _ in batches]
    raw = [_cast(batch, function) for batch, _, _ in samples.trials]
    return _Trials(batches, outputs, _training_losses(module, raw, dtype))


def recognise_loss(module: LightningModule, samples: Samples) -> tuple[SampleLoss | None, int]:
    """The loss of ``training_step``, recognised by its value (None: not recognised), and the number of outputs C."""
    trials = _try_training_step(module, samples)
    return trials.recognised(), trials.outputs[0].shape[1]


def detect_problem(
    module: LightningModule,
    samples: Samples,
    *,
    loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor] | None,
    noise: NoiseSystem | None,
    dtype: torch.dtype,
    batch_size: int | None,
    step_ratios: Mapping[str, float],
    process_group: ProcessGroup,
) -> ZeroLossProblem:
    """The zero-loss problem of a module; the loss is checked against ``training_step`` on a few samples.

    The loss is recognised by its value: mse (with the targets themselves or with one-hot targets), cross-entropy with
    soft targets, or cross-entropy with any label smoothing, 0 included. If the injected noise flips hard labels, their
    mean is smoothed.

    Args:
        module: the module that is trained.
        samples: the samples to measure.
        loss: the loss that ``training_step`` computes; None: it is recognised.
        noise: the noise that is injected, or given.
        dtype: see `ZeroLossProblem`.
        batch_size: see there.
        step_ratios: see there.
        process_group: see there.

    Raises:
        ValueError: the loss is not recognised, or is not the one that was passed.
    """
    trials = _try_training_step(module, samples)
    if loss is None:
        if trials.losses is None:
            raise ValueError(
                "training_step could not be evaluated outside of training, so the loss could not be "
                "recognised; pass it: SingularLimitMonitor(loss=...) with nn.MSELoss(), "
                "nn.CrossEntropyLoss(label_smoothing=...) or a function of one sample's (outputs, target)"
            )
        recognised = trials.recognised()
        if recognised is None:
            raise ValueError(
                f"the loss of training_step, {trials.losses[0]:.6g} on {len(trials.outputs[0])} samples, was not "
                f"recognised; {_ADVICE}"
            )
        chosen = recognised
    else:
        chosen = resolve_loss(loss)
        if trials.losses is not None:
            value, target = trials.fit(chosen, 1)
            if not _close(value, target):
                raise ValueError(
                    f"the loss that was passed gives {value:.6g} where training_step gives {target:.6g} on the same "
                    f"{len(trials.outputs[1])} samples; {_ADVICE}"
                )
    flips = next((part for part in parts(noise) if isinstance(part, LabelFlips)), None) if noise else None
    if flips is not None and chosen == SoftCrossEntropy():
        chosen = SoftCrossEntropy(flips.rate)
    targets = as_targets(chosen, samples.targets, trials.outputs[0])
    return ZeroLossProblem(
        module,
        chosen,
        samples.inputs,
        targets,
        dtype=dtype,
        batch_size=batch_size,
        step_ratios=step_ratios,
        process_group=process_group,
    )


def find_problem(
    module: LightningModule,
    samples: Samples,
    *,
    loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor] | None,
    noise: NoiseSystem | None,
    dtype: torch.dtype,
    batch_size: int | None,
    step_ratios: Mapping[str, float],
    process_group: ProcessGroup,
) -> tuple[ZeroLossProblem | Reason, Reason | None]:
    """The problem, or the reason why there is none; and a reason if only a subset of the samples is measured.

    The arguments are those of `detect_problem`; it raises nothing.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            problem = detect_problem(
                module,
                samples,
                loss=loss,
                noise=noise,
                dtype=dtype,
                batch_size=batch_size,
                step_ratios=step_ratios,
                process_group=process_group,
            )
    except ValueError as error:
        return Code.NO_PROBLEM(why=str(error)), None
    except Exception as error:  # modules may raise anything if they are used in an unexpected way
        _log.debug("the loss was not found", exc_info=error)
        return Code.NO_PROBLEM(why=f"the loss was not found: {type(error).__name__}: {error}"), None
    for warning in caught if process_group.rank == 0 else ():
        if warning.category is UserWarning and "over-parameterised" in str(warning.message):
            _log.warning("torch_singlim: %s", warning.message)
    if not samples.is_subset:
        return problem, None
    return problem, Code.SUBSET(samples=len(samples.inputs), total=samples.train_size or "a stream of")
