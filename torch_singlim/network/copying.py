"""Copies of a module that share its parameters, or have them in another precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["in_precision", "structural_copy"]


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters (never write them) and has modes and buffers of its own.

    >>> net = nn.Linear(2, 1)
    >>> twin = structural_copy(net)
    >>> twin.weight is net.weight, twin is net
    (True, False)
    """
    shared: dict[int, object] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        # results kept as attributes may hang on a graph, which deepcopy refuses
        shared |= {id(v): v for v in vars(part).values() if isinstance(v, Tensor) and v.grad_fn is not None}
    twin = copy.deepcopy(module, shared)  # a LightningModule drops its trainer
    for part in twin.modules():
        _uncompile(part)
    return twin


def _uncompile(part: nn.Module) -> None:
    """Undo torch.compile: derivatives of every order are taken of the module itself, hooks and all."""
    if hasattr(part, "_orig_mod"):  # what torch.compile makes of a module
        part.forward = part._orig_mod.__call__  # type: ignore[union-attr]  # a module
    elif getattr(part, "_compiler_ctx", None) is not None:  # what Lightning makes of a compiled LightningModule
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(part).pop(name, None)


def in_precision(twin: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A structural copy, changed in place to parameters and buffers of its own in another floating point type.

    >>> net = nn.Linear(2, 1)
    >>> in_precision(structural_copy(net), torch.float64).weight.dtype, net.weight.dtype
    (torch.float64, torch.float32)
    """
    for part in twin.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != dtype:
                    value = tensor.detach().to(dtype)
                    held[name] = (  # type: ignore[assignment]  # of the kind that this dict holds
                        nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                    )
    return twin
