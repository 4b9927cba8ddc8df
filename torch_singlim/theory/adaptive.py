"""Adaptive optimizers with their preconditioner frozen: gradient descent in a metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_singlim.theory.second_moments import SecondMoments
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["ADAPTIVE", "FrozenMetric", "SecondMoment", "differing", "frozen_metric", "is_decoupled"]


@dataclass(frozen=True)
class SecondMoment:
    """S = 1/(factor (sqrt(v) + eps)) of one parameter, with a v that is a mean over about 1/rate steps.

    Args:
        v: mean of the squared gradient.
        held: what stands in the place of v in S, if it does not follow v.
        eps: is added to the root.
        factor: of the whole.
        rate: of the mean.
    """

    v: Tensor
    eps: float
    rate: float
    factor: float = 1.0
    held: Tensor | None = None

    @property
    def step_size(self) -> Tensor:
        return 1 / (self.factor * ((self.v if self.held is None else self.held).sqrt() + self.eps))

    @property
    def response(self) -> Tensor:
        """-d log S/dv = 1/(2 sqrt(v) (sqrt(v) + eps)); 0 where v is 0, or does not matter."""
        if self.held is not None:
            return torch.zeros_like(self.v)
        root = self.v.sqrt()
        return torch.where(root > 0, 1 / (2 * root * (root + self.eps)), 0.0)


def _adam(state: dict[str, Any], group: dict[str, Any]) -> SecondMoment:
    beta = group["betas"][1]
    corrected = 1 - beta ** float(state["step"])
    # the largest mean so far stays where it is
    held = state["max_exp_avg_sq"] / corrected if group["amsgrad"] else None
    return SecondMoment(state["exp_avg_sq"] / corrected, group["eps"], 1 - beta, held=held)


def _rmsprop(state: dict[str, Any], group: dict[str, Any]) -> SecondMoment:
    second = state["square_avg"] - state["grad_avg"] ** 2 if group["centered"] else state["square_avg"]
    return SecondMoment(second, group["eps"], 1 - group["alpha"])


def _adagrad(state: dict[str, Any], group: dict[str, Any]) -> SecondMoment:
    steps = float(state["step"])
    root = steps**0.5  # of the sum over the mean
    decay = 1 + (steps - 1) * group["lr_decay"]
    return SecondMoment(state["sum"] / steps, group["eps"] / root, 1 / steps, decay * root)


# second moments of one parameter, from its state and the settings of its group
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
        moments: v in this metric, for drifts of order 2; the parameters in the order of ``module.parameters()``.
    """

    sgd: SGDSettings
    step_ratios: Mapping[str, Tensor] = field(repr=False)
    scale: float
    weight_decay: float
    moments: SecondMoments = field(repr=False)


def frozen_metric(
    optimizer: torch.optim.Optimizer, module: nn.Module, *, batch_size: int | None = None
) -> FrozenMetric:
    """The settings of SGD and the step sizes of each weight as which an adaptive optimizer moves for now.

        w <- w - alpha S m,   S = 1/(sqrt(v) + eps)      Adam: m <- beta_1 m + (1 - beta_1) g
                                                         RMSprop: m <- mu m + g;  Adagrad: m = g

    S is that of the optimizer's present state; bias correction of v is part of it, and so is the ratio of a group's
    learning rate to that of the first. With a problem in this metric, distances, the singular limit and `limit_flow`
    are those of the optimizer, for as long as v does not change much; for a drift of order 2 pass the moments, too,
    because noise and S are correlated. Decoupled weight decay, w <- w - alpha lambda w, is lambda/(2 s) |u|^2 in the
    coordinates u = w/sqrt(r).

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
    moments: list[SecondMoment] = []
    for name, p in module.named_parameters():
        if id(p) in held:
            state, group = optimizer.state.get(p), held[id(p)]
            if not state:
                raise ValueError(f"{type(optimizer).__name__} has made no step with {name} yet: make one before")
            wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}
            moments.append(metric(wide, group))
            sizes[name] = moments[-1].step_size * (float(group["lr"]) / float(first["lr"]))
    scale = 1 / torch.cat([1 / S.reshape(-1) for S in sizes.values()]).mean().item()
    if "betas" in first:
        momentum = dampening = float(first["betas"][0])
    else:
        momentum, dampening = float(first.get("momentum", 0.0)), 0.0
    ratios = torch.cat([S.reshape(-1) for S in sizes.values()]) / scale
    # the gradient in the coordinates of the metric is sqrt(r) times that in the weights
    values = torch.cat([each.v.reshape(-1) for each in moments])
    response = torch.cat([each.response.reshape(-1) for each in moments])
    return FrozenMetric(
        SGDSettings(scale * float(first["lr"]), momentum, dampening, batch_size=batch_size),
        {name: S / scale for name, S in sizes.items()},
        scale,
        float(first["weight_decay"]) / scale,
        SecondMoments(ratios * values, response / ratios, moments[0].rate),
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
