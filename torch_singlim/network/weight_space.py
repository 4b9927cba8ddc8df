"""The trainable weights of a module as one flat vector, in the coordinates of their step sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["WeightSpace"]


def _check_ratios(parameters: Mapping[str, nn.Parameter], ratios: Mapping[str, float | Tensor]) -> None:
    """Raise ValueError unless there is a positive number, or one for each weight, for names of these parameters."""
    unknown = sorted(ratios.keys() - parameters.keys())
    wrong = [name for name, ratio in ratios.items() if not bool((torch.as_tensor(ratio) > 0).all())]
    shapes = {name: tuple(ratio.shape) for name, ratio in ratios.items() if isinstance(ratio, Tensor)}
    other = [name for name in shapes.keys() & parameters.keys() if shapes[name] != parameters[name].shape]
    if unknown or wrong or other:
        got = ", ".join(unknown) or dict(ratios) if not other else {name: shapes[name] for name in other}
        raise ValueError(
            "step_ratios must give a positive number, or one for each weight, for names of trainable parameters, got "
            f"{got}"
        )


class WeightSpace:
    """The parameters of a module that require a gradient, in the order of ``module.parameters()``, as a vector ``[P]``.

    With `step_ratios` r (parameter name -> its step size relative to alpha, one number or one for each weight), the
    coordinates u are those in which steps of different sizes become plain gradient descent: w = sqrt(r) u, where

        w <- w - alpha r grad_w L      is      u <- u - alpha grad_u L(sqrt(r) u)

    and |u| is the norm of w in the metric 1/r. Parameters that `step_ratios` does not name keep their present values.

    Args:
        module: the module; its parameters are read, never written to.
        dtype: of the vectors.
        device: of the vectors; default: that of the weights.
        step_ratios: default: 1 for all trainable parameters.

    Raises:
        ValueError: no trainable parameters, unknown names, a ratio that is not positive or has another shape.

    >>> space = WeightSpace(nn.Linear(2, 1), dtype=torch.float64, step_ratios={"bias": 4.0})
    >>> space.num_weights, space.names
    (1, ['bias'])
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        step_ratios: Mapping[str, float | Tensor] | None = None,
    ) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if step_ratios is not None:
            _check_ratios(dict(named), step_ratios)
            named = [(name, p) for name, p in named if name in step_ratios]
        if not named:
            raise ValueError("the module has no trainable parameters: there are no weights to measure")
        self.module = module
        given: Mapping[str, float | Tensor] = dict.fromkeys(dict(named), 1.0) if step_ratios is None else step_ratios
        self.step_ratios = {name: given[name] for name, _ in named}
        self.dtype = dtype
        self.device = torch.device(device) if device is not None else named[0][1].device
        self.names = [name for name, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.num_weights = sum(p.numel() for _, p in named)
        self.uniform = not any(isinstance(ratio, Tensor) for ratio in self.step_ratios.values())
        """Whether all weights of a parameter have the same step size."""
        self._scale = None  # sqrt(r) [P]
        if not self.uniform or set(self.step_ratios.values()) != {1.0}:
            ratios = (torch.as_tensor(r, dtype=dtype, device=self.device) for r in self.step_ratios.values())
            roots = [r.detach().sqrt().expand(shape).reshape(-1) for r, shape in zip(ratios, self.shapes, strict=True)]
            self._scale = torch.cat(roots)

    def _cast(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(self.device, dtype, copy=True)

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters, in the order of the vector."""
        named = dict(self.module.named_parameters())
        return [named[name] for name in self.names]

    def weights(self) -> Tensor:
        """The module's present weights ``[P]``, a copy."""
        return self.flatten(self.parameters())

    def flatten(self, tensors: list[Tensor] | list[nn.Parameter], *, gradients: bool = False) -> Tensor:
        """Tensors of the parameters' shapes, in their order, as one vector ``[P]``; `gradients`: they are gradients."""
        flat = torch.cat([self._cast(t).reshape(-1) for t in tensors])
        if self._scale is None:
            return flat
        return flat * self._scale if gradients else flat / self._scale

    def unflatten(self, w: Tensor) -> dict[str, Tensor]:
        """The weights by name, from w ``[P]``."""
        sizes = [shape.numel() for shape in self.shapes]
        parts = (w if self._scale is None else w * self._scale).split(sizes)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}
