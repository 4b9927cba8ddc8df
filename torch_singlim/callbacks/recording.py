"""Record each optimizer step of a run: its micro-batches, settings, modes and random numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torch_singlim.callbacks.inject import injectors, transients
from torch_singlim.callbacks.optimizer import skipped
from torch_singlim.callbacks.stand_in import trainer_values
from torch_singlim.callbacks.twin import InjectionOf, MicroBatch, copy_batch
from torch_singlim.measure.optimizer_copy import parameters_of
from torch_singlim.measure.steps import Before, Clip, Recorded, Step, flat, held_by
from torch_singlim.network import RandomState

__all__ = ["SeveralCallsError", "StepRecording", "clip_of", "injections_of", "unperturbed"]


def clip_of(trainer: Trainer) -> Clip | None:
    """The gradient clipping of the trainer; None: there is none."""
    bound = trainer.gradient_clip_val
    if not bound:
        return None
    if trainer.gradient_clip_algorithm == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, bound)
    return lambda parameters: nn.utils.clip_grad_norm_(parameters, bound)


def unperturbed(trainer: Trainer) -> dict[int, Tensor]:
    """id of each tensor that the trainer's callbacks perturb at present -> its data without perturbation."""
    truth: dict[int, Tensor] = {}
    for each in reversed(injectors(trainer)):
        truth |= each.injection.unperturbed() if each.injection is not None else {}
    return truth


def injections_of(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> list[InjectionOf]:
    """The noise that the trainer's callbacks inject, for paths whose parameters are in this order."""
    positions = {id(p): i for i, p in enumerate(parameters)}
    found = []
    for each in injectors(trainer):
        assert each.injection is not None  # training has started
        indices = tuple(positions[id(p)] for p in each.injection.parameters)
        found.append(InjectionOf(each.noise, each.injection.num_outputs, each.batch_to_problem, indices))
    return found


class StepRecording:
    """Wraps the module's training_step during a window, and records the arguments of its calls.

    A failure of the recording does not reach the training; `finish` raises it.

    Args:
        trainer: with its callbacks.
        module: the module that is trained.
        optimizer: its optimizer.
        spending: returns a context that counts the time.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: torch.optim.Optimizer,
        spending: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._trainer, self._module, self._optimizer, self._spending = trainer, module, optimizer, spending
        self._parameters = parameters_of(optimizer)
        self._trained = [p.requires_grad for p in self._parameters]
        self.active = False
        """Whether calls are recorded."""
        self._error: Exception | None = None
        self._batches: list[MicroBatch] = []
        self._modes: tuple[bool, ...] = ()
        self._settings: Step | None = None
        self._before: Before | None = None
        self._transients: list[Tensor | None] = []
        self._last: list[Tensor] = []  # the weights after the last step
        self._moved = 0.0
        self.keep_before = False
        """Whether the state before the next step is to be kept."""

    def install(self) -> None:
        """Wrap training_step on the instance."""
        original, truth = self._module.training_step, unperturbed(self._trainer)
        self._last = [held_by(p, truth).clone() for p in self._parameters]

        @functools.wraps(original)  # Lightning reads its signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            if self.active and self._error is None:
                try:
                    with self._spending(), torch.no_grad():
                        self._note(args, kwargs)
                except Exception as error:  # what cannot be recorded is not followed
                    self._error = error
            return original(*args, **kwargs)

        training_step.recording = self  # type: ignore[attr-defined]  # for those who copy or unwrap the module
        self.active = True
        self._module.training_step = training_step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Remove the wrapper, and those below it that recorded before; one above it stays, and passes its calls on."""
        self.active, self._last = False, []
        held = vars(self._module)
        while (recording := getattr(held.get("training_step"), "recording", None)) and not recording.active:
            below = held["training_step"].__wrapped__
            if getattr(below, "recording", None) is None and getattr(below, "__self__", None) is self._module:
                del held["training_step"]  # the method of the class
            else:
                held["training_step"] = below

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the arguments of a call of training_step, without changing the random state."""
        sources, truth = injectors(self._trainer), unperturbed(self._trainer)
        if not self._batches:
            self._modes = tuple(part.training for part in self._module.modules())
            self._transients = [each.transient for each in sources]
            present = [held_by(p, truth) for p in self._parameters]
            self._moved = _distance(present, self._last)
            if self.keep_before:
                self._before = Before.of(self._module, self._optimizer, truth)

        self._batches.append(
            MicroBatch(
                args=copy_batch(args, truth),
                kwargs=copy_batch(kwargs, truth),
                trainer=trainer_values(self._trainer),
                random=RandomState.now(),
                etas=tuple(tuple(each.etas) for each in sources),
            )
        )

    def before_step(self) -> None:
        """Record the settings of this optimizer step."""
        trainer = self._trainer
        if skipped(trainer, self._optimizer):
            self._settings = None
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._settings = Step.of(
            self._module,
            self._optimizer,
            (),
            divisor=trainer.accumulate_grad_batches,
            clip=clip_of(trainer),
            scale=1.0 if scaler is None else float(scaler.get_scale()),
        )

    def finish(self) -> Recorded | None:
        """The step that the optimizer has made; None: it made none.

        Raises:
            Exception: the step could not be recorded.
            SeveralCallsError: the optimizer evaluated training_step more often than there are micro-batches.
        """
        batches, settings, before = self._batches, self._settings, self._before
        self._batches, self._settings, self._before = [], None, None
        if self._error is not None:
            raise self._error
        if not batches or settings is None:
            if _distance(self._parameters, self._last) != 0:
                raise RuntimeError("the optimizer moved the weights in a step that could not be recorded")
            return None
        if settings.divisor and len(batches) > settings.divisor:
            raise SeveralCallsError(len(batches))
        new = [each.transient for each in injectors(self._trainer)]
        batches[-1] = replace(batches[-1], transients=tuple(zip(self._transients, new, strict=True)))
        held = parameters_of(self._optimizer)
        same = [id(p) for p in held] == [id(p) for p in self._parameters]
        same = same and [p.requires_grad for p in held] == self._trained
        previous, self._last = self._last, [p.detach().clone() for p in self._parameters]
        after = flat(self._last)
        perturbed, iterate = transients(self._trainer), after
        if perturbed:
            iterate = after - flat([perturbed.get(p, torch.zeros_like(p)) for p in self._parameters])
        step = replace(settings, batches=tuple(batches), modes=self._modes)
        return Recorded(step, before, after, iterate, _distance(self._last, previous), self._moved, same)


def _distance(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    squares = [(a - b).double().square().sum() for a, b in zip(tensors, others, strict=True)]
    return torch.stack(squares).sum().sqrt().item()


class SeveralCallsError(RuntimeError):
    """The optimizer evaluated training_step more often than there are micro-batches."""

    def __init__(self, count: int) -> None:
        super().__init__(f"training_step was called {count} times in one step of the optimizer")
        self.count = count
