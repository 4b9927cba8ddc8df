"""Copies of a module that share its parameters, or have parameters of another precision."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["in_precision", "structural_copy", "uncompile"]


def structural_copy(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its parameters (never write to them) but has its own modes and buffers.

    >>> net = nn.Linear(2, 1)
    >>> twin = structural_copy(net)
    >>> twin.weight is net.weight, twin is net
    (True, False)
    """
    shared: dict[int, object] = {id(p): p for p in module.parameters()}
    for part in module.modules():
        # tensors kept as attributes may be part of a graph, and deepcopy cannot copy those
        shared |= {id(v): v for v in vars(part).values() if isinstance(v, Tensor) and v.grad_fn is not None}
    twin = copy.deepcopy(module, shared)  # a LightningModule drops its trainer
    for part in twin.modules():
        uncompile(part)
    return twin


def uncompile(part: nn.Module) -> None:
    """Undo torch.compile in a copy, whose compiled functions are those of the original module.

    >>> uncompile(nn.Linear(2, 1))  # was not compiled
    """
    if hasattr(part, "_orig_mod"):  # torch.compile wraps a module like this
        part.forward = part._orig_mod.__call__  # type: ignore[union-attr]  # a module
    elif getattr(part, "_compiler_ctx", None) is not None:  # Lightning marks a compiled LightningModule like this
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(part).pop(name, None)


def in_precision(twin: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a structural copy its own parameters and buffers in another floating point type, in place.

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
