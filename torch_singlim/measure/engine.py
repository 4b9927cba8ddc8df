"""The engine: makes measurements from snapshots of a training, independent of how these are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torch_singlim.geometry import linearised_displacement, nearest_point
from torch_singlim.linalg import Solution
from torch_singlim.measure.budget import Budget, expected_seconds
from torch_singlim.measure.distance import DistanceMeasurement, Forecast, measure_distance, tangent_at
from torch_singlim.measure.full_batch_window import compare_window
from torch_singlim.measure.measurement import Clock, Measurement
from torch_singlim.measure.reasons import Code, Reason, Scope
from torch_singlim.measure.schedule import Due, Schedule
from torch_singlim.measure.snapshot import Snapshot, StepSums
from torch_singlim.measure.states import check_keys
from torch_singlim.measure.tags import Need, scalars
from torch_singlim.measure.training import Training
from torch_singlim.measure.verdict import Visibility, verdict, visibility
from torch_singlim.measure.window import Window
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import CustomNoise, NoiseSystem, Sum, parts
from torch_singlim.theory import check_derivatives, has_effective_flow, with_measured_order

__all__ = ["Engine", "OpenWindow", "Options"]

# version of the state_dict; other versions cannot be loaded
_VERSION = 1
# tolerance of the nearest point at which the order of a custom noise is measured
_ORDER_POINT = 1e-2


@dataclass(frozen=True)
class Options:
    """What is measured, and how accurately.

    Args:
        replicas: number of independent runs of each window for the noise ceiling; 0: none.
        reference: integrate the effective flow by unit steps, too.
        num_draws: number of random directions for the limit's potential.
        relaxed_after: a mode counts as relaxed once alpha lambda step reaches this.
    """

    replicas: int = 0
    reference: bool = False
    num_draws: int = 32
    relaxed_after: float = 3.0


@dataclass(frozen=True)
class OpenWindow:
    """A window in progress, with what is needed when it ends.

    Args:
        start: optimizer steps at the beginning.
        stop: optimizer steps at the end.
        iterate: w - xi at the beginning  ``[P]``.
        velocity: the optimizer's momentum at the beginning  ``[P]``.
        sums: over the steps before the window.
        forecast: the motion that the limit predicts from the beginning.
        between: the iterate at some steps within the window.
    """

    start: int
    stop: int
    iterate: Tensor = field(repr=False)
    velocity: Tensor | None = field(repr=False)
    sums: StepSums | None
    forecast: Forecast | None = field(repr=False)
    between: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; the tangent space is recomputed from its point."""
        f = self.forecast
        forecast = None if f is None else {k: getattr(f, k) for k in ("point", "drift", "diffusion", "dimension")}
        sums = None if self.sums is None else vars(self.sums)
        return {**vars(self), "forecast": forecast, "sums": sums}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], problem: ZeroLossProblem | None) -> OpenWindow:
        """The window with this state."""
        f, sums = state["forecast"], state["sums"]
        if f is not None and problem is not None:
            f = Forecast(tangent=tangent_at(problem, f["point"]), **f)
        return cls(**{**state, "forecast": f, "sums": None if sums is None else StepSums(**sums)})


class Engine:
    """Measures snapshots of one training, opens and closes windows, and keeps the results and the reasons.

    The constructor does no work: derivatives are checked, and the order of a custom noise is measured, before the first
    measurement that needs them. Measurements read the problem's module and do not change it.

    Args:
        problem: loss and samples, or the reason why there are none.
        training: the noise, and what of the training the theory does not cover.
        options: what to measure.
        schedule: the steps at which to measure.
        budget: the time that measurements may take.
        generator: of all random directions and draws.
    """

    def __init__(
        self,
        problem: ZeroLossProblem | Reason,
        training: Training,
        options: Options,
        schedule: Schedule,
        budget: Budget,
        generator: torch.Generator,
    ) -> None:
        self.problem = None if isinstance(problem, Reason) else problem
        self.options, self.schedule, self.budget, self.generator = options, schedule, budget, generator
        self.noise: NoiseSystem = training.noise
        self.reasons: list[Reason] = list(training.reasons)
        """Why something was not measured or predicted, in the order in which it came up."""
        self.history: dict[int, dict[str, float]] = {}
        """What was measured: step -> tag -> value."""
        self.last_distance: DistanceMeasurement | None = None
        self.last_window: Window | None = None
        self.window: OpenWindow | None = None
        """The window in progress."""
        self.last_step = -1
        """The last step at which everything was measured."""
        self._timed = self._checked = False

    # --- what can be measured --------------------------------------------------------------------------------------

    def supports(self, scope: Scope) -> bool:
        """Whether no reason is known that prevents this scope from being measured or predicted."""
        blocking = {Scope.EVERYTHING, scope} | ({Scope.GEOMETRY} if scope is Scope.DRIFT else set())
        return self.problem is not None and not any(reason.code.scope in blocking for reason in self.reasons)

    @property
    def variance(self) -> float:
        """sigma^2 of the slow clock."""
        return 0.0 if self.problem is None else self.noise.variance(self.problem)

    def expects(self) -> frozenset[Need]:
        """The conditions of series that are fulfilled, so that these will be logged if there is time."""
        if self.problem is None or not self.supports(Scope.DRIFT):
            return frozenset()
        known = self._orders_known()
        found = {Need.DRIFT: True, Need.REPLICAS: self.options.replicas > 0, Need.MARKS: self.schedule.marks}
        found[Need.MOVES] = known and self.noise.order is not None
        found[Need.FLOW] = known and has_effective_flow(self.noise, self.problem)
        return frozenset(need for need, there in found.items() if there)

    def note(self, *reasons: Reason | None) -> list[Reason]:
        """Keep reasons, each of them once, and return the new ones."""
        new = [reason for reason in reasons if reason is not None and reason not in self.reasons]
        self.reasons += new
        return new

    def affords(self, kind: str) -> bool:
        """Whether there is time for this; the first process decides for all."""
        afforded = self.budget.affords(kind)
        if self.problem is None:
            return afforded
        return bool(self.problem.process_group.broadcast(afforded, self.problem.device))

    def _orders_known(self) -> bool:
        return not any(isinstance(p, CustomNoise) and p.claimed_order == "measured" for p in parts(self.noise))

    def _prepare(self, snapshot: Snapshot) -> bool:
        """Time a gradient, check derivatives and measure orders, once; returns whether the geometry can be measured."""
        if self.problem is None or not self.supports(Scope.GEOMETRY):
            return False
        if self.budget.share and not self._timed:
            self.budget.expect(self._expected_seconds(self.problem, snapshot))
            self._timed = True
        if not self._checked:
            if not self.affords("check"):
                return False
            with self.budget.timed("check"):
                self._check(self.problem)
            self._checked = True
        return self.supports(Scope.GEOMETRY)

    def _expected_seconds(self, problem: ZeroLossProblem, snapshot: Snapshot) -> dict[str, float]:
        options, window = self.options, self.schedule.longest
        batch = 1.0 if snapshot.sgd is None else snapshot.sgd.batch(problem.num_samples) / problem.num_samples
        runs = options.replicas * batch + 2 * options.reference
        return expected_seconds(problem, window=window, num_draws=options.num_draws, runs=runs)

    def _check(self, problem: ZeroLossProblem) -> None:
        """Measure the order of custom noises and check the derivatives; failures are kept as reasons."""
        if self.supports(Scope.DRIFT) and not self._orders_known():
            point = nearest_point(problem, problem.weights(), rtol=_ORDER_POINT).point
            try:
                self.noise = with_measured_order(
                    self.noise, problem, point, num_draws=self.options.num_draws, generator=self.generator
                )
            except ValueError as error:
                self.note(Code.ORDER_UNKNOWN(why=str(error)))
        try:
            check_derivatives(problem, self.noise if self.supports(Scope.DRIFT) else Sum(()))
        except ValueError as error:
            self.note(Code.DERIVATIVES(why=str(error)))

    # --- one step --------------------------------------------------------------------------------------------------

    def due(self, before: int, step: int) -> Due | None:
        """What is due at this step; `before` is the last step at which this was asked."""
        if self._ends(step) or self.schedule.begins(before, step) is not None:
            return Due.MEASUREMENT if step != self.last_step else None
        if self.window is not None and step in self.schedule.marks_of(self.window.start, self.window.stop):
            return Due.MARK
        return Due.EXCESS_LOSS if step in self.schedule.losses and step not in self.history else None

    def mark(self, snapshot: Snapshot) -> None:
        """Record the iterate of the window in progress."""
        if self.window is not None:
            self.window.between[snapshot.step] = snapshot.iterate

    def measure_loss(self, snapshot: Snapshot) -> Measurement:
        """The excess loss alone."""
        measurement = Measurement(snapshot.step, excess_loss=self._excess_loss(snapshot))
        self._keep(measurement)
        return measurement

    def measure(self, snapshot: Snapshot, *, before: int | None = None) -> Measurement:
        """Measure everything at a snapshot; a window that ends here is closed, one that begins here is opened.

        Args:
            snapshot: of the training.
            before: the last step before this one, if steps were skipped; default: the step number minus one.
        """
        step = self.last_step = snapshot.step
        self.note(*snapshot.reasons)
        excess_loss = self._excess_loss(snapshot)
        prepared = self._prepare(snapshot)
        ended = self._close(snapshot) if self._ends(step) else None
        distance = self._distance(snapshot) if prepared else None
        linearised = self._linearised(snapshot) if prepared and distance is None else None
        clock = None
        if self.supports(Scope.DRIFT) and self._orders_known():
            clock = Clock.at(snapshot, self.noise, self.variance)
        # nothing can fail from here on: the state may change
        begun = self.schedule.begins(step - 1 if before is None else before, step)
        if begun is not None:
            forecast = None if distance is None else distance.forecast
            iterate, velocity = snapshot.iterate, snapshot.velocity
            self.window = OpenWindow(step, step + begun, iterate, velocity, snapshot.sums, forecast)
        elif ended is not None:
            self.window = None
        self.last_distance = distance or self.last_distance
        self.last_window = ended or self.last_window
        measurement = Measurement(step, excess_loss, distance, linearised, ended, clock, self.budget.overhead)
        self._keep(measurement)
        return measurement

    def abandon(self, step: int) -> None:
        """After a failed measurement: discard a window that should have ended here."""
        if self.window is not None and self.window.start != step:
            self.window = None

    def _keep(self, measurement: Measurement) -> None:
        values = scalars(measurement)
        if values:
            self.history[measurement.step] = values

    def _excess_loss(self, snapshot: Snapshot) -> float | None:
        if self.problem is None:
            return None
        self.problem.function.refresh_constants()
        return self.problem.loss(snapshot.weights).item()

    def _ends(self, step: int) -> bool:
        return self.window is not None and step >= self.window.stop

    def _close(self, snapshot: Snapshot) -> Window:
        """The window that ends here: its displacement, compared with theory if supported and if there is time."""
        opened = self.window
        assert opened is not None
        start, stop = opened.start, snapshot.step
        measured = Window(start, stop, snapshot.iterate - opened.iterate)
        sgd = snapshot.sgd
        before, after = opened.sums, snapshot.sums
        if before is not None and after is not None:
            clipped, lr = after.clipped - before.clipped, (after.lr - before.lr) / (stop - start)
            if clipped:
                self.note(Code.CLIPPED(count=clipped, start=start, stop=stop))
            if lr == 0:
                self.note(Code.NOT_MOVED(start=start, stop=stop))
            if clipped or lr == 0:
                return measured
            sgd = None if sgd is None else replace(sgd, lr=lr)
        if sgd is None or self.problem is None or not self.supports(Scope.DRIFT) or not self._checked:
            return measured
        if not self.affords("window"):
            return measured
        with self.budget.timed("window"):
            window = compare_window(
                self.problem,
                opened.iterate,
                snapshot.iterate,
                start=start,
                stop=stop,
                noise=self.noise,
                sgd=sgd,
                forecast=opened.forecast,
                replicas=self.options.replicas,
                reference=self.options.reference,
                accurate=self.affords("steps"),
                between=opened.between,
                velocity=opened.velocity,
                generator=self.generator,
            )
        self.note(window.reason)
        return window

    def _distance(self, snapshot: Snapshot) -> DistanceMeasurement | None:
        """The distance and the limit's prediction, as far as there is time for them."""
        assert self.problem is not None
        if not self.affords("distance"):
            return None
        predicted = self.supports(Scope.DRIFT) and self.affords("limit")
        with self.budget.timed("limit" if predicted else "distance"):
            distance = measure_distance(
                self.problem,
                snapshot,
                noise=self.noise if predicted else None,
                num_draws=self.options.num_draws,
                relaxed_after=self.options.relaxed_after,
                generator=self.generator,
            )
        self.note(distance.reason)
        return distance

    def _linearised(self, snapshot: Snapshot) -> Solution | None:
        """The distance by one linearisation, from products alone, if there is no time for more."""
        assert self.problem is not None
        if not self.affords("linearised"):
            return None
        with self.budget.timed("linearised"):
            return linearised_displacement(self.problem, snapshot.weights)

    # --- what was found --------------------------------------------------------------------------------------------

    @property
    def visibility(self) -> Visibility:
        """Whether the effect of the noise is visible in the last window."""
        return visibility(self.last_window, self.last_distance)

    def verdict(self) -> str:
        """The results in words."""
        skipped = self.budget.reason
        compared = self.last_window is not None and self.last_window.comparisons
        return verdict(
            self.history,
            reasons=[*self.reasons, *([skipped] if skipped else [])],
            noise=self.visibility.words if compared else None,
        )

    # --- resuming --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Window in progress, results, reasons, orders, generator and budget, as tensors and plain values."""
        return {
            "version": _VERSION,
            "history": {step: dict(point) for step, point in self.history.items()},
            "reasons": [reason.state_dict() for reason in self.reasons],
            "window": None if self.window is None else self.window.state_dict(),
            "orders": [part.order for part in parts(self.noise)] if self._orders_known() else None,
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
        window, orders = state["window"], state["orders"]
        if window is not None and self.problem is not None and len(window["iterate"]) != self.problem.num_weights:
            raise ValueError(f"a window of {len(window['iterate'])} weights for {self.problem.num_weights} weights")
        opened = None if window is None else OpenWindow.from_state(window, self.problem)
        history = {step: dict(point) for step, point in state["history"].items()}
        noted = [Reason.from_state(each) for each in state["reasons"]]
        reasons = [*self.reasons, *(each for each in noted if each not in self.reasons)]
        noise = self.noise
        if orders is not None and len(orders) == len(parts(noise)):  # as measured when the run began
            known = zip(parts(noise), orders, strict=True)
            systems = tuple(replace(n, claimed_order=k) if isinstance(n, CustomNoise) else n for n, k in known)
            noise = Sum(systems) if isinstance(noise, Sum) else systems[0]
        random = torch.Generator().set_state(state["generator"]).get_state()
        # everything that can fail is done, but for this
        self.budget.load_state_dict(state["budget"])
        self.generator.set_state(random)
        self.window, self.history, self.reasons, self.noise = opened, history, reasons, noise
        self._checked, self.last_step = state["checked"], state["last_step"]
