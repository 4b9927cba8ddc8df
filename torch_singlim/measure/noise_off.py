"""Whether the noise of a training can be switched off, and what training mode adds besides noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.measure.paths import Gradient, Path
from torch_singlim.measure.steps import Step, flat
from torch_singlim.network import RandomState

__all__ = ["NoiseOff", "compare_noise_off"]

# gradients differ from rounding errors by more than this share of their norm
_ROUNDING = 1e-4


@dataclass(frozen=True)
class NoiseOff:
    """The gradient of one step without noise, compared with itself and with the one in training.

    Args:
        deterministic: whether it does not depend on the random state.
        random: whether the gradient in training does.
        added: norm of what training mode adds without being random, relative to the gradient; 0 if training is random,
            since the two cannot be told apart then.
    """

    deterministic: bool
    random: bool
    added: float


def compare_noise_off(path: Path, gradient: Gradient, step: Step) -> NoiseOff:
    """Evaluate the gradient of a step without noise and in training, each with different random states.

    Args:
        path: a copy of the run; its weights stay as they are, its buffers and gradients do not.
        gradient: computes the gradient of the step.
        step: a step of the run.
    """

    def quiet(seed: int) -> Tensor:
        path.optimizer.zero_grad()
        RandomState.seed(seed)
        gradient.quiet(path, step)
        return _gradient(path)

    def noisy(seed: int) -> Tensor:
        path.optimizer.zero_grad()
        gradient.noisy(path, step, seed)
        return _gradient(path)

    with RandomState.isolated():
        path.take_settings(step)
        first, same, other = quiet(1), quiet(1), quiet(2)
        size = max(torch.linalg.vector_norm(first).item(), 1e-300)
        repeated = torch.linalg.vector_norm(first - same).item()
        deterministic = torch.linalg.vector_norm(first - other).item() <= 2 * repeated + _ROUNDING * size
        one, two = noisy(1), noisy(2)
        random = torch.linalg.vector_norm(one - two).item() > _ROUNDING * size
        added = torch.linalg.vector_norm(one - first).item() / size
    return NoiseOff(deterministic, random, added if deterministic and not random and added > _ROUNDING else 0.0)


def _gradient(path: Path) -> Tensor:
    return flat([torch.zeros_like(p) if p.grad is None else p.grad for p in path.parameters])
