"""A module, its loss and its samples as functions of a flat weight vector."""

from torch_singlim.network.copying import compile_likewise, in_precision, no_compilation, structural_copy
from torch_singlim.network.forward_mode import jvp
from torch_singlim.network.functional import FunctionalModule, LinearCall
from torch_singlim.network.loss import CustomLoss, MeanSquaredError, SampleLoss, SoftCrossEntropy, resolve_loss
from torch_singlim.network.memory import free_memory, out_of_memory, saved_bytes
from torch_singlim.network.problem import ZeroLossProblem, check_samples
from torch_singlim.network.process_group import PeerFailed, ProcessGroup
from torch_singlim.network.randomness import RandomState, noise_off
from torch_singlim.network.sequence_loss import SequenceCrossEntropy
from torch_singlim.network.sites import ActivationSite
from torch_singlim.network.weight_space import WeightSpace

__all__ = [
    # loss and samples
    "ZeroLossProblem",
    "check_samples",
    # a module as a function of its flat weights
    "WeightSpace",
    "FunctionalModule",
    "ActivationSite",
    "LinearCall",
    "jvp",
    "structural_copy",
    "compile_likewise",
    "in_precision",
    "no_compilation",
    # its noise, and the global random state
    "noise_off",
    "RandomState",
    # losses of one sample
    "SampleLoss",
    "MeanSquaredError",
    "SoftCrossEntropy",
    "SequenceCrossEntropy",
    "CustomLoss",
    "resolve_loss",
    # memory and processes
    "free_memory",
    "out_of_memory",
    "saved_bytes",
    "ProcessGroup",
    "PeerFailed",
]
