"""The Lightning callbacks; the only subpackage that imports lightning."""

import logging

from torch_singlim.callbacks.inject import InjectNoise
from torch_singlim.callbacks.monitor import SingularLimitMonitor
from torch_singlim.callbacks.offline import measure_checkpoints

__all__ = ["InjectNoise", "SingularLimitMonitor", "measure_checkpoints"]

# messages appear on the terminal, like Lightning's own, unless the application has configured its logging
_logger = logging.getLogger("torch_singlim")
if _logger.level == logging.NOTSET:
    _logger.setLevel(logging.INFO)
if not _logger.hasHandlers():
    _logger.addHandler(logging.StreamHandler())
    _logger.propagate = False
