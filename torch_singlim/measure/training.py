"""How a network is trained, as far as theory is concerned: the noise, and what the theory does not cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_singlim.geometry import nearest_point
from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.measure.samples import TrainingSet
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import CustomNoise, Dropout, Minibatch, NoiseSystem, Sum, WeightDecay, map_parts, parts
from torch_singlim.theory import check_derivatives, of_hessian, with_measured_order

__all__ = [
    "Training",
    "checked",
    "detect_noise",
    "orders_known",
    "training_of",
    "unsupported_noise",
    "with_decay",
    "with_orders",
]

# tolerance of the nearest point at which the order of a custom noise is measured
_ORDER_POINT = 1e-2


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Args:
        noise: all noise of the training.
        reasons: what of the training the theory does not cover.
        whole: all training samples, if a part of them is measured and all are in memory; else None.
        adaptive: name of the optimizer, if it is an adaptive one whose metric is known; else empty.
    """

    noise: NoiseSystem
    reasons: tuple[Reason, ...] = ()
    whole: TrainingSet | None = None
    adaptive: str = ""


def detect_noise(problem: ZeroLossProblem, *, weight_decay: float, injected: NoiseSystem | None) -> NoiseSystem:
    """All noise of a training: dropout layers, the optimizer's weight decay, injected noise; or minibatches alone.

    >>> import torch
    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.2), nn.Linear(3, 1))
    >>> problem = ZeroLossProblem(net, "mse", torch.ones(1, 2), torch.ones(1, 1))
    >>> detect_noise(problem, weight_decay=0.01, injected=None)
    Dropout() + WeightDecay(coefficient=0.01)
    """
    systems: list[NoiseSystem] = [Dropout()] if problem.sites else []
    if weight_decay:
        systems.append(WeightDecay(weight_decay))
    systems += parts(injected) if injected else ()
    return Sum(tuple(systems)) if len(systems) > 1 else (systems or [Minibatch()])[0]


def with_orders(noise: NoiseSystem, orders: Sequence[int | None] | None) -> NoiseSystem:
    """The noise with custom parts of these orders, as they were measured before; None: they were not."""
    if orders is None or len(orders) != len(parts(noise)):
        return noise
    known = iter(orders)

    def with_order(part: NoiseSystem) -> NoiseSystem:
        order = next(known)
        return replace(part, claimed_order=order) if isinstance(part, CustomNoise) else part

    return map_parts(noise, with_order)


def orders_known(noise: NoiseSystem) -> bool:
    """Whether no part is a custom noise whose order is yet to be measured."""
    return not any(isinstance(part, CustomNoise) and part.claimed_order == "measured" for part in parts(noise))


def checked(
    problem: ZeroLossProblem,
    noise: NoiseSystem,
    *,
    limit: bool,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Training:
    """The noise with the orders of its custom parts, measured near the module's weights, and what fails of the theory.

    Args:
        problem: loss and samples.
        noise: all noise of the training.
        limit: whether the limit is going to be predicted; else orders are not measured, and the noise's derivatives
            are not checked.
        num_draws: for the trace in V.
        generator: of its draws.
    """
    reasons = []
    if limit and not orders_known(noise):
        point = nearest_point(problem, problem.weights(), rtol=_ORDER_POINT).point
        try:
            noise = with_measured_order(noise, problem, point, num_draws=num_draws, generator=generator)
        except ValueError as error:
            limit = False
            reasons.append(Code.ORDER_UNKNOWN(why=str(error)))
    try:
        check_derivatives(problem, noise if limit else Sum(()))
    except ValueError as error:
        reasons.append(Code.DERIVATIVES(why=str(error)))
    return Training(noise, tuple(reasons))


def with_decay(noise: NoiseSystem, coefficient: float) -> NoiseSystem:
    """The noise with weight decay of this coefficient in the place of its own, if it has any.

    >>> with_decay(Dropout() + WeightDecay(0.1), 0.2)
    Dropout() + WeightDecay(coefficient=0.2)
    """
    return map_parts(noise, lambda part: WeightDecay(coefficient) if isinstance(part, WeightDecay) else part)


def unsupported_noise(problem: ZeroLossProblem, noise: NoiseSystem, adaptive: str = "") -> tuple[Reason, ...]:
    """Reasons why the theory does not cover training mode, or the noise together with these step ratios.

    Args:
        problem: loss and samples.
        noise: all noise of the training.
        adaptive: name of the optimizer, if it is an adaptive one.
    """
    reasons = []
    if problem.function.normalises_over_batch:
        reasons.append(Code.BATCH_NORMALISATION())
    elif problem.function.is_random(problem.inputs[:2], training=True):
        reasons.append(Code.OTHER_RANDOMNESS())
    if adaptive:
        # an adaptive optimizer's weight decay is decoupled, and in its metric that of plain descent
        other = [part for part in parts(noise) if not isinstance(part, WeightDecay)]
        second = [part for part in other if part.scale_free and part.order == 2]
        # of order 2, the step sizes' own fluctuations are known where there is no other noise
        alone = len(second) == len(other) and of_hessian(Sum(tuple(second)), problem, 1) > 0
        unknown = [type(part).__name__ for part in other if not part.scale_free or (part in second and not alone)]
        if unknown:
            reasons.append(Code.ADAPTIVE_NOISE(optimizer=adaptive, noises=" and ".join(unknown)))
        return tuple(reasons)
    fixed = [type(part).__name__ for part in parts(noise) if not part.scale_free]
    if fixed and set(problem.function.step_ratios.values()) != {1.0}:
        reasons.append(Code.RATIOS_UNDER_NOISE(noises=" and ".join(fixed)))
    return tuple(reasons)


def training_of(
    problem: ZeroLossProblem | Reason | None,
    *,
    given: NoiseSystem | None,
    weight_decay: float,
    injected: NoiseSystem | None,
    reasons: tuple[Reason, ...] = (),
    whole: TrainingSet | None = None,
    adaptive: str = "",
) -> Training:
    """The noise that was given, or else that is detected, with every reason why its drift cannot be predicted.

    Args:
        problem: loss and samples, or the reason why there are none; None: they are not known yet.
        given: the noise as given by the user; None: it is detected.
        weight_decay: the optimizer's.
        injected: noise that is injected.
        reasons: the reasons that are known already.
        whole: all training samples, if a part of them is measured and all are in memory.
        adaptive: name of the optimizer, if it is an adaptive one.

    Raises:
        ValueError: a given noise that does not fit the problem.
    """
    if problem is None or isinstance(problem, Reason):
        return Training(given or injected or Minibatch(), (*([problem] if problem else []), *reasons))
    noise = given or detect_noise(problem, weight_decay=weight_decay, injected=injected)
    noise.check(problem)
    empty = () if problem.attained else (Code.NOT_ATTAINED(),)
    return Training(noise, (*empty, *reasons, *unsupported_noise(problem, noise, adaptive)), whole, adaptive)
