"""Functions of a direction, evaluated for many directions at once where memory allows it and where it is faster."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.func import vmap

from torch_singlim.network import ZeroLossProblem

__all__ = ["batched", "directions_at_once", "for_directions", "mean_at"]

# numbers of all directions at once, activations and weights. One direction takes 8 ms of calls of torch however small
# the network is; at this limit computing takes as long, and on a CPU twice as many were at most a fifth faster. The
# gradient of a potential then takes at most 40 MB: 20 to 25 of these numbers for each direction were measured
_NUMBERS = 2**18


def directions_at_once(problem: ZeroLossProblem) -> int:
    """Number of directions that are evaluated at once, at least 1.

    Several if they take little memory besides that of one direction, and one of them costs less than the calls of
    torch that evaluate it. If samples are evaluated in several chunks, there is no memory for a second direction.
    """
    if problem.batch_size < problem.num_samples:
        return 1
    small = int(_NUMBERS / (problem.activations + problem.num_weights))
    return max(1, min(small, problem.samples_fitting // problem.num_samples))


def batched(function: Callable[..., Tensor], *directions: Tensor) -> Tensor:
    """The values of a function at each of k directions, stacked  ``[k, ...]``.

    Args:
        function: of one direction, which may consist of several tensors; it must not communicate with other processes.
        *directions: stacked  ``[k, ...]`` each.

    Functions that vmap cannot batch, such as a loss with ``.item()`` or a decision that depends on data, are evaluated
    one direction at a time. An error that is not due to vmap is then raised again, by the function itself.
    """
    if len(directions[0]) == 1:
        return function(*(each[0] for each in directions))[None]
    try:
        return vmap(function)(*directions)
    except RuntimeError:  # what vmap raises whatever it refuses; also if memory ran out
        return torch.stack([function(*one) for one in zip(*directions, strict=True)])


def mean_at(problem: ZeroLossProblem, function: Callable[..., Tensor], *directions: Tensor) -> Tensor:
    """Mean over samples of a function of samples, at each of k directions  ``[k, ...]``.

    Args:
        problem: loss and samples.
        function: a chunk and one direction, of one or more tensors -> the mean over the chunk.
        *directions: stacked  ``[k, ...]`` each.
    """
    return problem.mean(lambda chunk: batched(functools.partial(function, chunk), *directions))


def for_directions(
    directions: Iterable[tuple[Tensor, ...]], at_once: int, function: Callable[[tuple[Tensor, ...]], Tensor]
) -> Iterator[Tensor]:
    """The value of a function for each direction, in order.

    Args:
        directions: each consists of one or more tensors; they are drawn one after the other, `at_once` at a time.
        at_once: number of directions that are passed to the function.
        function: directions, stacked  ``[k, ...]`` each -> values ``[k, ...]``.
    """
    remaining = iter(directions)
    while group := list(itertools.islice(remaining, at_once)):
        yield from function(tuple(torch.stack(each) for each in zip(*group, strict=True)))
