"""How a network is trained, as far as theory needs to know: its noise, and what of it the theory does not cover."""

from __future__ import annotations

from dataclasses import dataclass

from torch_singlim.measure.reasons import Code, Reason
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import Dropout, Minibatch, NoiseSystem, Sum, WeightDecay, parts

__all__ = ["Training", "detect_noise", "training_of", "unsupported_noise"]


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Args:
        noise: all of it.
        reasons: what of it the theory does not cover.
    """

    noise: NoiseSystem
    reasons: tuple[Reason, ...] = ()


def detect_noise(problem: ZeroLossProblem, *, weight_decay: float, injected: NoiseSystem | None) -> NoiseSystem:
    """All noise of a training: dropout layers, the optimizer's weight decay, what is injected; or minibatches alone.

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


def unsupported_noise(problem: ZeroLossProblem, noise: NoiseSystem) -> tuple[Reason, ...]:
    """What training mode does that is no noise of the theory, and noise that does not go with the step ratios."""
    reasons = []
    if problem.function.normalises_over_batch:
        reasons.append(Code.BATCH_NORMALISATION())
    elif problem.function.is_random(problem.inputs[:2], training=True):
        reasons.append(Code.OTHER_RANDOMNESS())
    fixed = [type(part).__name__ for part in parts(noise) if not part.scale_free]
    if fixed and set(problem.function.step_ratios.values()) != {1.0}:
        reasons.append(Code.RATIOS_UNDER_NOISE(noises=" and ".join(fixed)))
    return tuple(reasons)


def training_of(
    problem: ZeroLossProblem | Reason,
    *,
    given: NoiseSystem | None,
    weight_decay: float,
    injected: NoiseSystem | None,
    reasons: tuple[Reason, ...] = (),
) -> Training:
    """The noise as it was given, or detected, with every reason why its drift cannot be predicted.

    Args:
        problem: loss and samples, or why there are none.
        given: the noise that a user names; None: it is detected.
        weight_decay: the optimizer's.
        injected: noise that is injected.
        reasons: why the drift cannot be predicted, as known so far.

    Raises:
        ValueError: a given noise that does not fit the problem.
    """
    if isinstance(problem, Reason):
        return Training(given or injected or Minibatch(), (problem, *reasons))
    noise = given or detect_noise(problem, weight_decay=weight_decay, injected=injected)
    noise.check(problem)
    return Training(noise, (*reasons, *unsupported_noise(problem, noise)))
