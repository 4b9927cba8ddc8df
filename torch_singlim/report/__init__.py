"""Figures and pages from what was logged; the only subpackage that imports matplotlib."""

from torch_singlim.report.comparison import runs_figure
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
from torch_singlim.report.record import Record, Run, find_runs, read_run, record_file

__all__ = [
    # the record of a run, and a page of several
    "Record",
    "Run",
    "find_runs",
    "read_run",
    "record_file",
    "report",
    # the figures
    "Figure",
    "time_scales_figure",
    "agreement_figure",
    "speed_figure",
    "spectrum_figure",
    "layers_figure",
    "runs_figure",
    "sweep_figure",
    "drift_figure",
    "scaling_figure",
]
