"""How much memory is free, and how much a pass through a network takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["free_memory", "out_of_memory", "saved_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, *, control_group: Path = _CGROUP) -> int:
    """Bytes that a process can still allocate on a device, according to the driver, or to Linux and its control group.

    A device without a driver that tells shares the machine's memory. On other systems than Linux: a quarter of it.

    Args:
        device: the device.
        control_group: folder of the process's control group.

    >>> free_memory(torch.device("cpu")) > 2**20
    True
    """
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return module.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    try:
        limit, used = ((control_group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except OSError:  # no control group, or not version 2
        return free


def saved_bytes(function: Callable[[Tensor], Tensor], w: Tensor, data: Tensor) -> int:
    """Bytes of the activations that a backward pass through a function of w needs, without w and the data themselves.

    >>> w, x = torch.ones(3), torch.ones(3)
    >>> saved_bytes(lambda w: (w * x).sin(), w, x)  # w x, whose cosine is the derivative
    12
    """
    w = w.detach().requires_grad_(True)
    known = {w.untyped_storage().data_ptr(), data.untyped_storage().data_ptr()}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(w)  # alive until the bytes are counted, so that no address is reused
        total = sum(sizes.values())
    del outputs
    return total


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or the CPU, whose allocator has no exception of its own.

    >>> out_of_memory(MemoryError()), out_of_memory(ValueError("no"))
    (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
