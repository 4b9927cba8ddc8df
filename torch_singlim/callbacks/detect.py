"""What a Trainer trains: its probe set, its loss, its descent, its noise; read, not asked for."""

from __future__ import annotations

import itertools
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

from torch_singlim.functional import FunctionalModule, in_precision, structural_copy
from torch_singlim.loss import MeanSquaredError, SampleLoss, SoftCrossEntropy, resolve_loss
from torch_singlim.problem import ZeroLossProblem, check_samples
from torch_singlim.team import Team
from torch_singlim.theory import Dropout, LabelFlips, Minibatch, NoiseSystem, Sum, WeightDecay, parts

__all__ = [
    "BatchToProblem",
    "as_problem",
    "ProbeSet",
    "detect_noise",
    "detect_problem",
    "given_probe_set",
    "read_probe_set",
    "recognise_loss",
]

_LOSS_RTOL = 1e-3
_ADVICE = (
    "write the training loss as a mean over samples of mse or label-smoothed cross-entropy, or pass what it is: "
    "SingularLimitMonitor(loss=nn.MSELoss()), loss=nn.CrossEntropyLoss(label_smoothing=0.1), or a function of one "
    "sample's (outputs, target)"
)


BatchToProblem = Callable[[Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ProbeSet:
    """The samples that are probed, and how many the training set has (None: a stream, nobody knows).

    `batch` gives some of them as a training step sees them.
    """

    inputs: Tensor
    targets: Tensor
    train_size: int | None
    batch: Callable[[slice], Any] = field(repr=False)

    @property
    def is_subset(self) -> bool:
        """Whether training uses samples that the probe does not see."""
        return self.train_size is None or len(self.inputs) < self.train_size


def _train_loader(trainer: Trainer) -> DataLoader:
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(
            f"the probe set is read from one DataLoader, got {type(loader).__name__}; pass the probe set itself: "
            "SingularLimitMonitor(data=(inputs, targets))"
        )
    return loader


def read_probe_set(trainer: Trainer, num_samples: int, *, batch_to_problem: BatchToProblem | None = None) -> ProbeSet:
    """The first `num_samples` training samples, collated as the loader collates them.

    Args:
        trainer: with its train loader.
        num_samples: at most so many; of an iterable dataset the first that it gives.
        batch_to_problem: a batch -> (inputs ``[n, ...]``, targets ``[n, ...]``), where batches are something else.

    Raises:
        ValueError: no such loader, batches that are not (inputs, targets), an empty dataset, or items that change
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
        raise ValueError("the training dataset is empty: there is nothing to probe")
    inputs, targets = as_problem(collate(items), batch_to_problem)
    repeated, _ = as_problem(collate(again), batch_to_problem)
    few = min(len(inputs), len(repeated))
    if not torch.equal(inputs[:few], repeated[:few]):
        raise ValueError(
            "reading the same training items twice gave different inputs: with random augmentation the training set "
            "is not finite and has no zero-loss set; remove the augmentation, or pass a fixed probe set: "
            "SingularLimitMonitor(data=(inputs, targets))"
        )
    return ProbeSet(inputs, targets, size, lambda part: collate(items[part]))


def as_problem(batch: Any, batch_to_problem: BatchToProblem | None) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of a batch; ValueError where it is something else."""
    pair = batch if batch_to_problem is None else batch_to_problem(batch)
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(each, Tensor) for each in pair):
        return pair[0], pair[1]
    got = f"{type(pair).__name__} of {len(pair)}" if isinstance(pair, list | tuple) else type(pair).__name__
    if batch_to_problem is not None:
        raise ValueError(f"batch_to_problem must return (inputs, targets), two tensors, got {got}")
    raise ValueError(
        f"batches must be (inputs, targets), two tensors, got {got}; say how to read them: "
        "batch_to_problem=function, of SingularLimitMonitor and of InjectNoise; a monitor takes the probe set, too: "
        "data=(inputs, targets)"
    )


def given_probe_set(trainer: Trainer, inputs: Tensor, targets: Tensor) -> ProbeSet:
    """The probe set that was passed; a subset, where the training set is known to be larger."""
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    size = len(dataset) if isinstance(dataset, Sized) else 0
    return ProbeSet(inputs, targets, max(size, len(inputs)), lambda part: (inputs[part], targets[part]))


def _training_losses(module: LightningModule, batches: list[Any], dtype: torch.dtype) -> list[float] | None:
    """What training_step of an evaluation-mode copy returns on each batch; None where it needs a running trainer."""
    twin: Any = in_precision(structural_copy(module), dtype).eval()
    twin.log = twin.log_dict = lambda *args, **kwargs: None  # a copy has no logger
    losses = []
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for batch in batches:
                out = twin.training_step(batch, 0)
                value = out["loss"] if isinstance(out, dict) else out
                losses.append(float(value))
    except Exception:  # a user's training step may need anything of a trainer; the caller says what to pass instead
        return None
    return losses


def _as_targets(loss: SampleLoss, targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets as the loss takes them: class labels become one-hot where it is mse."""
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
    """Losses that could have given `value` on outputs f ``[n, C]``."""
    if targets.is_floating_point():
        if targets.reshape(len(targets), -1).shape != f.shape:
            return []
        soft = (
            targets.shape == f.shape
            and bool((targets > 0).all())
            and torch.allclose(targets.sum(1), f.new_ones(()).to(targets))
        )
        return [MeanSquaredError(), *([SoftCrossEntropy()] if soft else [])]
    if targets.ndim != 1 or int(targets.max()) >= f.shape[1] or int(targets.min()) < 0:
        return []
    hard, uniform = F.cross_entropy(f, targets.long()).item(), -F.log_softmax(f, 1).mean().item()
    # the cross-entropy is linear in its label smoothing: one value tells it
    smoothing = round((value - hard) / (uniform - hard), 4) if uniform != hard else 0.0
    smoothed = [SoftCrossEntropy(smoothing)] if 0 < smoothing < 1 else []
    return [MeanSquaredError(), *smoothed, SoftCrossEntropy()]


def _mean_loss(loss: SampleLoss, f: Tensor, targets: Tensor) -> float:
    """The loss as training has it: with the infimum that `value` subtracts, and hard labels let through."""
    if loss == SoftCrossEntropy() and not targets.is_floating_point():
        return F.cross_entropy(f, targets.long()).item()
    y = loss.prepare(_as_targets(loss, targets, f), f)
    return (loss.value(f, y) + loss.infimum(y)).mean().item()


@dataclass(frozen=True)
class _Trials:
    """The loss of training_step on two small batches (None where it could not be run), and the outputs there."""

    batches: list[tuple[Tensor, Tensor]]
    outputs: list[Tensor]
    losses: list[float] | None

    def fit(self, candidate: SampleLoss, which: int) -> tuple[float, float]:
        """What a candidate gives on one of the batches, and what training_step gives."""
        assert self.losses is not None
        return _mean_loss(candidate, self.outputs[which], self.batches[which][1]), self.losses[which]

    def recognised(self) -> SampleLoss | None:
        """The loss that agrees with training_step on both batches, if there is one."""
        if self.losses is None:
            return None

        def agrees(candidate: SampleLoss) -> bool:
            return all(_close(*self.fit(candidate, which)) for which in range(len(self.batches)))

        fitting = filter(agrees, _candidates(self.outputs[0], self.batches[0][1], self.losses[0]))
        return next(fitting, None)


def _close(value: float, target: float) -> bool:
    return abs(value - target) <= _LOSS_RTOL * abs(target) + 1e-12


def _cast(data: Any, function: FunctionalModule) -> Any:
    """Data on the function's device, in its precision, as Lightning hands it to a module of that precision."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(function.device, function.dtype if tensor.is_floating_point() else None)

    return apply_to_collection(data, Tensor, cast)


def _try_training_step(module: LightningModule, probe: ProbeSet) -> _Trials:
    check_samples(probe.inputs, probe.targets)
    dtype = next((p.dtype for p in module.parameters() if p.requires_grad), torch.float32)
    dtype = torch.promote_types(dtype, torch.float32)  # losses in half precision tell too little
    function = FunctionalModule(module, dtype=dtype)
    function.check_deterministic(_cast(probe.inputs[:2], function))
    half = min(max(len(probe.inputs) // 2, 1), 64)
    rest = slice(half, 2 * half) if len(probe.inputs) >= 2 * half else slice(0, half)
    samples = (slice(0, half), rest)
    batches = [_cast((probe.inputs[part], probe.targets[part]), function) for part in samples]
    with torch.no_grad():
        outputs = [function(function.weights(), x).double() for x, _ in batches]
    raw = [_cast(probe.batch(part), function) for part in samples]
    return _Trials(batches, outputs, _training_losses(module, raw, dtype))


def recognise_loss(module: LightningModule, probe: ProbeSet) -> tuple[SampleLoss | None, int]:
    """The loss of ``training_step``, recognised by its value (None: it was not), and the number of outputs C.

    Hard labels with cross-entropy give ``SoftCrossEntropy()``.
    """
    trials = _try_training_step(module, probe)
    return trials.recognised(), trials.outputs[0].shape[1]


def detect_problem(
    module: LightningModule,
    probe: ProbeSet,
    *,
    loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor] | None,
    noise: NoiseSystem | None,
    dtype: torch.dtype,
    batch_size: int | None,
    step_ratios: Mapping[str, float],
    team: Team,
) -> ZeroLossProblem:
    """The zero-loss problem that this module trains, its loss checked against ``training_step`` on a few samples.

    The loss is recognised by its value: mse (on targets as they are or one-hot), cross-entropy with soft targets, or
    with any label smoothing, which two values determine. Cross-entropy on hard labels is no such problem, unless the
    noise that is injected flips the labels: their mean is then label smoothing.

    Raises:
        ValueError: the loss is not recognised, or is not the one that was passed, or its zero-loss set is empty.
    """
    trials = _try_training_step(module, probe)
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
    targets = _as_targets(chosen, probe.targets, trials.outputs[0])
    return ZeroLossProblem(
        module,
        chosen,
        probe.inputs,
        targets,
        dtype=dtype,
        batch_size=batch_size,
        step_ratios=step_ratios,
        team=team,
    )


def detect_noise(
    problem: ZeroLossProblem, weight_decay: float, injected: NoiseSystem | None
) -> tuple[NoiseSystem, tuple[str, ...]]:
    """All noise of the training: dropout layers, the optimizer's weight decay, what is injected; or minibatches alone.

    Also what else training mode does that the theory does not cover.
    """
    systems: list[NoiseSystem] = [Dropout()] if problem.sites else []
    if weight_decay:
        systems.append(WeightDecay(weight_decay))
    systems += parts(injected) if injected else ()
    noise = Sum(tuple(systems)) if len(systems) > 1 else (systems or [Minibatch()])[0]
    reasons = []
    if problem.function.normalises_over_batch:
        reasons.append("batch normalisation couples the samples of a batch in training mode (GroupNorm does not)")
    elif problem.function.is_random(problem.inputs[:2], training=True):
        reasons.append("training mode is random beyond the nn.Dropout layers (functional dropout, attention dropout)")
    fixed = [type(part).__name__ for part in parts(noise) if not part.scale_free]
    if fixed and set(problem.function.step_ratios.values()) != {1.0}:
        reasons.append(f"parameter groups with different learning rates under {' and '.join(fixed)}")
    return noise, tuple(reasons)
