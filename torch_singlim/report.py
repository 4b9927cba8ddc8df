"""Figures from what a monitor recorded; the only place that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torch_singlim.observe import WindowObservation
from torch_singlim.scaling import Scaling
from torch_singlim.verdict import History

__all__ = ["drift_figure", "scaling_figure"]

# Okabe and Ito's colours, told apart by every kind of colour vision
_MEASURED, _THEORY, _CONTROL, _LIMIT, _CEILING = "#0072B2", "#D55E00", "#999999", "#009E73", "#000000"


def drift_figure(history: History, last_window: WindowObservation | None, *, title: str) -> Figure:
    """Four panels, measured against theory: loss gap, distance to Gamma, agreement by window, drift weight by weight.

    Where the limit diffuses the last one is the length of the motion, which alone can be predicted.

    Args:
        history: what was logged, step -> tag -> value: a monitor's `history`.
        last_window: its `last_window`, which has the displacement of every weight.
        title: above all of it.
    """
    figure = Figure(figsize=(10, 7.5), layout="constrained", dpi=150)
    figure.suptitle(title)
    panels = figure.subplots(2, 2)
    _loss(panels[0, 0], history)
    _distance(panels[0, 1], history)
    _agreement(panels[1, 0], history)
    if last_window is not None and last_window.spread is not None:
        _length(panels[1, 1], history)
    else:
        _parity(panels[1, 1], last_window)
    return figure


def _line(axes: Axes, history: History, tag: str, **style: Any) -> None:
    """One logged series over the steps; nothing where it was not logged."""
    points = [(step, p[f"singlim/{tag}"]) for step, p in sorted(history.items()) if step and f"singlim/{tag}" in p]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _windows(history: History) -> list[tuple[int, int]]:
    """Start and end of every window, in steps."""
    ends = [(step, p["singlim/drift/window"]) for step, p in sorted(history.items()) if "singlim/drift/window" in p]
    return [(step - int(length), step) for step, length in ends]


def _loss(axes: Axes, history: History) -> None:
    _line(axes, history, "loss_gap", color=_MEASURED, marker=".", label="loss gap L(w)")
    for i, (start, stop) in enumerate(_windows(history)):
        axes.axvspan(max(start, 1), stop, color=_CONTROL, alpha=0.12 + 0.1 * (i % 2), lw=0)
    axes.set(
        xscale="log", yscale="log", xlabel="optimizer steps", ylabel="loss", title="Fast, then slow (windows shaded)"
    )
    axes.legend(frameon=False)


def _distance(axes: Axes, history: History) -> None:
    _line(axes, history, "distance/measured", color=_CONTROL, marker="s", label="whole distance (no prediction)")
    _line(axes, history, "distance/separated", color=_MEASURED, marker="o", label="settled modes, measured")
    _line(axes, history, "distance/predicted", color=_THEORY, marker="^", ls="--", label="settled modes, expected")
    axes.set(xlabel="optimizer steps", ylabel="weight norm", title="Distance to the zero-loss set")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False)


def _agreement(axes: Axes, history: History) -> None:
    axes.axhline(0, color=_CONTROL, lw=0.5)
    for i, (start, stop) in enumerate(_windows(history)):
        ceiling = history[stop].get("singlim/drift/ceiling")
        if ceiling is not None:
            axes.hlines(ceiling, start, stop, color=_CEILING, lw=1, label="noise ceiling" if i == 0 else "")
    _line(axes, history, "drift/cosine", color=_THEORY, marker="o", label="effective flow")
    _line(axes, history, "limit/cosine", color=_LIMIT, marker="D", label="singular limit")
    _line(axes, history, "drift/null_cosine", color=_CONTROL, marker="s", label="loss alone (null)")
    axes.set(ylim=(-0.3, 1.05), xlabel="end of the window, optimizer steps", ylabel="cosine with the measured drift")
    axes.set_title("Which prediction points where training went")
    if _windows(history):
        axes.legend(frameon=False, loc="lower left", ncols=2)


def _parity(axes: Axes, last: WindowObservation | None) -> None:
    axes.set(xlabel="predicted displacement", ylabel="measured displacement", title="Drift, weight by weight")
    if last is None or last.flow is None:
        return
    q, m = last.flow.displacement.cpu().numpy(), last.displacement.cpu().numpy()
    reach = float(max(abs(q).max(), abs(m).max())) or 1.0
    extent = (-reach, reach, -reach, reach)
    cells = axes.hexbin(q, m, gridsize=60, extent=extent, bins="log", cmap="cividis", mincnt=1)
    axes.figure.colorbar(cells, ax=axes, label="weights per cell")
    axes.plot([-reach, reach], [-reach, reach], color=_THEORY, lw=1, ls="--", label="measured = predicted")
    axes.set_title(f"Drift, weight by weight (steps {last.start}-{last.stop})")
    axes.set_aspect("equal")
    axes.legend(frameon=False, loc="upper left")


def _length(axes: Axes, history: History) -> None:
    _line(axes, history, "limit/spread_measured", color=_MEASURED, marker="o", label="measured")
    _line(
        axes, history, "limit/spread_predicted", color=_LIMIT, marker="D", ls="--", label="singular limit (diffusion)"
    )
    axes.set(xlabel="end of the window, optimizer steps", ylabel="weight norm", title="Length of the motion along Γ")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.legend(frameon=False, loc="lower left")


def scaling_figure(scalings: Sequence[Scaling], *, title: str) -> Figure:
    """A panel for each system: measured rate over the step size, one line for each noise level, beside the limit's.

    Args:
        scalings: measured rates and fitted exponents.
        title: above all of it.
    """
    columns = min(len(scalings), 3)
    rows = -(-len(scalings) // columns)
    figure = Figure(figsize=(3.6 * columns, 3.3 * rows + 0.4), layout="constrained", dpi=150)
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, scaling in zip(panels, scalings, strict=False):
        _scaling(axes, scaling)
    for axes in panels[len(scalings) :]:
        axes.set_axis_off()
    return figure


def _scaling(axes: Axes, scaling: Scaling) -> None:
    levels = sorted({r.sigma for r in scaling.rates}, reverse=True)
    for sigma, color in zip(levels, (_THEORY, _MEASURED, _LIMIT, _CEILING), strict=False):
        rates = sorted((r for r in scaling.rates if r.sigma == sigma), key=lambda r: r.alpha)
        alphas = [r.alpha for r in rates]
        axes.plot(alphas, [r.predicted for r in rates], color=color, lw=1, ls="--")
        measured, errors = [r.measured.mean for r in rates], [r.measured.stderr for r in rates]
        axes.errorbar(alphas, measured, yerr=errors, color=color, fmt="o", ms=4, label=f"σ = {sigma:g}")
    a, b = scaling.expected
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="step size α",
        ylabel="motion along Γ per step",
        title=f"{scaling.name}\n$\\alpha^{{{scaling.fit.alpha.mean:.2f}}}\\sigma^{{{scaling.fit.sigma.mean:.2f}}}$, "
        f"theory $\\alpha^{{{a}}}\\sigma^{{{b}}}$",
    )
    axes.set_xticks(alphas := sorted({r.alpha for r in scaling.rates}), [f"{alpha:g}" for alpha in alphas], minor=False)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
