"""At the start of training: detect what is trained, and how; set up engine, snapshots and paths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from torch_singlim.callbacks.detect import Samples, find_problem, given_samples, training_set
from torch_singlim.callbacks.follower import Follower
from torch_singlim.callbacks.gather import Gatherer, tensor_samples
from torch_singlim.callbacks.inject import injected_noise
from torch_singlim.callbacks.isolation import isolated
from torch_singlim.callbacks.optimizer import (
    OptimizerSettings,
    StepRecorder,
    read_optimizer,
    select_parameters,
    step_batch_size,
)
from torch_singlim.callbacks.recording import unperturbed
from torch_singlim.callbacks.snapshot import Subject
from torch_singlim.measure import Account, Budget, Code, Engine, Options, Reason, Schedule, Scope, Training, training_of
from torch_singlim.network import ProcessGroup, SampleLoss, WeightSpace, ZeroLossProblem
from torch_singlim.noise import NoiseSystem

__all__ = ["Asked", "Started", "start"]

_log = logging.getLogger(__name__)
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


@dataclass
class Started:
    """What measures one training.

    Args:
        trainer: of the training.
        module: the module that is trained.
        asked: of the monitor.
        engine: makes the measurements.
        subject: of the snapshots.
        follower: opens paths beside the training.
        settings: of the optimizer at the start.
        gatherer: gathers samples from the run's batches; None: they are known, or there are enough.
        inputs: the samples that were gathered, until it is known whether they come again.
        epoch: in which they were gathered.
    """

    trainer: Trainer
    module: LightningModule
    asked: Asked
    engine: Engine
    subject: Subject
    follower: Follower
    settings: OptimizerSettings
    gatherer: Gatherer | None
    inputs: Tensor | None = None
    epoch: int = 0

    def see(self, batch: Any) -> None:
        """Gather samples from a batch; when there are enough, find out whether a later one brings them again."""
        engine, truth = self.engine, unperturbed(self.trainer)
        group = engine.process_group
        if self.gatherer is not None:
            why = ""
            try:
                self.gatherer.take(batch, truth)
            except Exception as error:  # a user's function may raise anything
                why = str(error) or type(error).__name__
            # all processes go on in the same way
            if group.all_reduce_min(float(not why)) == 0:
                self.gatherer = None
                reason = Code.NO_PROBLEM(why=why or "another process could not read its batch")
                engine.found(reason, _training(reason, self.settings, self.asked, self.trainer))
            elif group.all_reduce_min(float(self.gatherer.complete)) > 0:
                self.finish_gathering()
        elif self.inputs is not None and self.trainer.current_epoch > self.epoch:
            again = Gatherer.contain(self.inputs, batch, self.asked.batch_to_problem, truth)
            if group.all_reduce_min(float(again)) == 0:
                engine.note(Code.FRESH_SAMPLES())
            self.inputs = None

    def finish_gathering(self, *, whole: bool = False) -> None:
        """Measure distances of the samples that were gathered so far, if there are any; `whole`: of one epoch."""
        gatherer, self.gatherer = self.gatherer, None
        samples = None if gatherer is None else gatherer.samples(self.trainer, whole=whole)
        if samples is None:
            return
        engine, group = self.engine, self.engine.process_group
        problem, subset = _find(self.trainer, self.module, samples, self.asked, self.settings, group)
        engine.found(problem, _training(problem, self.settings, self.asked, self.trainer, samples, subset))
        if not isinstance(problem, Reason):
            engine.note(Code.GATHERED(step=self.trainer.global_step, samples=problem.num_samples))
            self.subject = replace(self.subject, space=problem.function)
            self.inputs, self.epoch = samples.inputs, self.trainer.current_epoch


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
    try:
        with isolated(budget, trainer.strategy.root_device.type):
            return _start(trainer, module, names, asked, budget)
    except ValueError:  # a contradiction
        raise
    except Exception as error:  # whatever training accepts goes on
        _log.debug("the start of a monitor failed", exc_info=error)
        return Code.NOT_STARTED(why=f"{type(error).__name__}: {error}")


def _start(trainer: Trainer, module: LightningModule, names: Sequence[str], asked: Asked, budget: Budget) -> Started:
    injected = injected_noise(trainer)
    if injected is not None and asked.noise is not None:
        raise ValueError(
            f"the noise is given twice, by SingularLimitMonitor(noise={asked.noise}) and by InjectNoise({injected}): "
            "do not pass it to the monitor, which detects injected noise"
        )
    group = ProcessGroup(trainer.global_rank, trainer.world_size, str(trainer.strategy.root_device))
    settings = read_optimizer(trainer, module, names, step_batch_size(trainer))
    problem, subset, gatherer, samples = None, None, None, None
    try:
        if asked.data:
            samples = given_samples(trainer, *asked.data)
        else:
            samples = tensor_samples(trainer, module, asked.num_samples, asked.batch_to_problem)
        if samples is None:
            gatherer = Gatherer(asked.num_samples, asked.batch_to_problem, group)
        else:
            problem, subset = _find(trainer, module, samples, asked, settings, group)
    except ValueError as error:
        problem = Code.NO_PROBLEM(why=str(error))
    plain = WeightSpace(module, dtype=asked.dtype, step_ratios=settings.step_ratios)
    space = problem.function if isinstance(problem, ZeroLossProblem) else plain
    training = _training(problem, settings, asked, trainer, samples, subset)
    total = trainer.estimated_stepping_batches
    schedule = Schedule.of_run(window=asked.window, every_n_steps=asked.every_n_steps, total=total)
    generator = torch.Generator().manual_seed(asked.seed)
    engine = Engine(problem, training, asked.options, schedule, budget, generator, process_group=group)
    follower = Follower(
        trainer,
        module,
        asked.options,
        space.parameters(),
        asked.batch_to_problem,
        group,
        asked.seed,
        lambda: budget.spending(Account.PATHS),
    )
    engine.note(follower.reason)
    if not engine.supports(Scope.PATHS):
        budget.close(Account.PATHS)
    if gatherer is None and not engine.supports(Scope.GEOMETRY):
        budget.close(Account.GEOMETRY)
    subject = Subject(module, space, StepRecorder(settings))
    return Started(trainer, module, asked, engine, subject, follower, settings, gatherer)


def _find(
    trainer: Trainer,
    module: LightningModule,
    samples: Samples,
    asked: Asked,
    settings: OptimizerSettings,
    group: ProcessGroup,
) -> tuple[ZeroLossProblem | Reason, Reason | None]:
    return find_problem(
        module,
        samples,
        loss=asked.loss,
        noise=injected_noise(trainer) or asked.noise,
        dtype=asked.dtype,
        batch_size=asked.batch_size,
        step_ratios=settings.step_ratios,
        process_group=group,
    )


def _training(
    problem: ZeroLossProblem | Reason | None,
    settings: OptimizerSettings,
    asked: Asked,
    trainer: Trainer,
    samples: Samples | None = None,
    subset: Reason | None = None,
) -> Training:
    """The training of a problem, with its noise and the reasons, and all samples if the problem has a part of them."""
    whole = training_set(problem, samples) if isinstance(problem, ZeroLossProblem) and samples else None
    return training_of(
        problem,
        given=asked.noise,
        weight_decay=settings.weight_decay,
        injected=injected_noise(trainer),
        reasons=(*settings.reasons, *([subset] if subset else [])),
        whole=whole,
        adaptive=settings.adaptive,
    )
