"""Read from an optimizer how it moves the weights: settings, sums over its steps, and what theory does not cover."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torch_singlim.measure import Code, Reason, StepSums
from torch_singlim.measure.states import check_keys
from torch_singlim.network import WeightSpace
from torch_singlim.theory import ADAPTIVE, FrozenMetric, SGDSettings, differing, frozen_metric, is_decoupled

__all__ = [
    "OptimizerSettings",
    "StepRecorder",
    "plain_optimizer",
    "read_groups",
    "read_metric",
    "read_optimizer",
    "select_parameters",
    "skipped",
    "step_batch_size",
]


def select_parameters(module: nn.Module, patterns: str | Sequence[str] | None) -> list[str]:
    """Names of the trainable parameters that match a shell pattern.

    Args:
        module: the module.
        patterns: one pattern or several; None: all parameters.

    Raises:
        ValueError: a pattern that matches no parameter.

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
class OptimizerSettings:
    """The settings of an optimizer, and why the theory does not cover it.

    Args:
        sgd: settings of the first parameter group, at the present learning rate (None: not SGD, or the learning rate
            is 0 at present).
        weight_decay: of the first parameter group.
        step_ratios: learning rate of each measured parameter, relative to the first group's.
        group_ratios: the same for each group.
        reasons: why the motion of the weights is not predicted.
        adaptive: name of the optimizer, if it is an adaptive one whose metric is known; else empty.
    """

    sgd: SGDSettings | None
    weight_decay: float
    step_ratios: dict[str, float]
    group_ratios: tuple[float, ...]
    reasons: tuple[Reason, ...]
    adaptive: str = ""


def _rate(group: Mapping[str, Any]) -> float:
    """The initial learning rate of a group if there is a schedule, since the present one may be zero in a warm-up."""
    return float(group.get("initial_lr", group["lr"]))


def read_groups(
    groups: Sequence[Mapping[str, Any]], rate_of: Mapping[str, float], batch_size: int | None
) -> OptimizerSettings:
    """Settings of torch.optim.SGD from its parameter groups; what the theory does not cover is in `reasons`.

    Args:
        groups: parameter groups of an optimizer, or of its state.
        rate_of: the learning rate, see `_rate`, of each measured parameter that the optimizer holds.
        batch_size: samples of one step; None: all.
    """
    first, rates = groups[0], [_rate(group) for group in groups]
    reasons = []
    keys = ("momentum", "dampening", "nesterov", "weight_decay", "maximize")
    different = [key for key in keys if any(group.get(key) != first.get(key) for group in groups)]
    if different:
        reasons.append(Code.GROUPS_DIFFER(keys=", ".join(different)))
    if first.get("maximize"):
        reasons.append(Code.MAXIMIZES())
    if min(rates) <= 0:
        stands = Code.NO_STEP_SIZE() if max(rates) <= 0 else Code.NO_STEP_SIZE_OF_GROUP()
        return OptimizerSettings(None, 0.0, dict.fromkeys(rate_of, 1.0), (), (*reasons, stands))
    present, sgd = float(first["lr"]), None
    if present > 0:
        sgd = SGDSettings(
            lr=present,
            momentum=float(first["momentum"]),
            dampening=float(first["dampening"]),
            nesterov=bool(first["nesterov"]),
            batch_size=batch_size,
        )
    ratios = {name: rate / rates[0] for name, rate in rate_of.items()}
    of_groups = tuple(rate / rates[0] for rate in rates)
    return OptimizerSettings(sgd, float(first["weight_decay"]), ratios, of_groups, tuple(reasons))


def _read_adaptive(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> OptimizerSettings:
    """Settings of an optimizer whose metric is known, which is read at each snapshot."""
    groups, reasons, name = optimizer.param_groups, [], type(optimizer).__name__
    rates, different = [_rate(group) for group in groups], differing(groups)
    if different:
        reasons.append(Code.GROUPS_DIFFER(keys=different))
    if groups[0].get("maximize"):
        reasons.append(Code.MAXIMIZES())
    if groups[0]["weight_decay"] and not is_decoupled(optimizer):
        reasons.append(Code.COUPLED_DECAY(optimizer=name))
    if groups[0]["weight_decay"] and len(set(rates)) > 1:
        reasons.append(Code.RATIOS_UNDER_NOISE(noises="WeightDecay"))
    if min(rates) <= 0:
        reasons.append(Code.NO_STEP_SIZE() if max(rates) <= 0 else Code.NO_STEP_SIZE_OF_GROUP())
        return OptimizerSettings(None, 0.0, dict.fromkeys(names, 1.0), (), tuple(reasons), name)
    of_groups = tuple(rate / rates[0] for rate in rates)
    decay = float(groups[0]["weight_decay"])
    return OptimizerSettings(None, decay, dict.fromkeys(names, 1.0), of_groups, tuple(reasons), name)


def read_metric(optimizer: torch.optim.Optimizer, space: WeightSpace, batch_size: int | None) -> FrozenMetric | None:
    """The present metric of an adaptive optimizer; None: it has made no step yet, or the learning rate is 0.

    Args:
        optimizer: one whose metric is known.
        space: the weights that are measured, all of which it holds.
        batch_size: samples of one step; None: all.

    Raises:
        ValueError: it has made no step with one of the parameters.
    """
    if not optimizer.state or any(float(group["lr"]) <= 0 for group in optimizer.param_groups):
        return None
    return frozen_metric(optimizer, space.module, batch_size=batch_size)


def plain_optimizer(trainer: Trainer) -> torch.optim.Optimizer | None:
    """The trainer's optimizer, without Lightning's wrapper; None: there are several, or none."""
    if len(trainer.optimizers) != 1:
        return None
    return getattr(trainer.optimizers[0], "optimizer", trainer.optimizers[0])


def read_optimizer(
    trainer: Trainer, module: LightningModule, names: Sequence[str], batch_size: int | None
) -> OptimizerSettings:
    """Settings of the trainer's optimizer, for the parameters with these names."""
    plain, optimizer = dict.fromkeys(names, 1.0), plain_optimizer(trainer)
    if optimizer is None:
        several = Code.SEVERAL_OPTIMIZERS(count=len(trainer.optimizers))
        return OptimizerSettings(None, 0.0, plain, (), (several,))
    adaptive = type(optimizer) in ADAPTIVE
    if not adaptive and not isinstance(optimizer, torch.optim.SGD):
        reason = Code.OPTIMIZER(optimizer=type(optimizer).__name__)
        return OptimizerSettings(None, 0.0, plain, (), (reason,))
    groups = optimizer.param_groups
    held = {id(p): _rate(group) for group in groups for p in group["params"] if p.requires_grad}
    parameters = dict(module.named_parameters())
    measured = {name: parameters[name] for name in names if name in parameters}
    rate_of = {name: held.get(id(p), _rate(groups[0])) for name, p in measured.items()}
    found = _read_adaptive(optimizer, names) if adaptive else read_groups(groups, rate_of, batch_size)
    reasons = list(found.reasons)
    if not module.automatic_optimization:
        reasons.append(Code.MANUAL_OPTIMIZATION())
    if type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping:
        reasons.append(Code.OWN_CLIPPING())
    if held.keys() != {id(p) for p in measured.values()}:
        reasons.append(Code.OTHER_PARAMETERS(held=len(held), measured=len(measured)))
    return replace(found, reasons=tuple(reasons))


def step_batch_size(trainer: Trainer) -> int | None:
    """Samples of one optimizer step, over accumulated batches and processes (None: the loader has no batch size)."""
    each = getattr(trainer.train_dataloader, "batch_size", None)
    return each * trainer.accumulate_grad_batches * trainer.world_size if each else None


def _gradients(optimizer: Any) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def skipped(trainer: Trainer, optimizer: Any) -> bool:
    """Whether the loss scaling of half precision skips this step, because a gradient has overflowed."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None:
        return False
    return not all(bool(gradient.isfinite().all()) for gradient in _gradients(optimizer))


def _clipped(trainer: Trainer) -> Tensor:
    """Whether the gradients of the last step are at the bound, 0 or 1, on their device."""
    by_value = trainer.gradient_clip_algorithm == "value"
    order = math.inf if by_value else 2.0
    gradients = _gradients(trainer.optimizers[0])
    if not gradients:  # a training step without a loss
        return torch.zeros((), dtype=torch.long)
    size = torch.stack([torch.linalg.vector_norm(g.detach(), order).double() for g in gradients])
    size = size.max() if by_value else torch.linalg.vector_norm(size)
    bound = float(trainer.gradient_clip_val or 0)
    # torch divides by the norm plus 1e-6: a clipped norm is below the bound by about that, and by rounding errors
    return (size >= bound * (1 - 1e-5) - 1e-6).long()


class StepRecorder:
    """Records sums over the steps of an optimizer, and what of these steps the theory does not cover.

    Args:
        settings: of the optimizer at the start of training.
    """

    def __init__(self, settings: OptimizerSettings) -> None:
        self._settings = settings
        self._sums = StepSums()
        self._metric: float | None = None  # scale of an adaptive optimizer's metric when it was last read
        self._until = self._in_metric = StepSums()  # the sums at that time; those in the metric until then
        self._clipped: int | Tensor = 0  # on the device, to avoid a synchronisation at every step
        self._ratio_changed = False
        self._rule: tuple[Any, ...] = ()  # settings of the last step
        self._alpha = 0.0  # its effective step size

    def before_step(self, trainer: Trainer, optimizer: Any) -> None:
        """Add the learning rate of this step."""
        if not self._settings.group_ratios or skipped(trainer, optimizer):
            return
        groups = optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        lr = rates[0]
        expected = zip(rates, self._settings.group_ratios, strict=False)
        # an adaptive optimizer's are read at each snapshot
        if not self._settings.adaptive and any(abs(rate - ratio * lr) > 1e-6 * lr for rate, ratio in expected):
            self._ratio_changed = True
        momentum, dampening, nesterov = (groups[0].get(key, 0) for key in ("momentum", "dampening", "nesterov"))
        rule = lr, float(momentum), float(dampening), bool(nesterov)
        if rule != self._rule:
            self._rule, self._alpha = rule, SGDSettings(*rule).effective_lr if lr > 0 else 0.0
        alpha = self._alpha
        s = self._sums
        self._sums = replace(s, lr=s.lr + lr, alpha=s.alpha + alpha, alpha_squared=s.alpha_squared + alpha**2)

    def after_step(self, trainer: Trainer) -> None:
        """Count a step whose gradient was clipped."""
        if trainer.gradient_clip_val:
            self._clipped = self._clipped + _clipped(trainer)

    @property
    def sums(self) -> StepSums | None:
        """Sums over the steps so far (None: unknown for this optimizer)."""
        return replace(self._sums, clipped=int(self._clipped)) if self._settings.group_ratios else None

    def sums_in_metric(self, scale: float) -> StepSums | None:
        """The sums with the step sizes of an adaptive optimizer, which are known where its metric is read.

        Between two readings they are interpolated; before the first one they are those of the first.

        Args:
            scale: of the metric now.
        """
        sums = self.sums
        if sums is None:
            return None
        a, b, done = self._metric or scale, scale, self._in_metric
        alpha = done.alpha + (a + b) / 2 * (sums.alpha - self._until.alpha)
        squared = done.alpha_squared + (a * a + a * b + b * b) / 3 * (sums.alpha_squared - self._until.alpha_squared)
        self._metric, self._until, self._in_metric = scale, sums, replace(sums, alpha=alpha, alpha_squared=squared)
        return self._in_metric

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """What of the steps so far the theory does not cover."""
        return (Code.RATIO_CHANGES(),) if self._ratio_changed else ()

    def state_dict(self) -> dict[str, Any]:
        """The sums, and those in the metric of an adaptive optimizer."""
        return {
            **asdict(replace(self._sums, clipped=int(self._clipped))),
            "metric": self._metric,
            "until": asdict(self._until),
            "in_metric": asdict(self._in_metric),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from these sums.

        Args:
            state: as returned by `state_dict`.

        Raises:
            ValueError: an incomplete state. Nothing has changed then.
        """
        check_keys(state, self.state_dict())
        found = dict(state)
        self._metric = found.pop("metric")
        self._until, self._in_metric = (StepSums(**found.pop(key)) for key in ("until", "in_metric"))
        self._sums = StepSums(**found)
        self._clipped = self._sums.clipped
