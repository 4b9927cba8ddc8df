"""One optimizer step of a run, as it is recorded for paths and replays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.measure.optimizer_copy import own_attributes, parameters_of
from torch_singlim.network import RandomState

__all__ = ["Before", "Clip", "Recorded", "Step", "flat", "held_by"]

# changes the gradients of parameters between backward and step, in place
Clip = Callable[[list[nn.Parameter]], object]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector, in float64  ``[P]``."""
    return torch.cat([t.detach().double().reshape(-1) for t in tensors])


@dataclass(frozen=True)
class Step:
    """One optimizer step of the run, with everything that paths need to make it, too.

    Args:
        batches: its micro-batches, in order.
        groups: settings of the optimizer's parameter groups at the step, without their parameters.
        modes: ``training`` of every submodule, in the order of ``module.modules()``.
        divisor: of the loss of each micro-batch; None: their number.
        clip: what is done to the gradients before the step.
        scale: of the loss before backward, by which the gradients are divided again (16-bit precision).
    """

    batches: tuple[Any, ...] = field(repr=False)
    groups: tuple[Mapping[str, Any], ...]
    modes: tuple[bool, ...] = field(repr=False)
    divisor: int | None = None
    clip: Clip | None = field(default=None, repr=False)
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Sequence[Any],
        *,
        divisor: int | None = None,
        clip: Clip | None = None,
        scale: float = 1.0,
    ) -> Step:
        """The step that a module and an optimizer are about to make."""
        groups = tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
        modes = tuple(part.training for part in module.modules())
        return cls(tuple(batches), groups, modes, divisor, clip, scale)

    @property
    def share(self) -> float:
        """The factor of each micro-batch's loss before backward."""
        return self.scale / (self.divisor or len(self.batches))


def held_by(tensor: Tensor, truth: Mapping[int, Tensor]) -> Tensor:
    """The data of a tensor without perturbation: those in `truth` under its id, if there are any, else its own."""
    found = truth.get(id(tensor))
    return tensor.detach() if found is None else found


@dataclass(frozen=True)
class Before:
    """The state of the run before a step, on which the step depends.

    Args:
        weights: the optimizer's parameters.
        state: of the module, including buffers.
        optimizer: the optimizer's state.
        attributes: those of the optimizer that are not in its state.
        original: the optimizer itself.
        random: the global random state.
    """

    weights: Tensor = field(repr=False)
    state: Mapping[str, Tensor] = field(repr=False)
    optimizer: Mapping[str, Any] = field(repr=False)
    attributes: Mapping[str, Any] = field(repr=False)
    original: torch.optim.Optimizer = field(repr=False)
    random: RandomState = field(repr=False)

    @classmethod
    def of(
        cls, module: nn.Module, optimizer: torch.optim.Optimizer, truth: Mapping[int, Tensor] | None = None
    ) -> Before:
        """A copy of the present state.

        Args:
            module: the module that is trained.
            optimizer: its optimizer.
            truth: id of each parameter that is perturbed at present -> its data without perturbation.
        """
        known = truth or {}
        parameters = [held_by(p, known) for p in parameters_of(optimizer)]
        tensors: dict[str, Tensor] = {**module.state_dict(), **dict(module.named_parameters(remove_duplicate=False))}
        held = {name: held_by(tensors[name], known) for name in module.state_dict()}
        state = {name: tensor.clone() for name, tensor in held.items()}
        held_state, attributes = copy.deepcopy(optimizer.state_dict()), own_attributes(optimizer)
        return cls(flat(parameters), state, held_state, attributes, optimizer, RandomState.now())


@dataclass(frozen=True)
class Recorded:
    """One optimizer step that the run has made.

    Args:
        step: the step, for paths to make, too.
        before: the state before the step; None unless it was to be kept.
        after: the optimizer's parameters after the step, including transient perturbations  ``[P]``.
        iterate: the same without transient perturbations  ``[P]``.
        length: |w_{k+1} - w_k| of the optimizer's step.
        moved: how far the weights had been moved since the last step by anything other than the optimizer.
        same_parameters: whether the optimizer holds the same parameters as before, and as many of them are trained.
    """

    step: Step
    before: Before | None = field(repr=False)
    after: Tensor = field(repr=False)
    iterate: Tensor = field(repr=False)
    length: float
    moved: float = 0.0
    same_parameters: bool = True
