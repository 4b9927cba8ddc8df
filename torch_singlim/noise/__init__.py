"""The noise systems: the same object is used for training and for theory.

Each system is a frozen object that is defined by the one line of its `noisy_loss`. Its `order` follows from theory;
`degeneracy` checks it numerically, and measures it for a `CustomNoise`.
"""

from torch_singlim.noise.activations import Dropout, InputNoise
from torch_singlim.noise.base import (
    BatchLoss,
    Covariance,
    NoiseSpace,
    NoiseSystem,
    Sum,
    draw_noise,
    leading,
    map_parts,
    noisy_loss,
    noisy_outputs,
    parts,
)
from torch_singlim.noise.custom import CustomNoise, Minibatch
from torch_singlim.noise.labels import LabelFlips, LabelNoise
from torch_singlim.noise.sharpness import SAM
from torch_singlim.noise.stratified import stratified_noise
from torch_singlim.noise.weights import AntiCorrelated, DropConnect, Langevin, WeightDecay

__all__ = [
    # what a noise is
    "NoiseSystem",
    "NoiseSpace",
    "BatchLoss",
    "Covariance",
    "Sum",
    "parts",
    "leading",
    "map_parts",
    "noisy_loss",
    "noisy_outputs",
    "draw_noise",
    "stratified_noise",
    # the systems
    "Dropout",
    "InputNoise",
    "DropConnect",
    "AntiCorrelated",
    "WeightDecay",
    "LabelNoise",
    "LabelFlips",
    "Langevin",
    "SAM",
    "Minibatch",
    "CustomNoise",
]
