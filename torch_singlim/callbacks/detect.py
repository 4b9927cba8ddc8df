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
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from torch_singlim.callbacks.training_loss import as_targets, close, try_training_step
from torch_singlim.measure import Code, Reason, TrainingSet
from torch_singlim.network import (
    ProcessGroup,
    SampleLoss,
    SoftCrossEntropy,
    ZeroLossProblem,
    resolve_loss,
)
from torch_singlim.noise import LabelFlips, NoiseSystem, parts

__all__ = [
    "BatchToProblem",
    "Samples",
    "as_pair",
    "detect_problem",
    "find_problem",
    "given_samples",
    "read_samples",
    "recognise_loss",
    "training_set",
]

_log = logging.getLogger(__name__)

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


def training_set(problem: ZeroLossProblem, samples: Samples) -> TrainingSet | None:
    """All training samples of a problem that has a part of them, if they are in memory."""
    if samples.whole is None:
        return None
    inputs, targets = samples.whole
    with torch.no_grad():
        outputs = problem.function(problem.weights(), problem.inputs[:1])
    return TrainingSet(inputs, as_targets(problem.sample_loss, targets, outputs))


def recognise_loss(module: LightningModule, samples: Samples) -> tuple[SampleLoss | None, int]:
    """The loss of ``training_step``, recognised by its value (None: not recognised), and the number of outputs C."""
    trials = try_training_step(module, samples.inputs, samples.targets, samples.trials)
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
    trials = try_training_step(module, samples.inputs, samples.targets, samples.trials)
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
        if isinstance(chosen, SoftCrossEntropy) and not samples.targets.is_floating_point():
            chosen = trials.at_positions(chosen)
        if trials.losses is not None:
            value, target = trials.fit(chosen, 1)
            if not close(value, target):
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
