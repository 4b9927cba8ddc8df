"""Potentials on Gamma, from derivatives of the outputs: as many directions as outputs instead of components of eta.

On Gamma the loss is stationary in the outputs f of each sample. With D_n = df_n/d eta and the curvature A_n = R_n^T R_n
of the loss, the Laplacian in eta and the tangential part of its gradient are then those of

    (1/N) sum_n sum_j sigma_j^2 (D_n^T A_n D_n)_jj = (1/N) sum_n |diag(sigma) D_n^T R_n^T|_F^2

whether each sample has an eta of its own or all share one. The other terms are zero on Gamma, and their gradients are
in the range of B^T, which is normal to Gamma.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad_and_value, vjp, vmap

from torch_singlim.geometry import linearize, samples_at_once
from torch_singlim.linalg import DenseFactored, rademacher
from torch_singlim.network import ZeroLossProblem, jvp
from torch_singlim.noise import NoiseSystem, noisy_outputs, parts
from torch_singlim.theory.directions import batched, directions_at_once, mean_at
from torch_singlim.theory.potential import Potential, part_potential, total, traced

__all__ = ["fluctuation_gradient", "noise_slopes", "row_gradient", "tangential_potential", "trace"]

# outputs of a batch at weights [P] and noise [n, D] or [D], for given inputs and targets
Outputs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _moved_weights(problem: ZeroLossProblem) -> Outputs:
    """f(w + eta), whose D_n is the Jacobian J_n."""
    return lambda w, eta, x, y: problem.function(w + eta, x)


def _slopes(
    problem: ZeroLossProblem,
    w: Tensor,
    u: Tensor,
    outputs: Outputs,
    scale: Tensor,
    *,
    per_sample: bool,
    image: Callable[[Tensor, slice], Tensor] | None = None,
) -> Tensor:
    """Gradient and value of (1/N) sum_n |diag(scale) D_n^T u_n|^2 for k stacked u ``[k, N, C]``  ``[k, P + 1]``.

    With g = diag(scale)^2 D^T u: grad |diag(scale) D^T u|^2 = 2 grad <D g, u> at fixed g, a forward and a reverse
    derivative. With `image`, g = X D^T u for another symmetric X: it returns these for u ``[N, C]`` and a slice of the
    samples  ``[n, P]``.
    """

    def of_batch(x: Tensor, y: Tensor, u: Tensor, g: Tensor | None = None) -> Tensor:  # the sum over a batch  [P + 1]
        zero = scale.new_zeros((len(x), scale.numel()) if per_sample else scale.shape)

        def slope() -> Tensor:
            return vjp(lambda eta: outputs(w, eta, x, y), zero)[1](u)[0]

        direction = scale.square() * slope() if g is None else g

        def square(v: Tensor) -> Tensor:
            along = jvp(lambda eta: outputs(v, eta, x, y), (zero,), (direction,))[1]
            return (along * u).sum()

        gradient, value = grad_and_value(square)(w)
        return torch.cat([2 * gradient, value[None]])

    if per_sample:

        def mean(part: slice, u: Tensor) -> Tensor:
            return of_batch(problem.inputs[part], problem.targets[part], u[part]) / (part.stop - part.start)

        return mean_at(problem, mean, u)

    def sample(x: Tensor, y: Tensor, u: Tensor, *g: Tensor) -> Tensor:
        return of_batch(x[None], y[None], u[None], *g)

    # a vector [P] for each sample is in memory: the same bound on the chunk as for rows of the Jacobian
    size, own = samples_at_once(problem, 1), problem.process_group.shard(problem.num_samples)

    def over(u: Tensor) -> Tensor:
        total = w.new_zeros(w.numel() + 1)
        for start in range(own.start, own.stop, size):
            part = slice(start, min(start + size, own.stop))
            images = () if image is None else (image(u, part),)
            total = total + vmap(sample)(problem.inputs[part], problem.targets[part], u[part], *images).sum(0)
        return total

    return problem.process_group.all_reduce(batched(over, u)) / problem.num_samples


def _over_rows(
    problem: ZeroLossProblem,
    w: Tensor,
    derivative: Callable[[Tensor], Tensor],
    *,
    num_draws: int,
    at_once: int,
    generator: torch.Generator | None,
) -> Potential:
    """The sum over the rows of R, all samples at once, or a mean over random combinations, independent for each sample.

    Args:
        problem: loss and samples.
        w: weights ``[P]``.
        derivative: combinations of the rows, stacked ``[k, N, rows]`` -> gradients and values ``[k, P + 1]``.
        num_draws: number of combinations; exact with as many as rows.
        at_once: number of combinations that are passed to `derivative`.
        generator: of random combinations.
    """
    rows = problem.num_residuals // problem.num_samples
    eye = torch.eye(rows, dtype=problem.dtype, device=problem.device)

    def combination(i: int | None) -> Tensor:
        if i is None:
            return rademacher((problem.num_samples, rows), generator=generator, like=w)
        return eye[i].expand(problem.num_samples, -1)

    return traced(combination, derivative, rows, num_draws, at_once=at_once, like=w)


def _at_once(problem: ZeroLossProblem, *, per_sample: bool) -> int:
    """Number of combinations of rows that are evaluated at once."""
    most = directions_at_once(problem)
    # with one eta for all samples, each combination takes a vector [P] for each sample
    return most if per_sample else max(1, min(most, samples_at_once(problem, 1) // problem.num_samples))


def row_gradient(problem: ZeroLossProblem, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient ``[P]`` and value of (1/N) sum_n |J_n^T R_n^T z_n|^2, z ``[N, rows]``, with R_n at the loss's optimum.

    On Gamma the outputs are at the optimum: value and tangential gradient are those of tr H. Off Gamma this is the
    variance of the gradient under noise on the labels, not the curvature of the loss.
    """
    both = _row_gradients(problem, w, z[None])[0]
    return both[:-1], both[-1]


def _row_gradients(problem: ZeroLossProblem, w: Tensor, z: Tensor) -> Tensor:
    """Gradient and value of `row_gradient` for each of k directions z ``[k, N, rows]``, joined  ``[k, P + 1]``."""
    y = problem.targets
    optimum = problem.sample_loss.optimum(y)
    u = torch.stack([problem.sample_loss.unwhiten(optimum, y, one) for one in z])
    return _slopes(problem, w, u, _moved_weights(problem), torch.ones_like(w), per_sample=False)


def trace(
    problem: ZeroLossProblem, w: Tensor, *, num_draws: int, generator: torch.Generator | None = None
) -> Potential:
    """tr H = (1/N) sum_n |J_n^T R_n^T|^2 and its gradient along Gamma, from gradients of single samples.

    Exact, with one pass for each row of R, if num_draws is large enough; else random combinations of the rows are used,
    independent for each sample.
    """
    return _over_rows(
        problem,
        w,
        lambda z: _row_gradients(problem, w, z),
        num_draws=num_draws,
        at_once=_at_once(problem, per_sample=False),
        generator=generator,
    )


def fluctuation_gradient(
    problem: ZeroLossProblem,
    w: Tensor,
    hessian: DenseFactored,
    covariance: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> Potential:
    """tr(X H(w)) and its gradient along Gamma ``[P]`` at a fixed X = B^T Y B, sample by sample.

    The rows of B are b_n = J_n^T R_n^T z / sqrt(N). So X b_n is B^T times a combination of columns of Y K.

    Args:
        problem: loss and samples.
        w: weights on Gamma ``[P]``.
        hessian: H there.
        covariance: Y K in the basis of residuals  ``[M, M]``.
        num_draws: number of combinations of the rows of R; exact with as many as rows.
        generator: of random combinations.
    """
    N, loss, y = problem.num_samples, problem.sample_loss, problem.targets
    f = problem.outputs(w)
    # each process takes products for samples of its own, and cannot communicate in them
    B = hessian.operator if problem.process_group.size == 1 else linearize(problem.alone(), w).operator

    def derivative(z: Tensor) -> Tensor:
        def along(z: Tensor) -> Tensor:  # [N, rows]
            def image(u: Tensor, part: slice) -> Tensor:
                columns = torch.einsum("mnr,nr->nm", covariance.view(len(covariance), N, -1)[:, part], z[part])
                return math.sqrt(N) * batched(B.rmatvec, columns)

            u = loss.unwhiten(f, y, z)[None]
            weights = _moved_weights(problem)
            return _slopes(problem, w, u, weights, torch.ones_like(w), per_sample=False, image=image)[0]

        return torch.stack([along(one) for one in z])

    return _over_rows(problem, w, derivative, num_draws=num_draws, at_once=1, generator=generator)


def noise_slopes(part: NoiseSystem[Tensor], problem: ZeroLossProblem, w: Tensor, u: Tensor) -> Tensor:
    """Gradient and value of (1/N) sum_n |diag(sigma) D_n^T u_n|^2 for k stacked u ``[k, N, C]``  ``[k, P + 1]``.

    Args:
        part: a single system that moves the outputs.
        problem: loss and N samples.
        w: weights ``[P]``.
        u: fixed covectors of the outputs.
    """

    def outputs(v: Tensor, eta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return noisy_outputs(part, problem.function, v, x, y, eta)

    return _slopes(problem, w, u, outputs, part.scale(problem), per_sample=part.per_sample)


def _part(
    part: NoiseSystem[Tensor],
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None,
) -> Potential:
    if not part.moves_outputs:
        return part_potential(part, problem, w, num_draws=num_draws, generator=generator)
    f, y, loss = problem.outputs(w), problem.targets, problem.sample_loss

    def derivative(z: Tensor) -> Tensor:
        return 0.5 * noise_slopes(part, problem, w, torch.stack([loss.unwhiten(f, y, one) for one in z]))

    at_once = _at_once(problem, per_sample=part.per_sample)
    return _over_rows(problem, w, derivative, num_draws=num_draws, at_once=at_once, generator=generator)


def tangential_potential(
    system: NoiseSystem,
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    num_draws: int,
    generator: torch.Generator | None = None,
) -> Potential:
    """V(w) on Gamma for noise of order 1, and a vector whose tangential part is that of grad V.

        V = (1/2N) sum_n |diag(sigma) D_n^T R_n^T|_F^2,      D_n = df_n/d eta

    for noise that moves the outputs; `potential` for the others (penalties, your own noise).

    Args:
        system: the noise.
        problem: loss and N samples.
        w: weights on Gamma ``[P]``.
        num_draws: number of directions for the trace of each part: exact with as many as R has rows, as a rule the
            number of outputs; for the others see `potential`.
        generator: of the random directions.
    """
    system.check(problem)
    return total(_part(part, problem, w, num_draws=num_draws, generator=generator) for part in parts(system))
