"""How the optimizer of a Trainer descends: its parameters, their learning rates, what happens to its steps."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torch_singlim.theory import SGDSettings

__all__ = [
    "Descent",
    "detect_descent",
    "select_parameters",
    "step_batch_size",
    "step_clipped",
    "step_skipped",
]


def select_parameters(module: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the trainable parameters that a pattern matches, as in a shell; None: all.

    Raises:
        ValueError: a pattern that matches none.

    >>> select_parameters(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), "1.*")
    ['1.weight', '1.bias']
    """
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    if patterns is None:
        return names
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            few = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            raise ValueError(f"parameters={pattern!r} matches none of the trainable parameters, which are {few}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Descent:
    """How the optimizer descends, or why the theory does not cover it.

    Args:
        sgd: its settings, those of the first parameter group (None: it is not SGD, or takes no steps).
        weight_decay: likewise.
        step_ratios: learning rate of each probed parameter, relative to the first group's.
        group_ratios: the same for each group.
        not_covered: why its steps are not predicted.
    """

    sgd: SGDSettings | None
    weight_decay: float
    step_ratios: dict[str, float]
    group_ratios: tuple[float, ...]
    not_covered: tuple[str, ...]


def detect_descent(trainer: Trainer, module: LightningModule, names: list[str], batch_size: int | None) -> Descent:
    """SGD settings from the one optimizer, for the parameters of these names; anything else is in `not_covered`.

    Raises:
        ValueError: several optimizers.
    """
    plain = dict.fromkeys(names, 1.0)
    if len(trainer.optimizers) != 1:
        raise ValueError(
            f"expected one optimizer, got {len(trainer.optimizers)}: the weights' motion is then not one descent; "
            "train the other networks in a run of their own"
        )
    optimizer = trainer.optimizers[0]
    # Lightning may wrap it
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        reason = f"{name} rescales or reshapes the gradient, the theory covers torch.optim.SGD"
        return Descent(None, 0.0, plain, (), (reason,))
    reasons = []
    groups = optimizer.param_groups
    first = groups[0]
    # under a schedule those that it is told: where it stands now says nothing, at a warm-up's zero or after resuming
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    keys = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    different = [key for key in keys if any(group[key] != first[key] for group in groups)]
    if different:
        reasons.append(f"parameter groups differ in {', '.join(different)}; the learning rate alone may differ")
    if not module.automatic_optimization:
        reasons.append("manual optimization: what happens between two steps of the optimizer is not known")
    if first["maximize"]:
        reasons.append("the optimizer maximizes")
    if type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
        reasons.append("the module clips gradients in its own way (configure_gradient_clipping)")
    moved = [(p, rate) for group, rate in zip(groups, rates, strict=True) for p in group["params"] if p.requires_grad]
    rate_of = {id(p): rate for p, rate in moved}
    probed = {name: p for name, p in module.named_parameters() if name in plain}
    if rate_of.keys() != {id(p) for p in probed.values()}:
        reasons.append(
            f"the optimizer holds {len(rate_of)} parameters, {len(probed)} are probed, and these are not the same: "
            "leave those out that are not trained, by requires_grad_(False) or SingularLimitMonitor(parameters=...)"
        )
    if min(rates) <= 0:
        stands = "the learning rate is 0" if max(rates) <= 0 else "the learning rate of a parameter group is 0"
        return Descent(None, 0.0, plain, (), (*reasons, stands))
    sgd = SGDSettings(
        lr=rates[0],
        momentum=float(first["momentum"]),
        dampening=float(first["dampening"]),
        nesterov=bool(first["nesterov"]),
        batch_size=batch_size,
    )
    ratios = {name: rate_of.get(id(p), rates[0]) / rates[0] for name, p in probed.items()}
    of_groups = tuple(rate / rates[0] for rate in rates)
    return Descent(sgd, float(first["weight_decay"]), ratios, of_groups, tuple(reasons))


def step_batch_size(trainer: Trainer) -> int | None:
    """Samples of one optimizer step, accumulated, of all processes (None: the loader has no batch size)."""
    each = getattr(trainer.train_dataloader, "batch_size", None)
    return each * trainer.accumulate_grad_batches * trainer.world_size if each else None


def _gradients(optimizer: Any) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def step_skipped(trainer: Trainer, optimizer: Any) -> bool:
    """Whether the loss scaling of half precision leaves this step out, its gradient having overflown."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return False
    return not all(bool(gradient.isfinite().all()) for gradient in _gradients(optimizer))


def step_clipped(trainer: Trainer) -> Tensor:
    """Whether the gradients of the step that was made are at the bound, 0 or 1, on their device."""
    by_value = trainer.gradient_clip_algorithm == "value"
    order = math.inf if by_value else 2.0
    size = torch.stack(
        [torch.linalg.vector_norm(g.detach(), order).double() for g in _gradients(trainer.optimizers[0])]
    )
    size = size.max() if by_value else torch.linalg.vector_norm(size)
    bound = float(trainer.gradient_clip_val or 0)
    # torch divides by the norm plus 1e-6: what was clipped is as much, and a rounding error, below the bound
    return (size >= bound * (1 - 1e-5) - 1e-6).long()
