"""The monitor: measures distance to the zero-loss set and drift along it during training, and compares with theory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from torch import Tensor, nn

from torch_singlim.callbacks.attempts import Attempts
from torch_singlim.callbacks.board import has_board, writers
from torch_singlim.callbacks.follower import TIMED_STEPS
from torch_singlim.callbacks.logs import Logs
from torch_singlim.callbacks.publish import describe, provide, report_reasons, say
from torch_singlim.callbacks.resume import state_of, take_over
from torch_singlim.callbacks.start import Asked, Started, start
from torch_singlim.callbacks.tensorboard import (
    begin_hyperparameters,
    draw,
    end_hyperparameters,
    module_hyperparameters,
    open_board,
    settings,
)
from torch_singlim.measure import (
    Account,
    Code,
    DistanceMeasurement,
    Due,
    Engine,
    Measurement,
    Options,
    Reason,
    Visibility,
    Window,
    scalars,
    terminal_line,
    verdict,
)
from torch_singlim.network import SampleLoss
from torch_singlim.noise import NoiseSystem

__all__ = ["SingularLimitMonitor"]

# under a budget, paths are opened every so many steps of a window
_ASKED = 10
# seconds that the callback adds to a step at which nothing is measured: 6e-5 in a loop that does nothing else, half of
# it in Lightning's calls, and this beside a training of 3 ms a step (difference of two runs of 64,000 steps)
_HOOKS = 1.3e-4


class SingularLimitMonitor(Callback):
    """Measure how far the weights are from the zero-loss set and how they drift along it, and compare with theory.

    The monitor works without arguments for a LightningModule whose forward maps inputs to outputs, whose batches are
    (inputs, targets), and whose loss is mse or cross-entropy. If a part of another training cannot be
    measured, this is not an error: the verdict gives the reason. Measurements are made on a copy of the weights:
    training with and without the monitor gives the same weights, to the last bit.

    Over windows of optimizer steps, paths run beside the training, from the same weights and on the same batches: one
    with the noise averaged (the averaged path), one without noise (the baseline), and replicas with noise of their own.
    The displacement of the weights is compared with theirs, and with the singular limit. These values are logged only
    at steps whose repetition on a copy gives what training gave.

    Scalars are sent to every logger of the trainer under ``singlim/``, where `EarlyStopping` and `ModelCheckpoint` find
    them, and are kept in `history` (step -> tag -> value, tags without the name). The last records, with their vectors,
    are `last_distance` and `last_window`. A run that is resumed from a checkpoint logs, but for the window that was in
    progress, what it would have logged without interruption. At the end a verdict is written to the log, to `verdict`,
    and to TensorBoard.

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
        window: number of optimizer steps of a window; "auto": as many as run and budget allow, between 50 and 1,000.
        every_n_steps: begin a window every so many optimizer steps, without limit for the time; default: at `window`
            times powers of two, and such that the last window ends with the run, as far as `max_overhead` allows.
        max_overhead: all measurements together may take 15 seconds and this share of the wall time; None: no limit; 0:
            the excess loss alone. Half of the time is for paths beside the training. What does not fit is skipped, and
            the verdict says so.
        draws: number of draws of the noise in each step of the averaged path; even.
        replicas: number of replicas, for standard errors and the noise ceiling, the best cosine that a deterministic
            prediction can have; 0: none. A step of a window costs 1 + draws + replicas steps of training.
        expanded: also follow a path with the paper's second-order expansion of the noise.
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

    >>> SingularLimitMonitor(window=500).asked.window
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
        window: int | Literal["auto"] = "auto",
        every_n_steps: int | None = None,
        max_overhead: float | None = 0.1,
        draws: int = 4,
        replicas: int = 1,
        expanded: bool = False,
        num_draws: int = 32,
        relaxed_after: float = 3.0,
        dtype: Literal["float64", "float32"] = "float64",
        batch_size: int | None = None,
        prog_bar: bool = False,
        name: str = "singlim",
        seed: int = 0,
    ) -> None:
        options = Options(
            draws=draws, replicas=replicas, expanded=expanded, num_draws=num_draws, relaxed_after=relaxed_after
        )
        self.asked = Asked(
            loss=loss,
            data=data,
            batch_to_problem=batch_to_problem,
            num_samples=num_samples,
            parameters=parameters,
            noise=noise,
            window=window,
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            dtype={"float64": torch.float64, "float32": torch.float32}[dtype],
            batch_size=batch_size,
            seed=seed,
            options=options,
        )
        """The arguments."""
        self.prog_bar, self.name = prog_bar, name
        self.engine: Engine | None = None
        """The engine, which makes the measurements; None before the start of training."""
        self.verdict = ""
        self._started: Started | None = None  # what measures; None before the start of training
        self._reasons: tuple[Reason, ...] = ()  # if nothing is measured
        self._resumed: dict[str, Any] | None = None  # a checkpoint's state, until training starts
        self._step_before = 0  # at the end of the last batch
        self._figures_at = 0  # the step at which figures were drawn last
        self._attempts: Attempts | None = None  # makes measurements harmless; None before the start of training
        self._logs: Logs | None = None  # where results are written; None before the start of training

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
        return None if self.engine is None else self.engine.windows.last

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
        if self.engine is None or self._started is None:
            return {}
        return state_of(self.engine, self._started.subject.recorder, self._figures_at)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts, since the network is not on its device before."""
        self._resumed = state_dict or None

    def _resume(self, trainer: Trainer, started: Started, state: Mapping[str, Any]) -> bool:
        """Continue from the state in a checkpoint; False: this failed, and the reason was noted."""
        engine, subject = started.engine, started.subject
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
        resumed, self._resumed, self.engine, self._started = self._resumed, None, None, None
        self.verdict, self._figures_at, self._logs = "", 0, None
        self._step_before = trainer.global_step
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it from a helper
            return
        found = start(trainer, pl_module, self.asked)
        if isinstance(found, Reason):
            self._reasons = (found,)
            self.verdict = verdict({}, reasons=self._reasons)
            report_reasons(trainer, self._reasons)
            return
        self.engine, self._started = found.engine, found
        went_on = resumed is not None and self._resume(trainer, found, resumed)
        describe(trainer, found.engine)
        self._attempts = Attempts(trainer, found.engine)
        self._logs = Logs(trainer, self.name, found.engine)
        if not went_on:
            self._publish(trainer, self._measure(trainer, trainer.global_step - 1))
        self._attempt(lambda: self._open_dashboard(trainer, found.engine))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Gather samples, if they are not known; open paths at the first step, when all callbacks have started."""
        started = self._started
        if started is None:
            return
        if started.gatherer is not None or started.inputs is not None:
            self._attempt(lambda: started.see(batch))
        windows = started.engine.windows
        if windows.waiting and windows.open is not None and windows.open.start == trainer.global_step:
            self._open_paths(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be content with the samples of one epoch."""
        if self._started is not None and self._started.gatherer is not None:
            started = self._started
            self._attempt(lambda: started.finish_gathering(whole=True))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Record the settings of this step."""
        if self._started is not None:
            self._started.subject.recorder.before_step(trainer, optimizer)
            self._started.follower.before_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the paths of a window, and measure what is due; otherwise only integers are compared."""
        started, step, before = self._started, trainer.global_step, self._step_before
        self._step_before = step
        if started is None or step == before:
            return
        started.engine.budget.add(_HOOKS)
        engine, subject = started.engine, started.subject
        subject.recorder.after_step(trainer)
        point = self._advance(trainer) if engine.windows.followed is not None else {}
        due = engine.due(before, step)
        if due is Due.MEASUREMENT:
            point |= self._measure(trainer, before)
        elif due is Due.EXCESS_LOSS:
            self._attempt(lambda: point.update(scalars(engine.measure_loss(subject.snapshot(trainer)))))
        self._publish(trainer, point)
        self._open_paths(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last weights and write the verdict."""
        engine = self.engine
        if engine is None or self._started is None:
            return
        self._started.follower.close()
        self._attempt(self._started.finish_gathering)
        if trainer.global_step != engine.last_step:
            self._publish(trainer, self._measure(trainer, trainer.global_step - 1))
        if trainer.global_step != self._figures_at:
            self._attempt(lambda: self._draw(trainer, engine))
        self._attempt(lambda: self._conclude(trainer, engine))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        if self._started is not None:
            self._started.follower.close()
        if self._logs is not None:
            self._logs.close()

    # --- paths beside the training ---------------------------------------------------------------------------------

    def _open_paths(self, trainer: Trainer) -> None:
        """Open paths if a window is in progress that has none yet, and there is time for them."""
        assert self._started is not None
        engine, follower, step = self._started.engine, self._started.follower, trainer.global_step
        # not asked at every step: it takes time, and several processes have to communicate, since the first one decides
        stop, free = None, engine.budget.share is None
        since = step - (engine.windows.open.start if engine.windows.open is not None else 0)
        if engine.windows.waiting and (free or since % _ASKED == 0 or since == TIMED_STEPS):
            stop = engine.opens(step, follower.seconds_per_step(engine.budget, step))
            if not free:
                stop = int(engine.process_group.broadcast(stop or 0)) or None
        if stop is not None and not self._attempt(lambda: follower.open(engine, step, stop), Account.PATHS):
            engine.give_up(None)
        follower.watch(engine, step)

    def _advance(self, trainer: Trainer) -> dict[str, float]:
        """Make the step that has ended on all paths; what is to be logged of the window at this step."""
        assert self._started is not None
        engine, follower, step = self._started.engine, self._started.follower, trainer.global_step
        found: list[Measurement | None] = []

        self._attempt(
            lambda: found.append(follower.advance(engine, step)), Account.PATHS, engine.give_up, follower.explain
        )
        return {} if not found or found[0] is None else scalars(found[0])

    # --- one measurement -------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, before: int) -> dict[str, float]:
        """Measure what is due at this step; draw figures if the number of steps has doubled."""
        assert self._started is not None
        engine, subject, step = self._started.engine, self._started.subject, trainer.global_step
        point: dict[str, float] = {}

        def measure() -> None:
            point.update(scalars(engine.measure(subject.snapshot(trainer), before=before)))
            line = terminal_line(engine.history.get(step, {}))
            if line:
                say(trainer, logging.INFO, f"step {step}: {line}")

        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # Lightning sets it from a helper
        with profiler.profile(f"[{type(self).__name__}]{self.name}.measure"):
            say(trainer, logging.INFO, f"step {step}: measuring ...")
            if not self._attempt(measure):
                engine.windows.abandon(step)
            if step >= 2 * max(self._figures_at, 1):
                self._attempt(lambda: self._draw(trainer, engine))
        return point

    def _attempt(self, *what: Any) -> bool:
        """Call a function that must not end the training; returns whether it succeeded: see `Attempts`."""
        assert self._attempts is not None
        return self._attempts(*what)

    def _publish(self, trainer: Trainer, point: Mapping[str, float]) -> None:
        """Send what was measured to loggers, to callbacks that monitor a metric, and to the progress bar."""
        if point:
            beside = [each._logs for each in _monitors(trainer) if each._logs is not None]
            self._attempt(lambda: self._logs and self._logs.write(trainer.global_step, point, beside))
            provide(trainer, self.name, point, prog_bar=self.prog_bar)

    # --- TensorBoard -----------------------------------------------------------------------------------------------

    def _open_dashboard(self, trainer: Trainer, engine: Engine) -> None:
        """Write the card of what was detected."""
        monitors = _monitors(trainer)
        running = {each.name: each.engine for each in monitors if each.engine is not None}
        if has_board(trainer) and self._started is not None:
            found = settings(engine, self._started.subject.snapshot(trainer), window=self.asked.window)
            open_board(trainer, self.name, running, found, first=monitors[0] is self)

    def _draw(self, trainer: Trainer, engine: Engine) -> None:
        """Write figures if there is time; every process takes part in computing what they show."""
        if has_board(trainer) and self._started is not None and engine.affords("figures"):
            self._figures_at = trainer.global_step
            with engine.budget.timed("figures"):
                subject = self._started.subject
                draw(trainer, self.name, engine, subject.snapshot(trainer).sgd, subject.space)

    def _conclude(self, trainer: Trainer, engine: Engine) -> None:
        self.verdict = engine.verdict()
        if self._logs is not None:
            self._logs.finish()
        say(trainer, logging.INFO, f"verdict\n\n{self.verdict}\n")
        for writer in writers(trainer):
            writer.add_text(f"{self.name}/verdict", self.verdict, trainer.global_step)
            if _monitors(trainer)[0] is self:
                end_hyperparameters(writer)


def _monitors(trainer: Trainer) -> list[SingularLimitMonitor]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets them from a helper
    return [each for each in callbacks if isinstance(each, SingularLimitMonitor)]
