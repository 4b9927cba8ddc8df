"""Numerical linear algebra on plain tensors, independent of networks."""

from torch_singlim.linalg.cholesky import CholeskyFactor, cholesky, gram_cutoff
from torch_singlim.linalg.estimate import Estimate, VectorEstimate, rademacher
from torch_singlim.linalg.exponential import LinearDescent, descent_norm, linear_descent, phi1, phi2
from torch_singlim.linalg.factored import (
    CholeskyFactored,
    DenseFactored,
    FactoredOperator,
    KrylovFactored,
)
from torch_singlim.linalg.krylov import (
    KrylovBasis,
    krylov_function,
    krylov_solve,
    lanczos,
    preconditioned_solve,
)
from torch_singlim.linalg.operator import LinearOperator
from torch_singlim.linalg.quasi_newton import QuasiNewton
from torch_singlim.linalg.solution import Result, Solution
from torch_singlim.linalg.tikhonov import Tikhonov, tikhonov
from torch_singlim.linalg.trust_region import TrustRegionStep, trust_region_step

__all__ = [
    # operators given by their products
    "LinearOperator",
    # H = B^T B through K = B B^T
    "FactoredOperator",
    "DenseFactored",
    "CholeskyFactored",
    "KrylovFactored",
    "cholesky",
    "CholeskyFactor",
    "gram_cutoff",
    # Lanczos
    "lanczos",
    "KrylovBasis",
    "krylov_solve",
    "preconditioned_solve",
    "krylov_function",
    "tikhonov",
    "Tikhonov",
    # minimisation
    "QuasiNewton",
    # a quadratic model in a ball
    "trust_region_step",
    "TrustRegionStep",
    # how an iteration ended
    "Solution",
    "Result",
    # linear descent over a long time
    "linear_descent",
    "LinearDescent",
    "descent_norm",
    "phi1",
    "phi2",
    # random estimates
    "Estimate",
    "VectorEstimate",
    "rademacher",
]
