"""A monitor in TensorBoard beside its charts: cards, figures, hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from torch_singlim.callbacks.board import writers
from torch_singlim.geometry import relaxation_level
from torch_singlim.measure import (
    DistanceMeasurement,
    Engine,
    History,
    Place,
    Reason,
    Scope,
    Snapshot,
    drift_by_layer,
    shares,
)
from torch_singlim.measure.tags import shown_in
from torch_singlim.measure.training import orders_known
from torch_singlim.network import WeightSpace
from torch_singlim.report import (
    Figure,
    agreement_figure,
    layers_figure,
    spectrum_figure,
    speed_figure,
    time_scales_figure,
)
from torch_singlim.theory import SGDSettings, time_scale

__all__ = [
    "Spectrum",
    "begin_hyperparameters",
    "card",
    "end_hyperparameters",
    "draw",
    "figures",
    "module_hyperparameters",
    "open_board",
    "settings",
]


def settings(engine: Engine, snapshot: Snapshot, *, window: int | str) -> dict[str, str | float]:
    """What was detected of network, loss, data, noise and optimizer, and the resulting time scales in steps.

    Args:
        engine: after the first snapshot was measured.
        snapshot: the first one.
        window: steps over which drift is measured.
    """
    problem, noise, sgd = engine.problem, engine.noise, snapshot.sgd
    found: dict[str, str | float] = {"weights": snapshot.weights.numel(), "noise": str(noise), "window": window}
    if problem is not None:
        found |= {
            "network": type(problem.function.module).__name__,
            "loss": str(problem.sample_loss),
            "samples": problem.num_samples,
            "residuals": problem.num_residuals,
        }
    if sgd is None:
        return found
    lr = sgd.lr if snapshot.metric is None else sgd.lr / snapshot.metric.scale
    found |= {"lr": lr, "momentum": sgd.momentum, "step size": sgd.effective_lr}
    if problem is not None:
        found["batch"] = sgd.batch(problem.num_samples)
    if engine.supports(Scope.LIMIT) and orders_known(noise) and noise.order is not None:
        variance = engine.variance_at(snapshot)
        found |= {"noise level": math.sqrt(variance), "order": noise.order}
        found["steps per unit of slow time"] = time_scale(sgd, noise.order, variance)
    if engine.last_distance is not None:
        relaxation = 1 / (sgd.effective_lr * engine.last_distance.tangent.hessian.largest)
        found["steps in which the stiffest mode relaxes"] = relaxation
    return found


def card(settings: Mapping[str, str | float], reasons: Sequence[Reason]) -> str:
    """What was detected at the start, as markdown.

    >>> print(card({"weights": 10}, []))
    | found | |
    |:---|:---|
    | weights | 10 |
    """
    lines = ["| found | |", "|:---|:---|"]
    for key, value in settings.items():
        lines.append(f"| {key} | {value if isinstance(value, str | int) else f'{value:.4g}'} |")
    return "\n".join([*lines, *(f"\n{reason.sentence}" for reason in reasons)])


@dataclass(frozen=True)
class Spectrum:
    """The nonzero eigenvalues of H at one measurement.

    Args:
        eigenvalues: descending  ``[rank]``.
        level: from which on a mode counts as relaxed; infinite: none does; None: unknown.
        step: of the measurement.
    """

    eigenvalues: Tensor = field(repr=False)
    level: float | None
    step: int

    @classmethod
    def of(cls, distance: DistanceMeasurement, sgd: SGDSettings | None, relaxed_after: float) -> Spectrum:
        """From a measurement of the distance; by products if H is not decomposed."""
        step, level = distance.step, None
        if sgd is not None:
            level = relaxation_level(sgd.effective_lr, step, relaxed_after)
        return cls(distance.tangent.spectrum(), level, step)


def by_layer(engine: Engine, space: WeightSpace) -> list[tuple[str, dict[str, float]]]:
    """The shares of the layers in the last distance to half of the loss, and in the last noise-induced drift."""
    sizes = {name: shape.numel() for name, shape in zip(space.names, space.shapes, strict=True)}
    window, displacement = engine.windows.last, engine.geometry.levels.displacement
    found = [] if window is None else list(drift_by_layer(window, sizes))
    if displacement is None or len(displacement) != space.num_weights:
        return found
    weights = torch.cat([part.reshape(-1) for part in space.unflatten(displacement.to(space.dtype)).values()])
    return [("distance to half of the loss", shares(weights, sizes)), *found]


def figures(
    history: History,
    spectrum: Spectrum | None,
    layers: Sequence[tuple[str, Mapping[str, float]]] = (),
) -> dict[str, Figure]:
    """Name -> figure, for what was measured so far."""
    drawn = {
        "1_time_scales": time_scales_figure(history),
        "2_agreement": agreement_figure(history),
        "3_speed": speed_figure({"": history}),
    }
    if spectrum is not None:
        drawn["4_spectrum"] = spectrum_figure(spectrum.eigenvalues, level=spectrum.level, step=spectrum.step)
    if layers:
        drawn["5_layers"] = layers_figure(layers)
    return {title: figure for title, figure in drawn.items() if figure is not None}


def draw(trainer: Trainer, name: str, engine: Engine, sgd: SGDSettings | None, space: WeightSpace) -> None:
    """Write the figures of the monitor with this name; every process takes part in computing what they show."""
    seen = engine.last_distance
    spectrum = None if seen is None else Spectrum.of(seen, sgd, engine.options.relaxed_after)
    layers = by_layer(engine, space)
    for writer in writers(trainer):
        for title, figure in figures(engine.history, spectrum, layers).items():
            writer.add_figure(f"{name}/figures/{title}", figure, trainer.global_step)


def open_board(
    trainer: Trainer,
    name: str,
    running: Mapping[str, Engine],
    found: Mapping[str, str | float],
    *,
    first: bool,
) -> None:
    """Write the card of what a monitor detected, and the run's hyperparameters.

    Args:
        trainer: with its loggers.
        name: of the monitor.
        running: the engines of all monitors that have started.
        found: settings of the monitor's training.
        first: whether this is the trainer's first monitor, which writes the hyperparameters.
    """
    for writer in writers(trainer):
        if first and not module_hyperparameters(trainer):
            begin_hyperparameters(writer, found, list(running))
        writer.add_text(f"{name}/set-up", card(found, running[name].reasons), trainer.global_step)


def module_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Hyperparameters that module and data module have saved, which Lightning logs at the start; empty: none."""
    holders = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    saved = [each.hparams_initial for each in holders if each is not None and each._log_hyperparams]
    return {key: value for each in saved for key, value in each.items() if key != "_class_path"}


def begin_hyperparameters(writer: SummaryWriter, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write the run as a row of the HPARAMS tab: its settings, and the tags that will be its metrics.

    TensorBoard reads only the first such record of a run, and Lightning writes one for a module with hyperparameters.
    """
    plain = {key: value for key, value in settings.items() if isinstance(value, bool | str | float | int)}
    # only the names matter, the values are not used
    metrics = {f"{name}/{tag.name}": 0.0 for name in names for tag in shown_in(Place.FINAL)}
    for summary in hparams(plain, metrics)[:2]:
        writer._get_file_writer().add_summary(summary)


def end_hyperparameters(writer: SummaryWriter) -> None:
    """Mark the run as finished: its metrics are the last values that were logged."""
    writer._get_file_writer().add_summary(hparams({}, {})[2])
