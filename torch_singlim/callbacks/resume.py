"""The monitor's state in a checkpoint, which is restored completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from torch_singlim.callbacks.optimizer import StepRecorder
from torch_singlim.measure import Engine
from torch_singlim.measure.states import check_keys

__all__ = ["state_of", "take_over"]


def state_of(engine: Engine, recorder: StepRecorder, figures_at: int) -> dict[str, Any]:
    """The state of a monitor, as tensors and plain values.

    Args:
        engine: the monitor's engine.
        recorder: of the optimizer's steps.
        figures_at: the step at which figures were drawn last.
    """
    return {"engine": engine.state_dict(), "steps": recorder.state_dict(), "figures_at": figures_at}


def take_over(state: Mapping[str, Any], engine: Engine, recorder: StepRecorder, device: torch.device) -> int:
    """Restore engine and recorder from a state; returns the step at which figures were drawn last.

    Args:
        state: as returned by `state_of`; its tensors may be on any device.
        engine: for the same training.
        recorder: for the same training.
        device: of the weights.

    Raises:
        ValueError: a state that does not fit or is incomplete. Nothing has changed then.
    """
    check_keys(state, ("engine", "steps", "figures_at"))
    try:
        check_keys(state["steps"], recorder.state_dict())
        figures_at = int(state["figures_at"])
        moved = {
            # a generator's state stays on the CPU
            key: value if key == "generator" else apply_to_collection(value, Tensor, lambda tensor: tensor.to(device))
            for key, value in state["engine"].items()
        }
        engine.load_state_dict(moved)
    except ValueError:
        raise
    except Exception as error:  # a state of another origin may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    recorder.load_state_dict(state["steps"])
    return figures_at
