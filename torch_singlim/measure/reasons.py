"""Reasons why something is not measured or not predicted: a code, a step, values, and the English sentence for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, unique
from typing import Any

__all__ = ["Code", "Kind", "Reason", "Scope"]

Value = str | int | float


class Kind(Enum):
    """The kind of a reason; the value is the first word of its sentence in a verdict."""

    UNSUPPORTED = "Unsupported"
    INVALIDATED = "Invalidated"
    SKIPPED = "Skipped"
    NOTED = "Note"


class Scope(Enum):
    """What a reason prevents from being measured or predicted; the value describes this."""

    EVERYTHING = "nothing is measured"
    GEOMETRY = "no distance is measured, and the singular limit is not predicted"
    MOTION = "neither paths beside the training nor the singular limit predict the drift"
    PATHS = "there are no paths beside the training, so that the drift is not predicted"
    SET = "no nearest point is measured, and the singular limit is not predicted"
    LIMIT = "the singular limit is not predicted"
    WINDOW = "there is no prediction for the rest of this window"
    PART = "a part of the measurements is missing"
    NOTHING = "everything is measured"

    @property
    def blocked_by(self) -> frozenset[Scope]:
        """The scopes of reasons that prevent this from being measured or predicted."""
        further = {
            Scope.LIMIT: {Scope.GEOMETRY, Scope.SET, Scope.MOTION},
            Scope.SET: {Scope.GEOMETRY},
            Scope.PATHS: {Scope.MOTION},
        }
        return frozenset({Scope.EVERYTHING, self} | further.get(self, set()))


_UNSUPPORTED, _INVALIDATED, _SKIPPED, _NOTED = Kind.UNSUPPORTED, Kind.INVALIDATED, Kind.SKIPPED, Kind.NOTED


@unique
class Code(Enum):
    """All reasons: the kind, the scope and the sentence of each."""

    # the training cannot be written as a zero-loss problem
    NO_PROBLEM = _UNSUPPORTED, Scope.GEOMETRY, "{why}"
    NOT_ATTAINED = (
        _UNSUPPORTED,
        Scope.SET,
        "the loss never reaches its infimum, so that its zero-loss set is empty, as with hard labels: distances to "
        "lower levels of the loss are measured; for a nearest point train with "
        "nn.CrossEntropyLoss(label_smoothing=0.1), soft targets that are all positive, or mse on one-hot targets",
    )
    NO_WEIGHTS = _UNSUPPORTED, Scope.EVERYTHING, "the module has no trainable parameters"
    SHARDED = (
        _UNSUPPORTED,
        Scope.EVERYTHING,
        "{strategy} shards the weights over several processes: distances need all of them, and torch does not copy "
        'sharded modules, as paths require; use strategy="ddp" or one device, or measure the checkpoints afterwards',
    )
    NOT_STARTED = _SKIPPED, Scope.EVERYTHING, "what is trained could not be found out: {why}"
    DERIVATIVES = _UNSUPPORTED, Scope.SET, "the check of the derivatives failed: {why}"
    # the optimizer
    NO_OPTIMIZER_STATE = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "{path} does not hold the state of one optimizer; ModelCheckpoint(save_weights_only=False) saves it",
    )
    SEVERAL_OPTIMIZERS = (
        _UNSUPPORTED,
        Scope.MOTION,
        "expected one optimizer, got {count}: the motion of the weights is then not the descent of one loss; train the "
        "other networks in a run of their own",
    )
    OPTIMIZER = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "{optimizer} rescales or reshapes the gradient; the theory covers torch.optim.SGD, and Adam, AdamW, RMSprop "
        "and Adagrad during training",
    )
    COUPLED_DECAY = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "{optimizer} divides its weight decay by its second moments; the theory covers the decoupled one of "
        "torch.optim.AdamW",
    )
    ADAPTIVE_NOISE = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "under {optimizer} the drift of {noises} is not known: the theory covers noise of order 1 that does not depend "
        "on the unit of a weight, such as dropout, DropConnect and input noise, and noise on the labels alone",
    )
    NO_METRIC = _INVALIDATED, Scope.PART, "the optimizer's metric cannot be read: {why}"
    METRIC_CHANGED = (
        _INVALIDATED,
        Scope.PART,
        "the optimizer's second moments changed its step sizes by {share:.0%} in the window {start}-{stop}: the limit, "
        "in the metric of its beginning, is not compared with it",
    )
    GROUPS_DIFFER = _UNSUPPORTED, Scope.LIMIT, "parameter groups differ in {keys}; the learning rate alone may differ"
    RATIO_CHANGES = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "the schedule changes the ratio of the parameter groups' learning rates",
    )
    RATIOS_UNDER_NOISE = _UNSUPPORTED, Scope.LIMIT, "parameter groups with different learning rates under {noises}"
    MANUAL_OPTIMIZATION = (
        _UNSUPPORTED,
        Scope.MOTION,
        "manual optimization: the module may do anything between two steps of the optimizer",
    )
    MAXIMIZES = _UNSUPPORTED, Scope.LIMIT, "the optimizer maximizes"
    OWN_CLIPPING = _UNSUPPORTED, Scope.LIMIT, "the module clips gradients in its own way (configure_gradient_clipping)"
    OTHER_PARAMETERS = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "the optimizer holds {held} parameters, {measured} are measured, and these are not the same: exclude "
        "parameters that are not trained, by requires_grad_(False) or SingularLimitMonitor(parameters=...)",
    )
    NO_STEP_SIZE = _UNSUPPORTED, Scope.LIMIT, "the learning rate is 0"
    NO_STEP_SIZE_OF_GROUP = _UNSUPPORTED, Scope.LIMIT, "the learning rate of a parameter group is 0"
    # the noise
    BATCH_NORMALISATION = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "batch normalisation couples the samples of a batch in training mode (use GroupNorm, which does not)",
    )
    OTHER_RANDOMNESS = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "training mode is random beyond dropout (noise drawn in forward, dropout that evaluation mode does not call)",
    )
    ORDER_UNKNOWN = _UNSUPPORTED, Scope.LIMIT, "{why}"
    # the samples
    SUBSET = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "{samples} of {total} training samples are measured: the distance to their nearest point is a lower bound for "
        "that of all, and distances to levels are those of these samples; pass num_samples to measure all of them",
    )
    GATHERED = (
        _NOTED,
        Scope.NOTHING,
        "the {samples} samples that are measured were gathered from the run's own batches until step {step}, as "
        "training saw them",
    )
    FRESH_SAMPLES = (
        _UNSUPPORTED,
        Scope.LIMIT,
        "the samples change from epoch to epoch (augmentation, or noise in the data set); distances are those of the "
        "samples that training saw first",
    )
    # paths beside the training
    NO_COPY = _UNSUPPORTED, Scope.PATHS, "module and optimizer cannot be copied: {why}"
    NO_STEP_ON_COPY = (
        _UNSUPPORTED,
        Scope.PATHS,
        "training_step cannot be repeated on a copy of the module: {why}",
    )
    FORWARD_AND_LOSS = (
        _NOTED,
        Scope.NOTHING,
        "paths take the outputs of forward and the recognised loss, since training_step cannot be repeated on a copy "
        "of the module: {why}",
    )
    NO_BATCHES = (
        _UNSUPPORTED,
        Scope.PATHS,
        "training_step takes a dataloader_iter, so that its batches are not known before it is called",
    )
    SEVERAL_CALLS = (
        _UNSUPPORTED,
        Scope.PATHS,
        "the optimizer evaluated the loss {count} times in one step (L-BFGS, SAM); paths make steps of one evaluation",
    )
    NO_BASELINE = (
        _UNSUPPORTED,
        Scope.PART,
        "the noise cannot be switched off: in evaluation mode two evaluations of training_step with different random "
        "numbers differ, so that there is no baseline and no noise-induced drift",
    )
    NO_NOISE = (
        _NOTED,
        Scope.NOTHING,
        "given its batches, the training is not random, so that there is no noise-induced drift, and the baseline is "
        "the averaged path",
    )
    AVERAGED_STEPS = (
        _NOTED,
        Scope.NOTHING,
        "{why}: the averaged path takes the mean of the steps of several optimizers, each with a draw of the noise of "
        "its own, instead of one step with the mean gradient",
    )
    PENALTY = (
        _NOTED,
        Scope.NOTHING,
        "training mode adds {share:.2g} of the gradient without being random (a penalty under self.training); it "
        "counts as noise-induced",
    )
    NO_POTENTIAL = (
        _UNSUPPORTED,
        Scope.PART,
        "the averaged path lacks the drift of second order of {noises}: it is known for label noise and label flips "
        "under torch.optim.SGD with one learning rate, where the loss is recognised",
    )
    REPLAY = (
        _INVALIDATED,
        Scope.WINDOW,
        "paths do not follow this training in the window from step {start}: step {step}, repeated on a copy with the "
        "same batch and random numbers, differs from what training did by {error:.2g} of the step; look for what acts "
        "between backward and the optimizer's step (clipping or noise in hooks), and for what changes the module, its "
        "loss or the optimizer from outside (callbacks, schedules of one's own)",
    )
    WEIGHTS_MOVED = (
        _INVALIDATED,
        Scope.WINDOW,
        "paths do not follow this training in the window from step {start}: after step {step} something other than the "
        "optimizer moved the weights, by {share:.2g} of a step; look for projections of the weights, averaging of "
        "weights (SWA, EMA, Lookahead) and hooks that assign parameters",
    )
    PARAMETERS_CHANGED = (
        _INVALIDATED,
        Scope.WINDOW,
        "parameters were added to the optimizer, frozen or unfrozen at step {step}, within the window from step "
        "{start}: the next window begins with the new ones",
    )
    UNRESOLVED = (
        _INVALIDATED,
        Scope.PART,
        "the noise-induced drift in the window {start}-{stop} is smaller than the sampling error of the averaged "
        "paths, {share:.2g} of the motion: pass more draws, or a longer window",
    )
    MEMORY = (
        _SKIPPED,
        Scope.PART,
        "no paths beside the training from step {step}: their copies need {needed:.1f} GiB, and {free:.1f} GiB are "
        "free; pass replicas=0, or draws=2",
    )
    INTERRUPTED = (
        _SKIPPED,
        Scope.PART,
        "the window from step {start} was in progress when the checkpoint was written, and its paths are not stored",
    )
    TOO_SHORT = _SKIPPED, Scope.PART, "the run ended at step {step}, before the window {start}-{stop} did"
    # windows
    CLIPPED = (
        _INVALIDATED,
        Scope.PART,
        "gradients were clipped in {count} of the steps {start}-{stop}: the limit is not compared with this window",
    )
    NOT_MOVED = _INVALIDATED, Scope.WINDOW, "the optimizer moved no weight in the steps {start}-{stop}"
    UNCERTAIN = (
        _INVALIDATED,
        Scope.WINDOW,
        "the estimated error of the prediction exceeds half of the predicted displacement in the window {start}-{stop}",
    )
    DIVERGED = (
        _INVALIDATED,
        Scope.WINDOW,
        "the prediction diverges in the window {start}-{stop}: training itself is probably unstable at this step size "
        "and noise",
    )
    EXPANSION_FAILS = (
        _INVALIDATED,
        Scope.PART,
        "the noise is too large for the second-order expansion that the singular limit rests on: compared with the "
        "averaged gradient at step {step}, that of the expansion has cosine {cosine:.2f} and {ratio:.2f} times the "
        "norm",
    )
    LIMIT_STOPPED = (
        _SKIPPED,
        Scope.PART,
        "the singular limit could not be integrated over the window {start}-{stop}: {status}; the frozen limit is "
        "compared all the same",
    )
    # measurements
    LEVEL_NOT_MET = (
        _SKIPPED,
        Scope.PART,
        "no point with {level} of the excess loss was found within {gradients} gradients of all samples",
    )
    SLOWER = (
        _NOTED,
        Scope.NOTHING,
        "the singular limit is that of {leading} alone: the drift of {others}, on a slower clock, is not part of it, "
        "since it is not known at this step size; it is known for full batches",
    )
    NEAREST = _NOTED, Scope.NOTHING, "the nearest point, at one step or more: {status}"
    FAILED = _SKIPPED, Scope.PART, "the measurement at step {step} failed: {error}"
    TIME = (
        _SKIPPED,
        Scope.PART,
        "to keep measurements below {grace:.0f} s and {share:.0%} of the wall time: {what}; pass max_overhead=None, or "
        "every_n_steps, for all of them",
    )
    LOSS_ALONE = (
        _SKIPPED,
        Scope.PART,
        "with max_overhead=0, all but the excess loss, the displacement of the weights and the clock",
    )
    STATE = _SKIPPED, Scope.PART, "the monitor's state in the checkpoint was not restored: {why}"

    @property
    def kind(self) -> Kind:
        """Unsupported, invalidated or skipped."""
        return self.value[0]

    @property
    def scope(self) -> Scope:
        """What the reason prevents from being measured or predicted."""
        return self.value[1]

    def __call__(self, *, step: int | None = None, **values: Value) -> Reason:
        """The reason with this code, at a step, with values for the placeholders in its sentence."""
        return Reason(self, step, values)


@dataclass(frozen=True)
class Reason:
    """One thing that is not measured or predicted, and why.

    Args:
        code: the code.
        step: at which it came up; None: at the start.
        values: for the placeholders in the sentence of the code.

    >>> str(Code.CLIPPED(count=3, start=0, stop=500))
    'gradients were clipped in 3 of the steps 0-500: the limit is not compared with this window'
    """

    code: Code
    step: int | None = None
    values: Mapping[str, Value] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.code.value[2].format(**{"step": self.step, **self.values})

    @property
    def sentence(self) -> str:
        """The sentence with the kind of the reason, for a verdict.

        >>> Code.MAXIMIZES().sentence
        'Unsupported: the optimizer maximizes.'
        """
        return f"{self.code.kind.value}: {self}."

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"code": self.code.name, "step": self.step, "values": dict(self.values)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Reason:
        """The reason with this state."""
        return cls(Code[state["code"]], state["step"], state["values"])
