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


class Scope(Enum):
    """What a reason prevents from being measured or predicted; the value describes this."""

    EVERYTHING = "nothing is measured"
    GEOMETRY = "neither distance nor drift is compared with theory"
    DRIFT = "the drift is not predicted"
    WINDOW = "there is no prediction for one window"
    PART = "a part of the measurements is missing"


_UNSUPPORTED, _INVALIDATED, _SKIPPED = Kind.UNSUPPORTED, Kind.INVALIDATED, Kind.SKIPPED


@unique
class Code(Enum):
    """All reasons: the kind, the scope and the sentence of each."""

    # the training cannot be written as a zero-loss problem
    NO_PROBLEM = _UNSUPPORTED, Scope.GEOMETRY, "{why}"
    NO_WEIGHTS = _UNSUPPORTED, Scope.EVERYTHING, "the module has no trainable parameters"
    SHARDED = (
        _UNSUPPORTED,
        Scope.EVERYTHING,
        '{strategy} shards the weights over several processes, and measurements need all of them: use strategy="ddp" '
        "or one device, or measure the checkpoints afterwards",
    )
    DERIVATIVES = _UNSUPPORTED, Scope.GEOMETRY, "the check of the derivatives failed: {why}"
    # the optimizer
    NO_OPTIMIZER_STATE = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "{path} does not hold the state of one optimizer; ModelCheckpoint(save_weights_only=False) saves it",
    )
    SEVERAL_OPTIMIZERS = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "expected one optimizer, got {count}: the motion of the weights is then not the descent of one loss; train the "
        "other networks in a run of their own",
    )
    OPTIMIZER = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "{optimizer} rescales or reshapes the gradient; the theory covers torch.optim.SGD",
    )
    GROUPS_DIFFER = _UNSUPPORTED, Scope.DRIFT, "parameter groups differ in {keys}; the learning rate alone may differ"
    RATIO_CHANGES = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "the schedule changes the ratio of the parameter groups' learning rates",
    )
    RATIOS_UNDER_NOISE = _UNSUPPORTED, Scope.DRIFT, "parameter groups with different learning rates under {noises}"
    MANUAL_OPTIMIZATION = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "manual optimization: the module may do anything between two steps of the optimizer",
    )
    MAXIMIZES = _UNSUPPORTED, Scope.DRIFT, "the optimizer maximizes"
    OWN_CLIPPING = _UNSUPPORTED, Scope.DRIFT, "the module clips gradients in its own way (configure_gradient_clipping)"
    OTHER_PARAMETERS = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "the optimizer holds {held} parameters, {measured} are measured, and these are not the same: exclude "
        "parameters that are not trained, by requires_grad_(False) or SingularLimitMonitor(parameters=...)",
    )
    NO_STEP_SIZE = _UNSUPPORTED, Scope.DRIFT, "the learning rate is 0"
    NO_STEP_SIZE_OF_GROUP = _UNSUPPORTED, Scope.DRIFT, "the learning rate of a parameter group is 0"
    # the noise
    BATCH_NORMALISATION = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "batch normalisation couples the samples of a batch in training mode (use GroupNorm, which does not)",
    )
    OTHER_RANDOMNESS = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "training mode is random beyond the nn.Dropout layers (functional dropout, attention dropout)",
    )
    ORDER_UNKNOWN = _UNSUPPORTED, Scope.DRIFT, "{why}"
    # the samples
    SUBSET = (
        _UNSUPPORTED,
        Scope.DRIFT,
        "{samples} of {total} training samples are measured, so that the distance is a lower bound: pass num_samples "
        "to measure all of them",
    )
    # windows
    CLIPPED = _INVALIDATED, Scope.WINDOW, "gradients were clipped in {count} of the steps {start}-{stop}"
    NOT_MOVED = _INVALIDATED, Scope.WINDOW, "the optimizer moved no weight in the steps {start}-{stop}"
    UNCERTAIN = (
        _INVALIDATED,
        Scope.WINDOW,
        "the estimated error of the prediction by long steps exceeds half of the predicted displacement in the window "
        "{start}-{stop}, and there was no time for unit-step integration: pass max_overhead=None",
    )
    DIVERGED = (
        _INVALIDATED,
        Scope.WINDOW,
        "descent on the effective loss diverges in the window {start}-{stop}: training itself is probably unstable at "
        "this step size and noise",
    )
    EXPANSION_FAILS = (
        _INVALIDATED,
        Scope.PART,
        "the noise is too large for the second-order expansion that the singular limit rests on: compared with the "
        "averaged gradient at step {step}, that of the expansion has cosine {cosine:.2f} and {ratio:.2f} times the "
        "norm",
    )
    # measurements
    FAILED = _SKIPPED, Scope.PART, "the measurement at step {step} failed: {error}"
    TIME = (
        _SKIPPED,
        Scope.PART,
        "to keep measurements below {share:.0%} of the wall time: {what}; pass max_overhead=None, or every_n_steps, "
        "for all of them",
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
    'gradients were clipped in 3 of the steps 0-500'
    """

    code: Code
    step: int | None = None
    values: Mapping[str, Value] = field(default_factory=dict)

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
