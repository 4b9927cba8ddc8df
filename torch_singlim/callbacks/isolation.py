"""Work beside a training that can neither change nor end it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from torch_singlim.measure import Budget

__all__ = ["attempt", "isolated", "out_of_memory"]

_log = logging.getLogger(__name__)


@contextmanager
def isolated(budget: Budget, device_type: str) -> Iterator[None]:
    """The global random state is put back, the time is counted, autocast is off, warnings are not shown.

    Args:
        budget: that counts the time.
        device_type: of the training.

    Raises:
        BaseException: whatever the block raises, once the random state is put back.
    """
    error: BaseException | None = None
    with (
        budget.spending(),
        isolate_rng(),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a filter of the user's may turn them into errors
        try:
            yield
        except BaseException as caught:  # isolate_rng restores nothing when an exception passes through it
            error = caught
    if error is not None:
        raise error


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on an accelerator or the CPU, whose allocator has no exception of its own.

    >>> out_of_memory(MemoryError()), out_of_memory(ValueError("no"))
    (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def attempt(
    what: Callable[[], object],
    *,
    budget: Budget,
    device_type: str,
    smaller: Callable[[], bool],
    failed: Callable[[Exception], None],
) -> bool:
    """Do it isolated from the training, and whether that worked; the traceback of a failure is logged at debug level.

    Args:
        what: to do.
        budget: that counts the time.
        device_type: of the training.
        smaller: called when memory has run out: makes the next try take less; False: there is nothing to make smaller.
        failed: called with any other exception, or when nothing can be made smaller.
    """
    while True:
        try:
            with isolated(budget, device_type):
                what()
            return True
        except Exception as error:
            if out_of_memory(error) and smaller():
                continue
            _log.debug("a measurement failed", exc_info=error)
            failed(error)
            return False
