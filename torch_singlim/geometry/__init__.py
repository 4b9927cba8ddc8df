"""The zero-loss set: Jacobian products, curvature, nearest point, tangent space."""

from torch_singlim.geometry.curvature import Linearization, gauss_newton, largest_curvature, linearize
from torch_singlim.geometry.gram import (
    MAX_DENSE,
    gram_flops,
    gram_matrix,
    jacobian_rows,
    samples_at_once,
    worth_factoring,
)
from torch_singlim.geometry.jacobian import JacobianProducts
from torch_singlim.geometry.level_distance import LevelPoint, level_distance
from torch_singlim.geometry.nearest_point import NearestPoint, nearest_point
from torch_singlim.geometry.relaxed import num_modes, relaxation_level, relaxed_filter, relaxed_part
from torch_singlim.geometry.tangent_space import TangentSpace, tangent_space

__all__ = [
    # products with the Jacobian, the linearisation of the residual, H = B^T B
    "JacobianProducts",
    "Linearization",
    "linearize",
    "gauss_newton",
    "largest_curvature",
    # K = B B^T
    "MAX_DENSE",
    "gram_matrix",
    "gram_flops",
    "worth_factoring",
    "jacobian_rows",
    "samples_at_once",
    # lower levels of the loss
    "level_distance",
    "LevelPoint",
    # Gamma
    "nearest_point",
    "NearestPoint",
    "tangent_space",
    "TangentSpace",
    # the modes that have had the time to decay
    "relaxation_level",
    "relaxed_filter",
    "relaxed_part",
    "num_modes",
]
