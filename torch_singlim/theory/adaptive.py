"""Adaptive optimizers with their preconditioner frozen: gradient descent in a metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.theory.sgd import SGDSettings

__all__ = ["frozen_metric"]


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


_METRICS = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}


def frozen_metric(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, batch_size: int | None = None
) -> tuple[SGDSettings, dict[str, Tensor]]:
    """The settings of SGD and the step sizes S of each weight as which an adaptive optimizer moves for now.

        w <- w - alpha S m,   S = 1/(sqrt(v) + eps)      Adam: m <- beta_1 m + (1 - beta_1) g
                                                         RMSprop: m <- mu m + g;  Adagrad: m = g

    S is that of the optimizer's present state; bias correction of v is part of it. With a problem in this metric,
    ``ZeroLossProblem(..., step_ratios=S)``, distances, the singular limit of order 1 and `limit_flow` are those of the
    optimizer, for as long as v does not change much. A drift of order 2 is not: its noise and S are correlated.

    Args:
        optimizer: Adam, AdamW, RMSprop or Adagrad, after its first step, with one parameter group and without weight
            decay.
        module: whose parameters it holds.
        batch_size: samples per step; None: full batch.

    Raises:
        ValueError: another optimizer, several groups, weight decay, no state yet.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    >>> net(torch.tensor([[1.0, 4.0]])).sum().backward()
    >>> optimizer.step()
    >>> frozen_metric(optimizer, net)[1]["weight"]
    tensor([[1.0000, 0.2500]], dtype=torch.float64)

    Source: arXiv 2404.12293 for plain descent; u = S^(-1/2) w makes it that.
    """
    metric, groups = _METRICS.get(type(optimizer)), optimizer.param_groups
    known = ", ".join(each.__name__ for each in _METRICS)
    if metric is None:
        raise ValueError(f"the metric is known for {known}, got {type(optimizer).__name__}")
    if len(groups) > 1 or groups[0]["weight_decay"]:
        raise ValueError(
            f"the metric is known for one parameter group without weight decay, got {len(groups)} groups and weight "
            f"decay {groups[0]['weight_decay']}"
        )
    group, ratios = groups[0], {}
    held = {id(p): p for p in group["params"]}
    for name, p in module.named_parameters():
        if id(p) in held:
            state = optimizer.state.get(p)
            if not state:
                raise ValueError(f"{type(optimizer).__name__} has made no step with {name} yet: make one before")
            wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}
            ratios[name] = metric(wide, group)
    if "betas" in group:
        momentum = dampening = float(group["betas"][0])
    else:
        momentum, dampening = float(group.get("momentum", 0.0)), 0.0
    return SGDSettings(float(group["lr"]), momentum, dampening, batch_size=batch_size), ratios
