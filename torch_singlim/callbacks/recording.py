"""Record each optimizer step of a run: its micro-batches, settings, modes and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from torch_singlim.callbacks.inject import InjectNoise
from torch_singlim.callbacks.twin import InjectionOf, MicroBatch, trainer_values
from torch_singlim.measure.paths import Before, Clip, Step, held_by
from torch_singlim.network import RandomState

__all__ = ["Recorded", "StepRecording", "clip_of", "injections_of"]


def clip_of(trainer: Trainer) -> Clip | None:
    """The gradient clipping of the trainer; None: there is none."""
    bound = trainer.gradient_clip_val
    if not bound:
        return None
    if trainer.gradient_clip_algorithm == "value":
        return lambda parameters: nn.utils.clip_grad_value_(parameters, bound)
    return lambda parameters: nn.utils.clip_grad_norm_(parameters, bound)


def _injectors(trainer: Trainer) -> list[InjectNoise]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets them from a helper
    return [each for each in callbacks if isinstance(each, InjectNoise)]


def injections_of(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> list[InjectionOf]:
    """The noise that the trainer's callbacks inject, for paths whose parameters are in this order."""
    positions = {id(p): i for i, p in enumerate(parameters)}
    found = []
    for each in _injectors(trainer):
        assert each.injection is not None  # training has started
        indices = tuple(positions[id(p)] for p in each.injection.parameters)
        found.append(InjectionOf(each.noise, each.injection.num_outputs, each.batch_to_problem, indices))
    return found


@dataclass(frozen=True)
class Recorded:
    """One optimizer step of the run.

    Args:
        step: the step, for paths to repeat.
        before: the state before the step; None unless it was to be kept.
        after: the weights after the step, including transient perturbations  ``[P]``.
        moved: how far the weights had been moved since the last step by anything other than the optimizer.
    """

    step: Step
    before: Before | None
    after: Tensor
    moved: float


class StepRecording:
    """Wraps the module's training_step during a window, and records the arguments of its calls.

    Args:
        trainer: with its callbacks.
        module: the module that is trained.
        optimizer: its optimizer.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        self._trainer, self._module, self._optimizer = trainer, module, optimizer
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._original: Any = None
        self._own: bool = False  # whether the instance had a training_step of its own
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
        self._own = "training_step" in vars(self._module)
        original = self._original = self._module.training_step
        self._last = [p.detach().clone() for p in self._parameters]

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._note(args, kwargs)
            return original(*args, **kwargs)

        self._module.training_step = training_step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Remove the wrapper."""
        if self._original is None:
            return
        if self._own:
            self._module.training_step = self._original  # type: ignore[method-assign]
        else:
            vars(self._module).pop("training_step", None)
        self._original = None
        self._last = []

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record the arguments of a call of training_step, without changing the random state."""
        injectors = _injectors(self._trainer)
        truth: dict[int, Tensor] = {}
        for each in reversed(injectors):
            truth |= each.injection.unperturbed() if each.injection is not None else {}
        if not self._batches:
            self._modes = tuple(part.training for part in self._module.modules())
            self._transients = [each.transient for each in injectors]
            present = [held_by(p, truth) for p in self._parameters]
            squares = [(a - b).square().sum() for a, b in zip(present, self._last, strict=True)]
            self._moved = torch.stack(squares).sum().sqrt().item()
            if self.keep_before:
                self._before = Before.of(self._module, self._optimizer, truth)

        def copied(tensor: Tensor) -> Tensor:
            return held_by(tensor, truth).clone()

        self._batches.append(
            MicroBatch(
                args=apply_to_collection(args, Tensor, copied),
                kwargs=apply_to_collection(kwargs, Tensor, copied),
                trainer=trainer_values(self._trainer),
                random=RandomState.now(),
                etas=tuple(tuple(each.etas) for each in injectors),
            )
        )

    def before_step(self) -> None:
        """Record the settings of this optimizer step."""
        divisor = self._trainer.accumulate_grad_batches
        self._settings = Step.of(self._module, self._optimizer, (), divisor=divisor, clip=clip_of(self._trainer))

    def finish(self) -> Recorded | None:
        """The step that the optimizer has made; None if nothing was recorded."""
        batches, settings, before = self._batches, self._settings, self._before
        self._batches, self._settings, self._before = [], None, None
        if not batches or settings is None:
            return None
        new = [each.transient for each in _injectors(self._trainer)]
        batches[-1] = replace(batches[-1], transients=tuple(zip(self._transients, new, strict=True)))
        self._last = [p.detach().clone() for p in self._parameters]
        after = torch.cat([p.double().reshape(-1) for p in self._last])
        step = replace(settings, batches=tuple(batches), modes=self._modes)
        return Recorded(step, before, after, self._moved)
