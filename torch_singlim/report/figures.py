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
        if tag in (tags.DRIFT_CEILING, tags.NOISE_CEILING):
            few = {**few, "ls": ":"}  # what reaches it remains visible
        axes.plot(steps, values, lw=1, label=None if i else label, **few)
        low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
        if any(errors):
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, lw=0)


def _has(history: History, *shown: Tag) -> bool:
    """Whether one of these was logged."""
    return any(tags.series(history, tag) for tag in shown)


def _panel_of_loss(axes: Axes, history: History) -> None:
    axes.plot(*_series(history, tags.EXCESS_LOSS), color=MEASURED, marker=".", lw=1)
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="loss", title="Excess loss")


_DISTANCES = (
    (tags.HUNDREDTH, MEASURED, "2", "to a hundredth of the loss"),
    (tags.TENTH, MEASURED, "1", "to a tenth"),
    (tags.HALF, MEASURED, "v", "to half"),
    (tags.NEAREST, CEILING, "s", "nearest point"),
    (tags.RELAXED, LIMIT, "o", "relaxed part"),
    (tags.RELAXED_EXPECTED, THEORY, "^", "the same, expected"),
)


def _panel_of_distances(axes: Axes, history: History) -> None:
    for tag, color, marker, label in _DISTANCES:
        steps, values = _series(history, tag)
        if steps:
            axes.plot(steps, values, color=color, marker=marker, label=label, lw=1)
    axes.set(xscale="log", yscale="log", xlabel="optimizer steps", ylabel="weight norm", title="Distances")
    if axes.lines:
        low, high = axes.get_ylim()
        axes.set_ylim(bottom=low * (low / high) ** 0.7)  # room for the legend
        axes.legend(loc="lower left")


def _panel_of_displacements(axes: Axes, history: History) -> None:
    for tag, color, marker, style, label in (
        (tags.DRIFT_MEASURED, MEASURED, "o", "-", "measured"),
        (tags.DRIFT_PREDICTED, THEORY, "^", "--", "predicted"),
        (tags.BASELINE_MOVED, CONTROL, "s", "-", "baseline (noise off)"),
    ):
        _plot_curves(axes, history, tag, color=color, marker=marker, ls=style, label=label)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="optimizer steps", ylabel="weight norm", title="Displacement within each window")
    axes.legend()


@COLUMN
def time_scales_figure(history: History) -> Figure | None:
    """The fast fall and the slow drift: excess loss, distances, and the displacement since each window's beginning.

    There is a panel for each of these that was measured; None: nothing was.

    Args:
        history: what was logged, step -> tag -> value.
    """
    panels = []
    if _has(history, tags.EXCESS_LOSS):
        panels.append(_panel_of_loss)
    if _has(history, *(tag for tag, *_ in _DISTANCES)):
        panels.append(_panel_of_distances)
    if len(tags.series(history, tags.DRIFT_MEASURED)) > 1:
        panels.append(_panel_of_displacements)
    if not panels:
        return None
    figure, all_axes = stacked_panels(len(panels))
    for axes, panel in zip(all_axes, panels, strict=True):
        panel(axes, history)
    return figure


# title -> label of the axis, and tag, colour, marker and label of each curve
_AGREEMENT = {
    "Direction of the drift": (
        "cosine with the measured drift",
        (
            (tags.DRIFT_COSINE, THEORY, "o", "predicted"),
            (tags.LIMIT_COSINE, LIMIT, "D", "singular limit"),
            (tags.DRIFT_BASELINE_COSINE, CONTROL, "s", "baseline (noise off)"),
            (tags.DRIFT_CEILING, CEILING, "_", "noise ceiling"),
        ),
    ),
    "Speed": (
        "measured / predicted",
        ((tags.DRIFT_SPEED, THEORY, "o", "predicted"), (tags.LIMIT_SPEED, LIMIT, "D", "singular limit")),
    ),
    "Noise-induced drift: run minus baseline": (
        "ratio, or cosine",
        (
            (tags.NOISE_RATIO, MEASURED, "o", "measured / predicted"),
            (tags.NOISE_COSINE, THEORY, "^", "cosine"),
            (tags.NOISE_CEILING, CEILING, "_", "noise ceiling"),
        ),
    ),
}


@COLUMN
def agreement_figure(history: History) -> Figure | None:
    """Direction and speed of the drift and of its noise-induced part, with standard errors, ceilings and baseline.

    There is a panel for each of these that was compared with theory; None: none was.

    Args:
        history: what was logged, step -> tag -> value.
    """
    there = {title: panel for title, panel in _AGREEMENT.items() if _has(history, *(tag for tag, *_ in panel[1]))}
    if not there:
        return None
    figure, all_axes = stacked_panels(len(there))
    for axes, (title, (unit, curves)) in zip(all_axes, there.items(), strict=True):
        for tag, color, marker, label in curves:
            _plot_curves(axes, history, tag, color=color, marker=marker, label=label)
        axes.set(xlabel="optimizer steps", ylabel=unit, title=title)
        if "cosine with" in unit:
            axes.axhline(0, color="0.8", lw=0.5, zorder=0)
            axes.set_ylim(-0.35, 1.08)
            axes.legend(loc="lower left", ncols=2)
        else:
            axes.axhline(1, color="0.6", lw=0.8, ls=":", zorder=0)
            # values at the first steps of a window are uncertain, and would set the scale
            axes.set_ylim(max(-0.5, min(0.0, axes.get_ylim()[0])), min(2.0, max(1.15, axes.get_ylim()[1])))
            axes.legend()
    return figure


@COLUMN
def speed_figure(runs: Mapping[str, History]) -> Figure | None:
    """Measured against predicted speed, with a point for each window of each run; they agree on the diagonal.

    The measured speed is that of the part of the motion along the prediction; bars are standard errors. None: no drift
    was compared with theory.

    Args:
        runs: name -> what was logged.
    """
    if not any(_has(history, tags.DRIFT_SPEED) for history in runs.values()):
        return None
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
    axes.set(xlabel="optimizer steps", ylabel="loss", title="Fast, then slow (windows shaded)")
    if axes.lines:
        axes.set(xscale="log", yscale="log")
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
