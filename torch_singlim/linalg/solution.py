"""How an iteration ended: one enumeration for every solver and integrator, with a message for each member."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

__all__ = ["Result", "Solution"]


class Result(Enum):
    """How an iteration ended; the value is a message that says what this means and what to do.

    >>> Result.MAX_STEPS.message
    'the tolerance was not reached in the steps allowed: allow more of them, or a larger tolerance'
    """

    SUCCESSFUL = "the tolerance was reached"
    MAX_STEPS = "the tolerance was not reached in the steps allowed: allow more of them, or a larger tolerance"
    INCONSISTENT = "the right-hand side has a part outside the range: this is the least-squares solution"
    STALLED = "no shorter step helps: this is how far it got"
    NEAR_FOCAL_POINT = (
        "near a focal point of the zero-loss set: the distance is flat along that set, or has a saddle, and another "
        "point may be closer: allow more steps, or measure later in the training"
    )
    SINGULAR = (
        "the zero-loss set is singular here: B loses rank, as at outputs that reach their targets only at infinity, or "
        "in a layer with fewer units than outputs: use soft targets, another loss or a wider layer"
    )
    DIVERGED = "the iterates are not bounded: the step size is probably unstable"
    INACCURATE = "the accuracy asked for costs more than unit-step integration: use effective_flow"

    @property
    def message(self) -> str:
        """What the result means and what to do."""
        return self.value


@dataclass(frozen=True)
class Solution:
    """The vector that an iteration found, and how the iteration ended.

    Args:
        x: the vector.
        status: how it ended.
        steps: number of products taken.
        residual: norm of the residual relative to the right-hand side; for a matrix function, the relative change over
            the last steps.
    """

    x: Tensor
    status: Result
    steps: int
    residual: float
