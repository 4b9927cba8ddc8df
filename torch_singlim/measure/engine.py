"""The engine: makes measurements from snapshots and steps of a training, independent of how these are taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from torch_singlim.geometry import LevelPoint
from torch_singlim.measure.budget import Account, Budget, expected_seconds
from torch_singlim.measure.distance import DistanceMeasurement
from torch_singlim.measure.full_batch_window import compare_window
from torch_singlim.measure.geometry import Geometry
from torch_singlim.measure.levels import Level, Levels
from torch_singlim.measure.limit import against_limit, displacement_in_metric
from torch_singlim.measure.measurement import Clock, Measurement
from torch_singlim.measure.options import Options
from torch_singlim.measure.reasons import Code, Reason, Scope
from torch_singlim.measure.schedule import Due, Schedule
from torch_singlim.measure.snapshot import Snapshot
from torch_singlim.measure.states import check_keys
from torch_singlim.measure.steps import Recorded
from torch_singlim.measure.tags import EXCESS_LOSS, scalars
from torch_singlim.measure.training import Training, checked, orders_known, with_decay, with_orders
from torch_singlim.measure.verdict import Visibility, verdict, visibility
from torch_singlim.measure.window import Window
from torch_singlim.measure.windows import Windows
from torch_singlim.network import PeerFailed, ProcessGroup, ZeroLossProblem, out_of_memory
from torch_singlim.noise import NoiseSystem, parts

__all__ = ["Engine"]

_log = logging.getLogger(__name__)
T = TypeVar("T")

# version of the state_dict; other versions cannot be loaded
_VERSION = 5


class Engine:
    """Measures snapshots of one training, opens, advances and closes windows, and keeps the results and the reasons.

    The constructor does no work: derivatives are checked, and the order of a custom noise is measured, before the first
    measurement that needs them. Measurements read the problem's module and do not change it.

    A window begins and ends with a snapshot. In between, its drift is compared with paths beside the training if these
    are opened by `Windows.follow`, and advanced with every step. `full_batch` is for snapshots without steps in
    between, as of checkpoints: the drift is then compared with descent on the loss of all samples.

    Args:
        problem: loss and samples, or the reason why there are none; None: they will be given to `found`.
        training: the noise, and what of the training the theory does not cover.
        options: what to measure.
        schedule: the steps at which to measure.
        budget: the time that measurements may take.
        generator: of all random directions and draws.
        full_batch: compare windows with full-batch descent instead of paths.
        process_group: of the processes that make the same measurements.
    """

    def __init__(
        self,
        problem: ZeroLossProblem | Reason | None,
        training: Training,
        options: Options,
        schedule: Schedule,
        budget: Budget,
        generator: torch.Generator,
        *,
        full_batch: bool = False,
        process_group: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
    ) -> None:
        self.problem = None if isinstance(problem, Reason) else problem
        self.full_batch, self.process_group = full_batch, process_group
        self.options, self.schedule, self.budget, self.generator = options, schedule, budget, generator
        self.noise: NoiseSystem = training.noise
        self.whole, self.adaptive = training.whole, training.adaptive
        self.reasons: list[Reason] = list(training.reasons)
        """Why something was not measured or predicted, the oldest reason first."""
        self.history: dict[int, dict[str, float]] = {}
        """What was measured: step -> tag -> value."""
        self.last_distance: DistanceMeasurement | None = None
        self.geometry = Geometry(
            options,
            schedule,
            budget,
            lambda kind, part: self.affords(kind, part=part),
            lambda part: process_group.broadcast(budget.gradients(part=part)),
            generator,
        )
        self.windows = Windows(schedule)
        self.last_step = -1
        """The last step at which everything was measured."""
        self._timed = self._checked = False

    def found(self, problem: ZeroLossProblem | Reason, training: Training) -> None:
        """Measure distances from now on, as loss and samples have been found in the course of the training.

        Args:
            problem: loss and samples, or the reason why there are none.
            training: with the noise of this problem.
        """
        self.problem = None if isinstance(problem, Reason) else problem
        self.noise, self.whole, self.adaptive = training.noise, training.whole, training.adaptive
        self.note(*training.reasons)
        if not self.supports(Scope.GEOMETRY):
            self.budget.close(Account.GEOMETRY)

    # --- what can be measured --------------------------------------------------------------------------------------

    def supports(self, scope: Scope) -> bool:
        """Whether no reason is known that prevents this scope from being measured or predicted."""
        there = scope is Scope.PATHS or self.problem is not None
        return there and not any(reason.code.scope in scope.blocked_by for reason in self.reasons)

    def _noise_at(self, snapshot: Snapshot) -> NoiseSystem:
        """All noise of the training, in the optimizer's metric at a snapshot."""
        return self.noise if snapshot.metric is None else with_decay(self.noise, snapshot.weight_decay)

    def variance_at(self, snapshot: Snapshot) -> float:
        """sigma^2 of the slow clock."""
        return 0.0 if self.problem is None else self._noise_at(snapshot).variance(self.problem)

    @property
    def _has_part(self) -> bool:
        """Whether a part of the training set is measured."""
        return any(reason.code is Code.SUBSET for reason in self.reasons)

    def note(self, *reasons: Reason | None) -> list[Reason]:
        """Keep reasons, each of them once, and return the new ones."""
        new = [reason for reason in reasons if reason is not None and reason not in self.reasons]
        self.reasons += new
        return new

    def affords(self, kind: str, *, part: float = 1.0) -> bool:
        """Whether this takes no more than a part of the time that is left; the first process decides for all."""
        return bool(self.process_group.broadcast(self.budget.affords(kind, part=part)))

    def _prepare(self) -> bool:
        """Check derivatives and measure orders, once; returns whether the nearest point can be measured."""
        if self.problem is None or not self.supports(Scope.SET):
            return False
        if not self._checked:
            if not self.affords("check"):
                return False
            with self.budget.timed("check"):
                draws, limit = self.options.num_draws, self.supports(Scope.LIMIT)
                found = checked(self.problem, self.noise, limit=limit, num_draws=draws, generator=self.generator)
                self.noise = found.noise
                self.note(*found.reasons)
            self._checked = True
        return self.supports(Scope.SET)

    # --- one step --------------------------------------------------------------------------------------------------

    def due(self, before: int, step: int) -> Due | None:
        """What is due at this step; `before` is the last step at which this was asked."""
        if self.windows.ends(step) or self.schedule.begins(before, step) is not None:
            return Due.MEASUREMENT if step != self.last_step else None
        known = EXCESS_LOSS.name in self.history.get(step, {})
        return Due.EXCESS_LOSS if step in self.schedule.losses and not known else None

    # --- paths beside the training ---------------------------------------------------------------------------------

    def opens(self, step: int, seconds_per_step: float | None) -> int | None:
        """The step up to which paths should be opened now; None: not now; see `Windows.opens`."""
        return self.windows.opens(step, seconds_per_step, self.budget) if self.supports(Scope.PATHS) else None

    def advance(self, step: int, recorded: Recorded) -> Measurement | None:
        """Make one step on all paths; the values of the window so far if they are to be logged at this step.

        Args:
            step: optimizer steps so far.
            recorded: the step that ended.
        """
        window, reason = self.windows.advance(step, recorded)
        self.note(reason)
        if window is None:
            return None
        return self._keep(Measurement(step, window=window, overhead=self.budget.overhead))

    def give_up(self, reason: Reason | None) -> None:
        """Do without paths for the rest of the window in progress; its motion is still measured."""
        self.note(reason)
        self.windows.give_up()

    # --- measurements ----------------------------------------------------------------------------------------------

    def measure_loss(self, snapshot: Snapshot) -> Measurement:
        """The excess loss alone."""
        return self._keep(Measurement(snapshot.step, excess_loss=self._excess_loss(snapshot)))

    def measure(self, snapshot: Snapshot, *, before: int | None = None) -> Measurement:
        """Measure everything at a snapshot; a window that ends here is closed, one that begins here is opened.

        Args:
            snapshot: of the training.
            before: the last step before this one, if steps were skipped; default: the step number minus one.
        """
        step, snapshot = snapshot.step, snapshot.for_noise(self.noise)
        self.last_step = step
        self.note(*snapshot.reasons)
        excess_loss = self._contained(step, lambda: self._excess_loss(snapshot))
        prepared = self._contained(step, self._prepare)
        ended = self._close(snapshot) if self.windows.ends(step) else None
        at = self._at_weights(snapshot, prepared=bool(prepared))
        clock = None
        if self.supports(Scope.LIMIT) and orders_known(self.noise):
            clock = Clock.at(snapshot, self.noise, self.variance_at(snapshot))
        # nothing can fail from here on: the state may change
        self.windows.turn(snapshot, before, ended, None if at.of_limit is None else at.of_limit.forecast)
        self.last_distance = at.of_limit or self.last_distance
        return self._keep(
            replace(at, excess_loss=excess_loss, window=ended, clock=clock, overhead=self.budget.overhead)
        )

    def _at_weights(self, snapshot: Snapshot, *, prepared: bool) -> Measurement:
        """Distances and stability; the nearest point if its measurement is prepared."""
        problem, step, geometry = self.problem, snapshot.step, self.geometry
        if problem is None:
            return Measurement(step)
        levels: dict[Level, LevelPoint] = {}

        def find(*which: Level) -> None:
            self.note(*geometry.find_levels(problem, snapshot, levels, *which))

        self._contained(step, lambda: find(Level.HALF, Level.TENTH))
        stability = self._contained(step, lambda: geometry.stability(problem, snapshot))
        noise = self._noise_at(snapshot) if self.supports(Scope.LIMIT) else None
        distance = self._contained(step, lambda: geometry.distance(problem, snapshot, noise)) if prepared else None
        in_metric = self._contained(step, lambda: geometry.in_metric(problem, snapshot, noise, distance))
        for found in filter(None, (distance, in_metric)):
            self.note(found.reason, found.of_nearest, found.of_slower)
        self._contained(step, lambda: find(Level.HUNDREDTH))
        whole = self._contained(step, lambda: geometry.of_whole(problem, self.whole, snapshot, levels))
        fewer = None
        if distance is not None and self._has_part:
            fewer = self._contained(step, lambda: geometry.of_fewer(problem, snapshot, distance.nearest))
        return Measurement(
            step,
            levels=levels,
            whole=whole or {},
            stability=stability,
            distance=distance,
            in_metric=in_metric,
            of_samples=fewer or {},
        )

    def _contained(self, step: int, what: Callable[[], T | None]) -> T | None:
        """A part of a measurement; where it fails, on any process, the others are made all the same."""
        try:
            with self.process_group.together():
                return what()
        except Exception as error:
            if out_of_memory(error) or (isinstance(error, PeerFailed) and error.left_further):
                raise
            _log.debug("a part of a measurement failed", exc_info=error)
            if isinstance(error, NotImplementedError):  # torch has no such derivative of an operation
                cure = "write it out in elementary operations"
                self.note(Code.DERIVATIVES(why=f"an operation lacks derivatives, {error}; {cure}"))
            else:
                self.note(self.failure(step, error))
            return None

    def failure(self, step: int, error: Exception) -> Reason | None:
        """The reason of a failed measurement; None: one was noted before, and only the first is."""
        if any(reason.code is Code.FAILED for reason in self.reasons):
            return None
        return Code.FAILED(step=step, error=f"{type(error).__name__}: {error}")

    def _keep(self, measurement: Measurement) -> Measurement:
        values = scalars(measurement)
        if values:
            self.history[measurement.step] = {**self.history.get(measurement.step, {}), **values}
        return measurement

    def _excess_loss(self, snapshot: Snapshot) -> float | None:
        if self.problem is None:
            return None
        if self.budget.share is not None and not self._timed:
            total, draws = 0 if self.whole is None else len(self.whole), self.options.num_draws
            self.budget.expect(expected_seconds(self.problem, num_draws=draws, total=total))
            self._timed = True
        if not self.affords("loss"):
            return None
        with self.budget.timed("loss"):
            self.problem.function.refresh_constants()
            return self.problem.loss(snapshot.weights).item()

    def _close(self, snapshot: Snapshot) -> Window:
        """The window that ends here: its displacement, compared with theory if supported and if there is time."""
        opened = self.windows.open
        assert opened is not None
        if opened.followed is None and not opened.closed and self.supports(Scope.PATHS) and not self.full_batch:
            if self.budget.share is None:  # resumed in the middle of an epoch
                self.note(Code.INTERRUPTED(start=opened.start))
            else:
                self.budget.skip("paths")
        window, sgd, steps = opened.at(snapshot), snapshot.sgd, snapshot.step - opened.start
        before, after = opened.sums, snapshot.sums
        if before is not None and after is not None:
            clipped, lr = after.clipped - before.clipped, (after.lr - before.lr) / steps
            if clipped:
                self.note(Code.CLIPPED(count=clipped, start=opened.start, stop=snapshot.step))
            if lr == 0:
                self.note(Code.NOT_MOVED(start=opened.start, stop=snapshot.step))
            if clipped or lr == 0:
                return window
            sgd = None if sgd is None else replace(sgd, lr=lr if opened.metric is None else opened.metric.scale * lr)
        if sgd is None or not self.supports(Scope.LIMIT) or not self._checked:
            return window
        if self.full_batch:
            assert self.problem is not None
            window = compare_window(
                self.problem,
                opened.iterate,
                snapshot.iterate,
                start=opened.start,
                stop=snapshot.step,
                noise=self.noise,
                sgd=sgd,
                replicas=self.options.replicas,
                velocity=opened.velocity,
                generator=self.generator,
            )
            self.note(window.reason)
        if opened.forecast is None or self.problem is None:
            return window
        displacement = displacement_in_metric(opened, snapshot)
        if isinstance(displacement, Reason):
            self.note(displacement)
            return window
        flow = self.geometry.flow(self.problem, opened, self._noise_at(snapshot), sgd, steps=steps)
        if isinstance(flow, Reason):
            self.note(flow)
            flow = None
        return against_limit(window, opened.forecast, displacement, steps, flow=flow)

    # --- what was found --------------------------------------------------------------------------------------------

    @property
    def visibility(self) -> Visibility:
        """Whether the effect of the noise is visible, in all windows together or in the last one."""
        return visibility(
            self.windows.last, self.last_distance, self.windows.noise_ratio, self.windows.noise_ratio_of_replicas
        )

    @property
    def all_reasons(self) -> list[Reason]:
        """The reasons, with that for what there was no time for."""
        skipped = self.budget.reason
        return [*self.reasons, *([skipped] if skipped else [])]

    @property
    def noise_words(self) -> str | None:
        """Whether the effect of the noise is visible, in words; None: nothing was compared with theory."""
        last = self.windows.last
        return self.visibility.words if last is not None and last.comparisons else None

    def verdict(self) -> str:
        """The results in words."""
        return verdict(self.history, reasons=self.all_reasons, noise=self.noise_words)

    # --- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Window in progress, results, reasons, orders, generator and budget, as tensors and plain values."""
        return {
            "version": _VERSION,
            "history": {step: dict(point) for step, point in self.history.items()},
            "reasons": [reason.state_dict() for reason in self.reasons],
            "windows": self.windows.state_dict(),
            "levels": self.geometry.levels.state_dict(),
            "orders": [part.order for part in parts(self.noise)] if orders_known(self.noise) else None,
            "checked": self._checked,
            "last_step": self.last_step,
            "generator": self.generator.get_state(),
            "budget": self.budget.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint.

        Args:
            state: as `state_dict` gives it.

        Raises:
            ValueError: a state of another version, or one that is not whole; its keys are named. Nothing has changed
                then.
        """
        if state.get("version", _VERSION) != _VERSION:
            raise ValueError(f"a state of version {_VERSION} was expected, got version {state['version']}")
        check_keys(state, self.state_dict())
        windows = Windows(self.schedule)
        windows.load_state_dict(state["windows"], self.problem)
        levels = Levels.from_state(state["levels"], None if self.problem is None else self.problem.weights())
        history = {step: dict(point) for step, point in state["history"].items()}
        noted = [Reason.from_state(each) for each in state["reasons"]]
        noise = with_orders(self.noise, state["orders"])
        random = torch.Generator().set_state(state["generator"]).get_state()
        # what can fail is done, but for this
        self.budget.load_state_dict(state["budget"])
        self.generator.set_state(random)
        self.note(*noted)
        self.windows, self.geometry.levels, self.history, self.noise = windows, levels, history, noise
        self._checked, self.last_step = state["checked"], state["last_step"]
        if windows.open is not None and windows.open.closed:
            self.note(Code.INTERRUPTED(start=windows.open.start))
