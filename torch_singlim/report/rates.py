"""Figures of several runs: the speed of their drift over step size and noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, StrMethodFormatter

from torch_singlim.measure import Rate, Scaling
from torch_singlim.report.style import CEILING, COLUMN, CYCLE, LIMIT, MEASURED, THEORY, stacked_panels

__all__ = ["scaling_figure", "sweep_figure"]


@COLUMN
def sweep_figure(rates: Sequence[Rate], *, title: str) -> Figure:
    """Speed of the drift in the last window of several runs, over step size and over noise level.

    Args:
        rates: one for each run; runs that have the other parameter in common are joined by a line.
        title: the fitted exponents, or why there are none.
    """
    figure, panels = stacked_panels(2, above=0.35)
    figure.suptitle(title, wrap=True)
    for axes, which, other, symbol, label in (
        (panels[0], "alpha", "sigma", "σ", "step size α"),
        (panels[1], "sigma", "alpha", "α", "noise level σ"),
    ):
        for color, value in zip(CYCLE, sorted({getattr(r, other) for r in rates}), strict=False):
            chosen = sorted((r for r in rates if getattr(r, other) == value), key=lambda r: getattr(r, which))
            x = [getattr(r, which) for r in chosen]
            measured = [r.measured.mean for r in chosen]
            errors = [0.0 if math.isnan(r.measured.stderr) else r.measured.stderr for r in chosen]
            axes.errorbar(x, measured, yerr=errors, color=color, marker="o", lw=1, label=f"{symbol} = {value:.3g}")
            axes.plot(x, [r.predicted for r in chosen], color=color, ls="--", marker="^", mfc="none", lw=1)
        axes.plot([], [], color="0.4", ls="--", marker="^", mfc="none", lw=1, label="predicted")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="weight norm per step")
        ticks = sorted({getattr(r, which) for r in rates})
        axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.minorticks_off()
        # the rates of one study usually lie within a decade, in which there would be a single tick
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
        axes.legend()
    return figure


def scaling_figure(scalings: Sequence[Scaling], *, title: str) -> Figure:
    """A panel for each system: measured and predicted rate over the step size, with one line for each noise level.

    Args:
        scalings: measured rates and fitted exponents.
        title: of the figure.
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
    for sigma, color in zip(levels, (THEORY, MEASURED, LIMIT, CEILING), strict=False):
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
