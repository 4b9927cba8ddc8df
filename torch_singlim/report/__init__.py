"""Figures and pages from what was logged; the only subpackage that imports matplotlib."""

from torch_singlim.report.figures import (
    Figure,
    agreement_figure,
    drift_figure,
    layers_figure,
    spectrum_figure,
    speed_figure,
    time_scales_figure,
)
from torch_singlim.report.page import report
from torch_singlim.report.rates import scaling_figure, sweep_figure
from torch_singlim.report.runs import Run, find_runs, read_run

__all__ = [
    # a finished run, or several
    "report",
    "find_runs",
    "read_run",
    "Run",
    # the figures
    "Figure",
    "time_scales_figure",
    "agreement_figure",
    "speed_figure",
    "spectrum_figure",
    "layers_figure",
    "sweep_figure",
    "drift_figure",
    "scaling_figure",
]
