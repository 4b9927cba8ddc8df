"""The noises: one object for each drives the training and the theory.

Each is a frozen object whose `noisy_loss` is the one line that defines it. Its `order` is a claim, which `degeneracy`
checks, and measures for a `CustomNoise`.
"""

from torch_singlim.noise.activations import Dropout, InputNoise
from torch_singlim.noise.base import (
    BatchLoss,
    Covariance,
    NoiseSpace,
    NoiseSystem,
    Sum,
    draw_noise,
    noisy_loss,
    parts,
)
from torch_singlim.noise.custom import CustomNoise, Minibatch
from torch_singlim.noise.labels import LabelFlips, LabelNoise
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
    "noisy_loss",
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
    "Minibatch",
    "CustomNoise",
]
