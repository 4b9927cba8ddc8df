"""When probes are made, and the window that one has opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torch_singlim.observe import Forecast, tangent_at
from torch_singlim.problem import ZeroLossProblem

__all__ = ["OpenWindow", "probe_starts", "window_marks"]

# equal parts of a window, whose scatter gives the standard errors
_PARTS = 4


def probe_starts(window: int, every_n_steps: int | None, total: int | None) -> Iterator[int]:
    """Optimizer steps at which windows begin: 0, then every n steps; or at window times powers of two.

    Without `every_n_steps` the last window of a run of known length ends with it.

    >>> list(probe_starts(100, None, 1000))
    [0, 100, 200, 400, 800, 900]
    >>> list(probe_starts(100, 300, 1000))
    [0, 300, 600, 900]
    """
    limit = math.inf if total is None else total - window
    starts = [0]
    step = every_n_steps or window
    while step <= limit and len(starts) < 10_000:
        starts.append(step)
        step += every_n_steps or step
    if every_n_steps is None and total is not None and limit > 0:
        # a last doubling that would overlap the final window gives way to it
        starts = [s for s in starts if s + window <= limit] + [int(limit)]
    yield from starts


def window_marks(window: int) -> set[int]:
    """Steps within a window at which the weights are kept, its quarters, for standard errors.

    >>> sorted(window_marks(500))
    [125, 250, 375]
    """
    return {round(window * part / _PARTS) for part in range(1, _PARTS)} - {0, window}


@dataclass
class OpenWindow:
    """A window that has begun: where, and what was there."""

    start: int
    drifting: Tensor  # [P]
    velocity: Tensor | None  # the optimizer's momentum [P]
    step_lengths: float  # sum of the learning rates so far
    clipped: int  # steps so far whose gradient was clipped
    forecast: Forecast | None
    between: dict[int, Tensor] = field(default_factory=dict)  # what drifted at some of its steps

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; the tangent space is found again from its point."""
        f = self.forecast
        forecast = None if f is None else {k: getattr(f, k) for k in ("point", "drift", "diffusion", "dimension")}
        return {**vars(self), "forecast": forecast}

    @classmethod
    def from_state(cls, state: dict[str, Any], problem: ZeroLossProblem) -> OpenWindow:
        """The window as it was."""
        f = state["forecast"]
        if f is not None:
            f = Forecast(tangent=tangent_at(problem, f["point"]), **f)
        return cls(**{**state, "forecast": f})
