"""How well a predicted displacement agrees with a measured one, and how well it could agree at best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_singlim.linalg import Estimate

__all__ = ["Agreement", "compare", "noise_ceiling", "noise_ratio"]


@dataclass(frozen=True)
class Agreement:
    """How a predicted displacement q agrees with a measured one m; nan if one of them is zero.

    Args:
        cosine: <m, q> / (|m| |q|).
        speed: <m, q> / <q, q>; 1: as fast as predicted.
        residual: |m - q| / |m|, the share of the motion that is not explained.
        measured: |m|, in units of the weights' norm.
        predicted: |q|.
        cosine_stderr: standard error of the cosine (nan: unknown).
        speed_stderr: standard error of the speed (nan: unknown).
    """

    cosine: float
    speed: float
    residual: float
    measured: float
    predicted: float
    cosine_stderr: float = math.nan
    speed_stderr: float = math.nan


def compare(measured: Tensor, predicted: Tensor) -> Agreement:
    """Cosine, speed ratio and unexplained share of two displacements ``[P]``.

    >>> found = compare(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> found.cosine, found.speed, found.residual
    (1.0, 2.0, 0.5)
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
