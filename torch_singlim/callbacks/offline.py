"""The monitor's measurements on the checkpoints of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from torch_singlim.callbacks.detect import Samples, detect_problem
from torch_singlim.callbacks.optimizer import select_parameters
from torch_singlim.callbacks.snapshot import snapshot_of_checkpoint
from torch_singlim.measure import Budget, Code, Engine, Options, Reason, Schedule, Snapshot, training_of
from torch_singlim.network import ProcessGroup, SampleLoss, WeightSpace, ZeroLossProblem
from torch_singlim.noise import NoiseSystem

__all__ = ["CheckpointMeasurements", "measure_checkpoints"]


@dataclass(frozen=True)
class CheckpointMeasurements:
    """The results of measurements on the checkpoints of a run.

    Args:
        history: step -> tag -> value, like a monitor's `history`.
        reasons: why something is not measured or not predicted.
        noise: whether its effect is visible, in words; None: nothing was compared with theory.
        verdict: all of this in words.
    """

    history: Mapping[int, Mapping[str, float]]
    reasons: tuple[Reason, ...]
    noise: str | None
    verdict: str


def measure_checkpoints(
    module: LightningModule,
    data: tuple[Tensor, Tensor],
    checkpoints: Iterable[str | Path],
    *,
    batch_size: int | None,
    loss: str | nn.Module | SampleLoss | None = None,
    noise: NoiseSystem | None = None,
    num_draws: int = 32,
    relaxed_after: float = 3.0,
    replicas: int = 0,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
) -> CheckpointMeasurements:
    """The distance at each checkpoint, the displacement from one to the next, and the prediction for these steps.

    These are the measurements of a `SingularLimitMonitor`, by the same engine. The module's weights are restored at the
    end. Learning rate, momentum and weight decay are read from the checkpoints; for the steps between two checkpoints
    those of the later one are used. A prediction covers all steps between two checkpoints, so that these should be no
    further apart than the length of a window.

    Args:
        module: a module of the class that was trained; each checkpoint is loaded into it.
        data: all samples that were trained on, (inputs, targets).
        checkpoints: files that Lightning wrote, in any order.
        batch_size: samples of one optimizer step; None: all.
        loss: the loss that ``training_step`` computes, if it is not recognised.
        noise: the noise that was injected, besides the module's dropout layers and the weight decay.
        num_draws: see `SingularLimitMonitor`.
        relaxed_after: see there.
        replicas: see there.
        dtype: see there.
        seed: see there.

    Raises:
        ValueError: no checkpoints, one that cannot be read or belongs to another module, two of the same step.
    """
    states = sorted(((_read(Path(path)), Path(path)) for path in checkpoints), key=lambda pair: pair[0]["global_step"])
    if not states:
        raise ValueError("no checkpoints: pass at least one file that Lightning's ModelCheckpoint wrote")
    steps = [int(state["global_step"]) for state, _ in states]
    for before, step, (_, path) in zip(steps, steps[1:], states[1:], strict=False):
        if before == step:
            raise ValueError(f"two checkpoints of step {step}, the second is {path}: pass one of each step")
    with _restored(module):
        _load(module, *states[0])
        problem = _problem(module, data, loss, noise, {"float64": torch.float64, "float32": torch.float32}[dtype])
        space = WeightSpace(module, dtype=torch.float64) if isinstance(problem, Reason) else problem.function
        engine: Engine | None = None
        for state, path in states:
            _load(module, state, path)
            snapshot = snapshot_of_checkpoint(state, path, space, batch_size=batch_size)
            if engine is None:
                options = Options(replicas=replicas, num_draws=num_draws, relaxed_after=relaxed_after)
                engine = _engine(problem, snapshot, noise, options, Schedule.between(steps), seed)
            engine.measure(snapshot)
    assert engine is not None  # there is a checkpoint
    return CheckpointMeasurements(engine.history, tuple(engine.reasons), engine.noise_words, engine.verdict())


def _problem(
    module: LightningModule,
    data: tuple[Tensor, Tensor],
    loss: str | nn.Module | SampleLoss | None,
    noise: NoiseSystem | None,
    dtype: torch.dtype,
) -> ZeroLossProblem | Reason:
    inputs, targets = data
    try:
        return detect_problem(
            module,
            Samples.of(inputs, targets, len(inputs)),
            loss=loss,
            noise=noise,
            dtype=dtype,
            batch_size=None,
            step_ratios=dict.fromkeys(select_parameters(module, None), 1.0),
            process_group=ProcessGroup(),
        )
    except ValueError as error:
        return Code.NO_PROBLEM(why=str(error))


def _engine(
    problem: ZeroLossProblem | Reason,
    first: Snapshot,
    noise: NoiseSystem | None,
    options: Options,
    schedule: Schedule,
    seed: int,
) -> Engine:
    """The engine for the run of the first checkpoint."""
    training = training_of(problem, given=None, weight_decay=first.weight_decay, injected=noise, reasons=first.reasons)
    generator = torch.Generator().manual_seed(seed)
    return Engine(problem, training, options, schedule, Budget(None), generator, full_batch=True)


@contextmanager
def _restored(module: LightningModule) -> Iterator[None]:
    """Restore the module's weights and buffers at the end."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(before)


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, if it consists of tensors and plain values."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint {path}") from error
    except Exception as error:  # unpickling a damaged file may raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no state_dict and global_step")
    return state


def _load(module: LightningModule, state: dict[str, Any], path: Path) -> None:
    """Load the weights and buffers of a checkpoint into the module."""
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} is a checkpoint of another module than {type(module).__name__}: {first}") from error
