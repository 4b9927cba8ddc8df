"""Copies of optimizers, including the attributes that torch leaves out when it copies one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["copy_optimizer", "own_attributes", "parameters_of", "set_attributes"]

# what torch copies, and `step`, which schedulers replace on the instance by a method that counts the steps of the run
_OF_TORCH = frozenset(vars(copy.deepcopy(torch.optim.SGD([torch.zeros(1)], lr=1.0)))) | {"step"}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimizer holds, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def own_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies of the attributes of an optimizer that are neither in its state nor in its groups.

    Parameters and the optimizer itself are not copied where an attribute refers to them.
    """
    held = {id(each): each for each in (optimizer, *parameters_of(optimizer))}
    return copy.deepcopy({k: v for k, v in vars(optimizer).items() if k not in _OF_TORCH}, held)


def set_attributes(twin: torch.optim.Optimizer, attributes: Mapping[str, Any], original: torch.optim.Optimizer) -> None:
    """Set the attributes of a copy; where they refer to the original or its parameters, those of the copy are meant.

    Args:
        twin: a copy of the optimizer.
        attributes: of the original, as `own_attributes` returns them.
        original: the optimizer.
    """
    pairs = zip((original, *parameters_of(original)), (twin, *parameters_of(twin)), strict=True)
    vars(twin).update(copy.deepcopy(dict(attributes), {id(old): new for old, new in pairs}))


def copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A deep copy with all of the state and all attributes.

    Args:
        optimizer: is not changed.
        memo: id -> the object that takes its place in the copy, as for `copy.deepcopy`.

    >>> sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    >>> sgd.calls = 3
    >>> copy_optimizer(sgd, {}).calls
    3
    """
    twin = copy.deepcopy(optimizer, memo)
    vars(twin).pop("step", None)
    set_attributes(twin, own_attributes(optimizer), optimizer)
    return twin
