"""A quadratic model that need not be convex, minimised in a ball by conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["TrustRegionStep", "trust_region_step"]


@dataclass(frozen=True)
class TrustRegionStep:
    """An approximate minimiser of q(x) = g^T x + x^T W x / 2 in a ball, and how far q falls in a larger one.

    Args:
        x: the step  ``[n]``.
        decrease: -q(x), not negative.
        reach_decrease: -q at the step in the larger ball.
        inside: whether the minimiser lies inside the smaller ball, and was found to the given tolerance.
        negative: whether a direction of negative curvature was found.
        steps: number of products.
    """

    x: Tensor = field(repr=False)
    decrease: float
    reach_decrease: float
    inside: bool
    negative: bool
    steps: int


def _to_boundary(x: Tensor, d: Tensor, radius: float) -> float:
    """The s >= 0 with |x + s d| = radius."""
    dd, xd, xx = torch.dot(d, d).item(), torch.dot(x, d).item(), torch.dot(x, x).item()
    return (-xd + math.sqrt(max(xd**2 + dd * (radius**2 - xx), 0.0))) / dd


def trust_region_step(
    matvec: Callable[[Tensor], Tensor],
    gradient: Tensor,
    radius: float,
    *,
    reach: float = 0.0,
    rtol: float = 0.1,
    max_steps: int = 20,
) -> TrustRegionStep:
    """Minimise q(x) = g^T x + x^T W x / 2 in |x| <= radius by truncated conjugate gradients.

    Along the iterates |x| grows and q falls. They stop at the boundary, which a direction of negative curvature is
    followed to (T. Steihaug, SIAM J. Numer. Anal. 20, 1983). So the path to a larger ball begins with the same steps.

    Args:
        matvec: the product with W, symmetric.
        gradient: g  ``[n]``.
        radius: of the ball.
        reach: radius of a larger ball, in which the decrease of q is evaluated as well.
        rtol: stop when |g + W x| <= rtol |g|.
        max_steps: maximum number of products.

    >>> W = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    >>> step = trust_region_step(lambda v: W @ v, torch.tensor([-1.0, 0.0]).double(), 2.0)
    >>> step.x, step.decrease, step.inside
    (tensor([1., 0.], dtype=torch.float64), 0.5, True)
    """
    x, q, r, d = torch.zeros_like(gradient), 0.0, gradient.clone(), -gradient
    within: tuple[Tensor, float] | None = None  # the step in the smaller ball, once the path has left it
    rr = first = torch.dot(r, r).item()
    steps, negative, converged = 0, False, rr == 0
    farthest = max(radius, reach)
    while not converged and steps < max_steps:
        steps += 1
        Wd = matvec(d)
        slope, curvature = torch.dot(r, d).item(), torch.dot(d, Wd).item()
        negative = curvature <= 0
        s = -slope / curvature if not negative else math.inf
        own = _to_boundary(x, d, radius)
        if within is None and s > own:
            within = x + own * d, q + own * slope + own**2 * curvature / 2
        out = s > (last := _to_boundary(x, d, farthest))
        s = min(s, last)
        x.add_(d, alpha=s)
        q += s * slope + s**2 * curvature / 2
        if out:
            break
        r.add_(Wd, alpha=s)
        rr, before = torch.dot(r, r).item(), rr
        converged = rr <= rtol**2 * first
        d.mul_(rr / before).sub_(r)
    step, value = (x, q) if within is None else within
    return TrustRegionStep(step, -value, -q, converged and within is None, negative, steps)
