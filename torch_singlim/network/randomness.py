"""Save and restore the global random state; switch off the noise of a module."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RandomState", "noise_off"]


@dataclass(frozen=True)
class RandomState:
    """The global random state: torch's (CPU and accelerators in use), Python's, and numpy's if it is loaded."""

    cpu: Tensor = field(repr=False)
    devices: dict[torch.device, Tensor] = field(repr=False)
    python: Any = field(repr=False)
    numpy: Any = field(repr=False)

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        devices = {device: torch.get_device_module(device).get_rng_state(device) for device in _devices_in_use()}
        numpy = sys.modules.get("numpy")
        return cls(
            torch.get_rng_state(), devices, random.getstate(), None if numpy is None else numpy.random.get_state()
        )

    def restore(self) -> None:
        """Make this the global random state again."""
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    @staticmethod
    def seed(seed: int) -> None:
        """Seed torch's generators: the CPU's and those of accelerators in use.

        `torch.manual_seed` does the same, but keeps a stack trace for each accelerator that is not in use. This takes
        up to 0.3 ms, as long as a step of a small network (torch 2.14).
        """
        torch.default_generator.manual_seed(seed)
        for device in _devices_in_use()[:1]:
            module = torch.get_device_module(device)
            seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed  # torch.mps has one device
            seed_all(seed)

    @staticmethod
    @contextmanager
    def isolated() -> Iterator[None]:
        """Random numbers that are drawn within the block do not change the state outside."""
        before = RandomState.now()
        try:
            yield
        finally:
            before.restore()


def _devices_in_use() -> list[torch.device]:
    """The accelerator's devices; none if it has not been initialised.

    To ask an accelerator for its random state would initialise it, which takes memory there and prevents a later fork.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator)
    in_use = getattr(module, "is_initialized", module.is_available)  # torch.mps has nothing to initialise
    return [torch.device(accelerator.type, i) for i in range(module.device_count())] if in_use() else []


@contextmanager
def noise_off(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, except for batch and instance normalisation, which keep their modes: they are not noise.

    >>> net = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    >>> with noise_off(net):
    ...     [part.training for part in net]
    [False, True]
    """
    kept = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            if not isinstance(part, kept):
                part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
