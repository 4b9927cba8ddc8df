"""Attempts to measure, which do not end the training where they fail; the reasons are noted and reported."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lightning.pytorch import Trainer

from torch_singlim.callbacks.isolation import attempt
from torch_singlim.callbacks.publish import report_reasons, say
from torch_singlim.measure import Account, Engine, Reason

__all__ = ["Attempts"]


class Attempts:
    """Makes what a monitor does harmless for one training.

    Args:
        trainer: of the training.
        engine: where failures are noted.
    """

    def __init__(self, trainer: Trainer, engine: Engine) -> None:
        self._trainer, self._engine = trainer, engine
        self._num_reported = len(engine.reasons)

    def __call__(
        self,
        what: Callable[[], object],
        account: Account = Account.GEOMETRY,
        failed: Callable[[Reason | None], None] | None = None,
        explain: Callable[[Exception], Reason | None] = lambda error: None,
    ) -> bool:
        """Call a function that must not end the training; returns whether it succeeded, on all processes.

        Args:
            what: the function.
            account: of the budget.
            failed: is given the reason of a failure, None if one of its kind was noted before; default: it is noted.
            explain: a particular reason for an exception; None: there is none.
        """
        engine = self._engine

        def noted(error: Exception) -> None:
            (failed or engine.note)(explain(error) or engine.failure(self._trainer.global_step, error))

        worked = attempt(
            what,
            budget=engine.budget,
            device_type=self._trainer.strategy.root_device.type,
            smaller=lambda: account is Account.GEOMETRY and self._smaller(),
            failed=noted,
            account=account,
            process_group=engine.process_group,
        )
        self.report()
        return worked

    def _smaller(self) -> bool:
        """Reduce the memory of measurements; False: it cannot be reduced."""
        problem = self._engine.problem
        if self._trainer.world_size > 1 or problem is None or problem.batch_size == 1:
            return False
        problem.batch_size = (problem.batch_size + 1) // 2
        say(self._trainer, logging.INFO, f"out of memory, trying again with {problem.batch_size} samples at once")
        return True

    def report(self) -> None:
        """Log the reasons that are new."""
        report_reasons(self._trainer, self._engine.reasons[self._num_reported :])
        self._num_reported = len(self._engine.reasons)
