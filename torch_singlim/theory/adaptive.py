"""Adaptive optimizers with their preconditioner frozen: gradient descent in a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.theory.sgd import SGDSettings

__all__ = ["ADAPTIVE", "FrozenMetric", "differing", "frozen_metric", "is_decoupled"]


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    corrected = second / (1 - group["betas"][1] ** float(state["step"]))
    return 1 / (corrected.sqrt() + group["eps"])


def _rmsprop(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    second = state["square_avg"] - state["grad_avg"] ** 2 if group["centered"] else state["square_avg"]
    return 1 / (second.sqrt() + group["eps"])


def _adagrad(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    decay = 1 + (float(state["step"]) - 1) * group["lr_decay"]
    return 1 / (decay * (state["sum"].sqrt() + group["eps"]))


# S of one parameter, from its state and the settings of its group
ADAPTIVE = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}


@dataclass(frozen=True)
class FrozenMetric:
    """The preconditioner S = s r of an adaptive optimizer at one moment, with r of harmonic mean 1.

    Args:
        sgd: the settings of SGD as which it moves in this metric; lr = s times that of the first group.
        step_ratios: r of each parameter, for ``ZeroLossProblem(..., step_ratios=...)``.
        scale: s, the inverse of the mean of 1/S over all weights.
        weight_decay: the coefficient of `WeightDecay` in this metric that is the optimizer's decoupled weight decay.
    """

    sgd: SGDSettings
    step_ratios: Mapping[str, Tensor] = field(repr=False)
    scale: float
    weight_decay: float


def frozen_metric(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, batch_size: int | None = None
) -> FrozenMetric:
    """The settings of SGD and the step sizes of each weight as which an adaptive optimizer moves for now.

        w <- w - alpha S m,   S = 1/(sqrt(v) + eps)      Adam: m <- beta_1 m + (1 - beta_1) g
                                                         RMSprop: m <- mu m + g;  Adagrad: m = g

    S is that of the optimizer's present state; bias correction of v is part of it, and so is the ratio of a group's
    learning rate to that of the first. With a problem in this metric, distances, the singular limit of order 1 and
    `limit_flow` are those of the optimizer, for as long as v does not change much. A drift of order 2 is not: its noise
    and S are correlated. Decoupled weight decay, w <- w - alpha lambda w, is lambda/(2 s) |u|^2 in the coordinates
    u = w/sqrt(r).

    Args:
        optimizer: Adam, AdamW, RMSprop or Adagrad, after its first step; its groups may differ in the learning rate.
        module: whose parameters it holds.
        batch_size: samples per step; None: full batch.

    Raises:
        ValueError: another optimizer, one that maximizes, groups with different settings, weight decay that is part of
            the gradient, or with groups of different learning rates, no state yet.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    >>> net(torch.tensor([[1.0, 4.0]])).sum().backward()
    >>> optimizer.step()
    >>> metric = frozen_metric(optimizer, net)
    >>> (metric.scale * metric.step_ratios["weight"]).float()
    tensor([[1.0000, 0.2500]])

    Source: arXiv 2404.12293 for plain descent; u = S^(-1/2) w makes it that.
    """
    metric, groups = ADAPTIVE.get(type(optimizer)), optimizer.param_groups
    known = ", ".join(each.__name__ for each in ADAPTIVE)
    if metric is None:
        raise ValueError(f"the metric is known for {known}, got {type(optimizer).__name__}")
    first = groups[0]
    different = differing(groups)
    if first.get("maximize"):
        raise ValueError("the optimizer maximizes: pass the negative loss instead")
    if different:
        raise ValueError(f"the groups of the optimizer may differ in their learning rate, not in {different}")
    if first["weight_decay"] and not is_decoupled(optimizer):
        raise ValueError(
            f"weight decay {first['weight_decay']} of {type(optimizer).__name__} is part of the gradient, and is "
            "divided by its second moments: use torch.optim.AdamW, whose weight decay is not"
        )
    if first["weight_decay"] and any(group["lr"] != first["lr"] for group in groups):
        raise ValueError(
            "weight decay and groups with learning rates of their own: in the metric there is no such decay"
        )
    held = {id(p): group for group in groups for p in group["params"]}
    sizes: dict[str, Tensor] = {}
    for name, p in module.named_parameters():
        if id(p) in held:
            state, group = optimizer.state.get(p), held[id(p)]
            if not state:
                raise ValueError(f"{type(optimizer).__name__} has made no step with {name} yet: make one before")
            wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}
            sizes[name] = metric(wide, group) * (float(group["lr"]) / float(first["lr"]))
    scale = 1 / torch.cat([1 / S.reshape(-1) for S in sizes.values()]).mean().item()
    if "betas" in first:
        momentum = dampening = float(first["betas"][0])
    else:
        momentum, dampening = float(first.get("momentum", 0.0)), 0.0
    return FrozenMetric(
        SGDSettings(scale * float(first["lr"]), momentum, dampening, batch_size=batch_size),
        {name: S / scale for name, S in sizes.items()},
        scale,
        float(first["weight_decay"]) / scale,
    )


def is_decoupled(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's weight decay shrinks the weights directly, instead of being part of the gradient."""
    return isinstance(optimizer, torch.optim.AdamW) or bool(optimizer.param_groups[0].get("decoupled_weight_decay"))


# settings of a group that say how its step is computed, not what it is
_IMPLEMENTATION = frozenset({"params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"})


def differing(groups: Sequence[Mapping[str, Any]]) -> str:
    """The settings, other than the learning rate, in which parameter groups differ, joined by commas."""
    keys = [key for key in groups[0] if key not in _IMPLEMENTATION and not key.endswith("param_names")]
    return ", ".join(key for key in keys if any(group.get(key) != groups[0][key] for group in groups))
