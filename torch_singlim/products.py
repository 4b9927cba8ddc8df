"""Products with the Jacobian of a function at one point, the pass through the function made once and kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.func import jvp, linearize, vjp

__all__ = ["JacobianProducts"]

# products J v after which recording the tangent pass, ten to twenty gradients, pays
_FEW = 30


class JacobianProducts:
    """J v and J^T u of a function at w, J its derivative ``[..., P]``.

    J^T u is the kept backward pass. J v is the transpose of that (u -> J^T u is linear) for linear layers. Convolutions
    are transposed slowly: there it is a tangent forward pass, at first made anew each time, then recorded with all that
    depends on w alone folded in, when that pays.

    Args:
        function: w ``[P]`` -> outputs.
        w: the point.
        tangent: whether tangent passes are faster than the transpose.

    >>> J = JacobianProducts(lambda w: w**2, torch.tensor([1.0, 2.0]), tangent=True)
    >>> J.push(torch.ones(2)), J.pull(torch.ones(2))
    (tensor([2., 4.]), tensor([2., 4.]))
    """

    def __init__(self, function: Callable[[Tensor], Tensor], w: Tensor, *, tangent: bool) -> None:
        self._function, self._w, self._pushed = function, w, 0
        self._transpose = None if tangent else vjp(self.pull, torch.zeros_like(self.outputs))[1]
        self._recorded: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def _backward(self) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
        return vjp(self._function, self._w)  # type: ignore[return-value]  # typed for auxiliary outputs, too

    @property
    def outputs(self) -> Tensor:
        """The function at w."""
        return self._backward[0].detach()

    def pull(self, u: Tensor) -> Tensor:
        """J^T u  ``[P]``."""
        return self._backward[1](u)[0]

    def push(self, v: Tensor) -> Tensor:
        """J v in the outputs' shape."""
        self._pushed += 1
        if self._transpose is not None or self._pushed <= _FEW:
            return self.unrecorded(v)
        if self._recorded is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some versions of torch warn there about torch itself
                self._recorded = linearize(self._function, self._w)[1]
        with torch.no_grad():
            return self._recorded(v)

    def unrecorded(self, v: Tensor) -> Tensor:
        """J v, recording nothing: vmap may batch it."""
        if self._transpose is not None:
            return self._transpose(v)[0]
        return jvp(self._function, (self._w,), (v,))[1]  # type: ignore[return-value]  # any number of outputs
