"""The monitor: distance to the zero-loss set and drift along it during training, beside the theory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from torch_singlim.callbacks.budget import Budget, expected_seconds, left_out_in_words
from torch_singlim.callbacks.dashboard import (
    Series,
    Spectrum,
    bands,
    begin_hyperparameters,
    card,
    end_hyperparameters,
    figures,
    has_board,
    layout,
    own_hyperparameters,
    settings,
    writers,
)
from torch_singlim.callbacks.descent import (
    Descent,
    detect_descent,
    select_parameters,
    step_batch_size,
    step_clipped,
    step_skipped,
)
from torch_singlim.callbacks.detect import (
    ProbeSet,
    detect_noise,
    detect_problem,
    given_probe_set,
    read_probe_set,
)
from torch_singlim.callbacks.inject import InjectNoise, injected_noise
from torch_singlim.callbacks.schedule import OpenWindow, probe_starts, window_marks
from torch_singlim.geometry import linearised_displacement, nearest_point
from torch_singlim.loss import SampleLoss
from torch_singlim.observe import Observation, WindowObservation, observe, observe_window
from torch_singlim.team import Team
from torch_singlim.theory import (
    CustomNoise,
    Langevin,
    NoiseSystem,
    SGDSettings,
    Sum,
    check_derivatives,
    has_effective_flow,
    parts,
    time_scale,
    with_measured_order,
)
from torch_singlim.verdict import observation_scalars, verdict, window_scalars

__all__ = ["SingularLimitMonitor"]


# strategies that hold a part of the weights in each process
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
# what the progress bar shows, where it is known
_SHOWN = ("loss_gap", "distance/measured", "distance/linearised")


class SingularLimitMonitor(Callback):
    """Measure how far the weights are from the zero-loss set and how they drift along it, beside the theory.

    Works with no arguments on a LightningModule whose forward maps inputs to outputs, whose batches are (inputs,
    targets) and whose loss is mse or label-smoothed cross-entropy. At a probe the weights are copied; everything else
    happens on the copy. Training with and without the monitor gives the same weights to the last bit.

    A probe opens a window of optimizer steps; at its end the displacement of the weights is compared with descent on
    the effective loss (the reference), with descent on the loss alone (the null control) and with the singular limit.
    Scalars go to every logger of the trainer under ``singlim/``, where `EarlyStopping` and `ModelCheckpoint` find them,
    too, and stay on `history` (step -> tag -> value); the last records, with their vectors, on `last_observation` and
    `last_window`. Checkpoints carry what a resumed run needs to go on as if it had never stopped. A verdict is written
    at the end, to the log, as `verdict`, and to TensorBoard as text. The loss gap, which is cheap, is logged ten times
    per decade of steps.

    Args:
        loss: what ``training_step`` computes, if it is not recognised: see `ZeroLossProblem`.
        data: the probe set ``(inputs, targets)``; default: the first `num_samples` of the training set.
        batch_to_problem: a batch -> (inputs, targets), for batches that are something else: a plain function, which a
            configuration file can name.
        num_samples: most samples to probe, of an iterable dataset the first. With fewer than the training set the
            distance is a lower bound and the drift is not predicted.
        parameters: the trainable parameters to probe, by shell patterns of their names; default: all. The others count
            as held fixed; where the optimizer moves them, the drift is not predicted.
        noise: what training does; default: the module's dropout layers, the optimizer's weight decay, and what
            `InjectNoise` callbacks inject.
        every_n_steps: a probe every so many optimizer steps, whatever it costs; default: at `window` times powers of
            two, and so that a last window ends with the run, as far as `max_overhead` allows.
        max_overhead: share of the wall time that probes may take; None: no limit. What they have not earned is left
            out in this order: the figures, following every step of a window where long steps are inaccurate, the
            limit's prediction with the expected distance, the nearest point, the drift over a window, the linearised
            distance. The loss gap is always logged.
        window: optimizer steps over which drift is measured; at most `every_n_steps`.
        replicas: independent copies of each window to run for the noise ceiling; 0: none. Costs as many windows of
            training again.
        reference: also follow the effective flow step by step, at the cost of two windows in gradients of the whole
            probe set: what `finite_window`, the default prediction, stands in for.
        num_draws: random directions for the limit's potential; at least the noise components of one sample: exact.
        separation: a normal mode counts as settled once lr * eigenvalue * steps reaches this: its first deviation has
            then decayed to exp(-separation).
        dtype: of the probe; float64 resolves small eigenvalues.
        batch_size: samples the probe evaluates at once; default: as many as fit into half of the free memory.
        prog_bar: show loss gap and distance in the progress bar.
        name: what the tags begin with; a second monitor of the same trainer needs another one.
        seed: of the probe's own generator.

    Raises:
        ValueError: at the start of training, where the set-up cannot be probed: what came, what was expected, what to
            write instead.

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
        separation: float = 3.0,
        dtype: Literal["float64", "float32"] = "float64",
        batch_size: int | None = None,
        prog_bar: bool = False,
        name: str = "singlim",
        seed: int = 0,
    ) -> None:
        counts = {"window": window, "num_samples": num_samples, "every_n_steps": every_n_steps or 1}
        for argument, value in counts.items():
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")
        if every_n_steps is not None and every_n_steps < window:
            raise ValueError(
                f"windows may not overlap: got window={window} > every_n_steps={every_n_steps}; make the window shorter"
            )
        if max_overhead is not None and not max_overhead > 0:
            raise ValueError(f"max_overhead must be a positive share of the wall time, or None, got {max_overhead}")
        self.max_overhead = None if every_n_steps is not None else max_overhead
        self.loss, self.data, self.num_samples, self.noise = loss, data, num_samples, noise
        self.batch_to_problem, self.parameters = batch_to_problem, parameters
        self.every_n_steps, self.window, self.replicas, self.reference = every_n_steps, window, replicas, reference
        self.num_draws, self.separation, self.batch_size = num_draws, separation, batch_size
        self.dtype = {"float64": torch.float64, "float32": torch.float32}[dtype]
        self.prog_bar, self.name, self.seed = prog_bar, name, seed
        self._begun, self._resumed = False, None
        self._marks = window_marks(window)
        self.history: dict[int, dict[str, float]] = {}
        self.last_observation: Observation | None = None
        self.last_window: WindowObservation | None = None
        self.not_covered: tuple[str, ...] = ()
        self.withdrawn: list[str] = []
        self.verdict = ""

    # --- set-up ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Monitors of one trainer differ by name."""
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        """Clock, schedule, window in progress, what was logged, generator and budget: tensors and numbers alone."""
        if not self._begun:
            return {}
        return {
            "slow_time": self._slow_time,
            "step_lengths": self._step_lengths,
            "clipped": int(self._clipped),
            "last_figures": self._last_figures,
            "last_probe": self._last_probe,
            "open": None if self._open is None else self._open.state_dict(),
            "orders": [part.order for part in parts(self._noise)],
            "history": dict(self.history),
            "withdrawn": list(self.withdrawn),
            "generator": self._generator.get_state(),
            "budget": self._budget.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: the network is not on its device before."""
        self._resumed = state_dict or None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be probed, before anything is trained."""
        self._begun = False
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED:
            raise ValueError(
                f"{strategy} spreads one copy of the weights over several processes, and a probe needs them whole: "
                'use strategy="ddp" or one device, or probe the checkpoints afterwards'
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The row of hyperparameters of the module's own gets the metrics, before Lightning writes it."""
        given, monitors = own_hyperparameters(trainer), _monitors(trainer)
        for writer in writers(trainer) if given and monitors[0] is self else ():
            begin_hyperparameters(writer, given, [each.name for each in monitors])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the problem, the descent and the noise; probe the first weights, or go on from a checkpoint."""
        resumed, self._resumed, self._begun = self._resumed, None, False
        self.history, self.last_observation, self.last_window, self.verdict = {}, None, None, ""
        self.withdrawn = []
        self._budget = Budget(self.max_overhead)
        self._warned = False
        self._slow_time = self._step_lengths = 0.0
        self._clipped: int | Tensor = 0  # steps; on the device, that no step has to wait for it
        self._last_probe, self._last_step = -1, trainer.global_step
        self._open: OpenWindow | None = None
        self._last_figures = 0
        with self._aside():
            self._generator = torch.Generator().manual_seed(self.seed)
            if self.data:
                probe = given_probe_set(trainer, *self.data)
            else:
                probe = read_probe_set(trainer, self.num_samples, batch_to_problem=self.batch_to_problem)
            injected = injected_noise(trainer)
            if injected is not None and self.noise is not None:
                raise ValueError(
                    f"the noise is given twice, by SingularLimitMonitor(noise={self.noise}) and by "
                    f"InjectNoise({injected}): leave it out of the monitor, which finds what is injected"
                )
            descent = detect_descent(
                trainer, pl_module, select_parameters(pl_module, self.parameters), step_batch_size(trainer)
            )
            self._problem = detect_problem(
                pl_module,
                probe,
                loss=self.loss,
                noise=injected or self.noise,
                dtype=self.dtype,
                batch_size=self.batch_size,
                step_ratios=descent.step_ratios,
                team=Team(trainer.global_rank, trainer.world_size),
            )
            self._set_descent(descent, probe, injected, orders=None if resumed is None else resumed["orders"])
            total = trainer.estimated_stepping_batches
            total_steps = int(total) if math.isfinite(total) else None
            self._starts = set(probe_starts(self.window, self.every_n_steps, total_steps))
            samples = self._problem.num_samples
            batch = samples if self._sgd is None else self._sgd.batch(samples)
            self._expected = expected_seconds(
                self._problem,
                window=self.window,
                num_draws=self.num_draws,
                runs=self.replicas * batch / samples + 2 * self.reference,
            )
            self._loss_gap_steps = {round(10 ** (k / 10)) for k in range(80)}
            if resumed is not None:
                self._resume(trainer, resumed)
        self._begun = True
        self._describe(probe)
        if resumed is None:
            self._probe(trainer)
        self._attempt(trainer, lambda: self._open_dashboard(trainer))

    def _resume(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Go on with what a checkpoint holds."""
        self._slow_time, self._step_lengths = state["slow_time"], state["step_lengths"]
        self._clipped, self._last_figures = state["clipped"], state["last_figures"]
        self._last_probe, self.history, self.withdrawn = state["last_probe"], state["history"], state["withdrawn"]
        self._open = None if state["open"] is None else OpenWindow.from_state(state["open"], self._problem)
        self._generator.set_state(state["generator"])
        self._budget.load_state_dict(state["budget"])
        for step in sorted(self.history):
            self._publish(trainer, self.history[step])

    def _set_descent(
        self, descent: Descent, probe: ProbeSet, injected: NoiseSystem | None, *, orders: list[int | None] | None
    ) -> None:
        noise, reasons = detect_noise(self._problem, descent.weight_decay, injected)
        self._noise = self.noise if self.noise is not None else noise
        self._noise.check(self._problem)
        custom = any(isinstance(part, CustomNoise) for part in parts(self._noise))
        if custom and orders is not None and len(orders) == len(parts(self._noise)):  # as measured when the run began
            known = zip(parts(self._noise), orders, strict=True)
            self._noise = Sum(tuple(replace(n, claimed_order=k) if isinstance(n, CustomNoise) else n for n, k in known))
        elif custom:
            foot = nearest_point(self._problem, self._problem.weights(), rtol=1e-2)
            self._noise = with_measured_order(
                self._noise, self._problem, foot.point, num_draws=self.num_draws, generator=self._generator
            )
        check_derivatives(self._problem, self._noise)
        self._variance = self._noise.variance(self._problem)
        self._sgd = descent.sgd
        self._group_ratios = descent.group_ratios
        self._is_subset = probe.is_subset
        if probe.is_subset:
            reasons += (
                f"the probe set has {len(probe.inputs)} of {probe.train_size or 'a stream of'} training samples: the "
                "distance is a lower bound; for the drift pass num_samples",
            )
        self.not_covered = (*descent.not_covered, *reasons)

    def _describe(self, probe: ProbeSet) -> None:
        p, s = self._problem, self._sgd
        dtypes = {q.dtype for q in p.function.module.parameters() if q.requires_grad and q.dtype.itemsize < 4}
        half = f", weights in {', '.join(str(d).removeprefix('torch.') for d in dtypes)} probed in " if dtypes else ""
        half += str(self.dtype).removeprefix("torch.") if half else ""
        descent = "" if s is None else f", lr {s.lr:g}, momentum {s.momentum:g}, batch {s.batch(p.num_samples)}"
        rank_zero_info(
            f"torch_singlim: {p.num_weights} weights, {p.num_samples} samples, {p.num_residuals} residuals, "
            f"{type(p.sample_loss).__name__}, noise {self._noise}{descent}{half}"
        )
        for reason in self.not_covered:
            _warn_not_covered(reason)

    def _stop_predicting(self, reason: str) -> None:
        """What the theory does not cover has begun in the middle of the training."""
        if reason not in self.not_covered:
            self.not_covered = (*self.not_covered, reason)
            self._open = None
            _warn_not_covered(reason)

    # --- the clock and the schedule --------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Advance the clock by the learning rate that this step uses."""
        if self._sgd is None or step_skipped(trainer, optimizer):
            return
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        lr = rates[0]
        if any(abs(rate - ratio * lr) > 1e-6 * lr for rate, ratio in zip(rates, self._group_ratios, strict=True)):
            self._stop_predicting("the schedule changes the ratio of the parameter groups' learning rates")
        self._step_lengths += lr
        order = self._noise.order
        if order is not None and lr > 0:
            self._slow_time += replace(self._sgd, lr=lr).effective_lr ** order * self._variance

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close a window, open the next, log; between probes nothing but a comparison of two integers."""
        step, before = trainer.global_step, self._last_step
        self._last_step = step
        if trainer.gradient_clip_val and step > before:
            self._clipped = self._clipped + step_clipped(trainer)
        ends = self._open is not None and step == self._open.start + self.window
        # under manual optimization more than one step at a time
        begins = any(each in self._starts for each in range(before + 1, step + 1))
        if (begins or ends) and step != self._last_probe:
            self._probe(trainer)
        elif self._open is not None and step - self._open.start in self._marks:
            self._attempt(trainer, lambda opened=self._open: opened.between.update({step: self._drifting(trainer)}))
        if step in self._loss_gap_steps and step not in self.history:
            self._attempt(trainer, lambda: self._log(trainer, {"singlim/loss_gap": self._loss_gap()}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe the last weights and write the verdict."""
        if trainer.global_step != self._last_probe:
            self._probe(trainer)
        if trainer.global_step != self._last_figures:
            self._attempt(trainer, lambda: self._draw(trainer))
        self._attempt(trainer, lambda: self._conclude(trainer))

    def _conclude(self, trainer: Trainer) -> None:
        self.verdict = verdict(
            self.history,
            not_covered=self.not_covered,
            withdrawn=self.withdrawn,
            left_out=left_out_in_words(self._budget.left_out, self._budget.share),
        )
        rank_zero_info("torch_singlim verdict\n\n" + self.verdict + "\n")
        for writer in writers(trainer):
            writer.add_text(f"{self.name}/verdict", self.verdict, trainer.global_step)
            if _monitors(trainer)[0] is self:
                end_hyperparameters(writer)

    # --- TensorBoard -----------------------------------------------------------------------------------------------

    def _open_dashboard(self, trainer: Trainer) -> None:
        """The card of what was found; by the last monitor to start, the layout of the charts of all."""
        if not has_board(trainer):
            return
        monitors, found = _monitors(trainer), self._settings()
        for writer in writers(trainer):
            if monitors[0] is self and not own_hyperparameters(trainer):
                begin_hyperparameters(writer, found, [each.name for each in monitors])
            writer.add_text(f"{self.name}/set-up", card(found, self.not_covered), trainer.global_step)
            if all(each._begun for each in monitors):
                writer.add_custom_scalars(layout({each.name: each._expected_series for each in monitors}))

    @property
    def _expected_series(self) -> Series:
        """Which series there will be, if time allows."""
        covered, noise = not self.not_covered, self._noise
        return Series(
            covered=covered,
            flow=covered and has_effective_flow(noise, self._problem),
            moves=covered and noise.order is not None,
            diffuses=covered and any(isinstance(part, Langevin) for part in parts(noise)),
            replicas=bool(self.replicas),
            bands=bool(self._marks),
        )

    def _settings(self) -> dict[str, str | float]:
        return settings(
            self._problem,
            self._noise,
            self._sgd,
            window=self.window,
            covered=not self.not_covered,
            observation=self.last_observation,
        )

    def _draw(self, trainer: Trainer) -> None:
        """Figures, if there is time for them; every process takes part in what they are drawn of."""
        if not has_board(trainer) or not self._affords("figures"):
            return
        self._last_figures = trainer.global_step
        with self._timed("figures"):
            seen = self.last_observation
            spectrum = None if seen is None else Spectrum.of(seen, self._sgd, self.separation)
            for writer in writers(trainer):
                for name, figure in figures(self.history, self.last_window, spectrum).items():
                    writer.add_figure(f"{self.name}/figures/{name}", figure, trainer.global_step)

    # --- one probe -------------------------------------------------------------------------------------------------

    def _probe(self, trainer: Trainer) -> None:
        """Where a window ends here, compare it; observe the weights; where a window begins, open it."""
        self._last_probe = step = trainer.global_step
        profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]  # Lightning sets it from a helper
        with profiler.profile(f"[{type(self).__name__}]{self.name}.probe"):
            self._attempt(trainer, lambda: self._observe(trainer))
            if self._open is not None and self._open.start != step:  # ends here, even if nothing came of it
                self._open = None
            if step >= 2 * max(self._last_figures, 1):
                self._attempt(trainer, lambda: self._draw(trainer))

    def _attempt(self, trainer: Trainer, what: Callable[[], object]) -> None:
        """Do it beside the training, which it may not end: what does not work is left out, with one warning.

        Out of memory it is tried again with fewer samples at once. Among several processes, which wait for one another,
        nothing can be left out by one.
        """
        while True:
            try:
                with self._aside():
                    what()
                return
            except Exception as error:
                if trainer.world_size > 1:
                    raise RuntimeError(
                        f"torch_singlim: the probe at step {trainer.global_step} failed on rank {trainer.global_rank}, "
                        f"and the others wait for it: {type(error).__name__}: {error}; leave the monitor out, or train "
                        "on one device, where a failing probe is left out"
                    ) from error
                if _out_of_memory(error) and self._problem.batch_size > 1:
                    self._problem.batch_size = (self._problem.batch_size + 1) // 2
                    rank_zero_info(
                        f"torch_singlim: out of memory at step {trainer.global_step}, the probe tries again with "
                        f"{self._problem.batch_size} samples at once"
                    )
                    continue
                if not self._warned:
                    rank_zero_warn(
                        f"torch_singlim: the probe at step {trainer.global_step} failed and was left out, "
                        f"training goes on: {type(error).__name__}: {error}"
                    )
                self._warned = True
                return

    def _loss_gap(self) -> float:
        self._problem.function.refresh_constants()
        return self._problem.loss(self._problem.weights()).item()

    def _observe(self, trainer: Trainer) -> None:
        step = trainer.global_step
        rank_zero_info(f"torch_singlim step {step}: probing ...")
        self._problem.function.refresh_constants()
        w = self._problem.weights()
        scalars, line = {"singlim/loss_gap": self._problem.loss(w).item()}, ""
        if self._open is not None and step - self._open.start == self.window:
            window = self._compare(trainer, self._open, step)
            if window is not None:
                scalars |= window_scalars(window)
                line += f", drift over {self.window} steps: {_in_words(scalars)}"
        observation = self._look(trainer, w, step)
        if observation is not None:
            scalars |= observation_scalars(observation)
            line = f", distance {observation.foot.distance:.3g}" + line
        elif self._affords("linearised"):
            scalars |= self._linearised(w)
            line = f", linearised distance {scalars['singlim/distance/linearised']:.3g}" + line
        self._open = None
        if not self.not_covered and step in self._starts:
            self._open = OpenWindow(
                step,
                self._drifting(trainer),
                self._velocity(trainer),
                self._step_lengths,
                int(self._clipped),
                None if observation is None else observation.forecast,
            )
        scalars |= self._clock(trainer)
        scalars["singlim/cost/overhead"] = self._budget.overhead
        self._log(trainer, scalars)
        rank_zero_info(f"torch_singlim step {step}: loss gap {scalars['singlim/loss_gap']:.2e}{line}")

    def _clock(self, trainer: Trainer) -> dict[str, float]:
        """Step size, noise level, and where the noise moves the weights, the slow clock."""
        sgd, order = self._current_sgd(trainer), self._noise.order
        if self.not_covered or sgd is None:
            return {}
        scalars = {"singlim/clock/step_size": sgd.effective_lr}
        if order is not None:
            scalars |= {
                "singlim/clock/noise_level": math.sqrt(self._variance),
                "singlim/clock/slow_time": self._slow_time,
                "singlim/clock/time_scale": time_scale(sgd, order, self._variance),
            }
        return scalars

    def _compare(self, trainer: Trainer, opened: OpenWindow, step: int) -> WindowObservation | None:
        """The window that ends here, held against theory, if there is time for it."""
        clipped = int(self._clipped) - opened.clipped
        if clipped:
            self._withdraw(f"gradients were clipped in {clipped} of the steps {opened.start}-{step}")
        mean_lr = (self._step_lengths - opened.step_lengths) / self.window
        if mean_lr == 0:
            self._withdraw(f"no weight was moved in the steps {opened.start}-{step}")
        if self._sgd is None or clipped or mean_lr == 0 or not self._affords("window"):
            return None
        with self._timed("window"):
            window = observe_window(
                self._problem,
                opened.drifting,
                self._drifting(trainer),
                start=opened.start,
                stop=step,
                noise=self._noise,
                sgd=replace(self._sgd, lr=mean_lr),
                forecast=opened.forecast,
                replicas=self.replicas,
                reference=self.reference,
                accurate=self._affords("steps"),
                between=opened.between,
                velocity=opened.velocity,
                generator=self._generator,
            )
        self.last_window = window
        self._withdraw(window.withdrawn)
        return window

    def _look(self, trainer: Trainer, w: Tensor, step: int) -> Observation | None:
        """Distance and the limit's prediction at weights w ``[P]``, as far as there is time for them."""
        if not self._affords("distance"):
            return None
        covered = not self.not_covered and self._affords("limit", also="distance")
        with self._timed("limit" if covered else "distance"):
            observation = observe(
                self._problem,
                w,
                step=step,
                noise=self._noise if covered else None,
                sgd=self._current_sgd(trainer),
                carried=self._carried(trainer),
                num_draws=self.num_draws,
                separation=self.separation,
                subset=self._is_subset,
                generator=self._generator,
            )
        self._withdraw(observation.withdrawn)
        self.last_observation = observation
        return observation

    def _linearised(self, w: Tensor) -> dict[str, float]:
        """The distance by one linearisation, from products alone: what is left of a probe when there is little time."""
        with self._timed("linearised"):
            displacement = linearised_displacement(self._problem, w)
        return {
            "singlim/distance/linearised": torch.linalg.vector_norm(displacement.x).item(),
            "singlim/quality/linear_residual": displacement.residual,
        }

    def _affords(self, kind: str, also: str | None = None) -> bool:
        """Whether there is time for it (and for something else besides); the first process decides for all."""
        expected = self._expected[kind] + (self._expected[also] if also else 0.0)
        return bool(self._problem.team.of_first(self._budget.affords(kind, expected), self._problem.device))

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._budget.learn(kind, time.perf_counter() - start)

    def _withdraw(self, reason: str | None) -> None:
        """Say why a prediction is not given, and keep it for the verdict."""
        if reason is not None and reason not in self.withdrawn:
            self.withdrawn.append(reason)
            rank_zero_info(f"torch_singlim: prediction withdrawn: {reason}")

    def _current_sgd(self, trainer: Trainer) -> SGDSettings | None:
        """The settings at the present learning rate: where the schedule has it, what the last step has used."""
        if self._sgd is None:
            return None
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        return replace(self._sgd, lr=lr) if lr > 0 else None

    def _carried(self, trainer: Trainer) -> Tensor | None:
        """What the injected noise has the weights carry at present ``[P]``, in the problem's dtype."""
        carried: dict[nn.Parameter, Tensor] = {}
        for each in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets them from a helper
            carried |= each.carried if isinstance(each, InjectNoise) else {}
        if not carried:
            return None
        return self._problem.function.flatten([carried.get(p, torch.zeros_like(p)) for p in self._probed()])

    def _probed(self) -> list[nn.Parameter]:
        function = self._problem.function
        parameters = dict(function.module.named_parameters())
        return [parameters[name] for name in function.names]

    def _drifting(self, trainer: Trainer) -> Tensor:
        """The weights without what they carry for a step ``[P]``."""
        carried = self._carried(trainer)
        w = self._problem.weights()
        return w if carried is None else w - carried

    def _velocity(self, trainer: Trainer) -> Tensor | None:
        """The optimizer's momentum buffers ``[P]``, where they exist."""
        state = trainer.optimizers[0].state
        buffers = [state.get(p, {}).get("momentum_buffer") for p in self._probed()]
        if any(b is None for b in buffers):
            return None
        return self._problem.function.flatten(buffers, gradients=True)

    def _log(self, trainer: Trainer, scalars: dict[str, float]) -> None:
        self.history[trainer.global_step] = scalars
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.log_metrics(self._named(scalars), step=trainer.global_step)
        for writer in writers(trainer):
            for tag, value in self._named(bands(scalars)).items():
                writer.add_scalar(tag, value, trainer.global_step)
        self._publish(trainer, scalars)

    def _named(self, scalars: dict[str, float]) -> dict[str, float]:
        """Tags as the loggers see them."""
        return {f"{self.name}/{tag.removeprefix('singlim/')}": value for tag, value in scalars.items()}

    def _publish(self, trainer: Trainer, scalars: dict[str, float]) -> None:
        """For callbacks that monitor a metric, and for the progress bar."""
        named = self._named(scalars)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in named.items()})
        if self.prog_bar:
            shown = {tag: named[tag] for tag in map(f"{self.name}/{{}}".format, _SHOWN) if tag in named}
            trainer.progress_bar_metrics.update(shown)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work beside the training: the global random state is put back, the time is booked, autocast is off."""
        with (
            self._budget.spending(),
            isolate_rng(),
            torch.enable_grad(),
            torch.autocast(self._device_type, enabled=False),
        ):
            error: BaseException | None = None
            try:
                yield
            except BaseException as caught:  # isolate_rng restores nothing when an exception passes through it
                error = caught
        if error is not None:
            raise error

    @property
    def _device_type(self) -> str:
        return self._problem.device.type if hasattr(self, "_problem") else "cpu"


def _monitors(trainer: Trainer) -> list[SingularLimitMonitor]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets them from a helper
    return [each for each in callbacks if isinstance(each, SingularLimitMonitor)]


def _warn_not_covered(reason: str) -> None:
    rank_zero_warn(f"torch_singlim: drift not predicted: {reason}. Geometry is still measured.")


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or the CPU, whose allocator has no exception of its own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _in_words(scalars: dict[str, float]) -> str:
    """The window's agreement, in the words of the terminal."""
    words = {
        "drift/cosine": "cosine",
        "reference/cosine": "step by step",
        "drift/ceiling": "ceiling",
        "drift/speed_ratio": "speed ratio",
        "drift/null_cosine": "null",
        "limit/spread_measured": "length along Gamma",
        "limit/spread_predicted": "predicted",
    }
    found = [f"{word} {scalars[f'singlim/{tag}']:.3f}" for tag, word in words.items() if f"singlim/{tag}" in scalars]
    return ", ".join(found) if found else "nothing moved"
