"""The Lightning callbacks; the only place that imports lightning."""

from torch_singlim.callbacks.inject import InjectNoise
from torch_singlim.callbacks.monitor import SingularLimitMonitor

__all__ = ["InjectNoise", "SingularLimitMonitor"]
