"""The monitor's measurements on the checkpoints of a finished run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from torch_singlim.callbacks.descent import select_parameters
from torch_singlim.callbacks.detect import ProbeSet, detect_noise, detect_problem
from torch_singlim.loss import SampleLoss
from torch_singlim.observe import Forecast, observe, observe_window
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.team import Team
from torch_singlim.theory import NoiseSystem, SGDSettings
from torch_singlim.verdict import observation_scalars, window_scalars

__all__ = ["probe_checkpoints"]


def probe_checkpoints(
    module: LightningModule,
    data: tuple[Tensor, Tensor],
    checkpoints: Iterable[str | Path],
    *,
    batch_size: int | None,
    loss: str | nn.Module | SampleLoss | None = None,
    noise: NoiseSystem | None = None,
    num_draws: int = 32,
    separation: float = 3.0,
    replicas: int = 0,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Distance at each checkpoint, displacement from one to the next, and what theory predicts for these steps.

    The same measurements as the `SingularLimitMonitor`'s; the module is put back as it was. Learning rate, momentum and
    weight decay are those in the checkpoint; between two the later one's. The prediction takes all the steps between
    two checkpoints: choose them as far apart as a window may be.

    Args:
        module: of the class that was trained; each checkpoint is loaded into it.
        data: all samples that were trained on, (inputs, targets).
        checkpoints: files that Lightning wrote, in any order.
        batch_size: samples of one optimizer step; None: all.
        loss: what ``training_step`` computes, if it is not recognised.
        noise: what was injected besides the module's dropout layers and the weight decay.
        num_draws: as the monitor's, and so are the others.
        separation: see there.
        replicas: see there.
        dtype: see there.
        seed: see there.

    Returns:
        step -> tag -> value, as a monitor's `history`.

    Raises:
        ValueError: no checkpoint, one of another module, two of one step, or one without the state of an optimizer that
            is covered.
    """
    states = sorted(((_read(Path(path)), Path(path)) for path in checkpoints), key=lambda pair: pair[0]["global_step"])
    if not states:
        raise ValueError("no checkpoints: pass at least one file that Lightning's ModelCheckpoint wrote")
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = data
    history: dict[int, dict[str, float]] = {}
    last: tuple[int, Tensor, Tensor | None, Forecast | None] | None = None
    with _borrowed(module):
        _load(module, *states[0])
        problem = detect_problem(
            module,
            ProbeSet(inputs, targets, len(inputs), lambda part: (inputs[part], targets[part])),
            loss=loss,
            noise=noise,
            dtype={"float64": torch.float64, "float32": torch.float32}[dtype],
            batch_size=None,
            step_ratios=dict.fromkeys(select_parameters(module, None), 1.0),
            team=Team(),
        )
        for state, path in states:
            step = int(state["global_step"])
            if step in history:
                raise ValueError(f"two checkpoints of step {step}, the second is {path}: pass one of each step")
            _load(module, state, path)
            problem.function.refresh_constants()
            sgd, decay = _descent(state, path, batch_size)
            system, reasons = detect_noise(problem, decay, noise)
            if reasons:
                raise ValueError(f"the drift of {path} is not predicted: {'; '.join(reasons)}")
            w, carried = problem.weights(), _carried(state, problem)
            drifting = w if carried is None else w - carried
            scalars: dict[str, float] = {}
            if last is not None:
                start, origin, velocity, forecast = last
                window = observe_window(
                    problem,
                    origin,
                    drifting,
                    start=start,
                    stop=step,
                    noise=system,
                    sgd=sgd,
                    forecast=forecast,
                    replicas=replicas,
                    velocity=velocity,
                    generator=generator,
                )
                scalars |= window_scalars(window)
            observation = observe(
                problem,
                w,
                step=step,
                noise=system,
                sgd=sgd,
                carried=carried,
                num_draws=num_draws,
                separation=separation,
                generator=generator,
            )
            history[step] = {"singlim/loss_gap": observation.loss_gap} | scalars | observation_scalars(observation)
            last = (step, drifting, _velocity(state, problem), observation.forecast)
    return history


@contextmanager
def _borrowed(module: LightningModule) -> Iterator[None]:
    """The module's weights and buffers are put back at the end."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(before)


def _read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, tensors and numbers alone."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint {path}") from error
    except Exception as error:  # whatever a damaged file makes of unpickling
        raise ValueError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(state, dict) or not {"state_dict", "global_step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of Lightning: it has no state_dict and global_step")
    return state


def _load(module: LightningModule, state: dict[str, Any], path: Path) -> None:
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path} is a checkpoint of another module than {type(module).__name__}: {first}") from error


def _descent(state: dict[str, Any], path: Path, batch_size: int | None) -> tuple[SGDSettings, float]:
    """Settings of the SGD whose state a checkpoint holds, and its weight decay."""
    optimizers = state.get("optimizer_states") or [{"param_groups": []}]
    groups: Sequence[dict[str, Any]] = optimizers[0]["param_groups"]
    if len(optimizers) != 1 or len(groups) != 1 or "dampening" not in groups[0] or groups[0]["lr"] <= 0:
        raise ValueError(
            f"{path} does not hold the state of one torch.optim.SGD with one parameter group and a positive learning "
            "rate: the drift is predicted for that alone; save_weights_only=False keeps it"
        )
    g = groups[0]
    sgd = SGDSettings(
        lr=g["lr"], momentum=g["momentum"], dampening=g["dampening"], nesterov=g["nesterov"], batch_size=batch_size
    )
    return sgd, float(g["weight_decay"])


def _velocity(state: dict[str, Any], problem: ZeroLossProblem) -> Tensor | None:
    """The optimizer's momentum ``[P]``, where it has buffers for all parameters."""
    buffers = state["optimizer_states"][0]["state"]
    found = [buffers.get(i, {}).get("momentum_buffer") for i in range(len(problem.function.names))]
    return None if any(b is None for b in found) else problem.function.flatten(found, gradients=True)


def _carried(state: dict[str, Any], problem: ZeroLossProblem) -> Tensor | None:
    """What the weights carry for a step under an `InjectNoise` whose state the checkpoint holds ``[P]``."""
    injected = [own for key, own in state.get("callbacks", {}).items() if key.startswith("InjectNoise")]
    memories = [own["memory"] for own in injected if own["memory"] is not None]
    return problem.function.flatten(memories) if memories else None
