"""The monitor: measures distance to the zero-loss set and drift along it during training, and compares with theory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn

from torch_singlim.callbacks.detect import find_problem
from torch_singlim.callbacks.inject import injected_noise
from torch_singlim.callbacks.isolation import attempt, isolated
from torch_singlim.callbacks.optimizer import StepRecorder, read_optimizer, select_parameters, step_batch_size
from torch_singlim.callbacks.publish import describe, log_point, provide, report_reasons, say
from torch_singlim.callbacks.resume import state_of, take_over
from torch_singlim.callbacks.snapshot import Subject
from torch_singlim.callbacks.tensorboard import (
    begin_hyperparameters,
    draw,
    end_hyperparameters,
    has_board,
    module_hyperparameters,
    open_board,
    settings,
    writers,
)
from torch_singlim.measure import (
    Budget,
    Code,
    DistanceMeasurement,
    Due,
    Engine,
    Measurement,
    Options,
    Reason,
    Schedule,
    Visibility,
    Window,
    scalars,
    terminal_line,
    training_of,
    verdict,
)
from torch_singlim.network import SampleLoss, WeightSpace
from torch_singlim.noise import NoiseSystem

__all__ = ["SingularLimitMonitor"]

# strategies with which each process has only a part of the weights
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


class SingularLimitMonitor(Callback):
    """Measure how far the weights are from the zero-loss set and how they drift along it, and compare with theory.

    The monitor works without arguments for a LightningModule whose forward maps inputs to outputs, whose batches are
    (inputs, targets), and whose loss is mse or label-smoothed cross-entropy. If a part of another training cannot be
    measured, this is not an error: the verdict gives the reason. Measurements are made on a copy of the weights:
    training with and without the monitor gives the same weights, to the last bit.

    A measurement opens a window of optimizer steps; at its end the displacement of the weights is compared with descent
    on the effective loss (the effective flow), with descent on the loss alone (the baseline) and with the singular
    limit. Scalars are sent to every logger of the trainer under ``singlim/``, where `EarlyStopping` and
    `ModelCheckpoint` find them, and are kept in `history` (step -> tag -> value, tags without the name). The last
    records, with their vectors, are `last_distance` and `last_window`. A run that is resumed from a checkpoint logs
    what it would have logged without interruption. At the end a verdict is written to the log, to `verdict`, and to
    TensorBoard.

    Args:
        loss: the loss that ``training_step`` computes, if it is not recognised: see `ZeroLossProblem`.
        data: the samples ``(inputs, targets)``; default: the first `num_samples` of the training set.
        batch_to_problem: a batch -> (inputs, targets), for batches of another form. A named function can be given in a
            configuration file.
        num_samples: maximum number of samples to measure. With fewer than the training set has, the distance is a lower
            bound and the drift is not predicted.
        parameters: the trainable parameters to measure, by shell patterns of their names; default: all. The others
            count as held fixed; if the optimizer moves them, the drift is not predicted.
        noise: the noise of the training; default: the module's dropout layers, the optimizer's weight decay, and the
            noise that `InjectNoise` callbacks inject.
        every_n_steps: measure every so many optimizer steps, without limit for the time; default: measure at `window`
            times powers of two, and such that the last window ends with the run, as far as `max_overhead` allows.
        max_overhead: share of the wall time that measurements may take; None: no limit; 0: the excess loss alone. What
            does not fit is skipped in this order: the figures, unit-step integration of a window where long steps are
            inaccurate, the limit's prediction with the expected distance, the nearest point, the drift over a window,
            the linearised distance. The excess loss is always logged.
        window: number of optimizer steps over which the drift is measured; at most `every_n_steps`.
        replicas: number of independent copies of each window for the noise ceiling, the best cosine that a
            deterministic prediction can have; 0: none. They cost as many windows of training.
        reference: also integrate the effective flow by unit steps, which costs two gradients of all samples per step.
            The default prediction, `finite_window`, approximates it.
        num_draws: number of random directions for the limit's potential, which is exact with at least as many as there
            are noise components of one sample.
        relaxed_after: a normal mode counts as relaxed once lr * eigenvalue * steps reaches this: its initial deviation
            has then decayed to exp(-relaxed_after).
        dtype: of the measurements; float64 resolves small eigenvalues.
        batch_size: samples evaluated at once; default: as many as fit into half of the free memory.
        prog_bar: show excess loss and distance in the progress bar.
        name: the beginning of all tags; a second monitor of the same trainer needs another name.
        seed: of the monitor's generator.

    Raises:
        ValueError: arguments that contradict one another; at the start of training, a noise that is given twice or does
            not fit, or patterns of names that match no parameters.

    >>> SingularLimitMonitor(window=500).window
    500
    """

    def __init__(
        self,
        *,
        loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor] | None = None,
        data: tuple[Tensor, Tensor] | None = None,
        batch_to_problem: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        num_samples: int = 1000,
        parameters: str | Sequence[str] | None = None,
        noise: NoiseSystem | None = None,
        every_n_steps: int | None = None,
        max_overhead: float | None = 0.1,
        window: int = 500,
        replicas: int = 0,
        reference: bool = False,
        num_draws: int = 32,
        relaxed_after: float = 3.0,
        dtype: Literal["float64", "float32"] = "float64",
        batch_size: int | None = None,
        prog_bar: bool = False,
        name: str = "singlim",
        seed: int = 0,
    ) -> None:
        least = {"window": (window, 1), "num_samples": (num_samples, 1), "num_draws": (num_draws, 2)}
        least |= {"replicas": (replicas, 0), "batch_size": (1 if batch_size is None else batch_size, 1)}
        for argument, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{argument} must be at least {bound}, got {value}")
        if every_n_steps is not None and every_n_steps < window:
            raise ValueError(
                f"windows may not overlap: got window={window} > every_n_steps={every_n_steps}; make the window shorter"
            )
        if max_overhead is not None and not max_overhead >= 0:
            raise ValueError(f"max_overhead must be a share of the wall time, or None, got {max_overhead}")
        self.max_overhead = None if every_n_steps is not None else max_overhead
        self.loss, self.data, self.num_samples, self.noise = loss, data, num_samples, noise
        self.batch_to_problem, self.parameters = batch_to_problem, parameters
        self.every_n_steps, self.window, self.batch_size = every_n_steps, window, batch_size
        self.dtype = {"float64": torch.float64, "float32": torch.float32}[dtype]
        self.prog_bar, self.name, self.seed = prog_bar, name, seed
        self.options = Options(replicas=replicas, reference=reference, num_draws=num_draws, relaxed_after=relaxed_after)
        self.engine: Engine | None = None
        """The engine, which makes the measurements; None before the start of training."""
        self.verdict = ""
        self._subject: Subject | None = None  # of the snapshots; None before the start of training
        self._reasons: tuple[Reason, ...] = ()  # if nothing is measured
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until training starts
        self._step_before = 0  # at the end of the last batch
        self._figures_at = 0  # the step at which figures were drawn last
        self._failed = False  # whether a failure was noted
        self._num_reported = 0  # reasons that were reported so far

    # --- what was measured -----------------------------------------------------------------------------------------

    @property
    def history(self) -> Mapping[int, Mapping[str, float]]:
        """Step -> tag -> value: all that was logged."""
        return {} if self.engine is None else self.engine.history

    @property
    def reasons(self) -> Sequence[Reason]:
        """Why something was not measured or predicted."""
        return self._reasons if self.engine is None else self.engine.reasons

    @property
    def last_distance(self) -> DistanceMeasurement | None:
        """The last measurement of the distance."""
        return None if self.engine is None else self.engine.last_distance

    @property
    def last_window(self) -> Window | None:
        """The last window."""
        return None if self.engine is None else self.engine.last_window

    @property
    def visibility(self) -> Visibility | None:
        """Whether the effect of the noise is visible in the last window."""
        return None if self.engine is None else self.engine.visibility

    # --- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Monitors of one trainer differ by name."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """The engine's state and the sums over the optimizer's steps, as tensors and plain values."""
        if self.engine is None or self._subject is None:
            return {}
        return state_of(self.engine, self._subject.recorder, self._figures_at)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, since the network is not on its device before."""
        self._resumed = state_dict or None

    def _resume(self, trainer: Trainer, engine: Engine, subject: Subject, state: Mapping[str, Any]) -> bool:
        """Continue from the state in a checkpoint; False: this failed, and the reason was noted."""
        try:
            self._figures_at = take_over(state, engine, subject.recorder, subject.space.device)
        except ValueError as error:
            engine.note(Code.STATE(why=str(error)))
            return False
        for step in sorted(engine.history):
            provide(trainer, self.name, engine.history[step], prog_bar=self.prog_bar)
        return True

    # --- the course of a training ----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the monitor at the start of every fit; a checkpoint is loaded after this."""
        if stage == "fit":
            self.engine, self._reasons = None, ()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the monitor's metrics to the hyperparameters of the module, before Lightning writes these."""
        found, monitors = module_hyperparameters(trainer), _monitors(trainer)
        for writer in writers(trainer) if found and monitors[0] is self else ():
            begin_hyperparameters(writer, found, [each.name for each in monitors])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detect what is trained, and how; measure the initial weights, or continue from a checkpoint."""
        resumed, self._resumed, self.engine, self._subject = self._resumed, None, None, None
        self.verdict, self._failed, self._figures_at = "", False, 0
        self._step_before = trainer.global_step
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from a helper
            return
        strategy = type(trainer.strategy).__name__
        names = [] if strategy in _SHARDED else select_parameters(pl_module, self.parameters)
        if not names:
            self._reasons = (Code.SHARDED(strategy=strategy) if strategy in _SHARDED else Code.NO_WEIGHTS(),)
            self.verdict = verdict({}, reasons=self._reasons)
            report_reasons(trainer, self._reasons)
            return
        budget = Budget(self.max_overhead)
        with isolated(budget, trainer.strategy.root_device.type):
            engine, subject = self._begin(trainer, pl_module, names, budget)
        self.engine, self._subject = engine, subject
        went_on = resumed is not None and self._resume(trainer, engine, subject, resumed)
        describe(trainer, engine)
        self._num_reported = len(engine.reasons)
        if not went_on:
            self._measure(trainer, trainer.global_step - 1)
        self._attempt(trainer, lambda: self._open_dashboard(trainer, engine))

    def _begin(
        self, trainer: Trainer, module: LightningModule, names: Sequence[str], budget: Budget
    ) -> tuple[Engine, Subject]:
        """The engine for this training, and the subject of its snapshots."""
        injected = injected_noise(trainer)
        if injected is not None and self.noise is not None:
            raise ValueError(
                f"the noise is given twice, by SingularLimitMonitor(noise={self.noise}) and by "
                f"InjectNoise({injected}): do not pass it to the monitor, which detects injected noise"
            )
        optimizer = read_optimizer(trainer, module, names, step_batch_size(trainer))
        problem, subset = find_problem(
            trainer,
            module,
            data=self.data,
            num_samples=self.num_samples,
            batch_to_problem=self.batch_to_problem,
            loss=self.loss,
            noise=injected or self.noise,
            dtype=self.dtype,
            batch_size=self.batch_size,
            step_ratios=optimizer.step_ratios,
        )
        plain = WeightSpace(module, dtype=self.dtype, step_ratios=optimizer.step_ratios)
        space = plain if isinstance(problem, Reason) else problem.function
        training = training_of(
            problem,
            given=self.noise,
            weight_decay=optimizer.weight_decay,
            injected=injected,
            reasons=(*optimizer.reasons, *([subset] if subset else [])),
        )
        total = trainer.estimated_stepping_batches
        schedule = Schedule.of_run(window=self.window, every_n_steps=self.every_n_steps, total=total)
        generator = torch.Generator().manual_seed(self.seed)
        engine = Engine(problem, training, self.options, schedule, budget, generator)
        return engine, Subject(module, space, StepRecorder(optimizer))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the learning rate of this step."""
        if self._subject is not None:
            self._subject.recorder.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure what is due; between measurements only integers are compared."""
        engine, subject, step, before = self.engine, self._subject, trainer.global_step, self._step_before
        self._step_before = step
        if engine is None or subject is None:
            return
        if step > before:
            subject.recorder.after_step(trainer)
        due = engine.due(before, step)
        if due is Due.MEASUREMENT:
            self._measure(trainer, before)
        elif due is Due.MARK:
            self._attempt(trainer, lambda: engine.mark(subject.snapshot(trainer)))
        elif due is Due.EXCESS_LOSS:
            self._attempt(trainer, lambda: self._publish(trainer, engine.measure_loss(subject.snapshot(trainer))))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last weights and write the verdict."""
        engine = self.engine
        if engine is None:
            return
        if trainer.global_step != engine.last_step:
            self._measure(trainer, trainer.global_step - 1)
        if trainer.global_step != self._figures_at:
            self._attempt(trainer, lambda: self._draw(trainer, engine))
        self._attempt(trainer, lambda: self._conclude(trainer, engine))

    # --- one measurement -------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, before: int) -> None:
        """Measure and publish what is due at this step; draw figures if the number of steps has doubled."""
        engine, subject, step = self.engine, self._subject, trainer.global_step
        assert engine is not None
        assert subject is not None

        def measure() -> None:
            self._publish(trainer, engine.measure(subject.snapshot(trainer), before=before))
            say(trainer, logging.INFO, f"step {step}: {terminal_line(engine.history.get(step, {}))}")

        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # Lightning sets it from a helper
        with profiler.profile(f"[{type(self).__name__}]{self.name}.measure"):
            say(trainer, logging.INFO, f"step {step}: measuring ...")
            if not self._attempt(trainer, measure):
                engine.abandon(step)
            if step >= 2 * max(self._figures_at, 1):
                self._attempt(trainer, lambda: self._draw(trainer, engine))

    def _attempt(self, trainer: Trainer, what: Callable[[], object]) -> bool:
        """Call a function that must not end the training; returns whether it succeeded.

        With several processes, which wait for one another, a failure of one of them ends the job.
        """
        engine = self.engine
        assert engine is not None

        def smaller() -> bool:
            problem = engine.problem
            if trainer.world_size > 1 or problem is None or problem.batch_size == 1:
                return False
            problem.batch_size = (problem.batch_size + 1) // 2
            say(trainer, logging.INFO, f"out of memory, trying again with {problem.batch_size} samples at once")
            return True

        def failed(error: Exception) -> None:
            words = f"{type(error).__name__}: {error}"
            if trainer.world_size > 1:
                raise RuntimeError(
                    f"torch_singlim: the measurement at step {trainer.global_step} failed on rank "
                    f"{trainer.global_rank}, and the others wait for it: {words}; remove the monitor, or train on one "
                    "device, where a measurement that fails is skipped"
                ) from error
            if not self._failed:  # only the first failure is reported
                engine.note(Code.FAILED(step=trainer.global_step, error=words))
            self._failed = True

        device_type = trainer.strategy.root_device.type
        worked = attempt(what, budget=engine.budget, device_type=device_type, smaller=smaller, failed=failed)
        report_reasons(trainer, engine.reasons[self._num_reported :])
        self._num_reported = len(engine.reasons)
        return worked

    def _publish(self, trainer: Trainer, measurement: Measurement) -> None:
        """Send a measurement to loggers, to callbacks that monitor a metric, and to the progress bar."""
        point = scalars(measurement)
        if point:
            log_point(trainer, self.name, measurement.step, point)
            provide(trainer, self.name, point, prog_bar=self.prog_bar)

    # --- TensorBoard -----------------------------------------------------------------------------------------------

    def _open_dashboard(self, trainer: Trainer, engine: Engine) -> None:
        """Write the card of what was detected; the last monitor that starts also writes the layout of all charts."""
        monitors = _monitors(trainer)
        running = {each.name: each.engine for each in monitors if each.engine is not None}
        if has_board(trainer) and self._subject is not None:
            found = settings(engine, self._subject.snapshot(trainer), window=self.window)
            first, complete = monitors[0] is self, len(running) == len(monitors)
            open_board(trainer, self.name, running, found, first=first, complete=complete)

    def _draw(self, trainer: Trainer, engine: Engine) -> None:
        """Write figures if there is time; every process takes part in computing what they show."""
        if has_board(trainer) and self._subject is not None and engine.affords("figures"):
            self._figures_at = trainer.global_step
            with engine.budget.timed("figures"):
                draw(trainer, self.name, engine, self._subject.snapshot(trainer).sgd)

    def _conclude(self, trainer: Trainer, engine: Engine) -> None:
        self.verdict = engine.verdict()
        say(trainer, logging.INFO, f"verdict\n\n{self.verdict}\n")
        for writer in writers(trainer):
            writer.add_text(f"{self.name}/verdict", self.verdict, trainer.global_step)
            if _monitors(trainer)[0] is self:
                end_hyperparameters(writer)


def _monitors(trainer: Trainer) -> list[SingularLimitMonitor]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets them from a helper
    return [each for each in callbacks if isinstance(each, SingularLimitMonitor)]
