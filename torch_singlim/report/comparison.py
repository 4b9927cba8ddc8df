"""Several runs side by side in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from torch_singlim.measure import History, tags
from torch_singlim.measure.tags import Tag
from torch_singlim.report.style import COLUMN, CYCLE

__all__ = ["runs_figure"]

# of a panel, and of a line of the legend, in inches
_WIDTH, _HEIGHT, _LINE = 3.5, 2.7, 0.17

# title, unit, tag and the second one with its marker, which is drawn beside it
_Panel = tuple[str, str, Tag, Tag | None]
_OVER_STEPS: tuple[_Panel, ...] = (
    ("Excess loss", "loss", tags.EXCESS_LOSS, None),
    ("Distance to half of the loss", "weight norm", tags.HALF, None),
    ("Nearest point", "weight norm", tags.NEAREST, None),
)
_AT_ENDS: tuple[_Panel, ...] = (
    ("Displacement over a window", "weight norm", tags.DRIFT_MEASURED, None),
    ("Cosine with the averaged path (bar: noise ceiling)", "cosine", tags.DRIFT_COSINE, tags.DRIFT_CEILING),
    ("Speed", "measured / predicted", tags.DRIFT_SPEED, None),
    ("Noise-induced drift", "measured / predicted", tags.NOISE_RATIO, None),
)


def _colors(count: int) -> list[str]:
    """One for each run; a scale if there are more than can be distinguished otherwise."""
    if count <= len(CYCLE):
        return list(CYCLE[:count])
    return [to_hex(colormaps["viridis"](i / (count - 1))) for i in range(count)]


@COLUMN
def runs_figure(runs: Mapping[str, History]) -> Figure | None:
    """Excess loss and distances over the steps; cosine, speed and noise ratio at the end of each window, of all runs.

    There is a panel for each of these that one of the runs has; None: no run has any.

    Args:
        runs: name -> what was logged.
    """
    panels = [p for p in (*_OVER_STEPS, *_AT_ENDS) if any(tags.series(history, p[2]) for history in runs.values())]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = columns * _WIDTH, rows * _HEIGHT + (len(runs) + 1) * _LINE
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    all_axes: Sequence[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(all_axes, panels, strict=False):
        title, unit, tag, beside = panel
        for color, history in zip(_colors(len(runs)), runs.values(), strict=True):
            if panel in _OVER_STEPS:
                points = {step: value for step, value in tags.series(history, tag).items() if step}
                axes.plot(list(points), list(points.values()), color=color, marker=".", lw=1)
            else:
                _at_ends(axes, history, tag, beside, color=color)
        axes.set(xlabel="optimizer steps", ylabel=unit, title=title)
        if panel in _OVER_STEPS:
            axes.set(xscale="log", yscale="log")
        elif tag in (tags.DRIFT_SPEED, tags.NOISE_RATIO):
            axes.axhline(1, color="0.6", lw=0.8, ls=":", zorder=0)
    lines = [Line2D([], [], color=color, marker="o") for color in _colors(len(runs))]
    figure.legend(lines, list(runs), loc="outside lower left")
    return figure


def _at_ends(axes: Axes, history: History, tag: Tag, beside: Tag | None, *, color: str) -> None:
    """The values at the end of each window, with their standard errors."""
    ends = [steps[-1] for steps in tags.windows(history).values() if tag.name in history[steps[-1]]]
    if not ends:
        return
    values = [history[end][tag.name] for end in ends]
    errors = [history[end].get(tag.stderr_name, 0.0) for end in ends]
    axes.errorbar(ends, values, yerr=errors, fmt="o", color=color, capsize=2)
    there = [end for end in ends if beside is not None and beside.name in history[end]]
    if beside is not None and there:
        axes.plot(there, [history[end][beside.name] for end in there], "_", color=color, ms=9)
