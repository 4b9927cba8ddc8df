"""Measure how a network moves along its zero-loss set during training, and compare with the singular limit.

Theory: A. Shalova, A. Schlichting, M. Peletier, "Singular-limit analysis of gradient descent with noise injection",
arXiv 2404.12293.
"""

import importlib
from typing import TYPE_CHECKING

from torch_singlim.geometry import (
    LevelPoint,
    NearestPoint,
    TangentSpace,
    gauss_newton,
    level_distance,
    linearize,
    nearest_point,
    tangent_space,
)
from torch_singlim.linalg import Estimate, Result
from torch_singlim.measure import (
    Agreement,
    Comparison,
    DistanceMeasurement,
    Engine,
    Model,
    Rate,
    Reason,
    Scaling,
    Snapshot,
    Visibility,
    Window,
    compare,
    fit_exponents,
    measure_distance,
    scaling_table,
)
from torch_singlim.network import ZeroLossProblem
from torch_singlim.noise import (
    SAM,
    AntiCorrelated,
    CustomNoise,
    DropConnect,
    Dropout,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    Minibatch,
    NoiseSystem,
    WeightDecay,
)
from torch_singlim.theory import (
    Degeneracy,
    Ensemble,
    FrozenMetric,
    LimitPrediction,
    SecondMoments,
    SGDSettings,
    WindowPrediction,
    degeneracy,
    effective_flow,
    finite_window,
    frozen_metric,
    has_finite_step,
    limit_flow,
    simulate,
    singular_limit,
    tangential_share,
)

if TYPE_CHECKING:
    from torch_singlim.callbacks import InjectNoise, SingularLimitMonitor, measure_checkpoints
    from torch_singlim.demo import handwritten_digits
    from torch_singlim.report import drift_figure, scaling_figure

__all__ = [
    # the problem: a module, its loss and its samples
    "ZeroLossProblem",
    # the zero-loss set
    "level_distance",
    "LevelPoint",
    "nearest_point",
    "NearestPoint",
    "tangent_space",
    "TangentSpace",
    "linearize",
    "gauss_newton",
    # how the network is trained
    "SGDSettings",
    # and with which noise
    "NoiseSystem",
    "SAM",
    "Dropout",
    "DropConnect",
    "AntiCorrelated",
    "InputNoise",
    "WeightDecay",
    "LabelNoise",
    "LabelFlips",
    "Langevin",
    "Minibatch",
    "CustomNoise",
    # what the theory predicts
    "singular_limit",
    "has_finite_step",
    "FrozenMetric",
    "frozen_metric",
    "SecondMoments",
    "LimitPrediction",
    "degeneracy",
    "Degeneracy",
    "limit_flow",
    "tangential_share",
    "finite_window",
    "effective_flow",
    "WindowPrediction",
    "simulate",
    "Ensemble",
    "Estimate",
    "Result",
    # measured against predicted
    "compare",
    "Agreement",
    "fit_exponents",
    "scaling_table",
    "Rate",
    "Scaling",
    # one training, snapshot by snapshot
    "Snapshot",
    "Engine",
    "measure_distance",
    "DistanceMeasurement",
    "Window",
    "Model",
    "Comparison",
    "Visibility",
    "Reason",
    # in a Lightning Trainer, or from its checkpoints
    "SingularLimitMonitor",
    "InjectNoise",
    "measure_checkpoints",
    # figures
    "drift_figure",
    "scaling_figure",
    # data of the examples
    "handwritten_digits",
]

__version__ = "0.1.0"

# names from subpackages that import lightning or matplotlib, which takes seconds: imported on first use
_LATE = {
    "SingularLimitMonitor": "callbacks",
    "InjectNoise": "callbacks",
    "measure_checkpoints": "callbacks",
    "drift_figure": "report",
    "scaling_figure": "report",
    "handwritten_digits": "demo",
}


def __getattr__(name: str) -> object:
    if name in _LATE:
        return getattr(importlib.import_module(f"torch_singlim.{_LATE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
