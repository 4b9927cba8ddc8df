"""K = B B^T, the Gram matrix of the residuals' gradients, by the cheapest of three methods.

layers     K = (1/N) sum_l (r A_l A_l^T + s) o (G_l G_l^T)   linear layers, from their inputs A and gradients G;
                                                             r, s the relative step sizes of weight and bias
columns    K = B B^T column by column                        M products with B
rows       K = B B^T block by block                          the rows of B themselves
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap

from torch_singlim.network.functional import LinearCall
from torch_singlim.network.problem import ZeroLossProblem
from torch_singlim.network.process_group import ProcessGroup

__all__ = ["MAX_DENSE", "Way", "gram_flops", "gram_matrix", "jacobian_rows", "samples_at_once", "worth_factoring"]

Way = Literal["layers", "columns", "rows"]

# number of residuals up to which K is decomposed: computing its eigenvectors takes seconds
MAX_DENSE = 4096
# memory for Jacobian rows, in bytes
_ROW_BYTES = 2**30
# number of directions whose products are evaluated at once
_DIRECTIONS = 10
# number of residuals up to which K and a factor are stored, about a gigabyte each; number of such matrices at a time
_MOST_FACTORED, _SQUARES = 12_000, 3
# number of rows of K that are formed at once
_BLOCK = 1024


def samples_at_once(problem: ZeroLossProblem, rows: int) -> int:
    """Number of samples, with `rows` Jacobian rows each, that fit into a quarter of the free memory, at most 1 GiB."""
    return max(1, min(_ROW_BYTES, problem.memory // 2) // (rows * problem.num_weights * problem.dtype.itemsize))


def _flops(problem: ZeroLossProblem) -> dict[Way, float]:
    """Floating point operations of each method that is considered; a multiply-add counts as two."""
    N, M = problem.num_samples, problem.num_residuals
    ways: dict[Way, float] = {"columns": 2 * problem.flops * N * M, "rows": float(M) ** 2 * problem.num_weights}
    if problem.linear_layers:
        ways = {"layers": sum(2.0 * N**2 * fan_in + 2.0 * M**2 * fan_out for fan_in, fan_out in problem.linear_layers)}
    return ways


def gram_flops(problem: ZeroLossProblem) -> float:
    """Approximate number of floating point operations of `gram_matrix`."""
    return min(_flops(problem).values())


def worth_factoring(problem: ZeroLossProblem) -> bool:
    """Whether forming K takes no longer than its Cholesky factorisation (a few seconds), and both fit into memory."""
    M = problem.num_residuals
    fits = _SQUARES * M**2 * problem.dtype.itemsize <= problem.memory
    return fits and M <= _MOST_FACTORED and gram_flops(problem) <= float(M) ** 3


def gram_matrix(
    problem: ZeroLossProblem,
    w: Tensor,
    outputs: Tensor,
    matvec: Callable[[Tensor], Tensor],
    *,
    way: Way | None = None,
) -> Tensor:
    """K = B B^T  ``[M, M]`` at weights w ``[P]``.

    Args:
        problem: N samples with `rows` residuals each, M = N rows.
        w: weights.
        outputs: f(w) ``[N, C]``.
        matvec: the product v -> B v in a form that vmap can batch.
        way: the method; default: the cheapest one.

    Each of the processes that share the samples forms the rows of its own samples; the rows are then exchanged.

    Raises:
        ValueError: "layers" for a network that does not consist of linear layers.
    """
    if way is None:
        flops = _flops(problem)
        way = min(flops, key=lambda each: flops[each])
    if way != "layers":
        return _from_rows(problem, w, outputs, matvec if way == "columns" else None)
    if not problem.linear_layers:
        raise ValueError("the network does not consist of linear layers alone: use 'columns' or 'rows'")
    return _from_layers(problem, w, outputs)


def _from_layers(problem: ZeroLossProblem, w: Tensor, f: Tensor) -> Tensor:
    """K without rows of B: the gradient of residual i is g_i a_i^T in a linear layer's weight and g_i in its bias.

    A ``[N, fan_in]`` are the layer's inputs, G ``[M, fan_out]`` the residuals' derivatives with respect to its outputs.
    """
    rows = problem.num_residuals // problem.num_samples
    inputs: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []
    calls: list[LinearCall] = []
    for part in problem.chunks():
        out, calls = problem.function.linear_calls(w, problem.inputs[part])
        R = problem.output_factor(f, part)  # [n, rows, C]
        shifts = [call.shift for call in calls]
        slopes = [torch.autograd.grad(out, shifts, row, retain_graph=True) for row in R.unbind(1)]
        inputs.append([call.input for call in calls])
        gradients.append([torch.stack(g, 1).flatten(0, 1) for g in zip(*slopes, strict=True)])  # [n rows, fan_out]
    K = f.new_zeros(problem.num_residuals, problem.num_residuals)
    width = max(1, _BLOCK // rows)  # samples
    group, N = problem.process_group, problem.num_samples
    own = group.shard(N)
    for layer, call in enumerate(calls):
        A = group.all_gather(torch.cat([chunk[layer] for chunk in inputs]), N)
        G = torch.cat([chunk[layer] for chunk in gradients])  # [n rows, fan_out]
        G = group.all_gather(G.view(own.stop - own.start, -1), N).view(N * rows, -1)
        for i in range(own.start, own.stop, width):
            last = min(i + width, own.stop)
            at, lower = slice(i * rows, last * rows), slice(0, last * rows)
            block = G[at] @ G[lower].T  # the columns up to the diagonal  [n rows, <= M]
            inner = call.weight_rate * (A[i:last] @ A[:last].T) if call.weight else block.new_zeros(1, 1)
            inner = inner + call.bias_rate
            K[at, lower] += block.view(-1, rows, last, rows).mul_(inner[:, None, :, None]).view_as(block)
    return _mirrored(group.all_reduce(K).div_(N))


def _mirrored(K: Tensor) -> Tensor:
    """K with the transpose of its lower triangle as its upper one, in place."""
    for i in range(0, len(K), _BLOCK):
        j = i + _BLOCK
        K[i:j, i:j] = K[i:j, i:j].tril() + K[i:j, i:j].tril(-1).T
        K[i:j, j:] = K[j:, i:j].T
    return K


def jacobian_rows(problem: ZeroLossProblem, w: Tensor, f: Tensor, part: slice) -> Tensor:
    """The rows of B for a slice of the samples ``[n rows, P]``: one vector-Jacobian product per residual.

    Args:
        problem: N samples.
        w: weights ``[P]``.
        f: the outputs at which R is taken  ``[N, C]``; f(w) for B itself.
        part: of the samples.
    """

    def sample_rows(x_i: Tensor, R_i: Tensor) -> Tensor:
        transposed = vjp(lambda v: problem.function(v, x_i[None])[0], w)[1]
        return vmap(lambda r: transposed(r)[0])(R_i)  # R_i J_i  [rows, P]

    R = problem.output_factor(f, part)
    return vmap(sample_rows)(problem.inputs[part], R).reshape(-1, problem.num_weights) / math.sqrt(problem.num_samples)


def _from_rows(problem: ZeroLossProblem, w: Tensor, f: Tensor, matvec: Callable[[Tensor], Tensor] | None) -> Tensor:
    """K from a bounded number of rows of B at a time: by products of B with each row, or by inner products of rows.

    The first method (`matvec` given) is cheaper if each weight is used once per sample, the second if weights are used
    at every pixel.
    """
    rows = problem.num_residuals // problem.num_samples
    # a product needs memory for the tangents of every sample's activations besides its own P numbers
    size = max(1, samples_at_once(problem, rows) // (4 if matvec else 1))
    group = problem.process_group
    shards = [ProcessGroup(rank, group.size).shard(problem.num_samples) for rank in range(group.size)]
    parts = [slice(i, min(i + size, each.stop)) for each in shards for i in range(each.start, each.stop, size)]
    own = shards[group.rank]
    K = f.new_zeros(problem.num_residuals, problem.num_residuals)
    for i, left in enumerate(parts):
        if not own.start <= left.start < own.stop:
            continue
        B_left = jacobian_rows(problem, w, f, left)
        at = slice(left.start * rows, left.stop * rows)
        if matvec is not None:
            K[:, at] = vmap(matvec, out_dims=1, chunk_size=_DIRECTIONS)(B_left)
            continue
        K[at, at] = B_left @ B_left.T
        for right in parts[i + 1 :]:
            across = slice(right.start * rows, right.stop * rows)
            K[at, across] = B_left @ jacobian_rows(problem, w, f, right).T
            K[across, at] = K[at, across].T
    K = problem.process_group.all_reduce(K)
    return (K + K.T) / 2
