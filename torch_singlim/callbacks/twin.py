"""Copies of a LightningModule whose training_step can be called without changing the training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from torch_singlim.callbacks.detect import BatchToProblem, as_pair
from torch_singlim.callbacks.injection import Injection
from torch_singlim.callbacks.stand_in import StandIn, ignore
from torch_singlim.callbacks.training_loss import as_targets
from torch_singlim.measure.paths import Path
from torch_singlim.measure.steps import Before, Step, held_by
from torch_singlim.network import ProcessGroup, RandomState, SampleLoss, compile_likewise, no_compilation, noise_off
from torch_singlim.noise import NoiseSystem

__all__ = [
    "InjectionOf",
    "MicroBatch",
    "TrainingStepGradient",
    "call_training_step",
    "copy_batch",
    "forward_and_loss",
    "make_twin",
]

# between the seeds of two processes
_SEEDS = 0x9E3779B97F4A7C15


def _data_sets(module: nn.Module) -> list[object]:
    """Data sets and loaders that are attributes of a module; they are not copied."""
    kept = [value for part in module.modules() for value in vars(part).values()]
    return [each for each in kept if isinstance(each, Dataset | DataLoader | LightningDataModule)]


def make_twin(module: LightningModule, optimizer: torch.optim.Optimizer) -> Path:
    """A copy of a module in training and its optimizer; the training_step of the copy can be called.

    Data sets are shared. Hooks are copied, so that their effects outside the module also occur for the copy.
    """
    path = Path(module, optimizer, shared=_data_sets(module))
    twin = path.module
    vars(twin).pop("training_step", None)  # a function that was set on the instance belongs to the run
    for part in twin.modules():
        if isinstance(part, LightningModule):
            part.log = part.log_dict = ignore  # type: ignore[method-assign]
    compile_likewise(twin, module)
    return path


def copy_batch(batch: Any, truth: Mapping[int, Tensor] | None = None) -> Any:
    """The same containers with copies of the tensors; of those that are perturbed at present, without perturbation."""
    return apply_to_collection(batch, Tensor, lambda tensor: held_by(tensor, truth or {}).clone())


@dataclass(frozen=True)
class MicroBatch:
    """A call of the run's training_step.

    Args:
        args: positional arguments, with copies of the tensors.
        kwargs: keyword arguments, with copies of the tensors.
        trainer: values of the trainer's attributes that it may have read.
        random: the global random state at the call.
        etas: noise of each injection, for each of its parts.
        transients: transient perturbation of each injection, before the optimizer step and after it.
    """

    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    trainer: Mapping[str, Any] = field(repr=False)
    random: RandomState = field(repr=False)
    etas: tuple[tuple[Tensor, ...], ...] = field(default=(), repr=False)
    transients: tuple[tuple[Tensor | None, Tensor | None], ...] = field(default=(), repr=False)


# of these, copy() makes the same as copy.copy, but takes 0.1 us for an OrderedDict instead of 2.5 us
_CONTAINERS = (OrderedDict, dict, list, set)


@contextmanager
def _plain_attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore lists, dictionaries and other attributes of the module that a training step may change."""
    owned = ("_parameters", "_buffers", "_modules")

    def shallow(value: Any) -> Any:
        if type(value) in _CONTAINERS:  # every layer has more than ten of them, for hooks
            return value.copy()
        return copy.copy(value) if isinstance(value, list | dict | set) else value

    before = [(part, {k: shallow(v) for k, v in vars(part).items() if k not in owned}) for part in module.modules()]
    try:
        yield
    finally:
        for part, kept in before:
            for name in vars(part).keys() - kept.keys() - set(owned):
                del vars(part)[name]
            vars(part).update(kept)


@dataclass(frozen=True)
class InjectionOf:
    """One injection of the run, for use on paths.

    Args:
        noise: the system.
        num_outputs: C if the noise needs it.
        batch_to_problem: a batch -> (inputs, targets).
        indices: positions of the injection's weights among the parameters of a path.
    """

    noise: NoiseSystem
    num_outputs: int
    batch_to_problem: BatchToProblem | None
    indices: tuple[int, ...]

    def on(self, path: Path, *, transient_in_forward: bool) -> Injection:
        """The injection for the weights of a path."""
        parameters = [path.parameters[i] for i in self.indices]
        return Injection(self.noise, parameters, self.num_outputs, transient_in_forward=transient_in_forward)


# the loss of a module, or what contains it, from the arguments of training_step
Evaluate = Callable[[LightningModule, tuple[Any, ...], Mapping[str, Any]], Any]


def call_training_step(module: LightningModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What training_step returns."""
    return module.training_step(*args, **kwargs)


def forward_and_loss(loss: SampleLoss, batch_to_problem: BatchToProblem | None) -> Evaluate:
    """The mean of a known loss on the outputs of ``forward``, for a training_step that cannot run on a copy.

    Args:
        loss: as `training_step` computes it.
        batch_to_problem: a batch -> (inputs, targets), for batches of another form.
    """

    def evaluate(module: LightningModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        x, y = as_pair(args[0], batch_to_problem)
        f = module(x).reshape(len(x), -1)
        return loss.value(f, loss.prepare(as_targets(loss, y, f), f)).mean()

    return evaluate


class TrainingStepGradient:
    """The gradient of a LightningModule's own training_step on a path, or of a loss that takes its place.

    Args:
        context: returns the context in which the trainer's precision plugin runs a training step.
        datamodule: that of the run.
        injections: the noise that the run's callbacks inject.
        process_group: the processes among which the run averages its gradients.
        evaluate: computes the loss of a copy of the module on a micro-batch.
    """

    def __init__(
        self,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        *,
        datamodule: LightningDataModule | None = None,
        injections: Sequence[InjectionOf] = (),
        process_group: ProcessGroup = ProcessGroup(),  # noqa: B008  # frozen
        evaluate: Evaluate = call_training_step,
    ) -> None:
        self._context = context
        self.datamodule, self.injections, self.process_group = datamodule, tuple(injections), process_group
        self.evaluate = evaluate
        """Computes the loss of a copy of the module on a micro-batch."""

    def _average(self, path: Path) -> None:
        """The mean of the gradient over all processes."""
        group = self.process_group
        if group.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in path.parameters]
        total = group.all_reduce(torch.cat([g.reshape(-1) for g in gradients])) / group.size
        for p, part in zip(path.parameters, total.split([p.numel() for p in path.parameters]), strict=True):
            p.grad = part.view_as(p).clone()

    def _backward(
        self, path: Path, step: Step, batch: MicroBatch, args: tuple[Any, ...], *, eager: bool = False
    ) -> None:
        module = path.module
        assert isinstance(module, LightningModule)
        module._trainer = StandIn(batch.trainer, path.optimizer, self.datamodule)  # type: ignore[assignment]
        with torch.enable_grad():
            with self._context(), no_compilation(module, eager=eager), _plain_attributes_restored(module):
                out = self.evaluate(module, args, batch.kwargs)
            loss = out.get("loss") if isinstance(out, Mapping) else out
            if loss is None:  # nor does the run make a backward pass then
                return
            if not isinstance(loss, Tensor):
                raise TypeError(f"training_step returned no loss on a copy of the module, but {type(out).__name__}")
            (loss * step.share).backward()

    def _accumulate(self, path: Path, step: Step, seed: int) -> None:
        """The gradient with one draw of all noise, from a seed; the weights are those of the recursion."""
        # noise on samples is each process's own; what is drawn once for a step is the same on all of them
        own_seed = (seed + _SEEDS * self.process_group.rank) % 2**63
        RandomState.seed(own_seed)
        generator, per_sample = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(own_seed)
        injections = [each.on(path, transient_in_forward=True) for each in self.injections]
        shared: list[dict[int, Tensor]] = [{} for _ in injections]
        for batch in step.batches:
            args = copy_batch(batch.args)
            for own, injection, drawn in zip(self.injections, injections, shared, strict=True):
                x, y = as_pair(args[0], own.batch_to_problem)
                etas = injection.draw(x, drawn, generator=generator, per_sample=per_sample)
                injection.perturb(x, y, etas)
            self._backward(path, step, batch, args)
            for injection in reversed(injections):
                injection.put_weights_back()
        self._average(path)
        for injection, drawn in zip(injections, shared, strict=True):
            injection.correct_gradients(drawn)

    def noisy(self, path: Path, step: Step, seed: int) -> None:
        """With noise drawn from this seed."""
        self._accumulate(path, step, seed)

    def quiet(self, path: Path, step: Step) -> None:
        """Without noise: nothing is injected, and all layers except for normalisation are in evaluation mode."""
        with noise_off(path.module):
            for batch in step.batches:
                self._backward(path, step, batch, copy_batch(batch.args), eager=True)
        self._average(path)

    def again(self, path: Path, step: Step, before: Before) -> None:
        """With the random numbers of the run, including injected noise."""
        injections = [each.on(path, transient_in_forward=False) for each in self.injections]
        shared: list[dict[int, Tensor]] = [{} for _ in injections]
        for batch in step.batches:
            args = copy_batch(batch.args)
            for k, (own, injection) in enumerate(zip(self.injections, injections, strict=True)):
                x, y = as_pair(args[0], own.batch_to_problem)
                etas = batch.etas[k]
                shared[k] |= {j: eta for j, eta in enumerate(etas) if not injection.forward[j].per_sample}
                injection.perturb(x, y, etas)
            batch.random.restore()
            self._backward(path, step, batch, args)
            for injection in reversed(injections):
                injection.put_weights_back()
        self._average(path)
        transients = step.batches[-1].transients
        for injection, drawn, (old, new) in zip(injections, shared, transients, strict=True):
            injection.correct_gradients(drawn)
            injection.exchange_transient(old, new)
