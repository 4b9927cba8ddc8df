"""Whether the derivatives that the theory takes of a network are right: each against a finite difference, once.

Some fused layers have forward-mode rules that are silently wrong at second and third order (torch's LayerNorm is).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, jvp

from torch_singlim.geometry import linearize
from torch_singlim.linalg import rademacher
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import NoiseSystem, Sum, parts
from torch_singlim.theory.potential import noisy_gradient, random_direction, second_order_gradient
from torch_singlim.theory.second_order import row_gradient

__all__ = ["check_derivatives"]

_SAMPLES = 2
_WRONG = 0.02  # relative; right ones agree to 1e-4 and better, the wrong ones known are off by 30 % and more
# a kink between the points of one difference (ReLU, max pooling) spoils that step length, and a deep network has kinks
# everywhere: the best one counts
_STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def _mismatch(value: Tensor, difference: Callable[[float], Tensor], floor: float) -> float:
    """Relative distance of a derivative from its finite difference, at the best step length.

    `floor`: below this size the difference is rounding, both count as zero.
    """
    size = max(torch.linalg.vector_norm(value).item(), floor)
    return min(torch.linalg.vector_norm(value - difference(h)).item() / size for h in _STEPS)


def _central(function: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
    return lambda h: (function(h) - function(-h)) / (2 * h)


def _second(function: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
    return lambda h: (function(h) - 2 * function(0.0) + function(-h)) / h**2


def _is_wrong(layer: nn.Module, x: Tensor, generator: torch.Generator) -> bool:
    """Whether a layer's own third derivative is wrong at its input x, after a nonlinearity, in a random direction."""
    with torch.no_grad():
        c = torch.randn(layer(x).shape, generator=generator, dtype=x.dtype).to(x)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
    zero, one = x.new_zeros(()), x.new_ones(())

    def along(t: Tensor) -> Tensor:
        return grad(lambda u: (c * layer(u).tanh()).sum())(x + t * v)

    def slope(t: Tensor) -> Tensor:
        return jvp(along, (t,), (one,))[1]  # type: ignore[return-value]  # jvp is typed for any number of outputs

    bend: Tensor = jvp(slope, (zero,), (one,))[1]  # type: ignore[assignment]
    return _mismatch(bend, _second(lambda h: along(zero + h)), 1e-6) > _WRONG


def check_derivatives(problem: ZeroLossProblem, noise: NoiseSystem) -> None:
    """Raise ValueError if a derivative that the theory would take of this network and noise is wrong in torch.

    On two samples, in float64, in a random direction, against central differences: the gradient, the products with
    the Jacobian, and the third derivatives that give grad V; the global random state is left alone.

    Args:
        problem: loss and samples; its module is copied.
        noise: the system.

    Raises:
        ValueError: which derivative is off by how much, the type of the layer responsible, and what to write instead.

    >>> from torch_singlim.noise import Dropout
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Dropout(0.1), nn.Linear(3, 1))
    >>> check_derivatives(ZeroLossProblem(net, "mse", torch.randn(4, 2), torch.zeros(4, 1)), Dropout())
    """
    few = problem.subset(_SAMPLES)
    generator = torch.Generator().manual_seed(0)
    w = few.weights()
    v = rademacher(tuple(w.shape), generator=generator, like=w) * (w.abs().mean() + 1e-3)
    linearization = linearize(few, w)
    f = few.outputs(w)
    gradient = few.gradient(w)
    loss = few.loss(w).abs().item() + 1e-12
    checks = {
        "the gradient": _mismatch(
            torch.dot(gradient, v)[None], _central(lambda h: few.loss(w + h * v)[None]), 1e-6 * loss
        ),
        "the Jacobian's product": _mismatch(
            linearization.operator.matvec(v),
            _central(lambda h: few.whiten(f, few.outputs(w + h * v))),
            1e-6,
        ),
    }
    first = Sum(tuple(part for part in parts(noise) if part.order == 1 and part.scale(few).numel()))
    if parts(first):
        s = random_direction(first, few, generator=generator)
        bend = second_order_gradient(first, few, w, s)[0]
        quiet = torch.linalg.vector_norm(gradient).item() + 1e-9
        checks["the gradient of the noise's potential V"] = _mismatch(
            bend, _second(lambda h: noisy_gradient(first, few, w, [h * each for each in s])), 1e-3 * quiet
        )
    if any(part.order == 2 for part in parts(noise)):
        z = rademacher((_SAMPLES, few.num_residuals // _SAMPLES), generator=generator, like=w)
        slope, _ = row_gradient(few, w, z)
        checks["the gradient of tr H"] = _mismatch(
            torch.dot(slope, v)[None], _central(lambda h: row_gradient(few, w + h * v, z)[1][None]), 1e-6
        )
    off = {name: size for name, size in checks.items() if size > _WRONG}
    if not off:
        return
    name, size = max(off.items(), key=lambda item: item[1])
    called = few.function.layers(few.inputs)
    layers = sorted({type(f).__name__ for f, x in called if x.is_floating_point() and _is_wrong(f, x, generator)})
    culprit = (
        f"the layer responsible is {' or '.join(layers)}: replace it by one with right derivatives (nn.GroupNorm, "
        "nn.RMSNorm and nn.LayerNorm are)"
        if layers
        else "no layer by itself is: a fused function that forward calls is (F.layer_norm, for one): use the module "
        "(nn.LayerNorm, which is taken apart here), or elementary operations"
    )
    raise ValueError(
        f"torch differentiates this network wrongly: {name} is off by {size:.0%} from a finite difference on "
        f"{_SAMPLES} samples; {culprit}"
    )
