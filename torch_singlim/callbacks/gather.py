"""The samples that a Trainer trains on: read from tensors, or gathered from the batches of the run."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from torch_singlim.callbacks.detect import BatchToProblem, Samples, as_pair, read_samples
from torch_singlim.callbacks.twin import copy_batch
from torch_singlim.measure.steps import held_by
from torch_singlim.network import ProcessGroup

__all__ = ["Gatherer", "tensor_samples"]

_TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def _holds_tensors(dataset: Dataset | None) -> bool:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return isinstance(dataset, TensorDataset)


def _tensors(dataset: Dataset) -> list[Tensor]:
    """The tensors of a `TensorDataset`, or of a subset of one, which are copied."""
    if isinstance(dataset, Subset):
        return [each[torch.as_tensor(dataset.indices)] for each in _tensors(dataset.dataset)]
    assert isinstance(dataset, TensorDataset)
    return list(dataset.tensors)


def tensor_samples(
    trainer: Trainer, module: LightningModule, num_samples: int, batch_to_problem: BatchToProblem | None
) -> Samples | None:
    """The first training samples, if these are known without a step of training; None: they are not.

    They are known if the loader goes through all of a `TensorDataset`, and nothing transforms its batches. Other data
    sets are not read: they may be random, slow, or readable only once.

    Args:
        trainer: with its train loader.
        module: the module that is trained.
        num_samples: maximum number of samples.
        batch_to_problem: a batch -> (inputs, targets), for batches of another form.

    Raises:
        ValueError: batches of another form.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or not _holds_tensors(loader.dataset):
        return None
    whole = isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler)
    datamodule = getattr(trainer, "datamodule", None)
    hooked = [type(module), *([type(datamodule)] if datamodule else [])]
    plain = loader.collate_fn is default_collate and all(
        getattr(kind, name).__module__.startswith("lightning.") for kind in hooked for name in _TRANSFER
    )
    limited = getattr(trainer, "overfit_batches", 0) or trainer.limit_train_batches not in (None, 1.0)
    if not whole or not plain or limited:
        return None
    found = read_samples(trainer, num_samples, batch_to_problem=batch_to_problem)
    return replace(found, whole=as_pair(_tensors(loader.dataset), batch_to_problem)) if found.is_subset else found


class Gatherer:
    """Gathers samples from the batches of a run, as training sees them, until there are enough or an epoch has passed.

    Args:
        num_samples: maximum number of samples.
        batch_to_problem: a batch -> (inputs, targets), for batches of another form.
        process_group: the processes of the run, each with batches of its own.
    """

    def __init__(self, num_samples: int, batch_to_problem: BatchToProblem | None, process_group: ProcessGroup) -> None:
        self._batch_to_problem, self._group = batch_to_problem, process_group
        self._wanted = -(-num_samples // process_group.size)
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._trials: list[tuple[Any, Tensor, Tensor]] = []
        self._count = 0
        self.complete = False
        """Whether there are enough."""

    def take(self, batch: Any, truth: dict[int, Tensor]) -> None:
        """Keep a copy of a batch of the run.

        Args:
            batch: after its transfer to the device.
            truth: id of each tensor that is perturbed at present -> its data without perturbation.

        Raises:
            ValueError: a batch of another form.
        """
        own = copy_batch(batch, truth)
        x, y = as_pair(own, self._batch_to_problem)
        if len(self._trials) < 2:
            self._trials.append((own, x, y))
        self._parts.append((x, y))
        self._count += len(x)
        self.complete = self._count >= self._wanted

    def samples(self, trainer: Trainer, *, whole: bool) -> Samples | None:
        """The samples of all processes; None: there are none.

        Args:
            trainer: with its train loader.
            whole: whether an epoch has passed.
        """
        count = int(self._group.all_reduce_min(min(self._count, self._wanted)))
        if not count:
            return None
        inputs, targets = (torch.cat([part[i] for part in self._parts])[:count] for i in (0, 1))
        if self._group.size > 1:
            inputs, targets = (self._group.all_gather(each, count * self._group.size) for each in (inputs, targets))
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        size = len(dataset) if isinstance(dataset, Sized) else len(inputs) if whole and not self.complete else None
        return Samples(inputs, targets, size, (*self._trials, *self._trials)[:2])

    @staticmethod
    def contain(inputs: Tensor, batch: Any, batch_to_problem: BatchToProblem | None, truth: dict[int, Tensor]) -> bool:
        """Whether the first inputs of a batch are among those that were gathered.

        Args:
            inputs: that were gathered.
            batch: of a later epoch.
            batch_to_problem: as for `take`.
            truth: as for `take`.
        """
        x, _ = as_pair(batch, batch_to_problem)
        rows = held_by(x, truth)[:4].to(inputs).flatten(1)
        known = inputs.flatten(1)
        return all(bool((known == row).all(1).any()) for row in rows)
