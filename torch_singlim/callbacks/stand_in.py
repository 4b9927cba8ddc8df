"""Replace the trainer of a copy of a module: what a training step may read of it, as it was in the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger

__all__ = ["StandIn", "ignore", "trainer_values"]

# attributes of the trainer that a training step may read, with their values at that step of the run
_READ = (
    "global_step",
    "current_epoch",
    "max_epochs",
    "max_steps",
    "num_training_batches",
    "accumulate_grad_batches",
    "log_every_n_steps",
    "world_size",
    "global_rank",
    "local_rank",
    "node_rank",
    "num_devices",
    "is_global_zero",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "training",
    "validating",
    "sanity_checking",
    "fast_dev_run",
)

# values under which the schedulers are kept
_SCHEDULERS = "lr_scheduler_configs"


def ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces the logging methods of a copy."""


def trainer_values(trainer: Trainer) -> dict[str, Any]:
    """The present values of the trainer's attributes that a training step may read; schedulers are copies."""
    values = {name: getattr(trainer, name) for name in _READ if hasattr(trainer, name)}
    held = (*trainer.optimizers, trainer.lightning_module)
    schedulers = trainer.lr_scheduler_configs
    return values | ({_SCHEDULERS: copy.deepcopy(schedulers, {id(each): each for each in held})} if schedulers else {})


class StandIn:
    """Replaces the trainer of a copy of a module: some attributes can be read, nothing can be changed.

    ``self.optimizers()`` and ``self.lr_schedulers()`` of the module return copies.

    Args:
        values: name -> value at the step of the run.
        optimizer: that of the copy.
        datamodule: that of the run.

    >>> StandIn({"global_step": 3}).global_step
    3
    >>> StandIn({}).callbacks
    Traceback (most recent call last):
    ...
    AttributeError: trainer.callbacks is not available to a training step that runs on a copy of the module
    """

    _name = "trainer"

    def __init__(
        self,
        values: Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        datamodule: LightningDataModule | None = None,
    ) -> None:
        self.optimizers = [] if optimizer is None else [optimizer]
        self.strategy = _StandInStrategy(self.optimizers)
        self.datamodule, self.logger, self.loggers = datamodule, DummyLogger(), [DummyLogger()]
        self.callback_metrics: dict[str, Any] = {}
        self.logged_metrics: dict[str, Any] = {}
        self._schedulers = values.get(_SCHEDULERS, [])
        vars(self).update({name: value for name, value in values.items() if name != _SCHEDULERS})

    @classmethod
    def of(cls, trainer: Trainer) -> StandIn:
        """For a training step at present, with an optimizer to be read."""
        optimizer = copy.copy(trainer.optimizers[0]) if len(trainer.optimizers) == 1 else None
        if optimizer is not None:
            optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
        return cls(trainer_values(trainer), optimizer, getattr(trainer, "datamodule", None))

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """Copies of the schedulers, for the optimizer of the copy."""
        originals = {id(config.scheduler.optimizer) for config in self._schedulers}
        return copy.deepcopy(self._schedulers, dict.fromkeys(originals, self.optimizers[0]))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{self._name}.{name} is not available to a training step that runs on a copy of the module"
        )


class _StandInStrategy:
    """Replaces the trainer's strategy, from which a module reads its optimizers."""

    _name = "trainer.strategy"
    __getattr__ = StandIn.__getattr__

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self._lightning_optimizers = optimizers
