"""The second-order theorem: the Ito term (1/2) D^2 Phi[Sigma] for any Sigma, and its potentials in closed form.

Phi(w) is the limit of the gradient flow of L that starts at w. In the eigenbasis of H on Gamma, with T = D^3 L,

    D^2 Phi[Sigma]_i = - sum_{jk: l_j + l_k > 0} T_ijk Sigma_jk / (l_j + l_k)     i tangent
                       - (1/l_i) sum_{jk tangent} T_ijk Sigma_jk                  i normal (keeps W on Gamma)

Source: Z. Li, T. Wang, S. Arora, arXiv 2110.06914; Katzenberger's theorem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import grad, vmap

from torch_singlim.linalg import DenseFactored, Estimate, FactoredOperator, VectorEstimate, rademacher
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.noise import Covariance
from torch_singlim.theory.directions import directions_at_once, mean_at
from torch_singlim.theory.on_gamma import trace
from torch_singlim.theory.potential import Potential, traced

__all__ = ["covariance_potential", "ito_drift", "log_pseudo_determinant"]

# number of third derivatives that are evaluated at once
_BATCH = 16


def ito_drift(problem: ZeroLossProblem, point: Tensor, factor: Tensor, hessian: FactoredOperator) -> Tensor:
    """(1/2) D^2 Phi[Sigma] for Sigma = F^T F  ``[P]``: the second-order theorem's drift per step, divided by alpha^2.

    With the solution X of the Lyapunov equation H X + X H = Sigma (without the tangent-tangent block), the tangential
    part is -(1/2) P_T T[X]. X has rank at most 2 r, r = rank H, so that it takes 2 r third derivatives along pairs of
    directions; the normal part takes k more, for k rows of F.

    Args:
        problem: loss and samples.
        point: weights on Gamma ``[P]``.
        factor: F ``[k, P]``.
        hessian: H at the point, decomposed.

    Raises:
        ValueError: H is not decomposed.
    """
    if not isinstance(hessian, DenseFactored):
        raise ValueError(
            "the second-order term of a noise without closed form needs H decomposed, got a Krylov factorisation: "
            "use fewer samples (gauss_newton decomposes H up to max_dense residuals)"
        )
    values = hessian.eigenvalues
    V = torch.stack([hessian.operator.rmatvec(u) for u in hessian.eigenvectors.T]) / values.sqrt()[:, None]  # [r, P]
    Y = V @ factor.T  # [r, k]
    tangential = factor - Y.T @ V  # [k, P]

    alone = problem.alone()  # processes cannot communicate inside vmap

    def third(a: Tensor, b: Tensor) -> Tensor:  # T[., a, b]
        return jvp(lambda v: alone.hessian_product(v, b), (point,), (a,))[1]  # type: ignore[return-value]

    def contract(A: Tensor, B: Tensor) -> Tensor:  # sum_q T[., a_q, b_q]
        return vmap(third, chunk_size=_BATCH)(A, B).sum(0) if len(A) else torch.zeros_like(point)

    X = (Y @ Y.T) / (values[:, None] + values)
    sizes, directions = torch.linalg.eigh(X)  # X_NN = sum_q x_q d_q d_q^T
    D = directions.T @ V
    normal_normal = contract(D, sizes[:, None] * D)
    normal_tangent = contract(V, 2 * (Y @ tangential) / values[:, None])
    curvature = contract(tangential, tangential)
    drift = hessian.project_kernel(normal_normal + normal_tangent)
    return -0.5 * (drift + hessian.normal_function(torch.reciprocal, curvature))


def residual_direction(
    count: int, *, like: Tensor, generator: torch.Generator | None
) -> Callable[[int | None], Tensor]:
    """Unit vectors, or random signs for the index None, in the space of residuals  ``[M]``."""

    def direction(i: int | None) -> Tensor:
        if i is None:
            return rademacher((count,), generator=generator, like=like)
        z = like.new_zeros(count)
        z[i] = 1.0
        return z

    return direction


def log_pseudo_determinant(
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: FactoredOperator,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """log pdet H = sum_i log l_i and its gradient, tr(H^+ dH) = E grad <t, H(w) t> over t = B^+ z with Cov t = H^+.

    Exact, with the M unit vectors as z, if num_draws is large enough; else z has random signs.
    """
    M = problem.num_residuals

    def derivative(z: Tensor) -> Tensor:
        logs = torch.stack([torch.dot(one, hessian.gram_function(torch.log, one)) for one in z])
        t = torch.stack([hessian.pseudo_inverse(one) for one in z])
        return torch.cat([quadratic_gradients(problem, w, t), logs[:, None]], 1)

    direction = residual_direction(M, like=w, generator=generator)
    found = traced(direction, derivative, M, num_draws, at_once=directions_at_once(problem), like=w)
    if hessian.exact:
        return replace(found, value=Estimate(hessian.spectrum().log().sum().item(), 0.0))
    return found


def quadratic_gradients(problem: ZeroLossProblem, w: Tensor, t: Tensor) -> Tensor:
    """grad_w <t, H(w) t> = grad_w (1/N) sum_n (J_n t)^T A_n (J_n t) ``[k, P]`` at k fixed vectors t ``[k, P]``."""

    def along(chunk: slice, t: Tensor) -> Tensor:
        x, y = problem.inputs[chunk], problem.targets[chunk]

        def quadratic(v: Tensor) -> Tensor:
            f, Jt, *_ = jvp(lambda u: problem.function(u, x), (v,), (t,))
            return problem.sample_loss.curvature(f, y, Jt).mean()

        return grad(quadratic)(w)

    return mean_at(problem, along, t)


def covariance_potential(
    covariance: Covariance,
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: FactoredOperator,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """V = (c_H/4) tr H + (c_I/4) log pdet H for Sigma = c_H H + c_I I, for which (1/2) D^2 Phi[Sigma] = -P_T grad V.

    Args:
        covariance: c_H and c_I.
        problem: loss and samples.
        w: weights ``[P]``, on Gamma. For log pdet H only the tangential part of the gradient is meaningful.
        hessian: H there.
        num_draws: number of directions for each trace, which is exact with at least as many as R has rows (tr H), or as
            there are residuals (log pdet H).
        generator: of random directions.
    """
    terms = []
    if covariance.hessian:
        terms.append(trace(problem, w, num_draws=num_draws, generator=generator).scaled(covariance.hessian / 4))
    if covariance.identity:
        logs = log_pseudo_determinant(problem, w, hessian, num_draws=num_draws, generator=generator)
        terms.append(logs.scaled(covariance.identity / 4))
    nothing = Potential(Estimate(0.0, 0.0), VectorEstimate(torch.zeros_like(w)[None]), 0)
    return sum(terms, start=nothing)
