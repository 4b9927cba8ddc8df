"""A monitor for trainers whose code cannot be changed, by Lightning's entry point for callbacks."""

from __future__ import annotations

import os

from lightning.pytorch import Callback

from torch_singlim.callbacks.monitor import SingularLimitMonitor

__all__ = ["callbacks_from_environment"]


def callbacks_from_environment() -> list[Callback]:
    """A monitor with default settings if the environment has TORCH_SINGLIM=1, else no callback.

    This is the function of the entry point ``lightning.pytorch.callbacks_factory``.

    >>> callbacks_from_environment()
    []
    """
    return [SingularLimitMonitor()] if os.environ.get("TORCH_SINGLIM") == "1" else []
