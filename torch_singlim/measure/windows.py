"""The windows of a run: which one is in progress, what its paths give, what the last one gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch_singlim.linalg import Estimate
from torch_singlim.measure.budget import Account, Budget
from torch_singlim.measure.coupling import CoupledWindow, Projection, pooled
from torch_singlim.measure.distance import Forecast
from torch_singlim.measure.followed import FollowedWindow, unresolved
from torch_singlim.measure.open_window import OpenWindow
from torch_singlim.measure.paths import CoupledPaths, Path
from torch_singlim.measure.reasons import Reason
from torch_singlim.measure.schedule import Schedule
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.measure.states import check_keys
from torch_singlim.measure.steps import Recorded
from torch_singlim.measure.window import Window
from torch_singlim.network import ZeroLossProblem

__all__ = ["Windows"]


def _pooled(parts: Sequence[Projection | None]) -> Estimate:
    return pooled([each for each in parts if each is not None and each.resolved])


class Windows:
    """Opens, advances and closes the windows of a run.

    Args:
        schedule: the steps at which they begin and end.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.open: OpenWindow | None = None
        """The window in progress."""
        self.last: Window | None = None
        """What was measured last, of the window in progress or of the last one."""
        self.projections: dict[int, CoupledWindow] = {}
        """Start of each window with paths -> inner products of its displacements, as last checked."""

    @property
    def waiting(self) -> bool:
        """Whether a window is in progress for which paths may still be opened."""
        return self.open is not None and self.open.followed is None and not self.open.closed

    def ends(self, step: int) -> bool:
        """Whether the window in progress ends at this step."""
        return self.open is not None and step >= self.open.stop

    def turn(self, snapshot: Snapshot, before: int | None, ended: Window | None, forecast: Forecast | None) -> None:
        """At a measurement: close the window that has ended, and open the one that begins.

        Args:
            snapshot: of the training.
            before: the last step before this one, if steps were skipped; None: the step number minus one.
            ended: what was measured of the window that ends here.
            forecast: the motion that the limit predicts from here, in the optimizer's metric.
        """
        step = snapshot.step
        begun = self.schedule.begins(step - 1 if before is None else before, step)
        if begun is not None:
            iterate, velocity = snapshot.iterate, snapshot.velocity
            metric, sums = snapshot.metric if forecast is not None else None, snapshot.sums
            self.open = OpenWindow(step, step + begun, iterate, velocity, sums, forecast, metric=metric)
        elif ended is not None:
            self.open = None
        self.last = ended or self.last

    def abandon(self, step: int) -> None:
        """After a failed measurement: discard a window that should have ended here."""
        if self.open is not None and self.open.start != step:
            self.open = None

    # --- paths beside the training ---------------------------------------------------------------------------------

    def opens(self, step: int, seconds_per_step: float | None, budget: Budget) -> int | None:
        """The step up to which paths should be opened now; None: not now.

        With a budget, windows wait until there is time for them, or become shorter; the last one begins later instead.

        Args:
            step: optimizer steps so far.
            seconds_per_step: the time that the paths' part of a step will take; None: unknown.
            budget: of the run.
        """
        window = self.open
        if window is None or not self.waiting:
            return None
        if budget.share is None:
            return window.stop if step == window.start else None
        remaining, shortest = window.stop - step, self.schedule.shortest
        if remaining < shortest or seconds_per_step is None or budget.share == 0:
            return None
        last = self.schedule.is_last(window.stop)
        seconds = budget.left(Account.PATHS) * self.schedule.part(window.start)
        affordable = int(min(seconds / seconds_per_step, remaining))
        if affordable >= remaining:
            return window.stop
        return step + affordable if affordable >= shortest and not last else None

    def follow(self, paths: CoupledPaths, rehearsal: Path, step: int, stop: int) -> None:
        """Advance paths with every step of the window in progress, from now on.

        Args:
            paths: from the present weights on.
            rehearsal: a copy of the run, for replays.
            step: optimizer steps so far.
            stop: the step up to which.
        """
        assert self.open is not None
        self.open.followed = FollowedWindow(paths, rehearsal, start=step, stop=stop)
        self.open.stop = stop

    @property
    def followed(self) -> FollowedWindow | None:
        """The paths that have to be advanced with every step; None: there are none."""
        return None if self.open is None else self.open.followed

    def replays(self, step: int) -> bool:
        """Whether the state before the step that ends at this number has to be kept, for its replay."""
        return self.followed is not None and self.followed.replays(step)

    def advance(self, step: int, recorded: Recorded) -> tuple[Window | None, Reason | None]:
        """Make one step on all paths; the window so far if it is to be logged, and what is to be noted.

        Args:
            step: optimizer steps so far.
            recorded: the step that ended.
        """
        window = self.open
        assert window is not None
        assert window.followed is not None
        found = window.followed.advance(step, recorded)
        if isinstance(found, Reason):
            self.give_up()
            return None, found
        if found is None:
            return None, None
        assert found.coupled is not None
        window.last = self.last = found
        self.projections[found.start] = found.coupled
        # the measurement at the end of the window contains it
        return (None, unresolved(found)) if step >= window.stop else (found, None)

    def give_up(self) -> None:
        """Do without paths for the rest of the window in progress."""
        if self.open is not None:
            self.open.followed, self.open.closed = None, True

    @property
    def noise_ratio(self) -> Estimate:
        """The noise-induced drift, measured over predicted, of all windows together."""
        return _pooled([each.noise for each in self.projections.values()])

    @property
    def noise_ratio_of_replicas(self) -> Estimate:
        """The same of the replicas."""
        return _pooled([each.noise_of_replicas for each in self.projections.values()])

    # --- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, without paths."""
        return {
            "open": None if self.open is None else self.open.state_dict(),
            "projections": {start: each.state_dict() for start, each in self.projections.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any], problem: ZeroLossProblem | None) -> None:
        """Continue from a state.

        Args:
            state: as `state_dict` gives it.
            problem: loss and samples.

        Raises:
            ValueError: a state that is not whole, or of another network.
        """
        check_keys(state, self.state_dict())
        opened = state["open"]
        if opened is not None and problem is not None and len(opened["iterate"]) != problem.num_weights:
            raise ValueError(f"a window of {len(opened['iterate'])} weights for {problem.num_weights} weights")
        self.open = None if opened is None else OpenWindow.from_state(opened, problem)
        self.projections = {start: CoupledWindow.from_state(each) for start, each in state["projections"].items()}
