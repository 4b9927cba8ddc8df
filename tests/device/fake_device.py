"""A torch device "fake" that is not the CPU, for tests on machines without an accelerator; see fake_device.cpp.

It is built by the system's C++ compiler on first use, outside the repository, in the folder where torch builds
extensions.
"""

import fcntl
import importlib.metadata
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_name("fake_device.cpp")


def missing():
    """What the machine lacks to build it, in words; empty: nothing."""
    if not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler"
    if not cpp_extension.is_ninja_available():
        return "no ninja"
    return ""


class _DeviceModule:
    """torch.fake: what torch and Lightning call by these names for every device."""

    def device_count(self):
        return torch.ops.fake_device.device_count()

    def current_device(self):
        return torch.accelerator.current_device_index()

    @contextmanager
    def device(self, device):
        before = self.current_device()
        torch.accelerator.set_device_index(device)
        try:
            yield
        finally:
            torch.accelerator.set_device_index(before)

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def _generator(self, device):
        device = torch.device("fake", device) if isinstance(device, int) else torch.device(device)
        return torch.ops.fake_device.default_generator(-1 if device.index is None else device.index)

    def get_rng_state(self, device="fake"):
        return self._generator(device).get_state()

    def set_rng_state(self, state, device="fake"):
        self._generator(device).set_state(state)

    def manual_seed_all(self, seed):
        for i in range(self.device_count()):
            self._generator(i).manual_seed(seed)


def load():
    """Make the device known to torch, building it first if there is no build for this source, Python and torch."""
    if hasattr(torch, "fake"):
        return
    version = re.sub(r"\W", "_", f"{sys.implementation.cache_tag}_{importlib.metadata.version('torch')}")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / f"torch_singlim_fake_device_{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building").open("w") as held:
        # Workers take turns. The system takes this lock from a process that ends; older versions of torch lock by a
        # file that exists, and would wait for ever for a process that was killed while it built.
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        cpp_extension.load("fake_device", [str(SOURCE)], build_directory=str(folder), is_python_module=False)
    torch.utils.rename_privateuse1_backend("fake")
    torch._register_device_module("fake", _DeviceModule())
    torch.utils.generate_methods_for_privateuse1_backend()


@contextmanager
def random_numbers_of_the_cpu():
    """Within the block the device draws from the CPU's global random state: a program draws what it draws on the CPU."""
    torch.ops.fake_device.share_random_state(True)
    try:
        yield
    finally:
        torch.ops.fake_device.share_random_state(False)
