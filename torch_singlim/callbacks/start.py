"""At the start of training: detect what is trained, and how; set up engine, snapshots and paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torch_singlim.callbacks.detect import find_problem
from torch_singlim.callbacks.follower import Follower
from torch_singlim.callbacks.inject import injected_noise
from torch_singlim.callbacks.isolation import isolated
from torch_singlim.callbacks.optimizer import StepRecorder, read_optimizer, select_parameters, step_batch_size
from torch_singlim.callbacks.snapshot import Subject
from torch_singlim.measure import Account, Budget, Code, Engine, Options, Reason, Schedule, Scope, training_of
from torch_singlim.network import ProcessGroup, SampleLoss, WeightSpace
from torch_singlim.noise import NoiseSystem

__all__ = ["Asked", "Started", "start"]

# strategies with which each process has only a part of the weights
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class Asked:
    """What a monitor was asked to measure; the fields are its arguments.

    Raises:
        ValueError: arguments that contradict one another.
    """

    loss: str | nn.Module | SampleLoss | Callable[[Tensor, Tensor], Tensor] | None
    data: tuple[Tensor, Tensor] | None
    batch_to_problem: Callable[[Any], tuple[Tensor, Tensor]] | None
    num_samples: int
    parameters: str | Sequence[str] | None
    noise: NoiseSystem | None
    window: int | Literal["auto"]
    every_n_steps: int | None
    max_overhead: float | None
    dtype: torch.dtype
    batch_size: int | None
    seed: int
    options: Options

    def __post_init__(self) -> None:
        o, window = self.options, 1 if self.window == "auto" else self.window
        least = {"window": (window, 1), "num_samples": (self.num_samples, 1), "num_draws": (o.num_draws, 2)}
        least |= {"draws": (o.draws, 2), "replicas": (o.replicas, 0)}
        least["batch_size"] = 1 if self.batch_size is None else self.batch_size, 1
        for argument, (value, bound) in least.items():
            if value < bound:
                raise ValueError(f"{argument} must be at least {bound}, got {value}")
        if o.draws % 2:
            raise ValueError(f"draws must be even, half of them for each of two averaged paths, got {o.draws}")
        if self.every_n_steps is not None and self.every_n_steps < window:
            raise ValueError(
                f"windows may not overlap: got window={window} > every_n_steps={self.every_n_steps}; make the window "
                "shorter"
            )
        if self.max_overhead is not None and not self.max_overhead >= 0:
            raise ValueError(f"max_overhead must be a share of the wall time, or None, got {self.max_overhead}")


@dataclass(frozen=True)
class Started:
    """What measures one training.

    Args:
        engine: makes the measurements.
        subject: of the snapshots.
        follower: opens paths beside the training.
    """

    engine: Engine
    subject: Subject
    follower: Follower


def start(trainer: Trainer, module: LightningModule, asked: Asked) -> Started | Reason:
    """Detect what is trained, and how; where nothing can be measured, the reason.

    Args:
        trainer: at the start of training.
        module: the module that is trained.
        asked: of the monitor.

    Raises:
        ValueError: the noise is given twice or does not fit; patterns of names that match no parameters.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in _SHARDED:
        return Code.SHARDED(strategy=strategy)
    names = select_parameters(module, asked.parameters)
    if not names:
        return Code.NO_WEIGHTS()
    # steps that are asked for are measured whatever they cost
    budget = Budget(None if asked.every_n_steps is not None else asked.max_overhead)
    with isolated(budget, trainer.strategy.root_device.type):
        return _start(trainer, module, names, asked, budget)


def _start(trainer: Trainer, module: LightningModule, names: Sequence[str], asked: Asked, budget: Budget) -> Started:
    injected = injected_noise(trainer)
    if injected is not None and asked.noise is not None:
        raise ValueError(
            f"the noise is given twice, by SingularLimitMonitor(noise={asked.noise}) and by InjectNoise({injected}): "
            "do not pass it to the monitor, which detects injected noise"
        )
    group = ProcessGroup(trainer.global_rank, trainer.world_size, str(trainer.strategy.root_device))
    optimizer = read_optimizer(trainer, module, names, step_batch_size(trainer))
    problem, subset = find_problem(
        trainer,
        module,
        data=asked.data,
        num_samples=asked.num_samples,
        batch_to_problem=asked.batch_to_problem,
        loss=asked.loss,
        noise=injected or asked.noise,
        dtype=asked.dtype,
        batch_size=asked.batch_size,
        step_ratios=optimizer.step_ratios,
        process_group=group,
    )
    plain = WeightSpace(module, dtype=asked.dtype, step_ratios=optimizer.step_ratios)
    space = plain if isinstance(problem, Reason) else problem.function
    training = training_of(
        problem,
        given=asked.noise,
        weight_decay=optimizer.weight_decay,
        injected=injected,
        reasons=(*optimizer.reasons, *([subset] if subset else [])),
    )
    total = trainer.estimated_stepping_batches
    schedule = Schedule.of_run(window=asked.window, every_n_steps=asked.every_n_steps, total=total)
    generator = torch.Generator().manual_seed(asked.seed)
    engine = Engine(problem, training, asked.options, schedule, budget, generator, process_group=group)
    follower = Follower(
        trainer,
        module,
        asked.options,
        space.parameters(),
        group,
        torch.Generator().manual_seed(asked.seed),
        lambda: budget.spending(Account.PATHS),
    )
    engine.note(follower.reason)
    for account, scope in ((Account.PATHS, Scope.PATHS), (Account.GEOMETRY, Scope.GEOMETRY)):
        if not engine.supports(scope):
            budget.close(account)
    return Started(engine, Subject(module, space, StepRecorder(optimizer)), follower)
