"""Figures of what a monitor measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from torch_singlim.measure import History, Window, tags
from torch_singlim.measure.tags import Tag
from torch_singlim.report.style import CEILING, COLUMN, CONTROL, CYCLE, LIMIT, MEASURED, THEORY, stacked_panels

__all__ = [
    "Figure",
    "agreement_figure",
    "drift_figure",
    "layers_figure",
    "spectrum_figure",
    "speed_figure",
    "time_scales_figure",
]

# parameters that a figure by layer shows
_LAYERS = 12
# width of a letter of a tick label, and how many of a parameter's name are shown
_LETTER, _LETTERS = 0.06, 22


def _series(history: History, tag: Tag) -> tuple[list[int], list[float]]:
    """Steps and values that were logged, without step 0."""
    points = {step: value for step, value in tags.series(history, tag).items() if step}
    return list(points), list(points.values())


def _curves(history: History, tag: Tag) -> Iterator[tuple[list[int], list[float], list[float]]]:
    """Steps, values and standard errors that were logged of each window."""
    for steps in tags.windows(history).values():
        there = [step for step in steps if tag.name in history[step]]
        if there:
            errors = [history[step].get(tag.stderr_name, 0.0) for step in there]
            yield there, [history[step][tag.name] for step in there], errors


def _plot_curves(axes: Axes, history: History, tag: Tag, *, label: str, **style: Any) -> None:
    """A curve for each window, with a band of its standard error."""
    for i, (steps, values, errors) in enumerate(_curves(history, tag)):
        few = style if len(steps) < 3 else {**style, "marker": None}
        axes.plot(steps, values, lw=1, label=None if i else label, **few)
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        if any(errors):
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)


def _empty(axes: Axes, words: str) -> None:
    """Write into an empty panel what is missing."""
    axes.text(0.5, 0.5, words, ha="center", va="center", transform=axes.transAxes, color="0.4", wrap=True)
    axes.set(xticks=[], yticks=[])


@COLUMN
def time_scales_figure(history: History) -> Figure:
    """The fast fall and the slow drift: excess loss and distance over the steps.

    Below: the displacement since the beginning of each window, measured and predicted.

    Args:
        history: what was logged, step -> tag -> value.
    """
    figure, (fall, drift) = stacked_panels(2)
    lines = [
        (tags.EXCESS_LOSS, CEILING, ".", "excess loss"),
        (tags.HALF, MEASURED, "v", "distance to half of it"),
        (tags.TENTH, MEASURED, "1", "distance to a tenth"),
        (tags.NEAREST, MEASURED, "s", "nearest point"),
        (tags.RELAXED, LIMIT, "o", "relaxed part"),
        (tags.RELAXED_EXPECTED, THEORY, "^", "the same, expected"),
    ]
    for tag, color, marker, label in lines:
        steps, values = _series(history, tag)
        if steps:
            fall.plot(steps, values, color=color, marker=marker, label=label, lw=1)
    fall.set(xscale="log", yscale="log", xlabel="optimizer steps", title="Excess loss and distances")
    fall.set_ylabel("loss, or weight norm")
    if fall.lines:
        fall.legend()
    if not tags.windows(history):
        _empty(drift, "the drift was not measured")
        return figure
    for tag, color, marker, style, label in (
        (tags.DRIFT_MEASURED, MEASURED, "o", "-", "measured"),
        (tags.DRIFT_PREDICTED, THEORY, "^", "--", "predicted"),
        (tags.BASELINE_MOVED, CONTROL, "s", "-", "baseline (noise off)"),
    ):
        _plot_curves(drift, history, tag, color=color, marker=marker, ls=style, label=label)
    drift.set_ylim(bottom=0)
    drift.set(xlabel="optimizer steps", ylabel="weight norm", title="Displacement within each window")
    drift.legend()
    return figure


@COLUMN
def agreement_figure(history: History) -> Figure:
    """Direction and speed of the drift and of its noise-induced part, with standard errors, ceilings and baseline.

    Args:
        history: what was logged, step -> tag -> value.
    """
    figure, (direction, speed, noise) = stacked_panels(3)
    for tag, color, marker, label in (
        (tags.DRIFT_COSINE, THEORY, "o", "predicted"),
        (tags.LIMIT_COSINE, LIMIT, "D", "singular limit"),
        (tags.DRIFT_BASELINE_COSINE, CONTROL, "s", "baseline (noise off)"),
        (tags.DRIFT_CEILING, CEILING, "_", "noise ceiling"),
    ):
        _plot_curves(direction, history, tag, color=color, marker=marker, label=label)
    for tag, color, marker, label in (
        (tags.DRIFT_SPEED, THEORY, "o", "predicted"),
        (tags.LIMIT_SPEED, LIMIT, "D", "singular limit"),
    ):
        _plot_curves(speed, history, tag, color=color, marker=marker, label=label)
    for tag, color, marker, label in (
        (tags.NOISE_RATIO, MEASURED, "o", "measured / predicted"),
        (tags.NOISE_COSINE, THEORY, "^", "cosine"),
        (tags.NOISE_CEILING, CEILING, "_", "noise ceiling"),
    ):
        _plot_curves(noise, history, tag, color=color, marker=marker, label=label)
    direction.axhline(0, color="0.8", lw=0.5, zorder=0)
    direction.set(ylabel="cosine with the measured drift", title="Direction of the drift", ylim=(-0.35, 1.08))
    speed.set(ylabel="measured / predicted", title="Speed")
    noise.set(ylabel="ratio, or cosine", title="Noise-induced drift: run minus baseline")
    for axes in (speed, noise):
        axes.axhline(1, color="0.6", lw=0.8, ls=":", zorder=0)
        # values at the first steps of a window are uncertain, and would set the scale
        axes.set_ylim(max(-0.5, min(0.0, axes.get_ylim()[0])), min(2.0, max(1.15, axes.get_ylim()[1])))
    for axes in (direction, speed, noise):
        axes.set_xlabel("optimizer steps")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left" if axes is direction else "best", ncols=2 if axes is direction else 1)
        else:
            axes.cla()
            _empty(axes, "no noise-induced drift" if axes is noise else "no drift was compared with the theory")
    return figure


@COLUMN
def speed_figure(runs: Mapping[str, History]) -> Figure:
    """Measured against predicted speed, with a point for each window of each run; they agree on the diagonal.

    The measured speed is that of the part of the motion along the prediction; bars are standard errors.

    Args:
        runs: name -> what was logged.
    """
    figure, (axes,) = stacked_panels(1)
    largest = 0.0
    for color, (name, history) in zip(CYCLE * (1 + len(runs) // len(CYCLE)), runs.items(), strict=False):
        ends = [steps[-1] for steps in tags.windows(history).values()]
        points = [history[end] for end in ends if tags.DRIFT_SPEED.name in history[end]]
        if not points:
            continue
        q = [p[tags.DRIFT_PREDICTED.name] / p[tags.WINDOW_STEPS.name] for p in points]
        m = [each * p[tags.DRIFT_SPEED.name] for each, p in zip(q, points, strict=True)]
        errors = [each * p.get(tags.DRIFT_SPEED.stderr_name, 0.0) for each, p in zip(q, points, strict=True)]
        axes.errorbar(q, m, yerr=errors, fmt="o", color=color, capsize=2, label=name if len(runs) > 1 else None)
        largest = max(largest, *q, *(each + error for each, error in zip(m, errors, strict=True)))
    if not largest:
        _empty(axes, "no drift was compared with the theory")
        return figure
    axes.plot(
        [0, 1.1 * largest], [0, 1.1 * largest], color="0.6", lw=0.8, ls=":", label="measured = predicted", zorder=0
    )
    axes.set(xlim=(0, 1.1 * largest), ylim=(0, 1.1 * largest))
    axes.set(
        xlabel="predicted, weight norm per step", ylabel="measured, weight norm per step", title="Speed of the drift"
    )
    axes.ticklabel_format(style="sci", scilimits=(-2, 3))
    axes.legend()
    return figure


@COLUMN
def spectrum_figure(eigenvalues: Tensor, *, level: float | None, step: int) -> Figure:
    """The nonzero eigenvalues of H, descending, and which of them have relaxed.

    Args:
        eigenvalues: ``[rank]``.
        level: eigenvalue from which on a mode counts as relaxed, c / (α steps); None: unknown.
        step: at which the spectrum was computed.
    """
    figure, (axes,) = stacked_panels(1)
    values = eigenvalues[eigenvalues > 0].sort(descending=True).values.double().cpu()
    index = torch.arange(1, len(values) + 1)
    relaxed = values >= (math.inf if level is None else level)
    for chosen, color, label in ((relaxed, MEASURED, "relaxed"), (~relaxed, CONTROL, "not relaxed")):
        if chosen.any():
            name = f"{label}: {int(chosen.sum())}" if level is not None else None
            axes.plot(index[chosen].tolist(), values[chosen].tolist(), ".", color=color, label=name, ms=3)
    if level is not None and math.isfinite(level):
        axes.axhline(level, color=THEORY, lw=0.8, ls="--", label="c / (α steps)")
    axes.set(xscale="log", yscale="log", xlabel="normal mode", ylabel="eigenvalue λ of H, loss / norm²")
    axes.set_title(f"Spectrum at step {step}")
    if level is not None:
        axes.legend()
    return figure


@COLUMN
def layers_figure(shares: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """The parameters with the largest shares of |v|^2, for each pair of a label and the shares of v by name."""
    largest = {name: max(found[name] for _, found in shares) for name in shares[0][1]}
    names = [name for name in largest if name in sorted(largest, key=lambda each: -largest[each])[:_LAYERS]]
    labels = [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}" for name in names]
    figure, (axes,) = stacked_panels(1, left=0.15 + _LETTER * max(map(len, labels)))
    height = 0.8 / len(shares)
    for i, (label, found) in enumerate(shares):
        at = [k + (i - (len(shares) - 1) / 2) * height for k in range(len(names))]
        axes.barh(at, [found[name] for name in names], height=height, color=CYCLE[i], label=label)
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="share of the squared norm", title="By layer")
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.legend()
    return figure


def drift_figure(history: History, last_window: Window | None, *, title: str) -> Figure:
    """Four panels, measured against theory: excess loss, distance to Gamma, agreement by window, drift by weight.

    If the limit diffuses, the last panel is the length of the motion, since nothing else can be predicted then.

    Args:
        history: what was logged, step -> tag -> value: a monitor's `history`.
        last_window: the monitor's `last_window`, which has the displacement of every weight.
        title: of the figure.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    _loss(panels[0, 0], history)
    _distance(panels[0, 1], history)
    _agreement(panels[1, 0], history)
    if last_window is not None and last_window.diffuses:
        _length(panels[1, 1], history)
    else:
        _parity(panels[1, 1], last_window)
    return figure


def _line(axes: Axes, history: History, tag: Tag, **style: Any) -> None:
    """One logged series over the steps; nothing if it was not logged."""
    steps, values = _series(history, tag)
    if steps:
        axes.plot(steps, values, **style)


def _windows(history: History) -> list[tuple[int, int]]:
    """Start and end of every window, in steps."""
    return [(start, steps[-1]) for start, steps in tags.windows(history).items()]


def _loss(axes: Axes, history: History) -> None:
    _line(axes, history, tags.EXCESS_LOSS, color=MEASURED, marker=".", label="excess loss L(w)")
    for i, (start, stop) in enumerate(_windows(history)):
        axes.axvspan(max(start, 1), stop, color=CONTROL, alpha=0.12 + 0.1 * (i % 2), lw=0)
    axes.set(
        xscale="log", yscale="log", xlabel="optimizer steps", ylabel="loss", title="Fast, then slow (windows shaded)"
    )
    axes.legend(frameon=False)


def _distance(axes: Axes, history: History) -> None:
    _line(axes, history, tags.NEAREST, color=CONTROL, marker="s", label="nearest point (no prediction)")
    _line(axes, history, tags.HALF, color=CONTROL, marker="v", label="half of the loss (no prediction)")
    _line(axes, history, tags.RELAXED, color=MEASURED, marker="o", label="relaxed modes, measured")
    _line(axes, history, tags.RELAXED_EXPECTED, color=THEORY, marker="^", ls="--", label="relaxed modes, expected")
    axes.set(xlabel="optimizer steps", ylabel="weight norm", title="Distance to the zero-loss set")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False)


def _agreement(axes: Axes, history: History) -> None:
    axes.axhline(0, color=CONTROL, lw=0.5)
    for tag, color, marker, label in (
        (tags.DRIFT_CEILING, CEILING, "_", "noise ceiling"),
        (tags.DRIFT_COSINE, THEORY, "o", "predicted"),
        (tags.LIMIT_COSINE, LIMIT, "D", "singular limit"),
        (tags.DRIFT_BASELINE_COSINE, CONTROL, "s", "baseline (noise off)"),
    ):
        _plot_curves(axes, history, tag, color=color, marker=marker, label=label)
    axes.set(ylim=(-0.3, 1.05), xlabel="optimizer steps", ylabel="cosine with the measured drift")
    axes.set_title("Direction of the drift")
    if _windows(history):
        axes.legend(frameon=False, loc="lower left", ncols=2)


def _parity(axes: Axes, last: Window | None) -> None:
    axes.set(xlabel="predicted displacement", ylabel="measured displacement", title="Drift, weight by weight")
    drift = None if last is None else last.drift
    if last is None or drift is None or drift.prediction is None or last.displacement is None:
        return
    q, m = drift.prediction.displacement.cpu().numpy(), last.displacement.cpu().numpy()
    reach = float(max(abs(q).max(), abs(m).max())) or 1.0
    extent = (-reach, reach, -reach, reach)
    cells = axes.hexbin(q, m, gridsize=60, extent=extent, bins="log", cmap="cividis", mincnt=1)
    axes.figure.colorbar(cells, ax=axes, label="weights per cell")
    axes.plot([-reach, reach], [-reach, reach], color=THEORY, lw=1, ls="--", label="measured = predicted")
    axes.set_title(f"Drift, weight by weight (steps {last.start}-{last.stop})")
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="upper left")


def _length(axes: Axes, history: History) -> None:
    _line(axes, history, tags.SPREAD_MEASURED, color=MEASURED, marker="o", label="measured")
    _line(axes, history, tags.SPREAD_PREDICTED, color=LIMIT, marker="D", ls="--", label="singular limit (diffusion)")
    axes.set(xlabel="end of the window, optimizer steps", ylabel="weight norm", title="Length of the motion along Γ")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="lower left")
