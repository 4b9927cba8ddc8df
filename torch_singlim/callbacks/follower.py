"""Opens paths beside a Trainer's training, and gives the steps of the run to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from torch_singlim.callbacks.detect import BatchToProblem, as_pair
from torch_singlim.callbacks.inject import transients
from torch_singlim.callbacks.optimizer import plain_optimizer
from torch_singlim.callbacks.recording import SeveralCallsError, StepRecording, clip_of, injections_of, unperturbed
from torch_singlim.callbacks.twin import (
    MicroBatch,
    TrainingStepGradient,
    call_training_step,
    forward_and_loss,
    make_twin,
)
from torch_singlim.measure import Budget, Code, Engine, Measurement, Options, Reason
from torch_singlim.measure.noise_off import compare_noise_off
from torch_singlim.measure.optimizer_copy import parameters_of
from torch_singlim.measure.paths import CoupledPaths, Path
from torch_singlim.measure.second_order import BatchPotential, without_potential
from torch_singlim.measure.steps import Recorded, held_by
from torch_singlim.network import PeerFailed, ProcessGroup, free_memory, out_of_memory
from torch_singlim.noise import parts

__all__ = ["TIMED_STEPS", "Follower"]

_GIB = 2.0**30
# between the seeds of two monitors: more than there are steps
_STRIDE = 2**40 + 15
# steps of the training that are timed before the first paths are opened
TIMED_STEPS = 3


def _unsupported(trainer: Trainer, module: LightningModule) -> Reason | None:
    """Why there can be no paths beside this training; None: none is known."""
    if len(trainer.optimizers) != 1:
        return Code.SEVERAL_OPTIMIZERS(count=len(trainer.optimizers))
    if not module.automatic_optimization:
        return Code.MANUAL_OPTIMIZATION()
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return Code.NO_BATCHES()
    return None


class Follower:
    """Copies a training when a window is opened, and records its steps until the window is closed.

    Args:
        trainer: whose training it is.
        module: the module that is trained.
        options: number of draws and replicas.
        watched: the parameters whose motion is compared.
        batch_to_problem: a batch -> (inputs, targets), for batches of another form.
        process_group: the processes among which the run averages its gradients.
        seed: of the paths' noise; each window has a generator of its own, so that a resumed run has the same.
        spending: returns a context that counts the time of the recording.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        options: Options,
        watched: list[nn.Parameter],
        batch_to_problem: BatchToProblem | None,
        process_group: ProcessGroup,
        seed: int,
        spending: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._trainer, self._module, self._options, self._watched = trainer, module, options, watched
        self._batch_to_problem = batch_to_problem
        self._group, self._seed, self._spending = process_group, seed, spending
        self._recording: StepRecording | None = None
        self._affine: bool | None = None  # whether the optimizer's updates are affine in the gradient; None: not tested
        self._evaluate = call_training_step  # computes the loss of a copy of the module
        self._baseline: bool | None = None  # whether the noise can be switched off; None: not tested
        self._began: tuple[int, float] | None = None  # a step, and the seconds that training had taken until then
        self._seconds, self._advanced = 0.0, 0  # that advancing paths took, and how often
        self.reason = _unsupported(trainer, module)
        """Why there can be no paths; None: none is known."""

    def open(self, engine: Engine, step: int, stop: int) -> None:
        """Let the engine follow paths from the present state on, and record the steps; or tell it why this fails.

        Args:
            engine: with a window in progress.
            step: optimizer steps so far.
            stop: the step up to which.
        """
        self.close()  # the window before may end here
        found = self._open(step, self._potential(engine))
        if isinstance(found, Reason):
            engine.give_up(found)
            return
        paths, rehearsal = found
        engine.note(self._form(paths))
        engine.windows.follow(paths, rehearsal, step, stop)

    def _form(self, paths: CoupledPaths) -> Reason | None:
        """That the averaged path takes the mean of steps, and why; None: it takes the mean gradient."""
        if paths.affine and clip_of(self._trainer) is None:
            return None
        name = type(self._optimizer()).__name__
        why = "gradients are clipped" if paths.affine else f"a step of {name} is not linear in the gradient"
        return Code.AVERAGED_STEPS(why=why)

    def _potential(self, engine: Engine) -> BatchPotential | None:
        """The potential of the noise that is known; None: paths do not need one. What they lack is noted."""
        second = [part for part in parts(engine.noise) if part.order == 2]
        if not second and not self._options.expanded:
            return None
        problem, optimizer = engine.problem, self._optimizer()
        plain = problem is not None and set(problem.function.step_ratios.values()) == {1.0}
        missing = [str(part) for part in second]
        if problem is not None and plain and isinstance(optimizer, torch.optim.SGD):
            missing = without_potential(engine.noise, problem)
        if missing:
            engine.note(Code.NO_POTENTIAL(noises=" and ".join(missing)))
        if problem is None or not plain or (len(missing) == len(second) and not self._options.expanded):
            return None

        def samples(batch: MicroBatch) -> tuple[Tensor, Tensor]:
            return as_pair(batch.args[0], self._batch_to_problem)

        return BatchPotential(problem, engine.noise, samples, self._group.size, self._group.all_reduce)

    def _open(self, step: int, potential: BatchPotential | None) -> tuple[CoupledPaths, Path] | Reason:
        optimizer = self._optimizer()
        short = self._memory(optimizer, step)
        if short is not None:
            return short
        parameters = parameters_of(optimizer)
        gradient = TrainingStepGradient(
            self._trainer.precision_plugin.train_step_context,
            datamodule=getattr(self._trainer, "datamodule", None),
            injections=injections_of(self._trainer, parameters),
            process_group=self._group,
            evaluate=self._evaluate,
        )
        positions = {id(p): i for i, p in enumerate(parameters)}
        try:
            rehearsal = make_twin(self._module, optimizer)
            paths = CoupledPaths(
                self._path,
                gradient,
                draws=self._options.draws,
                replicas=self._options.replicas,
                expanded=self._options.expanded,
                potential=potential,
                baseline=self._baseline is not False,
                affine=self._affine,
                watched=[positions[id(p)] for p in self._watched if id(p) in positions],
                generator=torch.Generator().manual_seed((self._seed * _STRIDE + step) % 2**63),
            )
        except Exception as error:  # a module may contain anything
            return Code.NO_COPY(why=f"{type(error).__name__}: {error}")
        self._affine = paths.affine
        self._recording = StepRecording(self._trainer, self._module, optimizer, self._spending)
        self._recording.install()
        return paths, rehearsal

    def _path(self) -> Path:
        """A copy of the run, without any perturbation."""
        optimizer = self._optimizer()
        path = make_twin(self._module, optimizer)
        truth, perturbed = unperturbed(self._trainer), transients(self._trainer)
        with torch.no_grad():
            for p, own in zip(path.parameters, parameters_of(optimizer), strict=True):
                p.copy_(held_by(own, truth))
                if own in perturbed:
                    p.sub_(perturbed[own])
        return path

    def _optimizer(self) -> torch.optim.Optimizer:
        found = plain_optimizer(self._trainer)
        assert found is not None  # others are unsupported
        return found

    def _memory(self, optimizer: torch.optim.Optimizer, step: int) -> Reason | None:
        """Why there is not enough memory for copies; None: there is."""
        held = [*self._module.parameters(), *self._module.buffers(), *parameters_of(optimizer)]
        state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
        one = sum(t.numel() * t.element_size() for t in (*held, *state))
        copies = 3 + self._options.replicas + (self._baseline is not False) + self._options.expanded
        free = self._group.all_reduce_min(free_memory(held[0].device))
        return None if copies * one <= free else Code.MEMORY(step=step, needed=copies * one / _GIB, free=free / _GIB)

    def watch(self, engine: Engine, step: int) -> None:
        """Keep the state before the next step if it will be replayed; stop recording if there are no paths.

        Args:
            engine: after everything at this step was done.
            step: optimizer steps so far.
        """
        if engine.windows.followed is None:
            self.close()
        if self._recording is not None:
            self._recording.keep_before = engine.windows.replays(step + 1)

    def before_step(self) -> None:
        """Record the settings of the step that the optimizer is about to make."""
        if self._recording is not None:
            self._recording.before_step()

    def advance(self, engine: Engine, step: int) -> Measurement | None:
        """Make the step that has ended on all paths.

        Args:
            engine: with paths.
            step: optimizer steps so far.

        Raises:
            Exception: the step could not be recorded, or not be made on paths.
        """
        assert self._recording is not None
        recorded = self._recording.finish()
        if recorded is None:
            return None
        engine.note(*self._check(engine, recorded))
        start = engine.budget.clock()
        found = engine.advance(step, recorded)
        self._seconds, self._advanced = self._seconds + engine.budget.clock() - start, self._advanced + 1
        return found

    def close(self) -> None:
        """Stop recording."""
        if self._recording is not None:
            self._recording.remove()
        self._recording = None

    def seconds_per_step(self, budget: Budget, step: int) -> float | None:
        """The time that the paths' part of a step is expected to take; None: unknown.

        Args:
            budget: knows how long steps took so far, with and without paths.
            step: optimizer steps so far.
        """
        if self._advanced:
            return self._seconds / self._advanced
        training = budget.elapsed - budget.spent
        if self._began is None:
            self._began = step, training
        steps = step - self._began[0]
        if steps < TIMED_STEPS:
            return None
        o = self._options
        return (1 + o.draws + o.replicas + 1) * (training - self._began[1]) / steps

    def _check(self, engine: Engine, recorded: Recorded) -> list[Reason]:
        """Before the first step on paths, once in a run: whether the noise can be switched off, and what that adds.

        Args:
            engine: with paths just opened.
            recorded: the first step.

        Raises:
            Exception: the step could not be made on a copy.
        """
        followed = engine.windows.followed
        if self._baseline is not None or followed is None:
            return []
        gradient, problem, instead = followed.paths.gradient, engine.problem, []
        assert isinstance(gradient, TrainingStepGradient)
        try:
            with self._group.together(), self._untouched():
                found = compare_noise_off(followed.rehearsal, gradient, recorded.step)
        except Exception as error:  # a training step may need more of the trainer than a copy has
            if problem is None or out_of_memory(error) or (isinstance(error, PeerFailed) and error.left_further):
                raise
            gradient.evaluate = self._evaluate = forward_and_loss(problem.sample_loss, self._batch_to_problem)
            with self._untouched():
                found = compare_noise_off(followed.rehearsal, gradient, recorded.step)
            instead = [Code.FORWARD_AND_LOSS(why=f"{type(error).__name__}: {error}")]
        self._baseline = found.deterministic and (found.random or found.added > 0)
        if not self._baseline:
            followed.paths.baseline = None
            return [*instead, Code.NO_NOISE() if found.deterministic else Code.NO_BASELINE()]
        return [*instead, *([Code.PENALTY(share=found.added)] if found.added else [])]

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Restore gradients and buffers of the module if the block has changed them.

        Raises:
            RuntimeError: it has: a copy of the module calls methods of the module itself.
        """
        module = self._module
        gradients = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
        buffers = [(b, b.clone()) for b in module.buffers()]
        changed = False
        try:
            yield
        finally:
            for p, held, value in gradients:
                if p.grad is not held or (held is not None and value is not None and not torch.equal(held, value)):
                    changed, p.grad = True, held
                    if held is not None and value is not None:
                        held.copy_(value)
            with torch.no_grad():
                for b, value in buffers:
                    if not torch.equal(b, value):
                        changed = True
                        b.copy_(value)
        if changed:
            raise RuntimeError("it calls methods of the module itself, which were set on the instance")

    def explain(self, error: Exception) -> Reason | None:
        """Why there can be no paths for the rest of the run; None: the failure says nothing about later windows.

        Args:
            error: what was raised.
        """
        if isinstance(error, SeveralCallsError):
            return Code.SEVERAL_CALLS(count=error.count)
        return Code.NO_STEP_ON_COPY(why=f"{type(error).__name__}: {error}") if self._baseline is None else None
