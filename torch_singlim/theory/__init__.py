"""The paper and its extensions, one function per formula."""

from torch_singlim.theory.descent import SGDSettings, time_scale
from torch_singlim.theory.distance import ExpectedDistance, expected_distance
from torch_singlim.theory.flow import Ensemble, WindowPrediction, effective_flow, simulate
from torch_singlim.theory.noise import Dropout, Minibatch, NoiseSystem, Sum, WeightDecay
from torch_singlim.theory.potential import Potential, averaged_gradient, noise_gram, potential
from torch_singlim.theory.singular_limit import LimitPrediction, singular_limit

__all__ = [
    # how the weights descend, and the slow clock
    "SGDSettings",
    "time_scale",
    # what is injected
    "NoiseSystem",
    "Dropout",
    "WeightDecay",
    "Minibatch",
    "Sum",
    # the effective potential
    "potential",
    "Potential",
    "averaged_gradient",
    "noise_gram",
    # the limit
    "singular_limit",
    "LimitPrediction",
    "expected_distance",
    "ExpectedDistance",
    # beyond the limit
    "effective_flow",
    "WindowPrediction",
    "simulate",
    "Ensemble",
]
