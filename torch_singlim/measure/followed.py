"""A window in progress with paths beside the training: each step is checked, some of them are logged."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from torch_singlim.linalg import Result
from torch_singlim.measure.coupling import CoupledWindow
from torch_singlim.measure.paths import CoupledPaths, Path
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.replay import Replay, replay
from torch_singlim.measure.schedule import marks_of
from torch_singlim.measure.steps import Recorded
from torch_singlim.measure.window import Comparison, Model, Window
from torch_singlim.theory import WindowPrediction

__all__ = ["FollowedWindow", "unresolved"]

# largest error of replays for a window: K |w_replayed - w| / |m|, were every step wrong by as much and in one direction
_ACCUMULATED = 0.02


class FollowedWindow:
    """Paths that are advanced with every step of the run, and the values at 20 steps of the window.

    Values of a step are given only if a replay of this step on a copy agrees with what the run did, and if nothing but
    the optimizer has moved the weights in any step before.

    Args:
        paths: from the beginning of the window.
        rehearsal: a copy of the run, for replays.
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
    """

    def __init__(self, paths: CoupledPaths, rehearsal: Path, *, start: int, stop: int) -> None:
        self.paths, self.rehearsal, self.start, self.stop = paths, rehearsal, start, stop
        self._marks = marks_of(start, stop)
        self._steps = 0  # that the optimizer made

    @property
    def advanced(self) -> bool:
        """Whether a step was made on the paths."""
        return self._steps > 0

    def replays(self, step: int) -> bool:
        """Whether the step that ends at this number is replayed, for which the state before it has to be kept."""
        return step in self._marks or step == self.start + 1

    def advance(self, step: int, recorded: Recorded) -> Window | Reason | None:
        """Make one step on all paths.

        Args:
            step: optimizer steps so far.
            recorded: the step that ended.

        Returns:
            The window so far, if it is to be logged at this step; a reason why it cannot be followed any further; None.
        """
        if recorded.moved != 0:  # nan, too
            share = recorded.moved / max(recorded.length, 1e-300)
            return Code.WEIGHTS_MOVED(step=step - 1, share=share, start=self.start)
        if not recorded.same_parameters:
            return Code.PARAMETERS_CHANGED(step=step, start=self.start)
        repeated = None
        if recorded.before is not None:
            repeated = replay(self.rehearsal, self.paths.gradient, recorded)
            if not repeated.passed:
                return Code.REPLAY(step=step, error=repeated.error, start=self.start)
        self.paths.advance(recorded.step)
        self._steps += 1
        if repeated is None or not repeated.judged or step not in self._marks:
            return None
        coupled = self.paths.window(recorded.iterate)
        if not torch.isfinite(coupled.gram).all():
            return Code.DIVERGED(start=self.start, stop=step)
        return self._window(step, recorded, repeated, coupled)

    def _window(self, step: int, recorded: Recorded, repeated: Replay, coupled: CoupledWindow) -> Window | Reason:
        off = self._steps * repeated.error * recorded.length
        if off > _ACCUMULATED * coupled.norm(0):
            return Code.REPLAY(step=step, error=repeated.error, start=self.start)
        gradients = self._steps * self.paths.gradients_per_step
        window = Window.of_coupled(coupled, self.start, step, replay_error=repeated.error, gradients=gradients)
        return window if step < self.stop else self._with_predictions(window, recorded.iterate)

    def _with_predictions(self, window: Window, iterate: Tensor) -> Window:
        """The window at its end, with the displacements themselves."""
        assert window.coupled is not None
        vectors = {Model.BASELINE: self.paths.displacement_of_baseline, Model.AVERAGED: self.paths.displacement}
        errors = {Model.BASELINE: 0.0, Model.AVERAGED: window.coupled.sampling_error}
        comparisons = {
            model: Comparison(
                each.agreement,
                WindowPrediction(vectors[model]()[None], errors[model], 0.0, window.gradients, Result.SUCCESSFUL),
            )
            for model, each in window.comparisons.items()
        }
        return replace(window, displacement=self.paths.moved(iterate), comparisons=comparisons)


def unresolved(window: Window) -> Reason | None:
    """Why the window has no values for the noise-induced drift, though there are a baseline and averaged paths."""
    coupled = window.coupled
    if coupled is None or coupled.noise is None or window.noise is not None:
        return None
    share = 0.0 if not coupled.norm(0) else coupled.sampling_error / coupled.norm(0)
    return Code.UNRESOLVED(start=window.start, stop=window.stop, share=share if math.isfinite(share) else 0.0)
