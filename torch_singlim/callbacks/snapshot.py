"""Snapshots of a training: from a Trainer, and from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from torch_singlim.callbacks.inject import transients
from torch_singlim.callbacks.optimizer import StepRecorder, read_groups, read_metric, read_optimizer, step_batch_size
from torch_singlim.measure import Code, Metric, Snapshot
from torch_singlim.network import WeightSpace

__all__ = ["Subject", "snapshot_of_checkpoint", "snapshot_of_trainer"]


def _velocity(space: WeightSpace, buffers: Sequence[Tensor | None]) -> Tensor | None:
    """Momentum buffers as one vector ``[P]``; None unless every parameter has one."""
    found = [each for each in buffers if each is not None]
    return space.flatten(found, gradients=True) if found and len(found) == len(buffers) else None


@dataclass(frozen=True)
class Subject:
    """What is measured of a Trainer's training.

    Args:
        module: the module that is trained.
        space: the weights that are measured.
        recorder: of the optimizer's steps.
    """

    module: LightningModule
    space: WeightSpace
    recorder: StepRecorder

    def snapshot(self, trainer: Trainer) -> Snapshot:
        """The present moment of the training."""
        return snapshot_of_trainer(trainer, self.module, self.space, self.recorder)


def snapshot_of_trainer(
    trainer: Trainer, module: LightningModule, space: WeightSpace, recorder: StepRecorder
) -> Snapshot:
    """The present moment of a training.

    Args:
        trainer: with its optimizer and its callbacks, which may inject noise.
        module: the module that is trained.
        space: the weights that are measured.
        recorder: of the optimizer's steps.
    """
    batch_size = step_batch_size(trainer)
    settings = read_optimizer(trainer, module, space.names, batch_size)
    perturbed = transients(trainer)
    parameters = space.parameters()
    perturbation = None
    if perturbed:
        perturbation = space.flatten([perturbed.get(p, torch.zeros_like(p)) for p in parameters])
    velocity, metric, sums = None, None, recorder.sums
    sgd, weight_decay, reasons = settings.sgd, settings.weight_decay, settings.reasons
    if settings.adaptive and not reasons:
        try:
            found = read_metric(trainer.optimizers[0], space, batch_size)
        except ValueError as error:
            found, reasons = None, (Code.NO_METRIC(why=str(error)),)
        if found is not None:
            ratios = torch.cat([found.step_ratios[name].reshape(-1) for name in space.names])
            metric = Metric(ratios.to(space.device, space.dtype), found.scale, found.moments)
            sgd, weight_decay, sums = found.sgd, found.weight_decay, recorder.sums_in_metric(found.scale)
    if settings.sgd is not None:
        state = trainer.optimizers[0].state
        velocity = _velocity(space, [state.get(p, {}).get("momentum_buffer") for p in parameters])
    return Snapshot(
        step=trainer.global_step,
        weights=space.weights(),
        perturbation=perturbation,
        velocity=velocity,
        sgd=sgd,
        weight_decay=weight_decay,
        step_ratios=settings.step_ratios,
        sums=sums,
        reasons=(*reasons, *recorder.reasons),
        metric=metric,
    )


def snapshot_of_checkpoint(
    state: Mapping[str, Any], path: Path, space: WeightSpace, *, batch_size: int | None
) -> Snapshot:
    """The moment of a checkpoint, whose weights have been loaded into the module of the space.

    Args:
        state: the content of the checkpoint.
        path: of the file, for reasons.
        space: all trainable weights of the module.
        batch_size: samples of one optimizer step; None: all.
    """
    step, weights = int(state["global_step"]), space.weights()
    injected = [own for key, own in state.get("callbacks", {}).items() if key.startswith("InjectNoise")]
    transient = [own["transient"] for own in injected if own.get("transient") is not None]
    # of a part of the weights it is not known of which
    whole = sum(len(part) for part in transient) == len(weights)
    perturbation = space.flatten(transient) if whole else None
    optimizers = state.get("optimizer_states") or []
    if len(optimizers) != 1:
        reason = (
            Code.NO_OPTIMIZER_STATE(path=str(path))
            if not optimizers
            else Code.SEVERAL_OPTIMIZERS(count=len(optimizers))
        )
        return Snapshot(step, weights, perturbation, reasons=(reason,))
    groups, buffers = optimizers[0]["param_groups"], optimizers[0]["state"]
    if "dampening" not in groups[0]:
        return Snapshot(step, weights, perturbation, reasons=(Code.OPTIMIZER(optimizer="the optimizer"),))
    settings = read_groups(groups, {}, batch_size)
    reasons = settings.reasons
    if len(groups) > 1:  # the state does not contain the names of the parameters in a group
        reasons += (Code.GROUPS_DIFFER(keys="their parameters, which a checkpoint does not name"),)
    held = sum(len(group["params"]) for group in groups)
    if held != len(space.names):
        reasons += (Code.OTHER_PARAMETERS(held=held, measured=len(space.names)),)
    momentum = [buffers.get(i, {}).get("momentum_buffer") for i in range(held)]
    return Snapshot(
        step=step,
        weights=weights,
        perturbation=perturbation,
        velocity=_velocity(space, momentum) if held == len(space.names) else None,
        sgd=settings.sgd,
        weight_decay=settings.weight_decay,
        step_ratios=dict.fromkeys(space.names, 1.0),
        reasons=reasons,
    )
