"""Measurements of a training, their comparison with theory and description in words; independent of Lightning."""

from torch_singlim.measure import tags
from torch_singlim.measure.agreement import Agreement, compare, noise_ceiling, noise_ratio
from torch_singlim.measure.budget import Account, Budget
from torch_singlim.measure.distance import DistanceMeasurement, measure_distance
from torch_singlim.measure.engine import Engine
from torch_singlim.measure.full_batch_window import compare_window
from torch_singlim.measure.layers import drift_by_layer, shares
from torch_singlim.measure.levels import Level
from torch_singlim.measure.measurement import Clock, Measurement
from torch_singlim.measure.options import Options
from torch_singlim.measure.reasons import Code, Kind, Reason, Scope
from torch_singlim.measure.samples import TrainingSet
from torch_singlim.measure.scaling import Exponents, Rate, Scaling, fit_exponents, scaling_table
from torch_singlim.measure.schedule import Due, Schedule
from torch_singlim.measure.snapshot import Metric, Snapshot, StepSums
from torch_singlim.measure.tags import History, Need, Place, Tag, scalars
from torch_singlim.measure.training import Training, training_of
from torch_singlim.measure.verdict import Visibility, sentences, terminal_line, verdict, visibility
from torch_singlim.measure.window import Comparison, Model, NoiseInduced, Spread, Window

__all__ = [
    # one moment of a training
    "Metric",
    "Snapshot",
    "StepSums",
    # how it is trained, and why something is not measured
    "Training",
    "training_of",
    "TrainingSet",
    "Reason",
    "Code",
    "Kind",
    "Scope",
    # the engine, when it measures, in how much time
    "Engine",
    "Options",
    "Schedule",
    "Due",
    "Budget",
    "Account",
    # what it measures
    "Measurement",
    "Clock",
    "Level",
    "DistanceMeasurement",
    "measure_distance",
    "Window",
    "Model",
    "Comparison",
    "NoiseInduced",
    "Spread",
    "compare_window",
    # over the layers
    "shares",
    "drift_by_layer",
    # measured against predicted
    "compare",
    "Agreement",
    "noise_ceiling",
    "noise_ratio",
    # tags, words
    "tags",
    "History",
    "Tag",
    "Need",
    "Place",
    "scalars",
    "verdict",
    "sentences",
    "Visibility",
    "visibility",
    "terminal_line",
    # several runs
    "Rate",
    "Exponents",
    "Scaling",
    "fit_exponents",
    "scaling_table",
]
