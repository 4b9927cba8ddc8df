"""What measurements on a part of the training set say about the whole: a level's certificate, and the growth with N."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_singlim.geometry import NearestPoint, nearest_point
from torch_singlim.linalg import Estimate
from torch_singlim.measure.distance import NEAREST, NEAREST_STEPS
from torch_singlim.network import ZeroLossProblem

__all__ = ["TrainingSet", "distances_of_subsets", "growth", "subset_sizes"]

# halvings of the number of samples, and the smallest number
_HALVINGS, _FEWEST = 3, 10


@dataclass(frozen=True)
class TrainingSet:
    """All training samples of a problem that has a part of them; its loss is evaluated chunk by chunk.

    Args:
        inputs: ``[N, ...]``, as the data set has them.
        targets: ``[N, ...]``, in the form in which they were given to the problem.
    """

    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def loss(self, problem: ZeroLossProblem, w: Tensor) -> float:
        """The excess loss of all samples at w ``[P]``; each process evaluates its share of them.

        Args:
            problem: the problem with a part of the samples.
            w: weights.
        """
        own, total = problem.process_group.shard(len(self)), w.new_zeros(())
        for start in range(own.start, own.stop, problem.batch_size):
            part = slice(start, min(start + problem.batch_size, own.stop))
            share = (part.stop - part.start) / len(self)
            total = total + share * problem.on(self.inputs[part], self.targets[part]).loss(w)
        return problem.process_group.all_reduce(total).item()


def subset_sizes(count: int) -> tuple[int, ...]:
    """Half, a quarter and an eighth of the samples, as far as ten are left.

    >>> subset_sizes(1000), subset_sizes(50)
    ((500, 250, 125), (25, 12))
    """
    return tuple(n for n in (count // 2**k for k in range(1, _HALVINGS + 1)) if n >= _FEWEST)


def distances_of_subsets(problem: ZeroLossProblem, w: Tensor, nearest: NearestPoint) -> dict[int, float]:
    """Distances to the zero-loss sets of nested subsets: all samples, their first half, quarter and eighth.

    The zero-loss set of a subset contains that of all samples. Each search begins at the point of the next larger
    subset, and so finds one that is no farther away, up to its error.

    Args:
        problem: loss and samples.
        w: weights  ``[P]``.
        nearest: the nearest point for all of them.

    Returns:
        number of samples -> distance, as far down as the searches met their tolerance.
    """
    found, start = {problem.num_samples: nearest.distance}, nearest.point
    for count in subset_sizes(problem.num_samples):
        part = problem.subset(count, dtype=problem.dtype)
        closer = nearest_point(part, w, rtol=NEAREST, max_steps=NEAREST_STEPS, start=start)
        if not closer.converged:
            break
        found[count], start = closer.distance, closer.point
    return found


def growth(distances: Mapping[int, float]) -> Estimate | None:
    """p of distance ~ N^p by least squares of the logarithms, with the standard error from the scatter about the line.

    None with fewer than three distances. Nested subsets share samples: the error is that of the fit, and says nothing
    of sizes beyond.

    Args:
        distances: number of samples -> distance.

    >>> p = growth({10: 1.0, 20: 2.0, 40: 4.0})
    >>> round(p.mean, 9), round(p.stderr, 9)
    (1.0, 0.0)
    """
    if len(distances) < 3 or min(distances.values()) <= 0:
        return None
    logs = torch.tensor(list(distances.items()), dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).unbind(1)
    xx = torch.dot(x, x).item()
    slope = torch.dot(x, y).item() / xx
    scatter = (y - slope * x).square().sum().item() / (len(distances) - 2)
    return Estimate(slope, math.sqrt(scatter / xx))
