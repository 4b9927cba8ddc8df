"""Colours, letters and panels that all figures share."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["CEILING", "COLUMN", "CONTROL", "CYCLE", "LIMIT", "MEASURED", "THEORY", "stacked_panels"]

# the colours of Okabe and Ito, which can be distinguished with any kind of colour vision
MEASURED, THEORY, CONTROL, LIMIT, CEILING = "#0072B2", "#D55E00", "#999999", "#009E73", "#000000"
CYCLE = (MEASURED, THEORY, LIMIT, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
# a panel as wide as a column of a paper, in inches, with letters that are readable at this size
_PANEL = (3.5, 2.9)
# its margins, in inches: tick labels and the axis label; the same below; a title. Fixed ones, since finding them by
# drawing takes two thirds of the time of a figure, during a training
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.7, 0.1, 0.46, 0.32
COLUMN = rc_context(
    {
        "font.size": 8,
        "axes.titlesize": 8.5,
        "legend.fontsize": 7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "lines.markersize": 4,
        "axes.prop_cycle": f"cycler('color', {list(CYCLE)})",
    }
)


def stacked_panels(rows: int, *, left: float = _LEFT, above: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Panels below each other; the margin to their left and the room above the first one, in inches."""
    width, height = _PANEL
    total, between = rows * height + above, _BELOW + _ABOVE
    figure = Figure(figsize=(width, total), dpi=160)
    margins = {
        "left": left / width,
        "right": 1 - _RIGHT / width,
        "bottom": _BELOW / total,
        "top": 1 - (_ABOVE + above) / total,
        "hspace": between / (height - between),
    }
    return figure, list(figure.subplots(rows, 1, squeeze=False, gridspec_kw=margins).flat)
