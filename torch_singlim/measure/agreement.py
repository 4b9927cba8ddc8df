"""How well a predicted displacement agrees with a measured one, and how well it could agree at best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate

__all__ = ["Agreement", "Plane", "Scatter", "compare", "jackknife", "noise_ceiling", "noise_ratio", "plane"]


@dataclass(frozen=True)
class Agreement:
    """How a predicted displacement q agrees with a measured one m; nan if one of them is zero.

    Args:
        cosine: <m, q> / (|m| |q|).
        speed: <m, q> / <q, q>; 1: as fast as predicted.
        residual: |m - q| / |m|, the share of the motion that is not explained.
        measured: |m|, in units of the weights' norm.
        predicted: |q|.
    """

    cosine: float
    speed: float
    residual: float
    measured: float
    predicted: float


def compare(measured: Tensor, predicted: Tensor) -> Agreement:
    """Cosine, speed ratio and unexplained share of two displacements ``[P]``.

    >>> compare(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    Agreement(cosine=1.0, speed=2.0, residual=0.5, measured=2.0, predicted=1.0)
    """
    if measured.shape != predicted.shape:
        raise ValueError(f"displacements of different weights: {tuple(measured.shape)} and {tuple(predicted.shape)}")
    m, q = torch.linalg.vector_norm(measured).item(), torch.linalg.vector_norm(predicted).item()
    inner = torch.dot(measured, predicted).item()
    rest = torch.linalg.vector_norm(measured - predicted).item()
    return Agreement(
        cosine=inner / (m * q) if m * q > 0 else math.nan,
        speed=inner / q**2 if q > 0 else math.nan,
        residual=rest / m if m > 0 else math.nan,
        measured=m,
        predicted=q,
    )


@dataclass(frozen=True)
class Plane:
    """The measured and the predicted path in the plane of the predicted displacement and the deviation from it.

    Args:
        measured: coordinates along the predicted displacement and across it, beginning at the origin ``[k + 1, 2]``.
        predicted: likewise.
    """

    measured: Tensor
    predicted: Tensor


def plane(measured: Sequence[Tensor], predicted: Sequence[Tensor]) -> Plane:
    """Coordinates of both paths in e_1 = q/|q| and e_2 = d/|d|, where d is the part of m - q normal to e_1 at the end.

    >>> plane([torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 0.0])]).measured
    tensor([[0., 0.],
            [1., 1.]])
    """
    q = predicted[-1]
    along = q / torch.linalg.vector_norm(q).clamp_min(torch.finfo(q.dtype).tiny)
    deviation = measured[-1] - torch.dot(measured[-1], along) * along
    across = deviation / torch.linalg.vector_norm(deviation).clamp_min(torch.finfo(q.dtype).tiny)

    def coordinates(path: Sequence[Tensor]) -> Tensor:
        points = [(torch.dot(v, along).item(), torch.dot(v, across).item()) for v in path]
        return torch.tensor([(0.0, 0.0), *points])

    return Plane(coordinates(measured), coordinates(predicted))


@dataclass(frozen=True)
class Scatter:
    """Standard errors of an agreement's cosine and speed ratio, from equal parts of the window."""

    cosine: float
    speed: float


def jackknife(measured: Sequence[Tensor], predicted: Sequence[Tensor]) -> Scatter:
    """Standard errors from two paths ``[P]`` at the ends of n parts of a window, omitting one part at a time.

        s^2 = (n-1)/n sum_j (a_j - mean a)^2,      a_j the agreement without part j        (Efron & Stein 1981)

    The parts are assumed to be independent; nan for fewer than two. Only inner products are used.

    >>> m = torch.tensor([[1.0, 0.1], [2.0, 0.0]])
    >>> jackknife(m, torch.tensor([[1.0, 0.0], [2.0, 0.0]])).speed
    0.0
    """
    n = len(measured)
    if n < 2:
        return Scatter(math.nan, math.nan)

    def without(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """<sum of a's parts, sum of b's parts>, both without part j  ``[n]``."""
        points = torch.tensor([[torch.dot(x, y).item() for y in b] for x in a], dtype=torch.float64)
        zero = torch.zeros(1, n, dtype=torch.float64)
        parts = points.diff(dim=0, prepend=zero).diff(dim=1, prepend=zero.T)
        return parts.sum() - parts.sum(0) - parts.sum(1) + parts.diagonal()

    inner, m, q = without(measured, predicted), without(measured, measured), without(predicted, predicted)

    def error(values: Tensor) -> float:
        return math.sqrt((n - 1) / n * (values - values.mean()).square().sum().item())

    return Scatter(error(inner / (m * q).sqrt()), error(inner / q))


def noise_ceiling(runs: Sequence[Tensor]) -> float:
    """The noise ceiling, the best cosine that any deterministic prediction can have with one run.

    It is sqrt(mean cosine between runs): a run is mean + fluctuation, and the mean itself has this cosine with a run.
    The runs ``[P]`` are independent, from the same weights and over the same window; nan for fewer than two.

    >>> noise_ceiling([torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])])
    0.0
    """
    cosines = [compare(a, b).cosine for a, b in itertools.combinations(runs, 2)]
    return math.sqrt(max(sum(cosines) / len(cosines), 0.0)) if cosines else math.nan


def noise_ratio(runs: Sequence[Tensor], flow: Tensor, baseline: Tensor) -> Estimate:
    """The noise-induced drift of a run over the predicted one; 1: as predicted, 0: none.

        <run - baseline, flow - baseline> / |flow - baseline|^2

    The first run ``[P]`` is the measured one. The standard error is the standard deviation over all runs, which are
    independent runs of the same window (nan for a single one).

    >>> noise_ratio([torch.tensor([2.0, 1.0])], torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0])).mean
    1.0
    """
    induced = flow - baseline
    size = induced.square().sum().item()
    if size == 0:
        return Estimate(math.nan, math.nan)
    ratios = torch.stack([torch.dot(run - baseline, induced) / size for run in runs])
    return Estimate(ratios[0].item(), ratios.std().item() if len(runs) > 1 else math.nan)
