"""Repeat a step of the run on a copy: if the result differs, paths cannot reproduce this training."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from torch_singlim.measure.optimizer_copy import set_attributes
from torch_singlim.measure.paths import Gradient, Path
from torch_singlim.measure.steps import Recorded
from torch_singlim.network import RandomState

__all__ = ["Replay", "replay"]

# tolerance of a replay: a share of the step, and a multiple of the rounding error of the weights
_REPLAY_RTOL, _ROUNDINGS = 1e-3, 4.0


@dataclass(frozen=True)
class Replay:
    """The result of repeating a step of the run.

    Args:
        error: rho = |w_replayed - w_{k+1}| / |w_{k+1} - w_k|; 0 if the run did not move.
        passed: |w_replayed - w_{k+1}| <= 1e-3 |w_{k+1} - w_k| + 4 eps |w|, or the run did not move.
        judged: whether the run moved.
    """

    error: float
    passed: bool
    judged: bool = True


def replay(path: Path, gradient: Gradient, recorded: Recorded) -> Replay:
    """Repeat a step of the run on a path, whose state is overwritten.

    Args:
        path: a copy of the run.
        gradient: computes the gradient of the step.
        recorded: the step, with the state before it.
    """
    step, before, after = recorded.step, recorded.before, recorded.after
    assert before is not None
    path.module.load_state_dict(dict(before.state))
    path.optimizer.load_state_dict(copy.deepcopy(dict(before.optimizer)))
    set_attributes(path.optimizer, before.attributes, before.original)
    with RandomState.isolated():
        path.take_settings(step)
        path.optimizer.zero_grad()
        gradient.again(path, step, before)
        for p in path.parameters:
            if step.scale != 1 and p.grad is not None:
                p.grad.div_(step.scale)
        path.update(step)
    off = torch.linalg.vector_norm(path.weights() - after).item()
    moved = torch.linalg.vector_norm(after - before.weights).item()
    if not moved:
        return Replay(0.0, passed=True, judged=False)
    eps = max(torch.finfo(p.dtype).eps for p in path.parameters)
    allowed = _REPLAY_RTOL * moved + _ROUNDINGS * eps * torch.linalg.vector_norm(after).item()
    return Replay(off / moved, off <= allowed)
