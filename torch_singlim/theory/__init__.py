"""The paper and its extensions, one function per formula."""

from torch_singlim.theory.adaptive import ADAPTIVE, FrozenMetric, differing, frozen_metric, is_decoupled
from torch_singlim.theory.derivatives import check_derivatives
from torch_singlim.theory.distance import ExpectedDistance, expected_distance
from torch_singlim.theory.effective import EffectiveLoss, WindowPrediction, has_effective_flow
from torch_singlim.theory.effective_flow import effective_flow
from torch_singlim.theory.ensemble import Ensemble, simulate
from torch_singlim.theory.finite_step import finite_step_potential, has_finite_step, step_ratio
from torch_singlim.theory.finite_window import finite_window
from torch_singlim.theory.fluctuations import UnstableStepError, fluctuation_covariance
from torch_singlim.theory.gradient_noise import GradientNoise, gradient_noise, of_hessian
from torch_singlim.theory.limit_flow import limit_flow
from torch_singlim.theory.on_gamma import tangential_potential
from torch_singlim.theory.order import Degeneracy, degeneracy, with_measured_order
from torch_singlim.theory.potential import Potential, averaged_gradient, potential, sampled_potential
from torch_singlim.theory.second_moments import SecondMoments, diagonal, excursion_potential
from torch_singlim.theory.second_order import covariance_potential, ito_drift
from torch_singlim.theory.sgd import SGDSettings, stationary_covariance, stationary_variance, time_scale
from torch_singlim.theory.singular_limit import LimitPrediction, singular_limit
from torch_singlim.theory.tangential_share import tangential_share

__all__ = [
    # the settings of SGD, and the slow clock
    "SGDSettings",
    "time_scale",
    "stationary_variance",
    "stationary_covariance",
    # adaptive optimizers
    "ADAPTIVE",
    "FrozenMetric",
    "differing",
    "frozen_metric",
    "is_decoupled",
    "SecondMoments",
    "diagonal",
    "excursion_potential",
    # whether torch's derivatives of the network are right
    "check_derivatives",
    # order 1: the effective potential
    "potential",
    "sampled_potential",
    "tangential_potential",
    "Potential",
    "averaged_gradient",
    # order 2: the gradient noise on Gamma and the Ito term
    "gradient_noise",
    "GradientNoise",
    "of_hessian",
    "covariance_potential",
    "ito_drift",
    # at finite step size
    "finite_step_potential",
    "has_finite_step",
    "step_ratio",
    "fluctuation_covariance",
    "UnstableStepError",
    # the order of a noise
    "degeneracy",
    "Degeneracy",
    "with_measured_order",
    # the limit
    "singular_limit",
    "LimitPrediction",
    "expected_distance",
    "ExpectedDistance",
    "limit_flow",
    "tangential_share",
    # beyond the limit
    "EffectiveLoss",
    "finite_window",
    "effective_flow",
    "has_effective_flow",
    "WindowPrediction",
    "simulate",
    "Ensemble",
]
