"""Copies of a module that share its parameters, or have parameters of another precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

__all__ = ["compile_likewise", "in_precision", "no_checkpointing", "no_compilation", "structural_copy"]


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
        _uncompile(part)
    return twin


def _uncompile(part: nn.Module) -> None:
    """Undo torch.compile in a copy, whose compiled functions are those of the original module."""
    if hasattr(part, "_orig_mod"):  # torch.compile wraps a module like this
        part.forward = part._orig_mod.__call__  # type: ignore[union-attr]  # a module
    elif getattr(part, "_compiler_ctx", None) is not None:  # Lightning marks a compiled LightningModule like this
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(part).pop(name, None)


@contextmanager
def no_checkpointing() -> Iterator[list[str]]:
    """Within it, torch.utils.checkpoint calls the functions that it is given; yields which of its forms were called.

    What is checkpointed is evaluated a second time in the backward pass, where a copy no longer has the weights that it
    was called with. torch has no switch for it.
    """
    called: list[str] = []

    def plain(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], **_: Any) -> Any:
        called.append("checkpoint")
        return function(*args, **kwargs)

    # before torch 2.13
    class Reentrant:
        @staticmethod
        def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
            called.append("reentrant")
            return function(*args)

    def generator(*_: Any, **__: Any) -> Iterator[None]:
        called.append("not reentrant")
        yield

    replaced = {
        "_checkpoint_impl": plain,
        "CheckpointFunction": Reentrant,
        "_checkpoint_without_reentrant_generator": generator,
    }
    kept = {name: getattr(checkpoint, name) for name in replaced if hasattr(checkpoint, name)}
    try:
        for name in kept:
            setattr(checkpoint, name, replaced[name])
        yield called
    finally:
        for name, original in kept.items():
            setattr(checkpoint, name, original)


@contextmanager
def no_compilation(twin: nn.Module, *, eager: bool = False) -> Iterator[None]:
    """Compile nothing for a copy: run what has been compiled for the original, and the rest without compilation.

    Code that is compiled for a copy would count for the limit at which torch no longer compiles the original. A
    LightningModule that is compiled as a whole is an exception: its code is not shared, and is compiled for the copies.

    Args:
        twin: the copy.
        eager: run nothing that was compiled.
    """
    parts = list(twin.modules())
    whole = any(getattr(part, "_compiler_ctx", None) is not None for part in parts)
    some = any(hasattr(p, "_orig_mod") or getattr(p, "_compiled_call_impl", None) is not None for p in parts)
    if (whole and eager) or (some and not whole):
        with torch.compiler.set_stance("force_eager" if eager else "eager_on_recompile"):
            yield
    else:
        yield


def compile_likewise(twin: nn.Module, module: nn.Module) -> None:
    """Compile a deep copy of a module in the way in which the module and its parts are compiled.

    Compiled code is then shared, and uses the same random numbers. What cannot be compiled likewise stays as it is.

    Args:
        twin: the copy.
        module: the original.
    """
    for part, original in zip(twin.modules(), module.modules(), strict=True):
        called = getattr(original, "_compiled_call_impl", None)  # nn.Module.compile, which deepcopy drops
        if called is not None:
            cells = (cell.cell_contents for cell in called.__closure__ or ())
            context = next((each for each in cells if hasattr(each, "compiler_config")), None)
            part._compiled_call_impl = None if context is None else context(part._call_impl)
        context = (getattr(original, "_compiler_ctx", None) or {}).get("dynamo_ctx")  # a compiled LightningModule
        if context is not None:
            for name in ("forward", "training_step"):
                vars(part).pop(name, None)
                setattr(part, name, context(getattr(part, name)))


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
