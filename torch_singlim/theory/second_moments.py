"""Second moments of the gradient, by which adaptive optimizers scale their steps, under noise of order 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry import jacobian_rows, samples_at_once
from torch_singlim.linalg import FactoredOperator
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.theory.potential import Potential, traced
from torch_singlim.theory.second_order import residual_direction
from torch_singlim.theory.sgd import SGDSettings

__all__ = ["SecondMoments", "diagonal", "excursion_potential"]


@dataclass(frozen=True)
class SecondMoments:
    """The second moments v of an adaptive optimizer, in the coordinates of its metric, and how its steps follow them.

    Args:
        values: v, a running mean of the squared gradient  ``[P]``.
        response: -d log S_i/d v_i  ``[P]``; 1/(2 v_i) for S = 1/sqrt(v).
        rate: at which the mean forgets, 1 - beta_2.
    """

    values: Tensor = field(repr=False)
    response: Tensor = field(repr=False)
    rate: float


def _over_rows(problem: ZeroLossProblem, w: Tensor, each: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
    """The sum of a function of v -> B(v) over all rows of B, with R at the loss's optimum  ``[P]``."""
    optimum = problem.sample_loss.optimum(problem.targets)
    # several vectors [P] for each residual are in memory
    size = samples_at_once(problem, 4 * (problem.num_residuals // problem.num_samples))
    shard, total = problem.process_group.shard(problem.num_samples), torch.zeros_like(w)
    for start in range(shard.start, shard.stop, size):
        part = slice(start, min(start + size, shard.stop))
        total += each(lambda v, part=part: jacobian_rows(problem, v, optimum, part)).sum(0)
    return problem.process_group.all_reduce(total)


def diagonal(problem: ZeroLossProblem, w: Tensor) -> Tensor:
    """h = diag H on Gamma  ``[P]``: the sum of the squared rows of B, with R at the loss's optimum.

    Off Gamma it is not the curvature of the loss, but c h_i is the variance of the gradient under noise on the labels
    with Sigma = c H.

    Args:
        problem: loss and samples.
        w: weights ``[P]``.
    """
    return _over_rows(problem, w, lambda rows: rows(w).square())


def _along(problem: ZeroLossProblem, w: Tensor, q: Tensor) -> Tensor:
    """Dh(w)[q], the derivative of `diagonal` along q  ``[P]``."""

    def along(rows: Callable[[Tensor], Tensor]) -> Tensor:
        B, dB = jvp(rows, (w,), (q,))
        return 2 * B * dB

    return _over_rows(problem, w, along)


def excursion_potential(
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: FactoredOperator,
    c: float,
    sgd: SGDSettings,
    moments: SecondMoments,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """What the step sizes' own fluctuations add to the drift of noise with Sigma = c H, as -alpha^2 P_T g.

        g_i = -(c^2/2) s_i sum_m f_m (grad h_i . p_m) (H p_m)_i,     f_m = rate/(rate + alpha l_m),   s = response

    with h = diag H and the eigenpairs (l_m, p_m) of H. The gradient's variance c h_i rises and falls with the excursion
    z of the weights from Gamma; v, and with it S, follow it as far as the mean reaches back: E[z_m zbar_m] =
    (alpha c/2) f_m. So S is correlated with the gradient H z itself. This is no potential: the value is 0.

    Args:
        problem: loss and samples, in the optimizer's metric.
        w: weights on Gamma ``[P]``.
        hessian: H there.
        c: Sigma = c H.
        sgd: the optimizer in its metric.
        moments: in its metric.
        num_draws: number of directions for the sum over modes; exact with as many as residuals.
        generator: of random directions.

    Source: to leading order in alpha and 1 - beta_2. Without this term, for S = 1/sqrt(c h): arXiv 2511.02773.
    """
    alpha, rate = sgd.effective_lr, moments.rate

    def root(values: Tensor) -> Tensor:
        return (rate / ((rate + alpha * values) * values)).sqrt()

    def derivative(z: Tensor) -> Tensor:
        found = []
        for one in z:  # q with E[q q^T] = sum_m f_m p_m p_m^T
            q = hessian.operator.rmatvec(hessian.gram_function(root, one))
            Hq = hessian.operator.rmatvec(hessian.operator.matvec(q))
            g = -(c**2 / 2) * moments.response.to(w) * _along(problem, w, q) * Hq
            found.append(torch.cat([g, g.new_zeros(1)]))
        return torch.stack(found)

    M = problem.num_residuals
    direction = residual_direction(M, like=w, generator=generator)
    return traced(direction, derivative, M, num_draws, at_once=1, like=w)
