"""Check the derivatives of a network that the theory needs: each is compared once with a finite difference.

Some functions have wrong derivatives of second and third order without an error message. torch's fused layer
normalisation is one of them, and is replaced (`ElementaryMode`); others may be a user's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad

from torch_singlim.geometry import linearize
from torch_singlim.linalg import rademacher
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.noise import NoiseSystem, Sum, parts
from torch_singlim.theory.on_gamma import noise_slopes, row_gradient
from torch_singlim.theory.potential import noisy_gradient, random_direction, second_order_gradient

__all__ = ["check_derivatives"]

_SAMPLES = 2
_WRONG = 0.02  # relative error; correct derivatives agree to 1e-4 or better, known wrong ones are off by 30 % or more
# a kink (ReLU, max pooling) between the points of a difference makes it useless at that step length, and a deep network
# has many kinks: the step length with the best agreement counts
_STEPS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def _mismatch(value: Tensor, difference: Callable[[float], Tensor], floor: float) -> float:
    """Relative difference between a derivative and its finite difference, at the best step length.

    `floor`: derivatives smaller than this count as zero, since the finite difference is then dominated by rounding.
    """
    size = max(torch.linalg.vector_norm(value).item(), floor)
    return min(torch.linalg.vector_norm(value - difference(h)).item() / size for h in _STEPS)


def _central(function: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
    return lambda h: (function(h) - function(-h)) / (2 * h)


def _second(function: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
    return lambda h: (function(h) - 2 * function(0.0) + function(-h)) / h**2


def _is_wrong(layer: nn.Module, x: Tensor, generator: torch.Generator) -> bool:
    """Whether the third derivative of a layer, followed by a nonlinearity, is wrong at x, in a random direction."""
    with torch.no_grad():
        c = torch.randn(layer(x).shape, generator=generator, dtype=x.dtype).to(x)
    v = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x)
    zero, one = x.new_zeros(()), x.new_ones(())

    def along(t: Tensor) -> Tensor:
        return grad(lambda u: (c * layer(u).tanh()).sum())(x + t * v)

    def slope(t: Tensor) -> Tensor:
        return jvp(along, (t,), (one,))[1]

    bend: Tensor = jvp(slope, (zero,), (one,))[1]  # type: ignore[assignment]
    return _mismatch(bend, _second(lambda h: along(zero + h)), 1e-6) > _WRONG


def check_derivatives(problem: ZeroLossProblem, noise: NoiseSystem) -> None:
    """Raise ValueError if torch computes a derivative wrongly that the theory needs for this network and noise.

    The gradient, a product with the Jacobian and the third derivatives in grad V are compared with central differences,
    on two samples, in float64, in a random direction. The global random state does not change.

    Args:
        problem: loss and samples; its module is copied.
        noise: the system.

    Raises:
        ValueError: a derivative is wrong; the message names it, its error, the layer responsible and a replacement.

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
    for part in parts(first):
        if part.moves_outputs:
            u = rademacher((1, *f.shape), generator=generator, like=w)
            slope = noise_slopes(part, few, w, u)[0, :-1]
            checks[f"the gradient of V on the zero-loss set, {part}"] = _mismatch(
                torch.dot(slope, v)[None],
                _central(lambda h, part=part, u=u: noise_slopes(part, few, w + h * v, u)[0, -1:]),
                1e-6,
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
    called = [(layer, x) for layer, x in few.function.layers(few.inputs) if x.is_floating_point()]
    with few.function.elementary():
        layers = sorted({type(layer).__name__ for layer, x in called if _is_wrong(layer, x, generator)})
    culprit = (
        f"the layer responsible is {' or '.join(layers)}: replace it by one whose derivatives are right (nn.GroupNorm, "
        "nn.RMSNorm, nn.LayerNorm)"
        if layers
        else "no layer by itself is responsible: forward calls a function that is; use elementary operations"
    )
    raise ValueError(
        f"torch differentiates this network wrongly: {name} is off by {size:.0%} from a finite difference on "
        f"{_SAMPLES} samples; {culprit}"
    )
