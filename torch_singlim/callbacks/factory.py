"""A monitor for trainers whose code cannot be changed: Lightning asks installed packages for callbacks."""

from __future__ import annotations

import os

from lightning.pytorch import Callback

from torch_singlim.callbacks.monitor import SingularLimitMonitor

__all__ = ["callbacks_from_environment"]


def callbacks_from_environment() -> list[Callback]:
    """A monitor with default settings where the environment has TORCH_SINGLIM=1; nothing otherwise.

    The entry point ``lightning.pytorch.callbacks_factory``.

    >>> callbacks_from_environment()
    []
    """
    return [SingularLimitMonitor()] if os.environ.get("TORCH_SINGLIM") == "1" else []
