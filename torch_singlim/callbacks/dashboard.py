"""What TensorBoard shows of a monitor: a layout of charts, cards, figures, hyperparameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from torch_singlim.geometry import separation_level
from torch_singlim.observe import Observation, WindowObservation
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.report import (
    Figure,
    agreement_figure,
    plane_figure,
    spectrum_figure,
    speed_figure,
    time_scales_figure,
)
from torch_singlim.theory import NoiseSystem, SGDSettings, time_scale
from torch_singlim.verdict import History

__all__ = [
    "Series",
    "Spectrum",
    "bands",
    "begin_hyperparameters",
    "card",
    "end_hyperparameters",
    "figures",
    "has_board",
    "layout",
    "own_hyperparameters",
    "settings",
    "writers",
]

Chart = list[str | list[str]]
Layout = dict[str, dict[str, Chart]]

# series that are drawn with their standard error; both have the steps of the series itself
_BANDS = ("drift/cosine", "drift/speed_ratio", "drift/pull", "potential")
# of the table of hyperparameters: what a run is judged by
_FINAL = ("loss_gap", "distance/measured", "drift/cosine", "drift/null_cosine", "drift/speed_ratio", "drift/pull")


def writers(trainer: Trainer) -> Iterator[SummaryWriter]:
    """The trainer's TensorBoard writers, on the process that writes."""
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment


def has_board(trainer: Trainer) -> bool:
    """Whether the trainer logs to TensorBoard, asked on any process."""
    return any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)


@dataclass(frozen=True)
class Series:
    """Which series a monitor logs, if time allows.

    Args:
        covered: drift is predicted at all.
        flow: descent on the effective loss is.
        moves: the noise moves the weights on one of the two clocks.
        diffuses: the limit does.
        replicas: windows are run again, for the ceiling.
        bands: standard errors within windows.
    """

    covered: bool
    flow: bool
    moves: bool
    diffuses: bool
    replicas: bool
    bands: bool


def layout(monitors: Mapping[str, Series]) -> Layout:
    """The charts of all monitors: category -> title with unit -> what is drawn.

    >>> series = Series(covered=False, flow=False, moves=False, diffuses=False, replicas=False, bands=False)
    >>> layout({"singlim": series})["Distance"]["Loss gap [loss]"]
    ['Multiline', ['^singlim/loss_gap$']]
    """
    charts: Layout = {}
    for name, series in monitors.items():
        of = f" ({name})" if len(monitors) > 1 else ""
        charts |= {f"{category}{of}": each for category, each in _charts(name, series).items() if each}
    return charts


def _charts(name: str, s: Series) -> Layout:
    def lines(*tags: str) -> Chart:
        return ["Multiline", [f"^{re.escape(f'{name}/{tag}')}$" for tag in tags]]

    def band(tag: str) -> Chart:
        return ["Margin", [f"{name}/{tag}", f"{name}/{tag}_lower", f"{name}/{tag}_upper"]]

    distance = {
        "Loss gap [loss]": lines("loss_gap"),
        "Distance to the zero-loss set [weight norm]": lines("distance/measured", "distance/linearised"),
    }
    drift: dict[str, Chart] = {}
    clock: dict[str, Chart] = {}
    quality = {
        "Share of the wall time spent probing": lines("cost/overhead"),
        "Nearest point found [0 or 1]": lines("quality/converged"),
        "Residual left at the nearest point [root of loss]": lines("quality/residual"),
    }
    if s.covered:
        distance |= {
            "Settled part, measured and expected [weight norm]": lines("distance/separated", "distance/predicted"),
            "Settled modes [share]": lines("separation"),
        }
        cosines = {"drift/null_cosine": True, "drift/cosine": s.flow, "drift/ceiling": s.replicas}
        title = "Cosine with the measured motion: loss alone, effective flow, noise ceiling"
        drift[title] = lines(*(tag for tag, logged in cosines.items() if logged))
        displacement = ("drift/measured", "drift/predicted") if s.flow else ("drift/measured",)
        drift["Displacement over a window [weight norm]"] = lines(*displacement)
        clock["Step size"] = lines("clock/step_size")
        quality["Gradients spent on a window [number]"] = lines("cost/products")
    if s.flow and s.bands:
        drift["Cosine with the effective flow, standard error"] = band("drift/cosine")
        drift["Speed, measured / predicted, standard error"] = band("drift/speed_ratio")
    if s.flow and s.replicas and s.moves:
        drift["Pull of the noise, measured / predicted, standard error"] = band("drift/pull")
    if s.flow:
        quality["Error of the prediction [weight norm]"] = lines("quality/stderr", "quality/error")
    if s.moves:
        along = ("spread_measured", "spread_predicted") if s.diffuses else ("measured", "predicted")
        drift["Motion along the zero-loss set, and its limit [weight norm]"] = lines(
            *(f"limit/{each}" for each in along)
        )
        clock["Slow time [sum of step size^order sigma^2]"] = lines("clock/slow_time")
        clock["Optimizer steps per unit of slow time"] = lines("clock/time_scale")
        clock["Potential of the noise, standard error [loss]"] = band("potential")
    return {"Distance": distance, "Drift": drift, "Clock": clock, "Quality and cost": quality}


def bands(scalars: Mapping[str, float]) -> dict[str, float]:
    """Value minus and plus its standard error, for the charts that draw them.

    >>> bands({"singlim/potential": 2.0, "singlim/potential_stderr": 0.5})
    {'singlim/potential_lower': 1.5, 'singlim/potential_upper': 2.5}
    """
    found = {}
    for tag in (f"singlim/{each}" for each in _BANDS):
        if f"{tag}_stderr" in scalars:
            value, error = scalars[tag], scalars[f"{tag}_stderr"]
            found |= {f"{tag}_lower": value - error, f"{tag}_upper": value + error}
    return found


def settings(
    problem: ZeroLossProblem,
    noise: NoiseSystem,
    sgd: SGDSettings | None,
    *,
    window: int,
    covered: bool,
    observation: Observation | None,
) -> dict[str, str | float]:
    """What was found of network, loss, data, noise and descent, and the time scales that follow, in steps.

    Args:
        problem: loss and probe set.
        noise: the system.
        sgd: the descent; None: not covered.
        window: steps over which drift is measured.
        covered: whether the theory covers it all.
        observation: the first, whose stiffest mode sets the fast time scale.
    """
    found: dict[str, str | float] = {
        "network": type(problem.function.module).__name__,
        "weights": problem.num_weights,
        "loss": str(problem.sample_loss),
        "samples": problem.num_samples,
        "residuals": problem.num_residuals,
        "noise": str(noise),
        "window": window,
    }
    if sgd is None:
        return found
    found |= {"lr": sgd.lr, "momentum": sgd.momentum, "batch": sgd.batch(problem.num_samples)}
    found["step size"] = sgd.effective_lr
    if covered and noise.order is not None:
        variance = noise.variance(problem)
        found |= {"noise level": math.sqrt(variance), "order": noise.order}
        found["steps per unit of slow time"] = time_scale(sgd, noise.order, variance)
    if observation is not None:
        relaxation = 1 / (sgd.effective_lr * observation.tangent.hessian.largest)
        found["steps in which the stiffest mode relaxes"] = relaxation
    return found


def card(settings: Mapping[str, str | float], not_covered: Sequence[str]) -> str:
    """What was found at the start, as markdown.

    >>> print(card({"weights": 10}, ["Adam"]))
    | found | |
    |:---|:---|
    | weights | 10 |
    <BLANKLINE>
    Drift not predicted: Adam.
    """
    lines = ["| found | |", "|:---|:---|"]
    for key, value in settings.items():
        lines.append(f"| {key} | {value if isinstance(value, str | int) else f'{value:.4g}'} |")
    return "\n".join([*lines, *(f"\nDrift not predicted: {reason}." for reason in not_covered)])


@dataclass(frozen=True)
class Spectrum:
    """The nonzero eigenvalues of H at one probe.

    Args:
        eigenvalues: descending  ``[rank]``.
        level: from which a mode counts as settled; infinite: none does; None: not known.
        step: of the probe.
    """

    eigenvalues: Tensor = field(repr=False)
    level: float | None
    step: int

    @classmethod
    def of(cls, observation: Observation, sgd: SGDSettings | None, separation: float) -> Spectrum:
        """From what was seen; by products, where H is not decomposed."""
        step, level = observation.step, None
        if sgd is not None:
            level = separation_level(sgd.effective_lr, step, separation) if step else math.inf
        return cls(observation.tangent.spectrum(), level, step)


def figures(history: History, window: WindowObservation | None, spectrum: Spectrum | None) -> dict[str, Figure]:
    """Name -> figure, of what there is to draw so far."""
    drawn = {"1_time_scales": time_scales_figure(history)}
    if window is not None:
        drawn |= {"2_agreement": agreement_figure(history), "3_speed": speed_figure({"": history})}
        if window.plane is not None:
            drawn["4_plane"] = plane_figure(window)
    if spectrum is not None:
        drawn["5_spectrum"] = spectrum_figure(spectrum.eigenvalues, level=spectrum.level, step=spectrum.step)
    return drawn


def own_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Those that module and data module have saved, which Lightning logs when training starts; empty: none."""
    holders = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    saved = [each.hparams_initial for each in holders if each is not None and each._log_hyperparams]
    return {key: value for each in saved for key, value in each.items() if key != "_class_path"}


def begin_hyperparameters(writer: SummaryWriter, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """The run as a row of the HPARAMS tab: its settings, and which tags it is judged by, once they are logged.

    TensorBoard takes the first such record of a run alone, and Lightning writes one for a module with hyperparameters.
    """
    plain = {key: value for key, value in settings.items() if isinstance(value, bool | str | float | int)}
    metrics = {f"{name}/{tag}": 0.0 for name in names for tag in _FINAL}  # the names count, no value is kept
    for summary in hparams(plain, metrics)[:2]:
        writer._get_file_writer().add_summary(summary)


def end_hyperparameters(writer: SummaryWriter) -> None:
    """The run is finished: its metrics are the last values that were logged."""
    writer._get_file_writer().add_summary(hparams({}, {})[2])
