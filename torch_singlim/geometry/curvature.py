"""The linearisation b + B v of the residual at one weight vector, and the Gauss-Newton matrix H = B^T B."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.func import grad, vmap

from torch_singlim.geometry.gram import MAX_DENSE, Way, gram_matrix, worth_factoring
from torch_singlim.geometry.jacobian import JacobianProducts
from torch_singlim.linalg import (
    CholeskyFactor,
    CholeskyFactored,
    DenseFactored,
    FactoredOperator,
    KrylovFactored,
    LinearOperator,
    cholesky,
    gram_cutoff,
    lanczos,
)
from torch_singlim.network import ZeroLossProblem, jvp

__all__ = ["Linearization", "gauss_newton", "largest_curvature", "linearize"]

# numbers, activations and weights, of all rows of B up to which B is formed, which takes 2 to 20 ms: a product then
# takes 0.01 to 0.1 instead of 0.5 ms or more
_TINY = 2**20


@dataclass(frozen=True)
class Linearization:
    """The weighted residual b and its derivative B at one weight vector: b(w + v) = b + B v + O(|v|^2).

    On the zero-loss set b = 0, and H = B^T B is the Hessian of the loss there.

    Args:
        operator: B, with the products v -> B v and u -> B^T u; shape [M, P].
        compute_residual: returns b ``[M]``, the rows of the first sample first; ValueError without a zero-loss set.
        residual_at: v -> R (f(v) - f*) ``[M]``, the residual at other weights in the metric R of these: its derivative
            here is B exactly (for a loss given as a function, up to terms of the size of b).
        second: u -> the product v -> sum_i u_i D^2 b_i v  ``[P]`` of the second derivatives, in the same metric.
        newton: returns c ``[M]`` with B^T c = grad L, the gradient in the coordinates of the residual; c = b for mse.
        gram: forms K = B B^T ``[M, M]``; optionally by a given method of `gram_matrix`, or in another precision.
        cheap_gram: whether forming and factoring K takes seconds only.
    """

    operator: LinearOperator
    compute_residual: Callable[[], Tensor] = field(repr=False)
    residual_at: Callable[[Tensor], Tensor] = field(repr=False)
    second: Callable[[Tensor], Callable[[Tensor], Tensor]] = field(repr=False)
    newton: Callable[[], Tensor] = field(repr=False)
    gram: Callable[..., Tensor] = field(repr=False)
    cheap_gram: bool

    @cached_property
    def residual(self) -> Tensor:
        """b ``[M]``."""
        return self.compute_residual()

    def factor(self) -> CholeskyFactor | None:
        """The Cholesky factor of K in single precision, or in full if that fails; None if K is rank-deficient."""
        product, dtype = self.operator.gram_product, self.residual.dtype
        return cholesky(self.gram(dtype=torch.float32), product=product, dtype=dtype) or cholesky(self.gram())


def _at_chunk(problem: ZeroLossProblem, w: Tensor, part: slice, *, tangent: bool) -> JacobianProducts:
    return JacobianProducts(lambda v: problem.function(v, problem.inputs[part]), w, tangent=tangent)


def _matrix(problem: ZeroLossProblem, f: Tensor, at: JacobianProducts) -> Tensor | None:
    """B ``[M, P]`` of a tiny problem, all products with its transpose at once; None for others, or if vmap cannot."""
    if problem.num_residuals * (problem.activations + problem.num_weights) > _TINY:
        return None
    N, C = f.shape
    R = problem.output_factor(f, slice(0, N))  # [N, rows, C]
    unit = torch.eye(N, dtype=f.dtype, device=f.device)
    cotangents = torch.einsum("nm,nrc->nrmc", unit, R).reshape(-1, N, C)  # row r of R_n at sample n, 0 elsewhere
    try:
        return vmap(at.vjp)(cotangents) / math.sqrt(N)
    except RuntimeError:  # vmap cannot batch the network's backward pass
        return None


def linearize(problem: ZeroLossProblem, w: Tensor) -> Linearization:
    """b(w) and B = N^{-1/2} [R_i J_i] at w.

    If all samples fit into one chunk, the pass through the network is made once and cached; a product then costs about
    half a gradient; for tiny problems B is formed. With several chunks the pass is repeated chunk by chunk, which
    bounds the memory.

    Args:
        problem: loss and samples.
        w: weights ``[P]``.

    Raises:
        ValueError: outputs that are not finite.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> linearize(problem, torch.zeros(2, dtype=torch.float64)).residual  # sqrt(2) (f - y)
    tensor([-4.2426], dtype=torch.float64)
    """
    N, group = problem.num_samples, problem.process_group
    own = group.shard(N)
    whole = problem.batch_size >= own.stop - own.start
    # the transpose is worth its cost only if it is cached
    cached = _at_chunk(problem, w, own, tangent=not problem.linear_layers) if whole else None
    f = problem.outputs(w) if cached is None else group.all_gather(cached.outputs, N)
    if not torch.isfinite(f).all():
        raise ValueError("the network's outputs are not finite at these weights: training has probably diverged")
    scale = 1 / math.sqrt(N)

    def jacobian(part: slice) -> JacobianProducts:
        return _at_chunk(problem, w, part, tangent=True) if cached is None else cached

    def matvec(v: Tensor) -> Tensor:  # v -> J v -> R J v
        Jv = torch.cat([jacobian(part).jvp(v) for part in problem.chunks()])
        return problem.whiten(f, group.all_gather(Jv, N))

    def batched(v: Tensor) -> Tensor:  # processes cannot communicate inside vmap: each evaluates all samples
        if group.size == 1:
            return problem.whiten(f, torch.cat([jacobian(part).unrecorded_jvp(v) for part in problem.chunks()]))
        parts = problem.alone().chunks()
        Jv = torch.cat([_at_chunk(problem, w, part, tangent=True).unrecorded_jvp(v) for part in parts])
        return problem.whiten(f, Jv)

    def rmatvec(u: Tensor) -> Tensor:  # u -> R^T u -> J^T R^T u
        g = scale * problem.sample_loss.unwhiten(f, problem.targets, u.reshape(N, -1))  # [N, C]
        return group.all_reduce(torch.stack([jacobian(part).vjp(g[part]) for part in problem.chunks()]).sum(0))

    B = None if cached is None or group.size > 1 else _matrix(problem, f, cached)
    shape = problem.num_residuals, problem.num_weights
    operator = LinearOperator(shape, matvec, rmatvec) if B is None else LinearOperator.from_matrix(B)

    def residual() -> Tensor:
        problem.check_attained()
        return problem.sample_loss.residual(f, problem.targets).reshape(-1) * scale

    def newton() -> Tensor:
        return problem.sample_loss.newton(f, problem.targets).reshape(-1) * scale

    def residual_at(v: Tensor) -> Tensor:
        return problem.whiten(f, problem.sample_loss.deviation(problem.outputs(v), problem.targets))

    def second(u: Tensor) -> Callable[[Tensor], Tensor]:
        g = scale * problem.sample_loss.unwhiten(f, problem.targets, u.reshape(N, -1))
        return _second(problem, w, g, own if whole else None)

    def gram(way: Way | None = None, dtype: torch.dtype = problem.dtype) -> Tensor:
        if dtype != problem.dtype:
            return linearize(problem.at_precision(dtype), w.to(dtype)).gram(way)
        return B @ B.T if B is not None and way is None else gram_matrix(problem, w, f, batched, way=way)

    return Linearization(operator, residual, residual_at, second, newton, gram, worth_factoring(problem))


def _second(problem: ZeroLossProblem, w: Tensor, g: Tensor, whole: slice | None) -> Callable[[Tensor], Tensor]:
    """The product v -> (D^2 sum_i g_i . f_i) v  ``[P]`` for g ``[N, C]``.

    If all samples of this process, `whole`, fit into memory, it is the derivative of a gradient whose graph is kept: a
    product then takes a half to a tenth of the time of forward over reverse mode, which repeats all of it.
    """

    def weighted(q: Tensor, part: slice) -> Tensor:
        return (problem.function(q, problem.inputs[part]) * g[part]).sum()

    def along(part: slice, v: Tensor) -> Tensor:
        return jvp(grad(lambda q: weighted(q, part)), (w,), (v,))[1]

    @functools.cache
    def recorded() -> tuple[Tensor, Tensor] | None:
        """The weights and the gradient, with its graph; None if it has none, or torch cannot make it."""
        if whole is None:
            return None
        q = w.detach().requires_grad_()
        try:
            with torch.enable_grad():
                gradient = torch.autograd.grad(weighted(q, whole), q, create_graph=True)[0]
        except RuntimeError:  # an operation that is differentiable once
            return None
        return (q, gradient) if gradient.requires_grad else None

    def product(v: Tensor) -> Tensor:
        kept = recorded()
        if kept is None:
            found = torch.stack([along(part, v) for part in problem.chunks()]).sum(0)
        else:
            found = torch.autograd.grad(kept[1], kept[0], v, retain_graph=True)[0]
        return problem.process_group.all_reduce(found)

    return product


def largest_curvature(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    generator: torch.Generator | None = None,
    rtol: float = 0.01,
    steps: int = 60,
) -> Tensor | None:
    """lambda_1, the largest eigenvalue of H = B^T B at w, a scalar, by Lanczos from a random vector.

    The value is a lower bound that is within rtol of an eigenvalue; it misses the largest one only if the random vector
    has almost no part along its eigenvector. None: not found in so many products.

    Args:
        problem: loss and samples.
        w: weights  ``[P]``.
        generator: of the random vector.
        rtol: largest relative error bound.
        steps: maximum number of products with B B^T.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> round(largest_curvature(problem, torch.zeros(2, dtype=torch.float64)).item(), 9)
    2.0
    """
    w = w.to(problem.dtype)
    B = linearize(problem, w).operator
    start = torch.randn(B.shape[0], generator=generator, dtype=torch.float64).to(w)
    for space in lanczos(B.gram_product, start, max_steps=steps, held=B.held):
        values, _, bounds = space.ritz()
        if bounds[-1] <= rtol * values[-1]:
            return values[-1]
    return None


def gauss_newton(
    problem: ZeroLossProblem,
    w: Tensor,
    *,
    at: Linearization | None = None,
    max_dense: int = MAX_DENSE,
    rtol: float = 1e-6,
    max_steps: int = 300,
    projections: bool = True,
    factor: CholeskyFactor | None = None,
) -> FactoredOperator:
    """H = B^T B at w, for projections and matrix functions.

    Args:
        problem: loss and samples.
        w: weights ``[P]``.
        at: ``linearize(problem, w)``, if it is there already.
        max_dense: up to this many residuals K is formed and decomposed (exact). Above, Lanczos is used, and the
            projections use the Cholesky factor of K if K is cheap to form.
        rtol: relative accuracy of each matrix function by Lanczos.
        max_steps: maximum number of products with K for each of these.
        projections: whether projections are going to be made; else no Cholesky factor is computed.
        factor: that of a K at weights nearby, which is refined by products instead of computing another one.

    >>> from torch import nn
    >>> problem = ZeroLossProblem(nn.Linear(2, 1, bias=False), "mse", torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]]))
    >>> gauss_newton(problem, torch.zeros(2, dtype=torch.float64)).spectrum()
    tensor([2.0000], dtype=torch.float64)
    """
    at = linearize(problem, w) if at is None else at
    if problem.num_residuals <= max_dense:
        return DenseFactored.from_gram(at.operator, at.gram())
    lanczos = (at.operator, w, rtol, max_steps, gram_cutoff(problem.num_residuals, problem.dtype))
    if factor is None and projections and at.cheap_gram:
        factor = at.factor()
    return KrylovFactored(*lanczos) if factor is None else CholeskyFactored(*lanczos, factor=factor)
