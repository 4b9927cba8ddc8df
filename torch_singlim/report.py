"""Figures from what a monitor recorded; the only place that imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_singlim.observe import Observation, WindowObservation

__all__ = ["drift_figure"]

# Okabe and Ito's colours, told apart by every kind of colour vision
_MEASURED, _THEORY, _CONTROL, _LIMIT, _CEILING = "#0072B2", "#D55E00", "#999999", "#009E73", "#000000"


def drift_figure(
    observations: Sequence[Observation],
    windows: Sequence[WindowObservation],
    loss_gaps: Mapping[int, float],
    *,
    title: str,
) -> Figure:
    """Four panels, measured against theory: loss gap, distance to Gamma, agreement by window, drift weight by weight.

    Args:
        observations: a monitor's `observations`.
        windows: its `windows`.
        loss_gaps: its `loss_gaps`, step -> L.
        title: above all of it.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    _loss(panels[0, 0], loss_gaps, windows)
    _distance(panels[0, 1], observations)
    _agreement(panels[1, 0], windows)
    _parity(panels[1, 1], windows)
    return figure


def _loss(axes: Axes, loss_gaps: Mapping[int, float], windows: Sequence[WindowObservation]) -> None:
    points = [(step, gap) for step, gap in sorted(loss_gaps.items()) if step > 0 and gap > 0]
    axes.plot(*zip(*points, strict=True), color=_MEASURED, marker=".", label="loss gap L(w)") if points else None
    for i, window in enumerate(windows):
        axes.axvspan(max(window.start, 1), window.stop, color=_CONTROL, alpha=0.12 + 0.1 * (i % 2), lw=0)
    axes.set(
        xscale="log", yscale="log", xlabel="optimizer steps", ylabel="loss", title="Fast, then slow (windows shaded)"
    )
    axes.legend(frameon=False)


def _distance(axes: Axes, observations: Sequence[Observation]) -> None:
    def line(value, style: dict) -> None:
        points = [(o.step, value(o)) for o in observations if o.step > 0 and value(o) is not None]
        points = [(step, y) for step, y in points if y > 0 and math.isfinite(y)]
        if points:
            axes.plot(*zip(*points, strict=True), **style)

    line(lambda o: o.foot.distance, {"color": _CONTROL, "marker": "s", "label": "whole distance (no prediction)"})
    line(lambda o: o.separated, {"color": _MEASURED, "marker": "o", "label": "settled modes, measured"})
    line(lambda o: o.expected, {"color": _THEORY, "marker": "^", "ls": "--", "label": "settled modes, expected"})
    axes.set(xlabel="optimizer steps", ylabel="weight norm", title="Distance to the zero-loss set")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _agreement(axes: Axes, windows: Sequence[WindowObservation]) -> None:
    places = range(len(windows))
    series = {
        "effective flow": (_THEORY, "o", [w.drift.cosine for w in windows]),
        "singular limit": (_LIMIT, "D", [w.limit.cosine if w.limit else math.nan for w in windows]),
        "loss alone (null)": (_CONTROL, "s", [w.null.cosine for w in windows]),
    }
    for label, (color, marker, values) in series.items():
        if any(math.isfinite(v) for v in values):
            axes.plot(places, values, color=color, marker=marker, label=label)
    for i, window in enumerate(windows):
        if math.isfinite(window.ceiling):
            label = "noise ceiling" if i == 0 else ""
            axes.hlines(window.ceiling, i - 0.3, i + 0.3, color=_CEILING, lw=1, label=label)
    axes.set_xticks(places, [f"{w.start}-{w.stop}" for w in windows])
    axes.set(ylim=(-0.05, 1.05), xlabel="window, optimizer steps", ylabel="cosine with the measured drift")
    axes.set_title("Which prediction points where training went")
    if windows:
        axes.legend(frameon=False, loc="lower left", fontsize="small", ncols=2)


def _parity(axes: Axes, windows: Sequence[WindowObservation]) -> None:
    axes.set(xlabel="predicted displacement", ylabel="measured displacement", title="Drift, weight by weight")
    if not windows:
        return
    last = windows[-1]
    q, m = last.flow.displacement.cpu().numpy(), last.displacement.cpu().numpy()
    reach = float(max(abs(q).max(), abs(m).max())) or 1.0
    extent = (-reach, reach, -reach, reach)
    cells = axes.hexbin(q, m, gridsize=60, extent=extent, bins="log", cmap="cividis", mincnt=1)
    axes.figure.colorbar(cells, ax=axes, label="weights per cell")
    axes.plot([-reach, reach], [-reach, reach], color=_THEORY, lw=1, ls="--", label="measured = predicted")
    axes.set_title(f"Drift, weight by weight (steps {last.start}-{last.stop})")
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="upper left")
