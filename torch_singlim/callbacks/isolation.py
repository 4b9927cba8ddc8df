"""Isolation of measurements from the training: they can neither change it nor end it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from torch_singlim.measure import Account, Budget
from torch_singlim.network import ProcessGroup, RandomState, out_of_memory

__all__ = ["attempt", "isolated"]

_log = logging.getLogger(__name__)


@contextmanager
def isolated(budget: Budget, device_type: str, account: Account = Account.GEOMETRY) -> Iterator[None]:
    """Run the block without autocast and without warnings, count its time, and restore the global random state.

    Args:
        budget: counts the time.
        device_type: of the training.
        account: of the budget.
    """
    with (
        budget.spending(account),
        RandomState.isolated(),
        torch.enable_grad(),
        torch.autocast(device_type, enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the user's filters may turn warnings into errors
        yield


def attempt(
    what: Callable[[], object],
    *,
    budget: Budget,
    device_type: str,
    smaller: Callable[[], bool],
    failed: Callable[[Exception], None],
    account: Account = Account.GEOMETRY,
    process_group: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
) -> bool:
    """Call a function, isolated from the training; returns whether it succeeded, on all processes.

    The traceback of a failure is logged at debug level.

    Args:
        what: the function.
        budget: counts the time.
        device_type: of the training.
        smaller: called if memory has run out; reduces the memory of the next attempt, or returns False if it cannot.
        failed: called with any other exception, or if the memory cannot be reduced.
        account: of the budget.
        process_group: of the processes that make the same call.
    """
    while True:
        try:
            with isolated(budget, device_type, account), process_group.together():
                what()
            return True
        except Exception as error:
            if out_of_memory(error) and smaller():
                continue
            _log.debug("a measurement failed", exc_info=error)
            failed(error)
            return False
