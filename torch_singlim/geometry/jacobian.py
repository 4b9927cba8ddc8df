"""Products with the Jacobian of a function at one point, from one cached pass through the function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, func

from torch_singlim.network import jvp

__all__ = ["JacobianProducts"]

# number of products J v from which on recording the tangent pass, at the cost of ten to twenty gradients, pays off
_FEW = 30


class JacobianProducts:
    """The products J v and J^T u with the derivative J ``[..., P]`` of a function at w.

    J^T u (vjp) is the cached backward pass. J v (jvp) is the transpose of that linear map for networks of linear
    layers. Convolutions are slow to transpose: for these J v is a tangent forward pass. The first products repeat the
    pass; after many products it is recorded, and everything that depends on w alone is evaluated only once.

    Args:
        function: w ``[P]`` -> outputs.
        w: the point.
        tangent: whether tangent passes are faster than the transpose.

    >>> J = JacobianProducts(lambda w: w**2, torch.tensor([1.0, 2.0]), tangent=True)
    >>> J.jvp(torch.ones(2)), J.vjp(torch.ones(2))
    (tensor([2., 4.]), tensor([2., 4.]))
    """

    def __init__(self, function: Callable[[Tensor], Tensor], w: Tensor, *, tangent: bool) -> None:
        self._function, self._w, self._tangent, self._products = function, w, tangent, 0
        self._recorded: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def _backward(self) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
        return func.vjp(self._function, self._w)  # type: ignore[return-value]  # typed for auxiliary outputs, too

    @cached_property
    def _transpose(self) -> Callable[[Tensor], tuple[Tensor]] | None:
        if self._tangent:
            return None
        return func.vjp(self.vjp, torch.zeros_like(self.outputs))[1]  # type: ignore[return-value]  # as above

    @property
    def outputs(self) -> Tensor:
        """The function's value at w."""
        return self._backward[0].detach()

    def vjp(self, u: Tensor) -> Tensor:
        """J^T u  ``[P]``."""
        return self._backward[1](u)[0]

    def jvp(self, v: Tensor) -> Tensor:
        """J v, in the shape of the outputs."""
        self._products += 1
        if self._transpose is not None or self._products <= _FEW:
            return self.unrecorded_jvp(v)
        if self._recorded is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some versions of torch emit a warning about torch itself here
                try:
                    self._recorded = func.linearize(self._function, self._w)[1]
                except NotImplementedError:  # no forward derivatives
                    self._recorded = self.unrecorded_jvp
        with torch.no_grad():
            return self._recorded(v)

    def unrecorded_jvp(self, v: Tensor) -> Tensor:
        """J v without recording, so that vmap may batch it."""
        if self._transpose is not None:
            return self._transpose(v)[0]
        return jvp(self._function, (self._w,), (v,))[1]
