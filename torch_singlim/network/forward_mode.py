"""Forward derivatives, also of functions for which torch has no forward-mode rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, func
from torch.utils import _pytree as pytree

__all__ = ["jvp"]


def jvp(function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """``torch.func.jvp``; by two reverse derivatives where the function has no forward one.

        J v = d/du <J^T u, v>

    >>> jvp(torch.sin, (torch.zeros(2),), (torch.ones(2),))
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    try:
        value, tangent, *_ = func.jvp(function, primals, tangents)
        return value, tangent
    except NotImplementedError:  # "Trying to use forward AD with ... that does not support it"
        value, pullback, *_ = func.vjp(function, *primals)
        zeros = pytree.tree_map(torch.zeros_like, value)
        second = func.vjp(pullback, zeros)[1]
        return value, second(tangents)[0]
