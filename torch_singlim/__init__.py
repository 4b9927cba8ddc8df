"""Measure how a network moves along its zero-loss set while it trains, beside what the singular limit predicts.

Theory: A. Shalova, A. Schlichting, M. Peletier, "Singular-limit analysis of gradient descent with noise injection",
arXiv 2404.12293.
"""

from typing import TYPE_CHECKING

from torch_singlim.agreement import Agreement, compare
from torch_singlim.geometry import FootPoint, TangentSpace, nearest_point, tangent_space
from torch_singlim.linalg import Estimate
from torch_singlim.problem import ZeroLossProblem
from torch_singlim.theory import (
    AntiCorrelated,
    CustomNoise,
    Degeneracy,
    DropConnect,
    Dropout,
    Ensemble,
    InputNoise,
    LabelFlips,
    LabelNoise,
    Langevin,
    LimitPrediction,
    Minibatch,
    SGDSettings,
    WeightDecay,
    WindowPrediction,
    degeneracy,
    effective_flow,
    finite_window,
    limit_flow,
    simulate,
    singular_limit,
)

if TYPE_CHECKING:
    from torch_singlim.callbacks import InjectNoise, SingularLimitMonitor

__all__ = [
    # the problem: a module, its loss, a finite probe set
    "ZeroLossProblem",
    # its zero-loss set
    "nearest_point",
    "FootPoint",
    "tangent_space",
    "TangentSpace",
    # how it is trained
    "SGDSettings",
    # with which noise
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
    "LimitPrediction",
    "degeneracy",
    "Degeneracy",
    "limit_flow",
    "finite_window",
    "effective_flow",
    "WindowPrediction",
    "simulate",
    "Ensemble",
    "Estimate",
    # measured against predicted
    "compare",
    "Agreement",
    # in a Lightning Trainer
    "SingularLimitMonitor",
    "InjectNoise",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # the callbacks import lightning, which takes seconds: only on first use
    if name in ("SingularLimitMonitor", "InjectNoise"):
        from torch_singlim import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
