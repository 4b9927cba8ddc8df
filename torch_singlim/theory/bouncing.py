"""Sharpness-aware minimisation near Gamma: w bounces along the stiffest mode, about a mean offset."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_singlim.linalg import FactoredOperator
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["bouncing", "bouncing_offset", "stiffest_mode"]

_EQUAL = 1e-9  # relative difference of eigenvalues that count as one


def stiffest_mode(hessian: FactoredOperator, *, like: Tensor) -> Tensor:
    """u, the eigenvector of H with the largest eigenvalue, of norm 1  ``[P]``; one of them if there are several.

    Args:
        hessian: H.
        like: a vector ``[P]`` with the dtype and device of u.
    """
    generator, least = torch.Generator().manual_seed(0), (1 - _EQUAL) * hessian.largest
    start = torch.randn(len(like), generator=generator, dtype=like.dtype).to(like.device)
    u = hessian.normal_function(lambda values: (values >= least).to(values), start)
    return u / torch.linalg.vector_norm(u)


def bouncing(sgd: SGDSettings, curvature: float) -> float:
    """x/rho for the distance x at which w bounces along the stiffest mode; infinite above alpha lambda_1 = 2.

        x -> x - alpha lambda_1 (x + rho sign x) = -x,      x = rho alpha lambda_1 / (2 - alpha lambda_1)

    >>> bouncing(SGDSettings(lr=0.5), 2.0)
    1.0
    """
    step = sgd.lr * curvature
    return step / (2 - step) if step < 2 else math.inf


def bouncing_offset(hessian: FactoredOperator, gradient: Tensor, bounce: float) -> Tensor:
    """Mean of w minus its nearest point  ``[P]``, to leading order in rho at fixed alpha.

        -((1 + b)^2 + b l/lambda_1) / (l (1 + l/(b lambda_1))) grad V,      b = x/rho

    along modes of curvature l, and -(1 + b)^2/lambda_1 grad V along the stiffest one.

    The gradient at the weights has a mean of its own, H o: so the direction of the perturbation has one, too, by which
    the other modes are driven back more strongly than by their curvature.

    Args:
        hessian: H.
        gradient: grad V  ``[P]``.
        bounce: b.
    """
    largest, b = hessian.largest, bounce

    def phi(values: Tensor) -> Tensor:
        share = values / largest
        others = ((1 + b) ** 2 + b * share) / (values * (1 + share / b))
        return torch.where(share >= 1 - _EQUAL, (1 + b) ** 2 / values, others)

    return -hessian.normal_function(phi, gradient)
