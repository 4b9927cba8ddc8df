"""The paper and its extensions, one function per formula."""

from torch_singlim.theory.descent import SGDSettings, time_scale
from torch_singlim.theory.distance import ExpectedDistance, expected_distance
from torch_singlim.theory.noise import Dropout, Minibatch, NoiseSystem, Sum, WeightDecay
from torch_singlim.theory.potential import Potential, noise_gram, potential
from torch_singlim.theory.singular_limit import LimitPrediction, singular_limit
